"""The kernels of csrc/cuda/sm90 on the emulation: compiled from their source, or translated from nvcc's PTX."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from siglip_kernels import build, gemm, targets
from siglip_kernels.backends import cuda
from siglip_kernels.backends.base import Problem
from tests.hopper import emulator
from tests.hopper.emulator import Settings
from tests.hopper.problems import Kind, Outcome, mismatch, random_shape, random_task, tensors_of
from tests.hopper.ptx import translate

FOLDER = build.CSRC / "cuda" / "sm90"
STAND_INS = emulator.HERE / "stand_ins"
SOURCE_FLAGS = ("-O1", "-w")
NO_FLOAT16 = """#include "instantiations.h"
const void* siglip::sm90::select_float16_kernel(const BlockParams&) { return nullptr; }
"""
FLOAT16 = '#define SIGLIP_FLOAT16\n#include "instantiations.cu"\n'

CONFIGURATIONS = {
    name: tuple(flag for flag in target.flags if flag.startswith("-D"))
    for name, target in targets.SM90_CONFIGURATIONS.items()
}
LABELS = [  # labels, weights, masses
    *itertools.product(("none", "offset", "ids", "ignore"), (False, True), (None,)),
    *itertools.product(("ids",), (True,), ("weights", "soft_targets")),
]
KINDS = [
    Kind(dtype, *labels, output, with_stats)
    for dtype, labels, output, with_stats in itertools.product(
        (torch.bfloat16, torch.float16), LABELS, ("dz", "dz", "float32 dz", "sums", "loss"), (False, False, True)
    )
]


def kinds_of(configuration: str) -> list[Kind]:
    """What the library runs: a cluster has nothing to share in the small problems that need dz in float32."""
    return [kind for kind in KINDS if "multicast" not in configuration or kind.output != "float32 dz"]


# What a mutation is tried on: one dtype, and for PTX one kernel.
MUTATED_KINDS = [kind for kind in KINDS if kind.dtype is torch.bfloat16 and kind.output != "float32 dz"]
PLAIN = "PairsE0ELNS0_6OutputE0E"
PLAIN_KINDS = [Kind(labels=labels) for labels in ("none", "offset")]

Texts = dict[str, str]  # by file name
Mutate = Callable[[Texts], None]


def from_source(
    mutate: Mutate = lambda texts: None, defines: Sequence[str] = (), *, only_bfloat16: bool = False
) -> ctypes.CDLL:
    """The library, compiled by the host's compiler against stand-ins for ptx.cuh and CUDA's headers."""
    texts = _texts(FOLDER) | _stand_ins()
    mutate(texts)
    texts["instantiations_float16.cpp"] = NO_FLOAT16 if only_bfloat16 else FLOAT16
    return _load(emulator.compile_library("sm90", texts, (*SOURCE_FLAGS, *defines), [emulator.HERE]))


def from_ptx(
    mutate: Mutate = lambda texts: None, defines: Sequence[str] = (), *, only_bfloat16: bool = False, only: str = ""
) -> ctypes.CDLL:
    """The library with kernels from the PTX that nvcc makes of them, ptx.cuh and all.

    ``only``: translate just the kernels whose mangled names contain it.
    """
    texts = _texts(FOLDER)
    mutate(texts)
    flags = [()] if only_bfloat16 else [(), ("-DSIGLIP_FLOAT16",)]
    kernels = {f"kernels_{i}.cpp": _kernels(_nvcc(texts, *defines, *flag), only) for i, flag in enumerate(flags)}
    # The kernels are only declared where the launcher selects one: its name is that of nvcc's.
    texts["kernel.cuh"], count = re.subn(
        r"(?s)(sigmoid_block_kernel\([^{]*\)) \{.*", r"\1;\n}  // namespace siglip::sm90\n", texts["kernel.cuh"]
    )
    assert count == 1
    texts |= _stand_ins() | kernels | {"instantiations_float16.cpp": NO_FLOAT16 if only_bfloat16 else FLOAT16}
    compile_flags = (*emulator.KERNEL_FLAGS, "-DSIGLIP_FROM_PTX", *defines)
    return _load(emulator.compile_library("sm90_ptx", texts, compile_flags, [emulator.HERE]))


def random_blocks(library: ctypes.CDLL, seeds: range, kinds: list[Kind]) -> Iterator[Outcome]:
    """Run random blocks, each on 1 to 7 multiprocessors."""
    return (_random_block(library, seed, kinds) for seed in seeds)


def _random_block(library: ctypes.CDLL, seed: int, kinds: list[Kind]) -> Outcome:
    choose = random.Random(seed)
    kind, shape, multiprocessors = choose.choice(kinds), random_shape(choose), choose.randint(1, 7)
    task, kernel = random_task(choose, kind, *shape), cuda.CudaBlockKernel()
    problem = Problem(shape[0], shape[1], shape[2], kind.dtype, task.x.device, task.dz is not None)
    settings = Settings.of_seed(seed)
    with emulated(library, multiprocessors, settings):
        task = task._replace(workspace=kernel.workspace(problem, *shape[:2]))
        partials = task.workspace.partials.fill_(torch.nan)
        if not kind.stats:  # which it allocates by itself
            emulator.allow(partials, *tensors_of(task))
        try:
            kernel.launch(kernel.variant(task), task)
            wrong = mismatch(task)
        except RuntimeError as error:
            wrong = str(error)
    return f"seed {seed}, {kind}, {shape}, {multiprocessors} multiprocessors, {settings}", wrong


@contextlib.contextmanager
def emulated(library: ctypes.CDLL, multiprocessors: int, settings: Settings) -> Iterator[None]:
    """Within it ``CudaBlockKernel`` launches on the emulation, with tensors on the CPU."""
    library.siglip_sm90_emulate(multiprocessors)
    emulator.configure(settings)
    stream = SimpleNamespace(cuda_stream=None)

    def pad_to_alignment(t: Tensor) -> Tensor:
        padded = gemm.pad_to_alignment(t)
        if emulator.is_restricted():
            emulator.allow(padded)
        return padded

    with (
        mock.patch.object(cuda, "load", return_value=library),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(cuda, "pad_to_alignment", pad_to_alignment),
    ):
        try:
            yield
        finally:
            emulator.forget()


def _stand_ins() -> Texts:
    texts = _texts(STAND_INS)
    del texts["libcuda.cpp"]  # part of the emulation
    return texts


def _texts(folder: Path) -> Texts:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def _load(path: Path) -> ctypes.CDLL:
    emulator.runtime()
    return cuda.declare(ctypes.CDLL(str(path)))


def _nvcc(texts: Texts, *flags: str) -> str:
    """The PTX of the kernels of one dtype."""
    nvcc, _ = build._compiler(targets.TARGETS["cuda"])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text)
        options = ("-std=c++17", "-O3", "-arch=compute_90a", "--ptx", *flags)
        command = [*nvcc, *options, "instantiations.cu", "-o", "out.ptx"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (Path(folder) / "out.ptx").read_text()


def _kernels(ptx: str, only: str) -> str:
    """C++ of the kernels in ``ptx``, each under its own name; one that is left out is a trap."""
    header, *entries = re.split(r"(?=\.visible \.entry )", ptx)
    names = [re.search(r"\.entry (\w+)", entry)[1] for entry in entries]
    code = translate(header + "".join(entry for name, entry in zip(names, entries, strict=True) if only in name))
    # Two dtypes cannot share a table.
    code = re.sub(r'extern "C" const (Kernel hopper_kernels|uint32_t hopper_kernel_count)', r"static const \1", code)
    translated = dict(re.findall(r'\{"(\w+)", (kernel_\d+),', code))
    for name in names:
        call = f"{translated[name]}(args)" if name in translated else "__builtin_trap()"
        code += f'extern "C" void {name}(void* const* args) {{ {call}; }}\n'
    return code
