"""Problems to time: batch, width, dtype and mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from siglip_kernels.backends.base import BlockKernel
from siglip_kernels.backends.base import Problem as BackendProblem

FULL, FORWARD, FROZEN = "forward + backward", "forward only", "frozen images"
# Number of GEMMs of 2·M·N·D operations that a mode needs.
GEMMS = {FULL: 3, FORWARD: 1, FROZEN: 2}


@dataclass(frozen=True)
class Problem:
    """B images and B texts of D features."""

    B: int
    D: int
    dtype: torch.dtype
    mode: str = FULL

    @property
    def flops(self) -> int:
        """Floating-point operations of the GEMMs: 6·B²·D with every gradient."""
        return 2 * GEMMS[self.mode] * self.B * self.B * self.D

    @property
    def key(self) -> tuple[str, str, int, int]:
        """The first fields of a result's Row: mode, dtype, B, D."""
        return self.mode, str(self.dtype).removeprefix("torch."), self.B, self.D

    def for_backend(self, device: torch.device) -> BackendProblem:
        """The same problem as the backends describe it."""
        return BackendProblem(self.B, self.B, self.D, self.dtype, device)

    def block_shape(self, kernel: BlockKernel, device: torch.device) -> tuple[int, int]:
        """Images and texts of the largest block into which ``kernel`` divides it."""
        R, C = kernel.block_shape(self.for_backend(device))
        return min(R, self.B), min(C, self.B)

    def __str__(self) -> str:
        return f"B={self.B} D={self.D} {str(self.dtype).removeprefix('torch.')} {self.mode}"


def suite(device: torch.device, quick: bool = False) -> list[Problem]:
    """What ``python -m bench`` times; ``quick``: tiny problems, to show that it runs."""
    if quick:
        return [Problem(B, 64, torch.float32, mode) for B in (256, 512) for mode in GEMMS]
    if device.type == "cpu":
        single = [Problem(B, 768, torch.float32) for B in (64, 256, 1024, 4096, 6144)]
        half = [Problem(B, 768, torch.bfloat16) for B in (1024, 4096, 6144)]
        modes = [replace(single[-1], mode=mode) for mode in (FORWARD, FROZEN)]
        return [*single, *half, *modes, replace(half[-1], mode=FORWARD)]
    half = [Problem(2**k, 768, torch.bfloat16) for k in range(10, 17)]
    modes = [Problem(32768, 768, torch.bfloat16, mode) for mode in (FORWARD, FROZEN)]
    return [*half, *modes, *(Problem(32768, D, torch.bfloat16) for D in (1024, 1152))]


# The logits alone would take 9 GiB.
MEMORY_PROBLEM = Problem(49_152, 32, torch.float32)
