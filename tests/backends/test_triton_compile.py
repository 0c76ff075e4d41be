"""Every shipped Triton kernel, cross-compiled: no spill, shared memory that fits, tensor cores. Needs no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.static import compilation, triton_report
from bench.static.triton_report import Resources, Row
from siglip_kernels.backends.triton import configs
from siglip_kernels.backends.triton.configs import Config, Variant

pytest.importorskip("triton", reason="Triton is not installed")

HOPPER = Variant("sm_90", torch.bfloat16, configs.LARGE["sm_90", 2], use_tma=True, precision="ieee")
GOOD = Resources(
    registers=168, spills=0, stack=0, shared=98304, tensor_core=8, instructions=2000, conversions=0, barriers=21
)


def compiled(variants: list[Variant], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    # In fresh processes, which take the environment of this one: under the interpreter there is nothing to compile.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return list(triton_report.inspect_variants(variants))


MOVES = {"sm_80": 4, "sm_90": 0, "sm_100": 0, "gfx942": 5}  # of accumulators; of dz, before pointers store it


@pytest.mark.parametrize("arch", configs.SHARED_MEMORY)
def test_shipped_variants(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sound, and accumulators stay where the tensor cores leave them, but for what pointers load or store."""
    # float16 repeats bfloat16 but for the scale of dz: of its uses, the one with dz and a diagonal.
    variants = [
        v
        for v in configs.shipped()
        if v.arch == arch and (v.dtype is not torch.float16 or (v.labels == "offset" and v.write_dz))
    ]
    rows = compiled(variants, monkeypatch)
    unsound = [f"{row.variant}: {'; '.join(row.problems)}" for row in rows if row.problems]
    assert not unsound, "\n".join(unsound)
    moves = {
        row.variant: row.resources.conversions
        for row in rows
        if row.resources and row.variant.dtype is torch.bfloat16 and not row.variant.stats and row.variant.write_dz
    }
    assert moves
    assert [(v, moved) for v, moved in moves.items() if moved > MOVES[arch] + (16 if v.teacher else 0)] == []


def test_bad_configurations_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = Variant("sm_80", torch.float32, configs.SMALL["sm_80", 4], use_tma=False, precision="ieee")
    expected = {
        replace(HOPPER, config=Config(128, 128, 64, num_warps=4, num_stages=8)): "bytes of shared memory",
        replace(HOPPER, config=Config(256, 128, 64, num_warps=4, num_stages=3)): "spills",
        replace(HOPPER, config=Config(96, 128, 64, num_warps=4, num_stages=3)): "does not compile",
        ampere: "no HMMA instruction",
    }
    rows = compiled(list(expected), monkeypatch)
    for row, problem in zip(rows, expected.values(), strict=True):
        assert any(problem in found for found in row.problems), row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_programs_share_a_hopper_multiprocessor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the epilogue of one runs under the products of the other.
    variants = [replace(HOPPER, dtype=dtype, labels=labels) for labels in ("none", "offset")]
    for row in compiled(variants, monkeypatch):
        assert row.resources is not None, row.problems
        registers = -(-row.resources.registers // 8) * 8 * 32 * row.variant.config.num_warps
        assert 2 * registers <= 65536, row
        assert 2 * (row.resources.shared + 1024) <= 228 * 1024, row


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spills": 2, "stack": 8}, "2 spills, 8 bytes of stack"),
        ({"stack": 8}, "0 spills, 8 bytes of stack"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"tensor_core": 0}, "no HGMMA instruction"),
    ],
)
def test_problems(changes: dict[str, int], problem: str) -> None:
    assert triton_report.find_problems(HOPPER, GOOD) == []
    assert triton_report.find_problems(HOPPER, replace(GOOD, **changes)) == [problem]


def _ptx_of_scaling(arch: str) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from siglip_kernels.backends.triton import scale

    signature = {"accumulator_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*bf16", "elements": "i32"}
    source = ASTSource(
        scale._scale_kernel,
        {**signature, "BLOCK": "constexpr"},
        {"BLOCK": scale.BLOCK},
        {(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    return str(triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32)).asm["ptx"])


def test_gradients_are_scaled_by_wide_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for ptx in compilation.parallel_map(_ptx_of_scaling, ["sm_80", "sm_90"]):
        assert ptx is not None
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v" in ptx
