"""``python -m siglip_kernels doctor``: what eager, torch.compile and ours take on every rank, and the batch that fits.

Memory is computed (``footprint.py``). Time is printed only if it was measured on a device of the same name.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from siglip_kernels.backends.base import BlockKernel
from siglip_kernels.memory.footprint import BATCH_MULTIPLE, Footprint, Job, block_kernel, footprints
from siglip_kernels.validation import FEATURE_DTYPES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FEATURE_DTYPES}
# D of the published checkpoints, by the size at the start of their names.
MODEL_DIMS = {"base": 768, "large": 1024, "so400m": 1152, "giant-opt": 1536}
SHAPE = re.compile(rf"(?:google/siglip2?-)?({'|'.join(MODEL_DIMS)})(?:-patch\d+-(?:\d+|naflex)(?:-\w+)?)?")
UNITS = {"b": 1} | {f"{p}{end}": base**n for n, p in enumerate("kmgt", 1) for end, base in (("ib", 1024), ("b", 1000))}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})")
# Within these limits, the size of every tensor fits into 64 bits, even at twice the largest batch.
MOST_BYTES, MOST_IMAGES, MOST_FEATURES, MOST_RANKS = 2**60, 2**28, 2**16, 2**15


@dataclass(frozen=True)
class Times:
    """Measurements on one device: the time of the others divided by the time of ours, with every gradient."""

    device: str
    threads: int
    torch: str
    commit: str
    source: str
    kernel: str  # ours: its time is 1
    rows: dict[tuple[str, int, int], tuple[float, float]]  # by dtype, B, D: eager, torch.compile


TIMES = (
    Times(
        device="AMD EPYC (AVX512)",
        threads=2,
        torch="2.13.0+cpu",
        commit="c539c1e",
        source="bench/results/amd-epyc-avx512-2-threads",
        kernel="cpu",
        rows={
            ("float32", 64, 768): (1.02, 1.38),
            ("float32", 256, 768): (1.07, 1.37),
            ("float32", 1024, 768): (1.19, 1.46),
            ("float32", 4096, 768): (1.48, 1.40),
            ("float32", 6144, 768): (2.46, 1.51),
            ("bfloat16", 1024, 768): (1.10, 1.68),
            ("bfloat16", 4096, 768): (1.35, 1.77),
            ("bfloat16", 6144, 768): (1.56, 1.80),
        },
    ),
    Times(
        device="NVIDIA H200",
        threads=16,
        torch="2.11.0+cu130",
        commit="5d1df17",
        source="bench/results/nvidia-h200",
        kernel="cuda",
        rows={
            ("bfloat16", 1024, 768): (0.86, 0.97),
            ("bfloat16", 4096, 768): (0.84, 0.96),
            ("bfloat16", 16_384, 768): (2.43, 1.30),
            ("bfloat16", 32_768, 768): (2.80, 1.39),
            ("bfloat16", 65_536, 768): (2.86, 1.37),
        },
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``doctor``."""
    parser.description = (
        "What the loss takes on every rank, forward and backward, with every gradient: open_clip's SigLipLoss in eager "
        "mode, torch.compile of it, and ours. Needs no GPU."
    )
    parser.add_argument(
        "shape",
        nargs="?",
        type=model_dim,
        metavar="MODEL-SHAPE",
        help="stands for D: base-patch16-224 or base (768), large-… (1024), so400m-… (1152), giant-opt-… (1536)",
    )
    images, features, ranks = (partial(_bounded_int, most) for most in (MOST_IMAGES, MOST_FEATURES, MOST_RANKS))
    parser.add_argument("--batch", type=images, required=True, help="images, and texts, of one rank")
    parser.add_argument("--dim", type=features, metavar="D", help="width of the features, in place of a MODEL-SHAPE")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the features (default: %(default)s)")
    parser.add_argument("--world-size", type=ranks, default=1, metavar="W", help="ranks (default: 1)")
    parser.add_argument(
        "--nodes", type=ranks, default=1, help="of a DeviceMesh nodes × GPUs, for a ring of two levels (default: 1)"
    )
    parser.add_argument(
        "--teacher", type=features, default=0, metavar="D'", help="width of a teacher's features (default: no teacher)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda, here or not)")
    parser.add_argument(
        "--memory", type=parse_size, help="of a rank, as 80GiB or 85GB (default: what the device here has)"
    )
    parser.add_argument("--reserved", type=parse_size, default=0, help="of it for the model and all else (default: 0B)")


