"""``python -m bench VERB``: arguments that every verb shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main


@pytest.mark.parametrize("verb", [[], ["gpu"], ["sweep"], ["transformers"]])
@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", ""])
def test_an_odd_device_is_an_error_of_the_arguments(
    verb: list[str], device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*verb, "--device", device, "--out", str(tmp_path)])
    assert exit_status.value.code == 2
    assert "argument --device: " in capsys.readouterr().err
