"""``python -m siglip_kernels doctor``: what it prints, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from siglip_kernels import backends
from siglip_kernels.__main__ import main
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.memory import doctor

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
f32, bf16 = torch.float32, torch.bfloat16


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "base-patch16-224", "--batch", "65536", "--memory", "80GiB", "--reserved", "60 gib")
    assert "Batch 65,536; D = 768, bfloat16, cuda; memory 80.0 GiB - 60.0 GiB reserved = 20.0 GiB" in out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["eager"][-2] == "no"
    assert lines["torch.compile"][-2] == lines["ours (triton)"][-2] == "yes"
    assert "computed from what is allocated, as measured on an H200" in out
    if not torch.cuda.is_available():
        assert "Time: no measurement on this device: memory only." in out


def test_a_teacher_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "base", "--batch", "65536", "--memory", "80GiB"
    plain, taught = (printed(capsys, *arguments, *more) for more in ((), ("--teacher", "1152")))
    assert "D = 768, a teacher's 1,152, bfloat16" in taught
    assert "eager" not in taught
    ours = [next(line for line in out.splitlines() if line.startswith("ours (")).split() for out in (plain, taught)]
    assert int(ours[1][-1].replace(",", "")) < int(ours[0][-1].replace(",", ""))


def test_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--dim", "512", "--batch", "8192", "--memory", "80GB", "--world-size", "8"
    out = printed(capsys, *arguments)
    assert "ours (triton), ring " in out
    assert "ours (triton), gather " in out
    assert "8 ranks = 65,536" in out
    assert "ours (triton), ring over 2 nodes " in printed(capsys, *arguments, "--nodes", "2")


def test_time_only_of_this_very_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And of the backend that was measured, at the nearest batch."""
    monkeypatch.setattr(
        "siglip_kernels.memory.footprint.backends.choose", lambda name, problem: backends.BACKENDS["eager"]
    )
    arguments = "base", "--batch", "5000", "--device", "cpu"
    monkeypatch.setattr(doctor, "_device_name", lambda device: doctor.TIMES[0].device)
    assert "no measurement on this device" in printed(capsys, *arguments)
    monkeypatch.setattr(EagerBlockKernel, "name", "cpu")
    eager, compiled = doctor.TIMES[0].rows["bfloat16", 4096, 768]
    expected = f"B = 4,096, D = 768: eager takes {eager:.2f}× our time, torch.compile {compiled:.2f}×"
    assert expected in printed(capsys, *arguments)
    assert "no measurement" in printed(capsys, *arguments, "--dtype", "float16")
    assert "no measurement" in printed(capsys, *arguments, "--world-size", "2")
    monkeypatch.setattr(doctor, "_device_name", lambda device: "another")
    assert "no measurement" in printed(capsys, *arguments)


def test_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from siglip_kernels.__main__ import main\n"
        "main(['doctor', 'so400m-patch14-384', '--batch', '4096', '--world-size', '4', '--memory', '80GiB'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ours (" in done.stdout


@pytest.mark.parametrize(
    ("text", "D"),
    [("base", 768), ("large-patch16-256", 1024), ("google/siglip2-so400m-patch16-naflex", 1152), ("giant-opt", 1536)],
)
def test_model_shapes(text: str, D: int) -> None:
    assert doctor.model_dim(text) == D


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("80gb", 80 * 10**9), ("1.5 TiB", 3 * 2**39), ("512MiB", 2**29), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert doctor.parse_size(text) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (2**30, "1.0 GiB"), (1000 * 2**20, "1.0 GiB"), (999 * 2**20, "999 MiB")]
)
def test_readable_sizes(size: int, text: str) -> None:
    assert doctor.format_size(size) == text


SMALL = "--batch 8 --memory 8GiB"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("base --memory 8GiB", "--batch"),
        ("base --batch 0 --memory 8GiB", "--batch: '0' is no whole number from 1"),
        ("base --batch -4 --memory 8GiB", "--batch"),
        ("base --batch many --memory 8GiB", "'many'"),
        ("huge-patch16-224 " + SMALL, "unknown model shape 'huge-patch16-224'; expected base (768)"),
        ("base-patch " + SMALL, "unknown model shape"),
        (SMALL, "a MODEL-SHAPE or --dim"),
        ("base --dim 768 " + SMALL, "a MODEL-SHAPE or --dim"),
        ("base --batch 8 --memory 80", "'80' is no size"),
        ("base --batch 8 --memory lots", "'lots' is no size"),
        ("base --batch 8 --memory " + 400 * "9" + "GiB", "is no size"),
        ("base --batch 8 --memory 8GiB --reserved 8GiB", "--reserved 8.0 GiB leaves nothing of 8.0 GiB"),
        ("base --world-size 6 --nodes 4 " + SMALL, "--nodes 4 must divide --world-size 6"),
        ("base --dtype int8 " + SMALL, "int8"),
        ("base --device tpu " + SMALL, "tpu"),
    ],
)
def test_errors(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments.split()])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_memory_of_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "base", "--batch", "8"])
    assert "no CUDA device here: say --memory" in capsys.readouterr().err
    assert "memory" in printed(capsys, "base", "--batch", "8", "--device", "cpu")