def doctor(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> int:
    """Print the table for the arguments. ``parser`` reports errors."""
    if (chosen.shape is None) == (chosen.dim is None):
        parser.error("expected D once: a MODEL-SHAPE or --dim")
    if chosen.world_size % chosen.nodes:
        parser.error(f"--nodes {chosen.nodes} must divide --world-size {chosen.world_size}")
    device = torch.device(chosen.device)
    memory = _device_memory(device) if chosen.memory is None else chosen.memory
    if memory is None:
        parser.error("no CUDA device here: say --memory, as 80GiB")
    if chosen.reserved >= memory:
        parser.error(f"--reserved {format_size(chosen.reserved)} leaves nothing of {format_size(memory)}")
    dtype = DTYPES[chosen.dtype]
    shape = chosen.batch, chosen.dim or chosen.shape, dtype, device
    job = Job(*shape, chosen.world_size, chosen.nodes, chosen.teacher)
    print(report(job, block_kernel(job), memory, chosen.reserved))
    return 0


def report(job: Job, kernel: BlockKernel, memory: int, reserved: int = 0) -> str:
    """The text for the job on a device with ``memory`` bytes. The model takes ``reserved`` of them."""
    name = str(job.dtype).removeprefix("torch.")
    ranks = f" a rank × {job.ranks:,} ranks = {job.batch * job.ranks:,}" if job.ranks > 1 else ""
    free = memory - reserved
    left = f"{format_size(memory)}" + f" - {format_size(reserved)} reserved = {format_size(free)}" * (reserved > 0)
    teacher = f", a teacher's {job.teacher:,}" if job.teacher else ""
    return "\n".join(
        [
            f"Batch {job.batch:,}{ranks}; D = {job.D:,}{teacher}, {name}, {job.device.type}; memory {left}",
            f"Inputs and gradients take {format_size(job.inputs + job.features)} a rank; the loss comes on top.",
            "",
            *_table(footprints(job, kernel, free), free),
            "",
            *_sources(job),
            *_times(job, kernel),
        ]
    )


def _table(found: dict[str, Footprint], free: int) -> list[str]:
    head = ("loss", "above inputs and gradients", "in all", "fits", "largest batch a rank")
    lines = [head] + [
        (
            name,
            format_size(taken.above),
            format_size(taken.total),
            "yes" if taken.total <= free else "no",
            f"{taken.largest:,}" if taken.largest else f"below {BATCH_MULTIPLE}",
        )
        for name, taken in found.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def _sources(job: Job) -> list[str]:
    how = "as measured on a CPU" if job.device.type == "cpu" else "as measured on an H200, in one process"
    others = (
        f"eager (open_clip's SigLipLoss), torch.compile: by the copies of the logits that are alive at once, {how}."
    )
    ours = f"ours: computed from what is allocated, {how}."
    if job.teacher:
        ours = "ours: computed from what is allocated, with a teacher as measured on a CPU."
    return [
        *([] if job.teacher else [others]),
        ours,
        "The largest batch: if the loss is all there is, in multiples of 64. Left out: libraries, CUDA context.",
    ]


def _times(job: Job, kernel: BlockKernel) -> list[str]:
    """The times of the nearest problem that was measured on this device, with one process."""
    name, here = str(job.dtype).removeprefix("torch."), _device_name(job.device)
    for times in TIMES:
        near = sorted(
            (abs(math.log(B / job.batch)), abs(math.log(D / job.D)), B, D, ratios)
            for (dtype, B, D), ratios in times.rows.items()
            if dtype == name
        )
        is_like = times.kernel == kernel.name and job.ranks == 1 and not job.teacher
        if near and times.device == here and is_like:
            *_, B, D, (eager, compiled) = near[0]
            return [
                f"Time, measured on {times.device}, {times.threads} threads, torch {times.torch}, B = {B:,}, D = {D}: "
                f"eager takes {eager:.2f}× our time, torch.compile {compiled:.2f}×."
            ]
    return [f"Time: no measurement on this device{' with several ranks' * (job.ranks > 1)}: memory only."]


def model_dim(text: str) -> int:
    """D of a MODEL-SHAPE; argparse prints the error."""
    found = SHAPE.fullmatch(text.lower())
    if found is None:
        expected = ", ".join(f"{name} ({D})" for name, D in MODEL_DIMS.items())
        raise argparse.ArgumentTypeError(
            f"unknown model shape {text!r}; expected {expected}, alone or as base-patch16-224; or give --dim"
        )
    return MODEL_DIMS[found[1]]


def parse_size(text: str) -> int:
    """Bytes of 80GiB, 85.9GB, 512MiB, …; argparse prints the error."""
    found = SIZE.fullmatch(text.strip().lower())
    taken = float(found[1]) * UNITS[found[2]] if found else math.inf
    if taken > MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number and its unit, as 80GiB or 85GB")
    return int(taken)


def format_size(size: int) -> str:
    """Bytes as a text, at most four figures and a unit."""
    scaled, unit = float(max(size, 0)), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if scaled < 1000 or unit == "TiB":
            break
        scaled /= 1024
    return f"{scaled:,.0f} {unit}" if unit in ("B", "KiB") or scaled >= 100 else f"{scaled:,.1f} {unit}"


def _bounded_int(most: int, text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {most:,}")
    return int(text)


def _device_memory(device: torch.device) -> int | None:
    """Bytes of the first device of that kind; None if there is none."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _device_name(device: torch.device) -> str | None:
    """The device's name, as the benchmark writes it; None if no CUDA device is here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"
