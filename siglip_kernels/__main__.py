"""``python -m siglip_kernels check``: gradient check of the backends that run here; ``info``: which do, and why not;
``build``: compile ahead what is otherwise compiled on first use; ``doctor``: what a loss takes, and what would fit."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch

import siglip_kernels
from siglip_kernels import backends, build, console, targets, testing
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.cuda import kernels, nvrtc
from siglip_kernels.backends.verification import describe_device, recorded
from siglip_kernels.loss import Backend, sigmoid_loss
from siglip_kernels.memory import doctor

QUICK_SHAPES = ((1, 129, 33), (127, 129, 100), (600, 1100, 64))


def devices() -> list[torch.device]:
    """The kinds of device on this machine, the CPU last."""
    return [torch.device(name) for name in ("cuda", "cpu") if name == "cpu" or torch.cuda.is_available()]


def sample_problems(device: torch.device) -> dict[torch.dtype, Problem]:
    """For each dtype, a call that every backend for that dtype should run."""
    return {dtype: Problem(M=1024, N=1024, D=768, dtype=dtype, device=device) for dtype in testing.DTYPES}


def why_not(backend: str, device: torch.device) -> list[str]:
    """The reasons against a call in the dtype that suits the backend best, as far as known without compiling."""
    reasons = fewest_reasons(backends.why_not(backend, call) for call in sample_problems(device).values())
    is_built = backend in targets.TARGETS and build.is_built(targets.TARGETS[backend])
    return reasons or (backends.BACKENDS[backend].prepare() if is_built else [])


def fewest_reasons(reasons: Iterable[list[str]]) -> list[str]:
    """One backend's reasons in the dtype that suits it best; ``reasons``: its reasons in several dtypes."""
    return min(reasons, key=lambda found: len(found))


def info() -> int:
    """Print versions, devices and backends, with every reason against an unavailable one."""
    print(f"siglip_kernels {siglip_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for device in devices():
        print(f"\n{device}: {describe_device(device)}")
        for backend in backends.NAMES[1:]:
            reasons = why_not(backend, device)
            pending = backend in targets.TARGETS and not build.is_built(targets.TARGETS[backend])
            available = "available" + (", not built yet: it will be on first use" if pending else "")
            print(f"  {backend:<7} {available if not reasons else 'unavailable: ' + '; '.join(reasons)}")
        for kernel in recorded(device):
            print(f"  verified here: {kernel}")
    return 0


def build_all() -> int:
    """Compile every library, also those that failed before, and every CUDA kernel. Returns 1 if any fails."""
    build.remove_leftovers()
    failed = 0
    for name, target in targets.TARGETS.items():
        cached = build.is_built(target)
        build.forget_failure(target)
        start = time.perf_counter()
        try:
            path = build.library(target)
            print(f"{name}: {'cached' if cached else f'built in {time.perf_counter() - start:.1f} s'}: {path}")
        except build.BuildError as error:
            print(f"{name}: failed: {error}")
            failed += 1
    return int(failed + _build_cuda() > 0)


def _build_cuda() -> bool:
    """Compile every kernel of the CUDA backend, where NVRTC is. Returns whether that failed."""
    if reason := nvrtc.why_not():
        print(f"cuda: left out: {reason}")
        return False
    start = time.perf_counter()
    try:
        for compilation in kernels.EVERY:
            kernels.machine_code(compilation)
    except nvrtc.CompileError as error:
        print(f"cuda: failed: {error}")
        return True
    print(f"cuda: {len(kernels.EVERY)} kernels built in {time.perf_counter() - start:.1f} s, or cached")
    return False


def check(only: str | None, only_device: torch.device | None, quick: bool) -> int:
    """Judge every backend that runs here against float64. Returns 1 if a case fails, or if nothing could be checked."""
    shapes = QUICK_SHAPES if quick else testing.SHAPES
    checked, failed = 0, 0
    for device in devices() if only_device is None else [only_device]:
        for backend in backends.NAMES[1:] if only is None else [only]:
            samples = sample_problems(device)
            reasons = {dtype: backends.why_not_prepared(backend, call) for dtype, call in samples.items()}
            possible = [dtype for dtype in samples if not reasons[dtype]]
            title = f"{backend} on {device} ({describe_device(device)})"
            if not possible:
                print(f"{title}: not run: {'; '.join(fewest_reasons(reasons.values()))}")
                continue
            report = judge(backend, device, possible, shapes, _progress)
            _progress(None)
            print(f"{title}: {'ok' if report.ok else 'FAILED'}\n{report}\n")
            checked += 1
            failed += not report.ok
    print(f"{checked} backend{'s' * (checked != 1)} checked, {failed} failed")
    return int(failed > 0 or checked == 0)


def judge(
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],  # that it runs
    shapes: Iterable[tuple[int, int, int]],  # M, N, D
    progress: Callable[[testing.Case], None] | None = None,
) -> testing.Report:
    """Judge one backend against float64, on the ``shapes`` that it runs."""
    loss_fn: Any = partial(sigmoid_loss, backend=cast(Backend, backend))
    return testing.check(
        loss_fn,
        device=device,
        progress=progress,
        dtypes=dtypes,
        shapes=[shape for shape in shapes if not backends.why_not(backend, Problem(*shape, dtypes[0], device))],
    )


def available_device(name: str) -> torch.device:
    """The device of that name, if values can be stored on it and read back; else argparse prints the error."""
    try:
        torch.zeros(1, dtype=torch.float32, device=name).item()
        return torch.device(name)
    except Exception as error:  # many devices raise errors of their own kind
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"no device {name!r} here: {reason}") from error


def _progress(case: testing.Case | None) -> None:
    """Show the case on a terminal's last line; None clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{'' if case is None else case}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m siglip_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices and backends, and the reasons against those unavailable")
    commands.add_parser("build", help="compile ahead, for images and clusters; tries again what failed before")
    check_parser = commands.add_parser("check", help="gradient check against float64")
    check_parser.add_argument("--backend", choices=backends.NAMES[1:], help="only this one")
    check_parser.add_argument("--device", type=available_device, help="only this one (default: every kind here)")
    check_parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    doctor_parser = commands.add_parser("doctor", help="what eager and ours would take, and the batch that would fit")
    doctor.add_arguments(doctor_parser)
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        return doctor.doctor(doctor_parser, chosen)
    if chosen.command == "check":
        return check(chosen.backend, chosen.device, chosen.quick)
    return info() if chosen.command == "info" else build_all()


if __name__ == "__main__":
    sys.exit(console.run(main))
