"""What a figure depends on: device, driver, versions, commit, threads, date."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch

import siglip_kernels


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on: device, driver, versions, commit, threads, date."""
    return {
        "device": _device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": str(torch.get_num_threads()),
        "siglip_kernels": siglip_kernels.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "import": _import_time(),
        "date": datetime.date.today().isoformat(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    name = model[0].split(":")[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@functools.cache
def _import_time() -> str:
    """Time that importing siglip_kernels takes after torch is imported."""
    program = "import time, torch; s = time.perf_counter(); import siglip_kernels; print(time.perf_counter() - s)"
    seconds = _output(sys.executable, "-c", program)
    return seconds and f"{1000 * float(seconds):.0f} ms"


def _output(*command: str) -> str:
    try:
        here = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
