"""Registers, spills and instructions of the kernels in csrc/cuda/, as nvcc compiled them; needs no GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from bench.static.disassembly import nvidia_tool, sass_opcodes
from siglip_kernels import build
from siglip_kernels.backends import cuda

SHARED_MEMORY = 227 * 1024  # of a thread block on Hopper
REGISTERS = 168  # of a thread at launch; with fewer, the consumers' setmaxnreg would wait forever
OUTPUTS = ("dz", "sums", "loss")  # Output of csrc/cuda/sm90/epilogue.cuh
COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU", "LDL", "STL")
# Matches Element, kGeneral and kOutput in a mangled name.
NAME = re.compile(r"sigmoid_block_kernelINS0_\d+(B?[Ff]loat16)ELb(\d)ELNS0_6OutputE(\d)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    dtype: str  # "Bfloat16" | "Float16"
    general: bool  # ids and weights
    output: str  # of OUTPUTS
    registers: int
    stack: int  # bytes of local memory a thread
    shared: int  # bytes
    opcodes: Counter[str]

    def problems(self) -> list[str]:
        """What is wrong with the kernel; empty if nothing is."""
        local = self.opcodes["LDL"] + self.opcodes["STL"]
        required = ["HGMMA", "UTMALDG", "USETMAXREG", *(["UTMASTG", "STSM"] if self.output == "dz" else [])]
        problems = [f"no {opcode} instruction" for opcode in required if not self.opcodes[opcode]]
        if local or self.stack:
            problems.append(f"{local} local loads and stores, {self.stack} bytes of stack")
        if self.registers != REGISTERS:
            problems.append(f"{self.registers} registers, expected {REGISTERS}")
        if self.shared > SHARED_MEMORY:
            problems.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY} fit")
        return problems

    def __str__(self) -> str:
        kind = f"{self.dtype:8} {'ids, weights' if self.general else 'offset':12} {self.output:4}"
        counts = "".join(f"{self.opcodes[opcode]:>8}" for opcode in COUNTED)
        figures = f"{self.registers:>5}{self.stack:>6}{self.shared:>8}{counts}{self.opcodes.total():>8}"
        return f"{kind} {figures}  {'; '.join(self.problems())}".rstrip()


def header() -> str:
    """The column titles of the table of kernels."""
    counts = "".join(f"{opcode:>8}" for opcode in (*COUNTED, "instr"))
    return f"{'dtype':8} {'labels':12} {'out':4} {'regs':>5}{'stack':>6}{'shared':>8}{counts}"


def kernels() -> list[Kernel]:
    """Every kernel of the library, which is built first if needed; BuildError if that fails."""
    library = str(build.library(build.TARGETS["cuda"]))
    loaded = cuda.load()
    assert not isinstance(loaded, str), loaded
    usage = _by_kernel(nvidia_tool("cuobjdump", "-res-usage", library), r"Function (\S+):")
    code = _by_kernel(nvidia_tool("cuobjdump", "-sass", library), r"Function : (\S+)")
    return [_kernel(name, usage[name], code[name], loaded.siglip_sm90_shared_bytes()) for name in code]


def _kernel(name: str, usage: str, code: str, dynamic_shared: int) -> Kernel:
    match = NAME.search(name)
    assert match is not None, name
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage))
    return Kernel(
        match[1], match[2] == "1", OUTPUTS[int(match[3])], registers, stack, dynamic_shared, Counter(sass_opcodes(code))
    )


def _by_kernel(text: str, heading: str) -> dict[str, str]:
    _, *parts = re.split(heading, text)
    return dict(zip(parts[::2], parts[1::2], strict=True))
