"""NVRTC, which compiles CUDA C++ without nvcc, a toolkit, headers or a GPU. CUDA builds of torch bring it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

# Folders of a CUDA toolkit, which has it too: conda's, and the usual one.
TOOLKITS = (Path(sys.prefix, "lib"), Path("/usr/local/cuda/lib64"))


class CompileError(RuntimeError):
    """NVRTC is not on this machine, or does not compile a source: its first errors."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library: of the CUDA version that torch was built for, if that is here, else the newest; CompileError."""
    # A process that has loaded one of some major version gets that one, whatever the path.
    found = sorted(_libraries(), key=lambda path: (_major(path) == _torch_major(), _major(path)), reverse=True)
    reasons = []
    for path in found:
        try:
            # It looks for this one by name alone, and that of CUDA 13.0 not in its own folder.
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(path)
        except OSError as error:
            reasons.append(str(error))
        else:
            library.nvrtcGetErrorString.restype = c_char_p
            return library
    wheel = f"nvidia-cuda-nvrtc{'-cu12' if _torch_major() == 12 else ''}"
    raise CompileError("; ".join(["no NVRTC to compile it with: pip install " + wheel, *reasons[-1:]]))


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled."""
    try:
        load()
    except CompileError as error:
        return str(error)
    return None


@functools.cache
def version() -> tuple[int, int]:
    """(major, minor) of the CUDA version that NVRTC belongs to."""
    major, minor = c_int(), c_int()
    _check(load().nvrtcVersion(byref(major), byref(minor)))
    return major.value, minor.value


def compile_file(path: Path, options: Sequence[str], ptx: bool = False) -> bytes:
    """The machine code of a source file, or with ``ptx`` its PTX. Includes are found beside it."""
    library, program = load(), c_void_p()
    source = path.read_bytes()
    _check(library.nvrtcCreateProgram(byref(program), source, os.fsencode(path), 0, None, None))
    try:
        arguments = [os.fsencode(option) for option in (*options, f"-I{path.parent}")]
        if library.nvrtcCompileProgram(program, len(arguments), (c_char_p * len(arguments))(*arguments)):
            log = _output(program, "ProgramLog").decode(errors="replace")
            errors = [line for line in log.splitlines() if "error" in line] or log.splitlines()
            raise CompileError(f"NVRTC {'.'.join(map(str, version()))}: {'; '.join(errors[:3]) or 'failed'}")
        return _output(program, "PTX" if ptx else "CUBIN")
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _output(program: c_void_p, kind: str) -> bytes:
    size = c_size_t()
    _check(getattr(load(), f"nvrtcGet{kind}Size")(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(load(), f"nvrtcGet{kind}")(program, buffer))
    return buffer.raw if kind == "CUBIN" else buffer.value


def _check(error: int) -> None:
    if error:
        raise CompileError(f"NVRTC: {load().nvrtcGetErrorString(error).decode()}")


def _libraries() -> Iterator[str]:
    """Paths of NVRTC in the wheels that torch depends on and in toolkits, and the names that the loader may know."""
    for folder in (*(folder for root in _wheels() for folder in root.glob("*/lib")), *TOOLKITS):
        yield from map(str, folder.glob("libnvrtc.so.[0-9]*"))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")


def _wheels() -> list[Path]:
    """The folders of the namespace package ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(path) for path in (spec and spec.submodule_search_locations) or ()]


def _major(path: str) -> int:
    match = re.search(r"\.so\.(\d+)", path)
    return int(match[1]) if match else 0


def _torch_major() -> int:
    return int((torch.version.cuda or "0").partition(".")[0])
