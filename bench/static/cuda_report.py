"""Registers, spills and instructions of the kernels in csrc/cuda/, as NVRTC compiles them; needs no GPU."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.static.disassembly import nvidia_tool, sass_opcodes
from siglip_kernels.backends.cuda import kernels
from siglip_kernels.backends.cuda.kernels import Compilation

REGISTERS = 168  # of a thread at launch; with fewer, the consumers' setmaxnreg would wait forever
COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "LDL", "STL")
HEADER = f"{'kernel':30} {'regs':>5}{'stack':>6}" + "".join(f"{name:>10}" for name in COUNTED) + f"{'instr':>8}"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    compilation: Compilation
    registers: int
    stack: int  # bytes of local memory a thread
    opcodes: Counter[str]

    def problems(self) -> list[str]:
        """What is wrong with the kernel; empty if nothing is."""
        local = self.opcodes["LDL"] + self.opcodes["STL"]
        stores = ["UTMASTG", "STSM"] if self.compilation.output == "kDz" else []
        required = ["HGMMA", "UTMALDG", "USETMAXREG", *stores]
        problems = [f"no {opcode} instruction" for opcode in required if not self.opcodes[opcode]]
        if local or self.stack:
            problems.append(f"{local} local loads and stores, {self.stack} bytes of stack")
        if self.registers != REGISTERS:
            problems.append(f"{self.registers} registers, expected {REGISTERS}")
        return problems

    def __str__(self) -> str:
        counts = "".join(f"{self.opcodes[opcode]:>10}" for opcode in COUNTED)
        figures = f"{self.registers:>5}{self.stack:>6}{counts}{self.opcodes.total():>8}"
        return f"{self.compilation!s:30} {figures}  {'; '.join(self.problems())}".rstrip()


def inspect(compilation: Compilation) -> Kernel:
    """The kernel, which is compiled first if needed; CompileError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernels.machine_code(compilation))
        usage = nvidia_tool("cuobjdump", "-res-usage", str(path))
        code = nvidia_tool("cuobjdump", "-sass", str(path))
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage))
    return Kernel(compilation, registers, stack, Counter(sass_opcodes(code)))
