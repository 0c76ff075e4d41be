"""Compiles Triton kernels for a target that need not be present, in parallel processes."""

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
Result = TypeVar("Result")


@dataclass(frozen=True)
class CompileOnlyDriver:
    """The part of a driver that Triton's compiler uses, so that compiler and cache are those of a real launch."""

    target: Any  # GPUTarget

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_variant(variant: Variant) -> Any:
    """Triton's CompiledKernel; later launches find it in the cache on disk. Only for processes that launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from siglip_kernels.backends.triton import launch

    arch, is_amd = variant.arch, variant.arch.startswith("gfx")
    driver.set_active(CompileOnlyDriver(GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)))
    return launch.compile_variant(variant)


def compile_ahead(variants: Sequence[Variant], seconds: float, processes: int = PROCESSES) -> list[str]:
    """Compile within ``seconds``, in order; one line for each variant that failed."""
    return [
        f"{variant}: {'not done in time' if found is None else found}"
        for variant, found in zip(variants, parallel_map(_compile_error, variants, processes, seconds), strict=True)
        if found != ""
    ]


def parallel_map(
    task: Callable[[Variant], Result],
    variants: Sequence[Variant],
    processes: int = PROCESSES,
    seconds: float | None = None,
) -> Iterator[Result | None]:
    """Yield ``task(variant)`` in order; None for a variant that is not done within ``seconds``."""
    if not variants:
        return
    deadline = None if seconds is None else time.perf_counter() + seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(variants)), initializer=_disable_interpreter) as pool:
        # Not imap: a process that hangs or dies would withhold the results of the others.
        for result in [pool.apply_async(task, (variant,)) for variant in variants]:
            try:
                yield result.get(None if deadline is None else max(0.0, deadline - time.perf_counter()))
            except multiprocessing.TimeoutError:
                yield None


def record_cache_misses(misses: list[str]) -> None:
    """From now on append to ``misses`` each block kernel that this process compiles itself."""
    from triton import knobs

    def listen(*, src: Any, cache_hit: bool, **others: Any) -> None:
        if not cache_hit and src.name == "_sigmoid_block_kernel":
            misses.append(str(src.signature))

    knobs.compilation.listener = listen


def _disable_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is first imported; under the interpreter nothing is compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def _compile_error(variant: Variant) -> str:
    """Why the variant does not compile; empty if it does."""
    try:
        compiled = compile_variant(variant)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    # Triton 3.6 also compiles C code for each signature, at the first launch if not here.
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    return ""
