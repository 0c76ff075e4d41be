"""The table of backends and the choice among them."""

from __future__ import annotations

from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.backends.cpu import CpuBlockKernel
from siglip_kernels.backends.cuda import CudaBlockKernel
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel

# In order of preference: "auto" takes the first that can run the call; the last one always can.
BACKENDS: dict[str, BlockKernel] = {
    kernel.name: kernel for kernel in (CudaBlockKernel(), TritonBlockKernel(), CpuBlockKernel(), EagerBlockKernel())
}
NAMES = ("auto", *BACKENDS)


def choose(name: str, problem: Problem) -> BlockKernel:
    """The block kernel that runs ``problem``; ValueError with every reason if the named one cannot."""
    if name == "auto":
        for kernel in BACKENDS.values():
            if kernel.is_automatic(problem) and not kernel.why_not(problem) and not kernel.prepare():
                return kernel
    reasons = why_not_prepared(name, problem)
    if reasons:
        raise ValueError(f"backend={name!r} cannot run this call: " + "; ".join(reasons))
    return BACKENDS[name]


def why_not_prepared(name: str, problem: Problem) -> list[str]:
    """Every reason why the named backend cannot run ``problem``. Prepares it if none is known before."""
    return why_not(name, problem) or BACKENDS[name].prepare()


def why_not(name: str, problem: Problem) -> list[str]:
    """Every reason why the named backend cannot run ``problem``, as far as known without compiling."""
    return BACKENDS[name].why_not(problem)
