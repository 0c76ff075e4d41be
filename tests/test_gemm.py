"""Whether the device's library multiplies half precision into float32 is found by trying, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels import gemm

GPU = torch.device("cuda", 0)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that can; what it was asked."""
    asked: list[Any] = []
    monkeypatch.setattr(gemm, "_found", {})
    monkeypatch.setattr(gemm, "is_capturing", lambda device: False)
    monkeypatch.setattr(gemm, "_multiplies_into_float32", lambda *what: asked.append(what) or True)
    return asked


@pytest.mark.parametrize("dtype", HALF)
def test_each_device_is_tried_once(dtype: torch.dtype, tried: list[Any]) -> None:
    for _ in range(3):
        assert gemm.accumulates_in_float32(dtype, GPU)
    assert tried == [(dtype, GPU)]
    assert not gemm.accumulates_in_float32(dtype, torch.device("cpu"))
    assert tried == [(dtype, GPU)]


def test_nothing_is_tried_under_capture(tried: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "is_capturing", lambda device: True)
    assert gemm.accumulates_in_float32(torch.bfloat16, GPU) == (torch.version.hip is None)
    assert tried == []
    monkeypatch.setattr(gemm, "is_capturing", lambda device: False)
    assert gemm.accumulates_in_float32(torch.bfloat16, GPU)
    assert tried == [(torch.bfloat16, GPU)]


def test_float16_sums_that_the_user_allows(tried: list[Any]) -> None:
    """torch then refuses a float32 result: the operands are widened, and the sums are float32 all the same."""
    assert gemm.accumulates_in_float32(torch.float16, GPU)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert not gemm.accumulates_in_float32(torch.float16, GPU)
        assert gemm.accumulates_in_float32(torch.bfloat16, GPU)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert gemm.accumulates_in_float32(torch.float16, GPU)


def products(rounded: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """mm and addmm into float32 by a library whose results are of ``rounded``."""

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_((a.double() @ b.double()).to(rounded))

    def addmm(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_((c.double() + a.double() @ b.double()).to(rounded))

    return mm, addmm


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounded", [torch.float32, *HALF])
def test_the_trial(rounded: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mm, addmm = products(rounded)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert gemm._multiplies_into_float32(dtype, torch.device("cpu")) == (rounded is torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_a_library_that_refuses(dtype: torch.dtype) -> None:
    """As torch does on the CPU, where it has no such product."""
    assert not gemm._multiplies_into_float32(dtype, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_a_gpu(dtype: torch.dtype) -> None:
    assert gemm._multiplies_into_float32(dtype, GPU)
