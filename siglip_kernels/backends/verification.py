"""The first run of a GPU kernel's variant on a device is compared with plain torch there.

No test of ours has seen that device, its driver, its compiler. So the first block that a variant computes is computed
by the eager kernel too, in parts. If the two agree, that is recorded on disk, and the variant is not compared again, by
any process, until kernels, versions or device change. If they don't, or the variant cannot be compiled or launched,
backend="auto" warns and leaves such blocks to the eager kernel; a backend by name raises KernelError. Inputs that
overflow or are all 0 prove nothing, nor does a lack of memory or a call under graph capture: the next call tries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from siglip_kernels import build, cache
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.comparison import errors_of_launch, run_eager
from siglip_kernels.host_read import is_capturing

RECORDED_DEVICES = ("cuda",)  # not the CPU, where only tests run these kernels


class KernelError(RuntimeError):
    """A GPU kernel cannot be compiled or launched on this device, or computes something else than plain torch."""


proven: set[tuple[Hashable, torch.device]] = set()  # variants that agreed with plain torch on the device
_faults: dict[tuple[Hashable, torch.device], str] = {}  # what is wrong with others


def launch_unproven(
    backend: str, variant: Hashable, task: BlockTask, launch: Callable[[Hashable, BlockTask], None]
) -> None:
    """``launch`` a variant that is not in ``proven``, and find out whether it belongs there; KernelError if not."""
    device = task.x.device
    key = variant, device
    if key not in _faults:
        if _is_recorded(backend, variant, device):
            proven.add(key)
        if key in proven or is_capturing(device):
            launch(variant, task)
            return
        fault = _find_fault(functools.partial(launch, variant), task)
        if fault == "":
            proven.add(key)
            _record(backend, variant, device)
        if not fault:
            return
        _faults[key] = f"{fault}. Kernel: {variant}. {environment(device)}"
        if task.may_replace:
            warnings.warn(
                f"siglip_kernels: {backend} {_faults[key]}. From now on plain torch does the blocks that need it: "
                "right, but slower. Please report this to the authors",
                RuntimeWarning,
                stacklevel=2,
            )
    if not task.may_replace:
        raise KernelError(f"backend={backend!r} {_faults[key]}")
    run_eager(task)


def _find_fault(launch: Callable[[BlockTask], None], task: BlockTask) -> str | None:
    """What is wrong with the first run of ``launch``; empty if nothing is, None if that cannot be told."""
    try:
        errors = errors_of_launch(launch, task)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from Triton, a compiler, the driver
        return f"cannot run here: {(str(error) or type(error).__name__).splitlines()[0]}"
    if not errors:
        return None
    wrong = [f"{name} {error:.3g}" for name, error in errors.items() if not error <= 1]
    return f"disagrees with plain torch, in multiples of what is allowed: {', '.join(wrong)}" if wrong else ""


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {instructions}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


@functools.cache
def environment(device: torch.device) -> str:
    """What besides the variant decides whether a kernel is right."""
    found = {"torch": torch.__version__, "CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["Triton"] = importlib.metadata.version("triton")
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return f"{describe_device(device)}; {versions}; kernels {_kernels_digest()}"


@functools.cache
def _kernels_digest() -> str:
    """Of the code of the kernels, and of that which launches them."""
    sources = [*Path(__file__).parent.rglob("*.py"), *(build.CSRC / "cuda").rglob("*.*")]
    return cache.digest(b"".join(path.read_bytes() for path in sorted(sources) if path.is_file()))


# ---- records: a file for each variant that agreed, named by the digest of all that it depends on ----


def recorded(device: torch.device) -> list[str]:
    """The variants that agreed with plain torch in this environment, each with its backend."""
    found = set()
    for root in cache.roots([]):
        for path in root.glob("verified/*.txt"):
            with contextlib.suppress(OSError, ValueError):
                kernel, where = path.read_text(encoding="utf-8").split("\n")
                found |= {kernel} if where == environment(device) else set()
    return sorted(found)


def _record(backend: str, variant: Hashable, device: torch.device) -> None:
    for path in _places(backend, variant, device, make=True):
        with contextlib.suppress(OSError):
            cache.write_text(path, f"{backend}: {variant}\n{environment(device)}")
            return


def _is_recorded(backend: str, variant: Hashable, device: torch.device) -> bool:
    return any(path.is_file() for path in _places(backend, variant, device))


def _places(backend: str, variant: Hashable, device: torch.device, make: bool = False) -> list[Path]:
    if device.type not in RECORDED_DEVICES:
        return []
    name = cache.digest(repr((backend, variant, environment(device))).encode())
    return [root / "verified" / f"{name}.txt" for root in cache.roots([], make)]
