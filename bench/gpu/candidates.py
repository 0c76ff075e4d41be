"""Candidates of the sweep: configurations, block shapes and workspaces of the Triton kernel, and the CUDA kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu.precompile import LossCall, variants_of_calls
from bench.harness.timing import MIB
from bench.microbenchmark.problems import Problem
from siglip_kernels import backends
from siglip_kernels.backends.base import BlockKernel
from siglip_kernels.backends.cuda import CudaBlockKernel
from siglip_kernels.backends.gpu import DZ_BYTES
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.backends.triton.configs import Config, Variant
from siglip_kernels.testing import PAIRS

SHIPPED = "shipped"
DIAGONAL, IDS = "diagonal", "ids and weights"


@dataclass(frozen=True)
class Candidate:
    """One way to run the Triton kernel, or the CUDA kernel in its place; None: as shipped."""

    name: str
    pairs_kind: str = DIAGONAL  # DIAGONAL or IDS: the pairs it is timed on
    config: Config | None = None
    blocks: tuple[int, int] | None = None  # images and texts
    dz_bytes: int = DZ_BYTES
    cuda: bool = False  # the CUDA kernel

    def make_kernel(self) -> BlockKernel:
        sizes: dict[str, Any] = {"dz_bytes": self.dz_bytes, "blocks": self.blocks}
        return CudaBlockKernel(**sizes) if self.cuda else TritonBlockKernel(self.config, **sizes)

    def launched_variants(self, arch: str, calls: list[LossCall]) -> list[Variant]:
        """The Triton kernels that ``calls`` launch with this candidate."""
        if self.cuda:
            return []
        return variants_of_calls(arch, calls, config=self.config, dz_bytes=self.dz_bytes, blocks=self.blocks)


@dataclass(frozen=True)
class SweepPlan:
    """The sizes of ``python -m bench sweep``."""

    problems: tuple[Problem, ...]  # to time
    check_shape: tuple[int, int, int]  # M, N, D of the check before timing; no tile divides them
    repeats: int  # of the check, which must agree bit by bit
    block_shapes: tuple[tuple[int, int], ...]
    workspace_mib: tuple[float, ...]  # MiB of dz
    cuda: bool  # the CUDA kernel as well; on other parts than Hopper it is listed with the reason why not
    seconds: float  # of timing for each problem


def make_plan(device: torch.device) -> SweepPlan:
    """On a CPU small sizes for Triton's interpreter, in float16, because it computes bfloat16 wrongly."""
    if device.type == "cpu":
        problems = tuple(Problem(64, D, torch.float16) for D in (16, 24))
        return SweepPlan(
            problems, (33, 70, 20), 1, block_shapes=((32, 64),), workspace_mib=(0.0625,), cuda=False, seconds=0.0
        )
    return SweepPlan(
        problems=tuple(Problem(32_768, D, torch.bfloat16) for D in (768, 1152)),
        check_shape=(1100, 2900, 776),
        repeats=20,
        # Whole waves of the library's 128 × 256 GEMM tiles on 132 multiprocessors, for dx (R rows) and dy (C rows).
        block_shapes=((11_008, 11_008), (16_384, 8_192), (6_656, 16_384)),
        workspace_mib=(64, 128, 512, 1024),
        cuda=True,
        seconds=5.0,
    )


def make_candidates(shipped: Config, plan: SweepPlan) -> list[Candidate]:
    """All candidates that need no new kernel code, the shipped one first; ``shipped``: its large tile."""
    # With fewer lanes the running products of 256 columns would overflow.
    wide = replace(shipped, block_m=128, block_n=256, num_warps=8, num_stages=3, lanes=max(2, shipped.lanes))
    tiles = {
        "4 warps": replace(shipped, num_warps=4),
        "8 warps": replace(shipped, num_warps=8),
        "128 × 256, 8 warps, 3 stages": wide,
        "128 × 256, 8 warps, 4 stages": replace(wide, num_stages=4),
        "256 × 128, 8 warps, 3 stages": replace(wide, block_m=256, block_n=128),
        "64 × 256, 4 warps, 2 stages": replace(wide, block_m=64, num_warps=4, num_stages=2),
        "2 stores of dz": replace(shipped, dz_stores=(2, shipped.dz_stores[1])),
        "4 stores of dz": replace(shipped, dz_stores=(4, shipped.dz_stores[1])),
        "2 stages": replace(shipped, num_stages=2),
        "4 stages": replace(shipped, num_stages=4),
        "128 features, 2 stages": replace(shipped, block_d=128, num_stages=2),
        "16 rows of tiles together": replace(shipped, group_m=16),
    }
    with_ids = {
        f"{columns} columns, {warps} warps": replace(
            shipped, max_columns=(columns, *shipped.max_columns[1:]), warps=(warps, *shipped.warps[1:])
        )
        for columns in (64, 128)
        for warps in (4, 8)
        if columns <= shipped.block_n
    }
    candidates = [Candidate(SHIPPED)]
    candidates += [Candidate(name, config=config) for name, config in tiles.items()]
    candidates += [Candidate(f"blocks of {R:,} × {C:,}", blocks=(R, C)) for R, C in plan.block_shapes]
    candidates += [
        Candidate(
            "128 × 256, and blocks of {:,} × {:,}".format(*plan.block_shapes[0]), DIAGONAL, wide, plan.block_shapes[0]
        )
    ]
    candidates += [Candidate(f"workspace of {size:g} MiB", dz_bytes=int(size * MIB)) for size in plan.workspace_mib]
    candidates += [Candidate("CUDA", cuda=True)] * plan.cuda
    candidates += [Candidate(SHIPPED, IDS)]
    as_shipped = configs.fitted(shipped, "ids", "none", stats=False)
    candidates += [
        Candidate(name, IDS, config)
        for name, config in with_ids.items()
        if configs.fitted(config, "ids", "none", stats=False)
        != replace(as_shipped, max_columns=config.max_columns, warps=config.warps)
    ]
    candidates += [Candidate("CUDA", IDS, cuda=True)] * plan.cuda
    return [c for c in candidates if c.config != shipped]  # a candidate that has become the shipped one is dropped


def check_pairs(kind: str, M: int, N: int, device: torch.device) -> dict[str, Any]:
    """Arguments of sigmoid_loss for a check, as varied as the kind of pairs allows."""
    return {} if kind == DIAGONAL else PAIRS["ids"](M, N, device) | PAIRS["weights"](M, N, device)


def timed_pairs(kind: str, B: int, device: torch.device) -> dict[str, Any]:
    """The diagonal, expressed in this kind of pairs, so that one set of float64 values serves all."""
    if kind == DIAGONAL:
        return {}
    ids, ones = torch.arange(B, device=device), torch.ones(B, device=device)
    return {"image_ids": ids, "text_ids": ids.clone(), "image_weights": ones, "text_weights": ones.clone()}


@contextmanager
def registered_as_triton(kernel: BlockKernel) -> Iterator[None]:
    """Within the context ``backend="triton"`` is ``kernel``."""
    before = backends.BACKENDS["triton"]
    backends.BACKENDS["triton"] = kernel
    try:
        yield
    finally:
        backends.BACKENDS["triton"] = before
