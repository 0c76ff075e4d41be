"""What there is to compile: the shared libraries, their sources below csrc/ and their flags."""

from __future__ import annotations

import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A file below csrc/ and its own flags. A target may compile one file in several ways."""

    path: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One shared library."""

    name: str
    sources: tuple[Source, ...]
    headers: tuple[str, ...] = ()  # below csrc/, all that the sources include: a change triggers a new build
    flags: tuple[str, ...] = ()  # for every source; csrc/ is on the include path
    link_flags: tuple[str, ...] = ()


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
# The epilogue for each instruction set, whatever this machine has: the library chooses at run time.
_X86 = (
    Source("cpu/epilogue.cpp", ("-DSIGLIP_ISA_LEVEL=avx2", "-mavx2", "-mfma")),
    Source("cpu/epilogue.cpp", ("-DSIGLIP_ISA_LEVEL=avx512", *_AVX512)),
    Source("cpu/gemm.cpp", (*_AVX512, "-mavx512bf16")),
)
CPU_PORTABLE_SOURCES = (
    Source("cpu/interface.cpp"),
    Source("cpu/cpu_info.cpp"),
    Source("cpu/epilogue.cpp", ("-DSIGLIP_ISA_LEVEL=portable",)),
)
_CPU_HEADERS = ("convert", "cpu_info", "epilogue", "gemm", "interface", "parallel", "params", "simd", "simd_math")

TARGETS = {  # by the backend's name
    "cpu": Target(
        "cpu",
        CPU_PORTABLE_SOURCES + (_X86 if platform.machine().lower() in ("x86_64", "amd64") else ()),
        headers=tuple(f"cpu/{name}.h" for name in _CPU_HEADERS),
        flags=("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"),
    ),
}
