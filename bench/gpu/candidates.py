"""What might be shipped instead: configurations, block shapes and workspaces of the Triton kernel, as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu.precompile import Ask, variants
from bench.microbenchmark.problems import Problem
from siglip_kernels import backends
from siglip_kernels.backends.base import DZ_BYTES
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.backends.triton.configs import Config, Variant
from siglip_kernels.testing import PAIRS

MIB = 2**20
SHIPPED = "shipped"
DIAGONAL, IDS = "diagonal", "ids and weights"


@dataclass(frozen=True)
class Candidate:
    """One way to run the Triton kernel; None: as it is shipped."""

    name: str
    use: str = DIAGONAL  # which pairs it is timed on
    config: Config | None = None
    blocks: tuple[int, int] | None = None  # images and texts
    dz_bytes: int = DZ_BYTES

    @property
    def options(self) -> dict[str, Any]:
        return {"dz_bytes": self.dz_bytes, "config": self.config, "blocks": self.blocks}

    def kernel(self) -> TritonBlockKernel:
        return TritonBlockKernel(**self.options)

    def variants(self, arch: str, asks: list[Ask]) -> list[Variant]:
        """The compilations that ``asks`` need with this candidate."""
        return variants(arch, asks, **self.options)


@dataclass(frozen=True)
class Plan:
    """The sizes of ``python -m bench sweep``."""

    problems: tuple[Problem, ...]  # that are timed
    checked: tuple[int, int, int]  # M, N, D of the check before, ragged
    repeats: int  # that must give the same bits
    blocks: tuple[tuple[int, int], ...]
    bounds: tuple[float, ...]  # MiB of dz
    seconds: float  # of timing for each problem


def plan(device: torch.device) -> Plan:
    """On a CPU sizes for Triton's interpreter, and float16, since it computes bfloat16 wrongly."""
    if device.type == "cpu":
        problems = tuple(Problem(64, D, torch.float16) for D in (16, 24))
        return Plan(problems, (33, 70, 20), 1, blocks=((32, 64),), bounds=(0.0625,), seconds=0.0)
    return Plan(
        problems=tuple(Problem(32_768, D, torch.bfloat16) for D in (768, 1152)),
        checked=(1100, 2900, 776),
        repeats=20,
        # By waves of the 128 × 256 tiles of the library's products on 132 multiprocessors: dx, of R rows, and dy, of C.
        blocks=((11_008, 11_008), (16_384, 8_192), (6_656, 16_384)),
        bounds=(64, 128, 512, 1024),
        seconds=8.0,
    )


def candidates(shipped: Config, plan: Plan) -> list[Candidate]:
    """All that need no new kernel code, what is shipped first; ``shipped``: its large tile."""
    wide = replace(shipped, block_m=128, block_n=256, num_warps=8, num_stages=3)
    tiles = {
        "4 warps": replace(shipped, num_warps=4),
        "128 × 256, 8 warps, 3 stages": wide,
        "128 × 256, 8 warps, 4 stages": replace(wide, num_stages=4),
        "256 × 128, 8 warps, 3 stages": replace(wide, block_m=256, block_n=128),
        "2 stages": replace(shipped, num_stages=2),
        "4 stages": replace(shipped, num_stages=4),
        "128 features, 2 stages": replace(shipped, block_d=128, num_stages=2),
        "16 rows of tiles together": replace(shipped, group_m=16),
    }
    narrow = configs.narrowed(shipped)
    found = [Candidate(SHIPPED)]
    found += [Candidate(name, config=config) for name, config in tiles.items()]
    found += [Candidate(f"blocks of {R:,} × {C:,}", blocks=(R, C)) for R, C in plan.blocks]
    found += [Candidate("128 × 256, and blocks of {:,} × {:,}".format(*plan.blocks[0]), DIAGONAL, wide, plan.blocks[0])]
    found += [Candidate(f"workspace of {size:g} MiB", dz_bytes=int(size * MIB)) for size in plan.bounds]
    found += [Candidate(SHIPPED, IDS), Candidate("64 columns", IDS, narrow)]
    found += [Candidate("64 columns, 4 warps", IDS, replace(narrow, num_warps=4))]
    return [c for c in found if c.config != shipped]  # once one is shipped it is no candidate any more


def pairs(use: str, M: int, N: int, device: torch.device) -> dict[str, Any]:
    """For a check: what sigmoid_loss takes, as various as the use allows."""
    return {} if use == DIAGONAL else PAIRS["ids"](M, N, device) | PAIRS["weights"](M, N, device)


def timed_pairs(use: str, B: int, device: torch.device) -> dict[str, Any]:
    """The diagonal in the words of the use, so that its float64 values serve all."""
    if use == DIAGONAL:
        return {}
    ids, ones = torch.arange(B, device=device), torch.ones(B, device=device)
    return {"image_ids": ids, "text_ids": ids.clone(), "image_weights": ones, "text_weights": ones.clone()}


@contextmanager
def as_triton(kernel: TritonBlockKernel) -> Iterator[None]:
    """Meanwhile ``backend="triton"`` is ``kernel``."""
    before = backends.BACKENDS["triton"]
    backends.BACKENDS["triton"] = kernel
    try:
        yield
    finally:
        backends.BACKENDS["triton"] = before
