"""Whether Triton can launch kernels, and their launch: of those that are compiled already past its JIT.

The JIT takes the host 30 µs to find a kernel again.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_not_launch() -> str | None:
    """Why Triton has no driver. It compiles a part of it in C on first use. The interpreter needs none."""
    try:
        import triton

        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # from Triton, the C compiler or the loader
        return f"Triton cannot launch here: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


class CompiledKernels:
    """The compilations of one kernel, by what they depend on."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def launch(
        self,
        key: Hashable,  # what the constants, options and the arguments' types depend on, and the device
        programs: int,
        arguments: dict[str, Any],  # all of the kernel's, in its order
        options: dict[str, Any],  # of the launch
        unaligned: Sequence[Tensor | None] = (),  # arguments that need not be aligned to 16 bytes; the others are
    ) -> None:
        """Launch on the current device and stream. Integers that Triton specializes belong to ``key``."""
        key = key, *[-1 if t is None else t.data_ptr() % 16 for t in unaligned]
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments.values())
            return
        compiled = self.kernel[(programs,)](**arguments, **options)
        if compiled is not None:  # as under the interpreter
            self._compiled[key] = compiled

    def forget(self) -> None:
        self._compiled.clear()
