"""Triton kernels compiled for a target that need not be here, side by side in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from siglip_kernels.backends.triton.configs import Variant

PROCESSES = min(16, os.cpu_count() or 1)
T = TypeVar("T")


@dataclass(frozen=True)
class StandIn:
    """What Triton's compiler asks of a driver: so it is the compiler of a launch, and its cache that of a launch."""

    target: Any  # GPUTarget

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_variant(variant: Variant) -> Any:
    """Triton's CompiledKernel; from then on every launch finds it on disk. For processes that launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from siglip_kernels.backends.triton import launch

    arch, is_amd = variant.arch, variant.arch.startswith("gfx")
    driver.set_active(StandIn(GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)))
    return launch.compile_variant(variant)


def compile_ahead(variants: Sequence[Variant], seconds: float, processes: int = PROCESSES) -> list[str]:
    """Compile all within ``seconds``, the first ones first; what did not succeed, in words."""
    return [
        f"{variant}: {'not done in time' if found is None else found}"
        for variant, found in zip(variants, side_by_side(_reason, variants, processes, seconds), strict=True)
        if found != ""
    ]


def side_by_side(
    task: Callable[[Variant], T], variants: Sequence[Variant], processes: int = PROCESSES, seconds: float | None = None
) -> Iterator[T | None]:
    """``task`` of each variant, in order, as they are done; None for one that is not within ``seconds``."""
    if not variants:
        return
    ends = None if seconds is None else time.perf_counter() + seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(variants)), initializer=_without_interpreter) as pool:
        # Not imap: a process that hangs, or dies, would withhold the results of the others.
        for result in [pool.apply_async(task, (variant,)) for variant in variants]:
            try:
                yield result.get(None if ends is None else max(0.0, ends - time.perf_counter()))
            except multiprocessing.TimeoutError:
                yield None


def note_late(late: list[str]) -> None:
    """From now on ``late`` grows by each block kernel that this process has to compile itself."""
    from triton import knobs

    def note(*, src: Any, cache_hit: bool, **others: Any) -> None:
        if not cache_hit and src.name == "_sigmoid_block_kernel":
            late.append(str(src.signature))

    knobs.compilation.listener = note


def _without_interpreter() -> None:
    """Triton reads it when it is first imported: under the interpreter there is nothing to compile."""
    os.environ.pop("TRITON_INTERPRET", None)


def _reason(variant: Variant) -> str:
    """Why it does not compile; nothing when it does."""
    try:
        compiled = compile_variant(variant)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    # Triton 3.6 compiles C code for each signature too, at the first launch if not here.
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    return ""
