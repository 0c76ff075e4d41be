"""Triton's own launcher on the emulation: a driver that compiles for sm_90 and runs the PTX on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from siglip_kernels.backends.triton.configs import SHARED_MEMORY, Variant
from tests.hopper import emulator
from tests.hopper.emulator import Program
from tests.hopper.ptx import translate


@dataclass
class EmulatedDriver:
    """What Triton asks of its active driver."""

    target: Any
    utils: Any
    launcher_cls: Any
    bodies: dict[bytes, int] = field(default_factory=dict)  # by cubin: the kernel, as a launch takes it
    programs: list[Program] = field(default_factory=list)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def add(self, cubin: bytes, name: str, ptx: str) -> None:
        """Run ``ptx`` where the compiled kernel is launched."""
        program = Program(translate(ptx))
        self.programs.append(program)
        self.bodies[cubin] = program.body(name)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        return None, self.bodies[cubin], 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY["sm_90"]}


@functools.cache
def _cuda_utils() -> tuple[Any, tempfile.TemporaryDirectory]:
    """Triton's launcher in C, linked to the emulation; and the folder with libcuda, to which Triton 3.6 links too."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "libcuda.so.1").symlink_to(emulator.runtime()._name)
    with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder.name):
        from triton.backends.nvidia.driver import CudaUtils

        return CudaUtils(), folder


@contextlib.contextmanager
def emulated_driver() -> Iterator[EmulatedDriver]:
    """Within it Triton's kernels compile for a Hopper and launch on the emulation."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.driver import driver

    utils, _ = _cuda_utils()
    emulated = EmulatedDriver(GPUTarget("cuda", 90, 32), None, CudaLauncher)
    own = {"load_binary": emulated.load_binary, "get_device_properties": emulated.get_device_properties}
    emulated.utils = SimpleNamespace(**{**vars(utils), **own})
    from siglip_kernels.backends.triton import launch

    before = driver._active
    driver.set_active(emulated)
    try:
        yield emulated
    finally:
        driver._active = before
        launch._kernels.forget()  # what it compiled runs on this driver alone


def compile_for(driver: EmulatedDriver, variant: Variant, mutate: Callable[[str], str]) -> None:
    """Compile the block kernel with Triton, and make its PTX, as ``mutate`` changes it, what a launch runs."""
    from siglip_kernels.backends.triton import launch

    compiled = launch.compile_variant(variant)
    driver.add(compiled.asm["cubin"], compiled.metadata.name, mutate(compiled.asm["ptx"]))
