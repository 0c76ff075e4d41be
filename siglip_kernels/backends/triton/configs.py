"""Kernel configurations: data, chosen by a pure function of the architecture and the problem. Nothing is searched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Tile shape and launch parameters of the block kernel."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    # Columns in which a row's sums are kept: in as many lanes and warps a tensor core's accumulator spreads it. Fewer
    # make sums move between threads, more take registers.
    lanes: int = 4
    dz_stores: tuple[int, int] = (2, 2)  # of a tile, 2 or 4: without and with stats
    # For a kernel that keeps more in registers: columns at most, and warps (0: num_warps). With ids; with masses, a
    # balance or pairs that are left out; with stats.
    max_columns: tuple[int, int, int] = (256, 64, 64)
    warps: tuple[int, int, int] = (0, 8, 8)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_d} {self.num_warps}w {self.num_stages}s"


# LARGE: tiles for problems that fill the device. SMALL: smaller tiles, which spread a small problem over more of it.
# The keys are the architecture family and the bytes per element. On sm_100 the accumulator has 128 rows, one for each
# thread of 4 warps: with 8 warps, or 64 rows, it moves through shared memory.
LARGE = {
    ("sm_80", 2): Config(128, 64, 64, num_warps=8, num_stages=3, lanes=8, dz_stores=(2, 4)),
    ("sm_80", 4): Config(64, 64, 32, num_warps=8, num_stages=3, lanes=8),
    ("sm_90", 2): Config(
        128, 128, 64, num_warps=8, num_stages=3, dz_stores=(4, 4), max_columns=(64, 64, 64), warps=(4, 8, 8)
    ),
    ("sm_90", 4): Config(128, 64, 32, num_warps=8, num_stages=3),
    ("sm_100", 2): Config(128, 128, 64, 4, num_stages=3, lanes=1, max_columns=(64, 64, 32), warps=(4, 4, 4)),
    ("sm_100", 4): Config(128, 64, 32, 4, num_stages=3, lanes=1, max_columns=(64, 64, 32), warps=(4, 4, 4)),
    ("gfx942", 2): Config(128, 128, 64, num_warps=8, num_stages=2, lanes=16, dz_stores=(4, 4)),
    ("gfx942", 4): Config(128, 128, 32, num_warps=8, num_stages=2, lanes=16, dz_stores=(4, 4)),
}
SMALL = {
    ("sm_80", 2): Config(64, 64, 64, num_warps=4, num_stages=3, lanes=8, max_columns=(256, 32, 32)),
    ("sm_80", 4): Config(64, 32, 32, num_warps=4, num_stages=3, lanes=8),
    ("sm_90", 2): Config(64, 64, 64, num_warps=4, num_stages=3, warps=(4, 4, 4)),
    ("sm_90", 4): Config(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_100", 2): Config(128, 32, 64, num_warps=4, num_stages=3, lanes=1, warps=(4, 4, 4)),
    ("sm_100", 4): Config(128, 32, 32, num_warps=4, num_stages=2, lanes=1, warps=(4, 4, 4)),
    ("gfx942", 2): Config(64, 64, 64, num_warps=4, num_stages=2, lanes=16, dz_stores=(4, 4)),
    ("gfx942", 4): Config(64, 64, 32, num_warps=4, num_stages=2, lanes=16, dz_stores=(4, 4)),
}
# Large tiles are used from this number of tiles on: about one for each multiprocessor of the parts above.
MIN_LARGE_TILES = 128
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TMA = ("sm_90", "sm_100")
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# How the kernel finds the positives: the values of its LABELS_… constants.
LABELS = {"none": 0, "offset": 1, "ids": 2, "ignore": 3}
# How the kernel uses the mass of a positive pair. Masses come only with ids and weights, a balance only with weights.
MASSES = ("none", "weights", "soft_targets")


def family(arch: str) -> str:
    """The architecture family with the configurations for ``arch`` ("sm_86", "gfx950", …)."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    # sm_120 has neither wgmma nor tcgen05, and only the shared memory of sm_86.
    return "sm_90" if number == 90 else "sm_100" if 100 <= number < 120 else "sm_80"


