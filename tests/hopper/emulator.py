"""Builds and drives the emulation of a Hopper: the runtime, kernels from source or from PTX, and launches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip_kernels import cache
from tests.building import HOST_CXX

HERE = Path(__file__).parent
# The name makes it the driver library that Triton's launcher looks for.
RUNTIME_FLAGS = ("-O3", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1")
# Translated kernels run once or twice: what their compilation takes matters more than how fast they are.
KERNEL_FLAGS = ("-O0", "-w")
CACHE, CACHE_SECONDS = Path(tempfile.gettempdir()) / f"siglip-hopper-{os.getuid()}", 24 * 3600
SCHEDULES = ("random", "starve", "priority", "round_robin")  # Schedule in state.h
TIMINGS = ("random", "at_once", "late")  # Timing in state.h


class LaunchError(RuntimeError):
    """What the kernel did wrong: a race, a deadlock, a rule of the ISA."""


@dataclass(frozen=True)
class Settings:
    """How a launch is scheduled, and when asynchronous work is done."""

    seed: int = 0
    schedule: str = "random"  # of SCHEDULES
    timing: str = "random"  # of TIMINGS
    strict_mbarriers: bool = True  # bulk copies need fence.mbarrier_init

    @classmethod
    def of_seed(cls, seed: int, **others: Any) -> Settings:
        """Settings that take every schedule and timing in turn."""
        return cls(seed, SCHEDULES[seed % 4], TIMINGS[seed // 4 % 3], **others)


def compile_library(name: str, files: Mapping[str, str], flags: Sequence[str], includes: Sequence[Path] = ()) -> Path:
    """The shared library of ``files`` (name: text; each .cpp is compiled), from the cache if it is there."""
    headers = {str(p): p.read_text() for folder in includes for p in sorted(folder.glob("*.h"))}
    assert HOST_CXX is not None
    key = hashlib.sha256(repr((sorted(files.items()), tuple(flags), headers, HOST_CXX)).encode()).hexdigest()[:24]
    folder = CACHE / key
    if found := cache.intact(folder, name):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with cache.private_folder(folder) as place:
        for file, text in files.items():
            (place / file).write_text(text)
        sources = [str(place / file) for file in files if file.endswith(".cpp")]
        library = place / f"{name}.so"
        command = [HOST_CXX, "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", *flags]
        command += [f"-I{folder}" for folder in (place, *includes)] + [*sources, "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[:4000]}")
        return cache.store(library, folder)


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulation itself. Its symbols are there for every library that is loaded later."""
    for folder in CACHE.glob("*"):
        with contextlib.suppress(OSError):  # another process may remove it too
            if time.time() - folder.stat().st_mtime > CACHE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    paths = [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.h")), HERE / "stand_ins" / "libcuda.cpp"]
    files = {path.name: path.read_text() for path in paths}
    library = ctypes.CDLL(str(compile_library("hopper", files, RUNTIME_FLAGS)), mode=ctypes.RTLD_GLOBAL)
    library.hopper_error.restype = ctypes.c_char_p
    library.hopper_stmatrix_conflicts.restype = ctypes.c_uint64
    for name, types in {
        "hopper_allow": (ctypes.c_uint64, ctypes.c_uint64),
        "hopper_configure": (ctypes.c_uint64, *[ctypes.c_int32] * 3),
        "hopper_launch": (ctypes.c_void_p, *[ctypes.c_uint32] * 4, ctypes.c_void_p),
    }.items():
        getattr(library, name).argtypes = types
    return library


def configure(settings: Settings) -> None:
    schedule, timing = SCHEDULES.index(settings.schedule), TIMINGS.index(settings.timing)
    runtime().hopper_configure(settings.seed, schedule, timing, settings.strict_mbarriers)


def allow(*arrays: Any) -> None:
    """Let kernels access the memory of these tensors or NumPy arrays, besides what they already may."""
    for array in arrays:
        if hasattr(array, "data_ptr"):
            storage = array.untyped_storage()
            runtime().hopper_allow(storage.data_ptr(), storage.nbytes())
        else:
            runtime().hopper_allow(array.ctypes.data, array.nbytes)


def forget() -> None:
    """Let kernels access all memory again."""
    runtime().hopper_forget()


def is_restricted() -> bool:
    """Whether kernels may access only what they are allowed to."""
    return bool(runtime().hopper_is_restricted())


class Program:
    """Kernels in C++ for the emulation, such as translated PTX."""

    def __init__(
        self, source: str, flags: Sequence[str] = KERNEL_FLAGS, headers: Mapping[str, str] | None = None
    ) -> None:
        runtime()
        path = compile_library("kernels", {"kernels.cpp": source} | dict(headers or {}), flags, [HERE])
        self.library = ctypes.CDLL(str(path))

    def body(self, name: str) -> int | None:
        """The address of a kernel's code."""
        return ctypes.cast(self.library[f"kernel_{name}"], ctypes.c_void_p).value

    def launch(
        self,
        name: str,
        grid: int = 1,
        threads: int = 32,
        args: Sequence[Any] = (),  # ctypes objects, in the order of the parameters
        *,
        shared: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """Run a kernel to its end; LaunchError if it breaks a rule."""
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        configure(settings or Settings())
        if runtime().hopper_launch(self.body(name), grid, threads, shared, 0, pointers):
            raise LaunchError(runtime().hopper_error().decode())
