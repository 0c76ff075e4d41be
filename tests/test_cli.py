"""``python -m siglip_kernels``: what it prints, and that its exit code tells a wrong kernel from a right one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import siglip_kernels
from siglip_kernels import backends, testing
from siglip_kernels.__main__ import main
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.eager import EagerBlockKernel

ROOT = Path(siglip_kernels.__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where Triton is not interpreted."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "siglip_kernels", *arguments],
        env={**settings, "OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_info() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    for words in (siglip_kernels.__version__, torch.__version__, "cpu: ", "threads"):
        assert words in done.stdout, done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == {"eager", "cpu", "triton", "cuda"}, done.stdout
    assert "available" in lines["eager"]
    for line in lines.values():
        _, separator, reason = line.partition("unavailable: ")
        assert not separator or len(reason) > 10, f"no reason is given: {line}"


def test_check_of_a_right_backend() -> None:
    done = command("check", "--quick", "--backend", "eager", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eager on cpu" in done.stdout
    assert ": ok" in done.stdout
    assert "FAILED" not in done.stdout
    for words in ("loss", "dx", "dy", "dscale", "dbias", *testing.REGIMES, "float64", "float32", "bfloat16", "float16"):
        assert words in done.stdout, (words, done.stdout)
    assert "1 backends checked, 0 failed" in done.stdout


class Broken(EagerBlockKernel):
    """Forgets the last image of every block, as a wrong mask would."""

    def block(self, *inputs: Any, **out: Any) -> None:
        super().block(*inputs, **out)
        if out["dz"] is not None:
            out["dz"][-1] = 0


class Unable(EagerBlockKernel):
    def why_not(self, problem: Problem) -> list[str]:
        return ["the moon is not full", f"D = {problem.D}"]


@pytest.fixture
def one_small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd in all three sides, so that the exit code is told quickly."""
    monkeypatch.setattr("siglip_kernels.__main__.QUICK_SHAPES", ((7, 9, 5),))


@pytest.mark.usefixtures("one_small_shape")
def test_check_exits_1_when_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", "--quick", "--backend", "eager", "--device", "cpu"]
    assert main(arguments) == 0
    assert "1 backends checked, 0 failed" in capsys.readouterr().out
    monkeypatch.setitem(backends.BACKENDS, "eager", Broken())
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "1 backends checked, 1 failed" in printed
    # The shape, the regime and the worst coordinate of each failure.
    assert "FAILED float32 M=7 N=9 D=5 init diagonal: dx" in printed
    assert "at [6, " in printed


@pytest.mark.usefixtures("one_small_shape")
def test_check_says_why_a_backend_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing checked is no success."""
    monkeypatch.setitem(backends.BACKENDS, "eager", Unable())
    assert main(["check", "--quick", "--backend", "eager", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "the moon is not full; D = 768" in printed
    assert "0 backends checked" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "command"),
        (["measure"], "measure"),
        (["check", "--backend", "cudnn"], "cudnn"),
        (["check", "--device", "toaster"], "toaster"),
    ],
)
def test_bad_command_lines(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Words and an exit code, not a traceback."""
    try:
        code = main(["check", "--quick", "--backend", "eager", "--device", "cuda"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    assert code != 0
    captured = capsys.readouterr()
    assert "cuda" in (captured.out + captured.err).lower()
