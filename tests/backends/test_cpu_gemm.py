"""Whose products the CPU backend takes on which machine, and those of MKL called past torch."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels import backends, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.backends.cpu import CpuBlockKernel, choose_gemm
from siglip_kernels.backends.cpu_native import LEVELS, CpuLibrary, Machine
from siglip_kernels.testing import DTYPES, check, make_inputs, relative_l2


@pytest.fixture
def kernel(native: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> CpuBlockKernel:
    """The backend "cpu" where it has MKL's products and none of our own."""
    if not set(DTYPES) <= set(native.gemm):
        pytest.skip("this torch has no MKL, or an old one")
    kernel = CpuBlockKernel("portable")
    monkeypatch.setitem(backends.BACKENDS, "cpu", kernel)
    return kernel


def machine(vendor: str, family: int, model: int, level: str, float16: bool = False, mkl: str = "all") -> Machine:
    """``mkl``: "all" its products, "float32" those that an old MKL or one of another platform has, or "none"."""
    gemm = {"all": DTYPES, "float32": [torch.float32, torch.float64], "none": []}[mkl]
    return Machine(vendor, family, model, LEVELS.index(level), float16, frozenset(gemm))


AMD, HYGON, INTEL = "AuthenticAMD", "HygonGenuine", "GenuineIntel"
# And whose products multiply float32, bfloat16, float16.
MACHINES = {
    "Zen 2": (machine(AMD, 0x17, 0x31, "avx2"), "blas", "widened", "widened"),
    "Zen 3": (machine(AMD, 0x19, 0x01, "avx2"), "blas", "widened", "widened"),
    "Zen 4": (machine(AMD, 0x19, 0x11, "avx512_bf16"), "ours", "ours", "widened"),
    "Zen 4 without MKL": (machine(AMD, 0x19, 0x11, "avx512_bf16", mkl="none"), "ours", "ours", "widened"),
    "Zen 5": (machine(AMD, 0x1A, 0x02, "avx512_bf16"), "ours", "ours", "widened"),
    "Hygon Dhyana": (machine(HYGON, 0x18, 0x00, "avx2"), "blas", "widened", "widened"),
    "Hygon with AVX-512": (machine(HYGON, 0x18, 0x04, "avx512_bf16"), "ours", "ours", "widened"),
    "Skylake-SP": (machine(INTEL, 6, 0x55, "avx512"), "blas", "widened", "widened"),
    "Cascade Lake": (machine(INTEL, 6, 0x55, "avx512"), "blas", "widened", "widened"),
    "Cascade Lake without MKL": (machine(INTEL, 6, 0x55, "avx512", mkl="none"), "ours", "widened", "widened"),
    "Cooper Lake": (machine(INTEL, 6, 0x55, "avx512_bf16"), "blas", "widened", "widened"),
    "Cooper Lake without MKL": (machine(INTEL, 6, 0x55, "avx512_bf16", mkl="none"), "ours", "widened", "widened"),
    "Ice Lake-SP": (machine(INTEL, 6, 0x6A, "avx512"), "blas", "widened", "widened"),
    "Sapphire Rapids": (machine(INTEL, 6, 0x8F, "amx", float16=True), "blas", "blas", "blas"),
    "Sapphire Rapids, AMX masked": (
        machine(INTEL, 6, 0x8F, "avx512_bf16", float16=True),
        *("blas", "widened", "blas"),
    ),
    "Sapphire Rapids, an older MKL": (
        machine(INTEL, 6, 0x8F, "amx", float16=True, mkl="float32"),
        *("blas", "widened", "widened"),
    ),
    "Emerald Rapids": (machine(INTEL, 6, 0xCF, "amx", float16=True), "blas", "blas", "blas"),
    "Granite Rapids": (machine(INTEL, 6, 0xAD, "amx", float16=True), "blas", "blas", "blas"),
    "Alder Lake": (machine(INTEL, 6, 0x97, "avx2"), "blas", "widened", "widened"),
    "Arm": (machine("", 0, 0, "portable", mkl="none"), "blas", "widened", "widened"),
    "unknown, AVX2": (machine("CentaurHauls", 7, 0x5B, "avx2"), "blas", "widened", "widened"),
    "unknown, AVX-512": (machine("VirtualVendor", 6, 0, "avx512"), "ours", "widened", "widened"),
    "unknown, AVX512-BF16": (machine("VirtualVendor", 6, 0, "avx512_bf16"), "ours", "ours", "widened"),
    "unknown, AMX": (machine("VirtualVendor", 6, 0, "amx", float16=True), "blas", "blas", "blas"),
}


@pytest.mark.parametrize(("machine", "float32", "bfloat16", "float16"), MACHINES.values(), ids=MACHINES)
def test_products_of_a_machine(machine: Machine, float32: str, bfloat16: str, float16: str) -> None:
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
    assert [choose_gemm(machine, dtype) for dtype in dtypes] == [float32, bfloat16, float16, "blas"]


def test_the_machine_at_hand(native: CpuLibrary) -> None:
    """As the operating system has it."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    said = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.+)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    if "vendor_id" not in said:
        pytest.skip("the operating system does not say it in x86's words")
    assert native.machine.vendor == said["vendor_id"]
    assert (native.machine.family, native.machine.model) == (int(said["cpu family"]), int(said["model"]))


def test_a_level_under_test_has_no_vendor(native: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that our own products are tested on Intel too."""
    monkeypatch.setattr(native, "machine", MACHINES["Sapphire Rapids, AMX masked"][0])
    assert CpuBlockKernel()._gemm(torch.bfloat16) == "widened"
    assert CpuBlockKernel("avx512_bf16")._gemm(torch.bfloat16) == "ours"
    assert CpuBlockKernel("avx512_bf16")._gemm(torch.float16) == "widened"


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of torch's products, one after the other."""
    results: list[Tensor] = []
    mm = torch.mm

    def recorded(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        results.append(out)
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    return results


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_past_torch(
    native: CpuLibrary, dtype: torch.dtype, by_torch: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL's own functions give what torch.mm gives, which is for torch without MKL."""
    inputs = make_inputs(130, 200, 96, dtype)
    direct = sigmoid_loss_and_grads(*inputs, backend="cpu")
    assert not by_torch
    monkeypatch.setattr(native, "gemm", {})
    right = sigmoid_loss_and_grads(*inputs, backend="cpu")
    assert len(by_torch) == 3
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(direct, right, strict=True))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float64, 0)], ids=str)
def test_torch_multiplies_where_less_than_float32_is_allowed(
    dtype: torch.dtype, count: int, by_torch: list[Tensor]
) -> None:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        sigmoid_loss_and_grads(*make_inputs(130, 200, 96, dtype), backend="cpu")
    finally:
        settings.fp32_precision = before
    assert len(by_torch) == count


def test_float16_by_mkl(kernel: CpuBlockKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs anywhere, only slower."""
    monkeypatch.setattr(kernel, "_machine", kernel._machine._replace(float16_products=True))
    assert kernel._gemm(torch.float16) == "blas"
    report = check(partial(sigmoid_loss, backend="cpu"), dtypes=[torch.float16], shapes=[(130, 200, 96), (300, 40, 7)])
    assert report.ok, report


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_features_at_all(dtype: torch.dtype) -> None:
    """A product over nothing is 0."""
    x, y, scale, bias = make_inputs(3, 4, 8, dtype)
    loss = sigmoid_loss(x[:, :0], y[:, :0], scale, bias, backend="cpu")
    assert relative_l2(loss, sigmoid_loss(x * 0, y * 0, scale, bias, backend="eager")) < 1e-6
