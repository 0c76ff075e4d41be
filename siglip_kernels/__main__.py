"""``python -m siglip_kernels check``: gradient check of the backends that run here; ``info``: which do, and why not;
``build``: compile ahead what is otherwise compiled on first use; ``doctor``: what a loss takes, and what would fit."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

import siglip_kernels
from siglip_kernels import backends, build, doctor, testing
from siglip_kernels.backends.base import Problem
from siglip_kernels.loss import Backend, sigmoid_loss

QUICK_SHAPES = ((1, 129, 33), (127, 129, 100), (600, 1100, 64))


def devices() -> list[torch.device]:
    """The kinds of device at hand, the CPU last."""
    return [torch.device(name) for name in ("cuda", "cpu") if name == "cpu" or torch.cuda.is_available()]


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {instructions}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons against a plain call of the backend."""
    return backends.why_not(backend, Problem(M=1024, N=1024, D=768, dtype=dtype, device=device))


def info() -> int:
    """Print versions, devices and backends, with every reason against an unavailable one."""
    print(f"siglip_kernels {siglip_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for device in devices():
        print(f"\n{device}: {describe(device)}")
        for backend in backends.NAMES[1:]:
            reasons = why_not(backend, device, torch.float32)
            pending = backend in build.TARGETS and not build.is_built(build.TARGETS[backend])
            unproven = backends.BACKENDS[backend].unproven
            available = "available" + (", not built yet: it will be on first use" if pending else "")
            available += f", {unproven}: only backend={backend!r} reaches it" if unproven else ""
            print(f"  {backend:<7} {available if not reasons else 'unavailable: ' + '; '.join(reasons)}")
    return 0


def build_ahead() -> int:
    """Compile every target, those that failed before too; 1 when any fails."""
    failed = 0
    for name, target in build.TARGETS.items():
        cached = build.is_built(target)
        build.forget_failure(target)
        start = time.perf_counter()
        try:
            path = build.library(target)
            print(f"{name}: {'cached' if cached else f'built in {time.perf_counter() - start:.1f} s'}: {path}")
        except build.BuildError as error:
            left_out = target.optional and not build.has_compiler(target)
            print(f"{name}: {'left out' if left_out else 'failed'}: {error}")
            failed += not left_out
    return int(failed > 0)


def check(only: str | None, only_device: torch.device | None, quick: bool) -> int:
    """Judge every backend that runs here against float64; 1 when any case fails, or when nothing could be checked."""
    shapes = QUICK_SHAPES if quick else testing.SHAPES
    checked, failed = 0, 0
    for device in devices() if only_device is None else [only_device]:
        for backend in backends.NAMES[1:] if only is None else [only]:
            plain = {dtype: Problem(1024, 1024, 768, dtype, device) for dtype in testing.DTYPES}
            possible = [dtype for dtype in plain if not backends.unprepared(backend, plain[dtype])]
            title = f"{backend} on {device} ({describe(device)})"
            if not possible:
                print(f"{title}: not run: {'; '.join(backends.unprepared(backend, plain[torch.float32]))}")
                continue
            loss_fn: Any = partial(sigmoid_loss, backend=cast(Backend, backend))
            call = plain[possible[0]]
            selection = {
                "dtypes": possible,
                "shapes": [s for s in shapes if not backends.why_not(backend, Problem(*s, call.dtype, device))],
                "pairs": testing.PLAIN_PAIRS if backends.only_plain(backend, call) else tuple(testing.PAIRS),
            }
            report = testing.check(loss_fn, device=device, progress=_progress, **selection)
            _progress(None)
            print(f"{title}: {'ok' if report.ok else 'FAILED'}\n{report}\n")
            checked += 1
            failed += not report.ok
    print(f"{checked} backends checked, {failed} failed")
    return int(failed > 0 or checked == 0)


def _device_here(name: str) -> torch.device:
    """The device of that name; argparse prints the error where there is none."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _progress(case: testing.Case | None) -> None:
    """Shows the case on a terminal's last line; None clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{'' if case is None else case}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m siglip_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices and backends, and the reasons against those unavailable")
    commands.add_parser("build", help="compile ahead, for images and clusters; tries again what failed before")
    check_parser = commands.add_parser("check", help="gradient check against float64")
    check_parser.add_argument("--backend", choices=backends.NAMES[1:], help="only this one")
    check_parser.add_argument("--device", type=_device_here, help="only this one (default: every kind at hand)")
    check_parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    doctor_parser = commands.add_parser("doctor", help="what eager and ours would take, and the batch that would fit")
    doctor.add_arguments(doctor_parser)
    chosen = parser.parse_args(arguments)
    if chosen.command == "doctor":
        return doctor.doctor(doctor_parser, chosen)
    if chosen.command == "check":
        return check(chosen.backend, chosen.device, chosen.quick)
    return info() if chosen.command == "info" else build_ahead()


if __name__ == "__main__":
    sys.exit(main())
