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
    compiler: str = "cxx"  # or "nvcc"
    optional: bool = False  # few machines have its compiler


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
_SM90_HEADERS = (
    *(f"{name}.h" for name in ("config", "host_device", "instantiations", "layout", "params", "pipeline")),
    *(f"{name}.h" for name in ("sigmoid_loss", "tile_scheduler")),
    *(f"{name}.cuh" for name in ("epilogue", "general_pairs", "kernel", "ptx")),
)


def _sm90(name: str, *defines: str) -> Target:
    """The kernels for Hopper; ``defines``: of csrc/cuda/sm90/config.h."""
    return Target(
        name,
        (
            Source("cuda/sm90/launch.cu"),
            Source("cuda/sm90/instantiations.cu"),
            Source("cuda/sm90/instantiations.cu", ("-DSIGLIP_FLOAT16",)),
        ),
        headers=tuple(f"cuda/sm90/{name}" for name in _SM90_HEADERS),
        flags=(
            *("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fvisibility=hidden"),
            *defines,
        ),
        compiler="nvcc",
        optional=True,
    )


TARGETS = {  # by the backend's name
    "cpu": Target(
        "cpu",
        CPU_PORTABLE_SOURCES + (_X86 if platform.machine().lower() in ("x86_64", "amd64") else ()),
        headers=tuple(f"cpu/{name}.h" for name in _CPU_HEADERS),
        flags=("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"),
    ),
    "cuda": _sm90("cuda"),
}
# The tile configurations of the Hopper kernel, by name. Which is fastest is for a GPU to say: until then the first.
SM90_CONFIGURATIONS = {
    "128x128": TARGETS["cuda"],
    "128x128, multicast": _sm90("cuda_multicast", "-DSIGLIP_SM90_CLUSTER=2"),
    "128x256": _sm90("cuda_n256", "-DSIGLIP_SM90_BLOCK_N=256"),
    "128x256, multicast": _sm90("cuda_n256_multicast", "-DSIGLIP_SM90_BLOCK_N=256", "-DSIGLIP_SM90_CLUSTER=2"),
}
