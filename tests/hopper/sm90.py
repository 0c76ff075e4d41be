"""The kernels of csrc/cuda/sm90 on the emulation: compiled from their source, or translated from nvcc's PTX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from siglip_kernels import build
from siglip_kernels.backends import cuda
from tests.hopper import emulator

FOLDER = build.CSRC / "cuda" / "sm90"
STAND_INS = emulator.HERE / "source"
FLAGS = ("-O1", "-w")

Mutate = Callable[[dict[str, str]], None]  # changes the texts of files by name


def sources() -> dict[str, str]:
    """The kernel's files, with stand-ins for what only nvcc compiles."""
    files = {path.name: path.read_text() for path in FOLDER.glob("*.*")}
    files |= {path.name: path.read_text() for path in STAND_INS.iterdir()}
    files["instantiations_float16.cpp"] = '#define SIGLIP_FLOAT16\n#include "instantiations.cu"\n'
    return files


def from_source(mutate: Mutate | None = None) -> ctypes.CDLL:
    files = sources()
    if mutate is not None:
        mutate(files)
    return _load(emulator.compile_library("sm90", files, FLAGS, [emulator.HERE]))


def _load(path) -> ctypes.CDLL:
    emulator.runtime()
    library = ctypes.CDLL(str(path))
    cuda.declare(library)
    return library


@contextlib.contextmanager
def emulated(library: ctypes.CDLL, multiprocessors: int, settings: emulator.Settings) -> Iterator[None]:
    """Within it ``CudaBlockKernel`` launches on the emulation, with tensors on the CPU."""
    library.siglip_sm90_emulate(multiprocessors)
    emulator.configure(settings)
    stream = SimpleNamespace(cuda_stream=None)
    with (
        mock.patch.object(cuda, "load", lambda: library),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", lambda: stream),
    ):
        yield