def choose(
    arch: str,
    M: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    labels: str = "offset",
    masses: str = "none",
    stats: bool = False,
    balance: bool = False,
) -> Config:
    """The configuration for [M, D] images and [N, D] texts of ``dtype``, with the uses of a :class:`Variant`."""
    key = family(arch), dtype.itemsize
    large, small = (fitted(table[key], labels, masses, stats, balance) for table in (LARGE, SMALL))
    tiles = -(-M // large.block_m) * -(-N // large.block_n)
    return large if tiles >= MIN_LARGE_TILES else small


def fitted(config: Config, labels: str, masses: str, stats: bool, balance: bool = False) -> Config:
    """The configuration with fewer columns, or other warps, where these uses keep more in registers."""
    if stats:
        use = 2
    elif labels == "ignore" or masses != "none" or balance:
        use = 1
    elif labels == "ids":
        use = 0
    else:
        return config
    columns, warps = min(config.block_n, config.max_columns[use]), config.warps[use] or config.num_warps
    return replace(config, block_n=columns, num_warps=warps)


@functools.lru_cache(maxsize=4096)
def max_tiles(M: int, N: int, config: Config | None = None) -> int:
    """An upper bound on the tiles of [M, N] pairs, with ``config`` or with any shipped configuration."""
    every = (*LARGE.values(), *SMALL.values()) if config is None else (config,)
    return max(-(-M // c.block_m) * -(-N // min(c.block_n, *c.max_columns)) for c in every)


def precision(arch: str, dtype: torch.dtype, allow_tf32: bool) -> str:
    """How the tensor cores multiply. float32 takes three TF32 products for float32 accuracy, one if TF32 is allowed."""
    if dtype is not torch.float32 or family(arch) == "gfx942":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


@dataclass(frozen=True)
class Variant:
    """One compilation of the block kernel: everything that its code depends on."""

    arch: str
    dtype: torch.dtype
    config: Config
    use_tma: bool
    precision: str
    labels: str = "offset"  # "none" | "offset" | "ids" | "ignore"
    has_weights: bool = False
    loss_only: bool = False
    write_dz: bool = True
    masses: str = "none"  # one of MASSES
    stats: bool = False
    balance: bool = False  # positive_weight and label_smoothing
    teacher: bool = False  # only with a balance, which may be 1 and 0
    by_image: bool = False  # the loss of each image; only with loss_only

    def __str__(self) -> str:
        """A description that differs for any two shipped variants."""
        flags = {
            "weights": self.has_weights,
            "masses": self.masses == "weights",
            "soft": self.masses == "soft_targets",
            "balance": self.balance,
            "teacher": self.teacher,
            "stats": self.stats,
            "loss-only": self.loss_only,
            "by-image": self.by_image,
            "no-dz": not self.write_dz,
        }
        words = [
            f"{self.arch:6} {ELEMENTS[self.dtype]} {self.config!s:17}",
            "tma" if self.use_tma else "ptr",
            f"{self.precision:6}",
            self.labels,
            *(name for name, is_set in flags.items() if is_set),
        ]
        return " ".join(words)


# What a launch can ask for. USES shape the kernel's code most; ALL_USES are all there are.
USES: tuple[dict[str, Any], ...] = (
    {"labels": "none"},
    {"labels": "offset"},
    {"labels": "ids", "has_weights": True},
    {"labels": "offset", "loss_only": True, "write_dz": False},
    {"labels": "offset", "loss_only": True, "write_dz": False, "by_image": True},
    {"labels": "offset", "write_dz": False},
    {"labels": "ignore"},
    {"labels": "ids", "has_weights": True, "masses": "weights"},
    {"labels": "ids", "has_weights": True, "masses": "soft_targets"},
    {"labels": "offset", "stats": True},
    {"labels": "ignore", "has_weights": True, "stats": True},
    {"labels": "ids", "has_weights": True, "masses": "soft_targets", "stats": True},
    {"labels": "offset", "has_weights": True, "balance": True},
    {"labels": "ignore", "has_weights": True, "balance": True},
    {"labels": "ids", "has_weights": True, "masses": "soft_targets", "balance": True},
    {"labels": "ids", "has_weights": True, "masses": "soft_targets", "balance": True, "stats": True},
    {"labels": "offset", "has_weights": True, "balance": True, "teacher": True},
    {"labels": "ignore", "has_weights": True, "balance": True, "teacher": True},
    {"labels": "ids", "has_weights": True, "masses": "soft_targets", "balance": True, "teacher": True, "stats": True},
)
ALL_USES: tuple[dict[str, Any], ...] = tuple(
    {
        "labels": labels,
        "has_weights": has_weights,
        "loss_only": loss_only,
        "write_dz": write_dz,
        "masses": masses,
        "stats": stats,
        "balance": balance,
        "teacher": teacher,
        "by_image": by_image,
    }
    for balance, teacher in ((False, False), (True, False), (True, True))
    for stats in (False, True)
    for masses in MASSES
    for labels in LABELS
    for has_weights in (False, True)
    for loss_only, write_dz, by_image in (
        *((False, True, False), (False, False, False), (True, False, False), (True, False, True)),
    )
    if (masses == "none" or (labels == "ids" and has_weights)) and (has_weights or not balance)
)


def shipped(every: bool = False) -> Iterator[Variant]:
    """Every configuration with USES; ``every``: with ALL_USES."""
    for arch in SHARED_MEMORY:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for table in (LARGE, SMALL):
                config = table[arch, dtype.itemsize]
                for precise in dict.fromkeys(precision(arch, dtype, tf32) for tf32 in (False, True)):
                    for use in ALL_USES if every else USES:
                        v = Variant(arch, dtype, config, arch in TMA, precise, **use)
                        yield replace(v, config=fitted(config, v.labels, v.masses, v.stats, v.balance))
