"""What the tests of the translator share: the head of a module, and a launch on arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.hopper import emulator
from tests.hopper.emulator import Program

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"


def launch(program: Program, name: str, *arrays: np.ndarray, **options: Any) -> None:
    """Run a kernel whose parameters are the addresses of the arrays, which are all that it may access."""
    emulator.forget()
    emulator.allow(*arrays)
    try:
        program.launch(name, args=[ctypes.c_uint64(array.ctypes.data) for array in arrays], **options)
    finally:
        emulator.forget()
