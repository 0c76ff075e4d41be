"""``prepare`` of the Triton backend: what a first launch would die of is a reason, found once, and "auto" goes on."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siglip_kernels import backends
from siglip_kernels.backends import triton as backend
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.triton import TritonBlockKernel

ON_CUDA = Problem(4096, 4096, 768, torch.bfloat16, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has, nor leaves what it found."""
    monkeypatch.setattr(backend, "why_not_launch", functools.cache(backend.why_not_launch.__wrapped__))


@pytest.mark.parametrize(
    ("cc", "says"),
    [
        (None, "Failed to find C compiler"),
        ("false", ".*'false'.* non-zero exit status 1"),
        ("no-such-cc", ".*no-such-cc"),
    ],
)
def test_triton_without_a_c_compiler(
    cc: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a CUDA machine: Triton itself is asked."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.knobs.nvidia, "libcuda_path", str(tmp_path))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: nvidia.CudaDriver()))
    for cached in (nvidia.libcuda_dirs, nvidia.library_dirs):
        monkeypatch.setattr(nvidia, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(nvidia, "CudaUtils", type("CudaUtils", (), dict(vars(nvidia.CudaUtils))))
    if cc is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", cc)
    (reason,) = TritonBlockKernel().prepare()
    assert re.match(f"Triton cannot launch here: {says}", reason), reason
    assert "\n" not in reason


def test_triton_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    asked = []
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(
        type(triton.runtime.driver), "active", SimpleNamespace(get_current_target=lambda: asked.append(1))
    )
    assert TritonBlockKernel().prepare() == TritonBlockKernel().prepare() == []
    assert asked == [1]


def test_the_interpreter_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setenv("PATH", "")
    assert TritonBlockKernel().prepare() == []


def test_auto_goes_on_where_triton_cannot_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "eager"):
        monkeypatch.setattr(backends.BACKENDS[name], "why_not", lambda problem: [])
    monkeypatch.setattr(backend, "why_not_launch", lambda: "no C compiler")
    assert backends.choose("auto", ON_CUDA).name == "eager"
    with pytest.raises(ValueError, match="backend='triton' cannot run this call: no C compiler"):
        backends.choose("triton", ON_CUDA)
