"""``python -m bench static``: a line for each kernel, and 1 where one has a problem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from bench.__main__ import main
from bench.static import cuda_report, triton_report
from siglip_kernels.backends.cuda import kernels
from siglip_kernels.backends.triton import configs

FIGURES = {"registers": 100, "stack": 0, "shared": 2048, "tensor_core": 4, "instructions": 1000, "conversions": 0}
SOUND = triton_report.Resources(**FIGURES, spills=0, barriers=21)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each variant has, in place of compiling it; none at first."""
    found: list[str] = []

    def inspect_variants(variants: list[configs.Variant], processes: int) -> Iterator[triton_report.Row]:
        yield from (triton_report.Row(variant, SOUND, found) for variant in variants)

    monkeypatch.setattr(triton_report, "inspect_variants", inspect_variants)
    return found


def test_triton_as_a_table(problems: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["static", "triton", "--arch", "sm_90", "--variants", "3"]
    assert main(arguments) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head == triton_report.HEADER
    assert len(rows) == len(set(rows)) == 3
    assert all(row.startswith("sm_90") for row in rows)
    assert last == "3 variants, 0 with problems"
    problems.append("12 spills")
    assert main(arguments) == 1
    assert capsys.readouterr().out.count("12 spills") == 3


def test_triton_as_json(problems: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["static", "triton", "--variants", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["resources"]["registers"] for line in lines] == [100, 100]
    assert [line["problems"] for line in lines] == [[], []]


def test_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opcodes = Counter(["HGMMA", "UTMALDG", "USETMAXREG", "UTMASTG", "STSM"])
    spilling: list[kernels.Compilation] = []

    def inspect(compilation: kernels.Compilation) -> cuda_report.Kernel:
        stack = 8 if compilation in spilling else 0
        return cuda_report.Kernel(compilation, cuda_report.REGISTERS, stack, opcodes)

    monkeypatch.setattr(cuda_report, "inspect", inspect)
    assert main(["static", "cuda"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "22 kernels, 0 with problems"
    spilling.append(kernels.EVERY[7])
    assert main(["static", "cuda"]) == 1
    assert "8 bytes of stack" in capsys.readouterr().out


def test_the_kernels_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["static"])
    assert "{triton,cuda}" in capsys.readouterr().err
