"""The kernel of csrc/cuda/sm90 on the emulation: compiled from its source, or translated from NVRTC's PTX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from siglip_kernels import gemm
from siglip_kernels.backends import cuda
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.cuda import driver, kernels, nvrtc
from siglip_kernels.backends.cuda.driver import DriverError
from siglip_kernels.backends.cuda.kernels import Compilation
from tests.hopper import emulator
from tests.hopper.emulator import Program, Settings
from tests.hopper.problems import Kind, Outcome, mismatch, random_shape, random_task, tensors_of
from tests.hopper.ptx import translate

FOLDER = kernels.SOURCE.parent
STAND_INS = emulator.HERE / "stand_ins"
SOURCE_FLAGS = ("-O1", "-w")

LABELS = [  # labels, weights, masses
    *itertools.product(("none", "offset", "ids", "ignore"), (False, True), (None,)),
    *itertools.product(("ids",), (True,), ("weights", "soft_targets")),
]
KINDS = [
    Kind(dtype, *labels, output, with_stats, *more)
    for dtype, labels, output, with_stats, more in itertools.product(
        (torch.bfloat16, torch.float16),
        LABELS,
        ("dz", "dz", "float32 dz", "sums", "loss"),
        (False, False, True),
        ((False, False), (True, False), (True, True)),  # a balance, a teacher
    )
    if labels[1] or not any(more)  # which come with weights only
]
# What a mutation is tried on: one dtype, and for PTX one kernel. Half of them have no weights.
_IN_BFLOAT16 = [kind for kind in KINDS if kind.dtype is torch.bfloat16 and kind.output != "float32 dz"]
MUTATED_KINDS = _IN_BFLOAT16 + [kind for kind in _IN_BFLOAT16 if not kind.weights]
PLAIN_KINDS = [Kind(labels=labels) for labels in ("none", "offset")]

Texts = dict[str, str]  # by file name
Mutate = Callable[[Texts], None]
Load = Callable[[Compilation], Program]  # makes each compilation of the kernel when it is first launched


def from_source(mutate: Mutate = lambda texts: None) -> Load:
    """The kernel by the host's compiler, against a stand-in for ptx.cuh."""
    texts = _texts(FOLDER) | _texts(STAND_INS)
    mutate(texts)
    source = texts.pop("kernel.cpp")
    del texts["libcuda.cpp"]  # part of the emulation

    @functools.cache
    def load(compilation: Compilation) -> Program:
        defines = [option for option in kernels.options(compilation) if option.startswith("-D")]
        return Program(source, (*SOURCE_FLAGS, *defines), texts)

    return load


def from_ptx(mutate: Mutate = lambda texts: None) -> Load:
    """The kernel from the PTX that NVRTC makes of it, ptx.cuh and all."""
    texts = _texts(FOLDER)
    mutate(texts)

    @functools.cache
    def load(compilation: Compilation) -> Program:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)
            ptx = nvrtc.compile_file(Path(folder) / "kernel.cu", kernels.options(compilation), ptx=True)
        return Program(translate(ptx.decode()))

    return load


def random_blocks(load: Load, seeds: range, kinds: list[Kind]) -> Iterator[Outcome]:
    """Run random blocks, each on 1 to 7 multiprocessors."""
    return (_random_block(load, seed, kinds) for seed in seeds)


def _random_block(load: Load, seed: int, kinds: list[Kind]) -> Outcome:
    choose = random.Random(seed)
    kind, shape, multiprocessors = choose.choice(kinds), random_shape(choose), choose.randint(1, 7)
    task, kernel = random_task(choose, kind, *shape), cuda.CudaBlockKernel()
    problem = Problem(shape[0], shape[1], shape[2], kind.dtype, task.x.device, task.dz is not None)
    settings = Settings.of_seed(seed)
    with emulated(load, multiprocessors, settings):
        task = task._replace(workspace=kernel.workspace(problem, *shape[:2]))
        partials = task.workspace.partials.fill_(torch.nan)
        if not kind.stats:  # which it allocates by itself
            emulator.allow(partials, *tensors_of(task))
        try:
            kernel.launch(kernel.variant(task), task)
            wrong = mismatch(task)
        except DriverError as error:
            wrong = str(error)
    return f"seed {seed}, {kind}, {shape}, {multiprocessors} multiprocessors, {settings}", wrong


@contextlib.contextmanager
def emulated(load: Load, multiprocessors: int, settings: Settings) -> Iterator[None]:
    """Within it ``CudaBlockKernel`` launches on the emulation, with tensors on the CPU."""
    emulator.configure(settings)

    def load_kernel(compilation: Compilation, device: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(load(compilation).body(kernels.NAME))

    def pad_to_alignment(t: Tensor) -> Tensor:
        padded = gemm.pad_to_alignment(t)
        if emulator.is_restricted():
            emulator.allow(padded)
        return padded

    with (
        mock.patch.object(driver, "load", emulator.runtime),
        mock.patch.object(kernels, "load_kernel", load_kernel),
        mock.patch.object(kernels, "_multiprocessors", return_value=multiprocessors),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True),
        mock.patch.object(cuda, "pad_to_alignment", pad_to_alignment),
    ):
        try:
            yield
        finally:
            emulator.forget()


def _texts(folder: Path) -> Texts:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}
