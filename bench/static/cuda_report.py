"""Registers, spills and instructions of the kernels in csrc/cuda/, as nvcc compiled them; needs no GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from bench.static.disassembly import nvidia_tool, sass_opcodes
from siglip_kernels import build, targets
from siglip_kernels.backends import cuda

SHARED_MEMORY = 227 * 1024  # of a thread block on Hopper
REGISTERS = 168  # of a thread at launch; with fewer, the consumers' setmaxnreg would wait forever
# Pairs and Output of csrc/cuda/sm90/epilogue.cuh.
PAIRS, OUTPUTS = ("offset", "general", "stats"), ("dz", "float32 dz", "sums", "loss")
COUNTED = ("HGMMA", "UTMALDG", "MULTICAST", "UTMASTG", "MUFU", "LDL", "STL")
# Matches Element, kPairs and kOutput in a mangled name.
NAME = re.compile(r"sigmoid_block_kernelINS0_\d+(B?[Ff]loat16)ELNS0_5PairsE(\d)ELNS0_6OutputE(\d)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    configuration: str  # of targets.SM90_CONFIGURATIONS
    dtype: str  # "Bfloat16" | "Float16"
    pairs: str  # of PAIRS
    output: str  # of OUTPUTS
    registers: int
    stack: int  # bytes of local memory a thread
    shared: int  # bytes
    opcodes: Counter[str]  # MULTICAST: those UTMALDG that load into every CTA of a cluster

    def problems(self) -> list[str]:
        """What is wrong with the kernel; empty if nothing is."""
        local = self.opcodes["LDL"] + self.opcodes["STL"]
        required = ["HGMMA", "UTMALDG", "USETMAXREG", *(["UTMASTG", "STSM"] if self.output == "dz" else [])]
        required += ["MULTICAST"] if "multicast" in self.configuration else []
        problems = [f"no {opcode} instruction" for opcode in required if not self.opcodes[opcode]]
        if local or self.stack:
            problems.append(f"{local} local loads and stores, {self.stack} bytes of stack")
        if self.registers != REGISTERS:
            problems.append(f"{self.registers} registers, expected {REGISTERS}")
        if self.shared > SHARED_MEMORY:
            problems.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY} fit")
        return problems

    def __str__(self) -> str:
        kind = f"{self.configuration:18} {self.dtype:8} {self.pairs:7} {self.output:10}"
        counts = "".join(f"{self.opcodes[opcode]:>10}" for opcode in COUNTED)
        instructions = self.opcodes.total() - self.opcodes["MULTICAST"]
        figures = f"{self.registers:>5}{self.stack:>6}{self.shared:>8}{counts}{instructions:>8}"
        return f"{kind} {figures}  {'; '.join(self.problems())}".rstrip()


def header() -> str:
    """The column titles of the table of kernels."""
    counts = "".join(f"{opcode:>10}" for opcode in COUNTED)
    return f"{'tile':18} {'dtype':8} {'pairs':7} {'out':10} {'regs':>5}{'stack':>6}{'shared':>8}{counts}{'instr':>8}"


def kernels(configuration: str) -> list[Kernel]:
    """Every kernel of the library, which is built first if needed; BuildError if that fails."""
    library = str(build.library(targets.SM90_CONFIGURATIONS[configuration]))
    loaded = cuda.load(configuration)
    assert not isinstance(loaded, str), loaded
    usage = _by_kernel(nvidia_tool("cuobjdump", "-res-usage", library), r"Function (\S+):")
    code = _by_kernel(nvidia_tool("cuobjdump", "-sass", library), r"Function : (\S+)")
    shared = loaded.siglip_sm90_shared_bytes()
    return [_kernel(configuration, name, usage[name], code[name], shared) for name in sorted(code)]


def _kernel(configuration: str, name: str, usage: str, code: str, dynamic_shared: int) -> Kernel:
    match = NAME.search(name)
    assert match is not None, name
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage))
    opcodes = Counter(sass_opcodes(code)) + Counter(MULTICAST=len(re.findall(r"UTMALDG\S*\.MULTICAST", code)))
    kind = match[1], PAIRS[int(match[2])], OUTPUTS[int(match[3])]
    return Kernel(configuration, *kind, registers, stack, dynamic_shared, opcodes)


def _by_kernel(text: str, heading: str) -> dict[str, str]:
    _, *parts = re.split(heading, text)
    return dict(zip(parts[::2], parts[1::2], strict=True))
