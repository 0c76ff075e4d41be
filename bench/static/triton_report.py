"""Registers, spills, shared memory and tensor-core instructions of every shipped Triton kernel; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bench.static.compilation import compile_variant, parallel_map
from bench.static.disassembly import nvidia_tool, sass_opcodes
from siglip_kernels.backends.triton import configs

# Tensor-core instructions.
TENSOR_CORE = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTC\w*MMA", "gfx942": r"v_mfma"}
COLUMNS = {"regs": 5, "spills": 6, "stack": 6, "shared": 7, "tensor": 6, "instr": 6, "conv": 6, "bar": 4}  # and widths
HEADER = f"{'variant':76} " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())

# Problems of a row that say nothing about the kernel.
NO_FIGURES, TIMED_OUT = "no figures", "not compiled in time"


@dataclass(frozen=True)
class Resources:
    """Resources that one compiled kernel uses on a multiprocessor."""

    registers: int  # a thread; AMD: vector registers, accumulators included
    spills: int  # NVIDIA: local loads and stores; AMD: spilled vector and scalar registers
    stack: int  # bytes of local (scratch) memory a thread
    shared: int  # bytes
    tensor_core: int  # instructions
    instructions: int  # of all kinds
    conversions: int  # of matrices from one layout to another, most of them through shared memory
    barriers: int


class Row(NamedTuple):
    """One line of the report."""

    variant: configs.Variant
    resources: Resources | None  # None: it does not compile
    problems: list[str]


def resources(variant: configs.Variant, compiled: Any) -> Resources:
    """The resources of ``variant`` as compile_variant compiled it."""
    return _amd_resources(compiled, variant) if _is_amd(variant) else _nvidia_resources(compiled, variant)


def find_problems(variant: configs.Variant, resources: Resources) -> list[str]:
    """What is wrong with the compiled ``variant``; empty if nothing is."""
    family = configs.family(variant.arch)
    limit = configs.SHARED_MEMORY[family]
    found = []
    if resources.spills or resources.stack:
        found.append(f"{resources.spills} spills, {resources.stack} bytes of stack")
    if resources.shared > limit:
        found.append(f"{resources.shared} bytes of shared memory, {variant.arch} has {limit}")
    if not resources.tensor_core:
        found.append(f"no {TENSOR_CORE[family]} instruction")
    return found


def inspect_variants(
    variants: list[configs.Variant], processes: int = 2, seconds: float | None = None
) -> Iterator[Row]:
    """Compile the variants in parallel; a row for each, in order. ``seconds``: for all of them."""
    for variant, row in zip(variants, parallel_map(_inspect, variants, processes, seconds), strict=True):
        yield row or Row(variant, None, [TIMED_OUT])


def _inspect(variant: configs.Variant) -> Row:
    try:
        compiled = compile_variant(variant)
    except Exception as error:
        return Row(variant, None, [f"does not compile: {type(error).__name__}: {str(error)[:300]}"])
    try:
        found = resources(variant, compiled)
    except (OSError, subprocess.SubprocessError, LookupError) as error:  # a disassembler is missing
        return Row(variant, None, [f"{NO_FIGURES}: {error}"])
    return Row(variant, found, find_problems(variant, found))


def _is_amd(variant: configs.Variant) -> bool:
    return variant.arch.startswith("gfx")


def _conversions(compiled: Any) -> int:
    return len(re.findall(r"ttg\.convert_layout .*: tensor<\d+x\d+", compiled.asm["ttgir"]))


def _nvidia_resources(compiled: Any, variant: configs.Variant) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = nvidia_tool("cuobjdump", "-res-usage", cubin.name)
        opcodes = sass_opcodes(nvidia_tool("nvdisasm", "-c", cubin.name))
    return Resources(
        registers=_integer(r"REG:(\d+)", usage),
        spills=sum(opcode in ("LDL", "STL") for opcode in opcodes),
        stack=_integer(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        tensor_core=_matches(TENSOR_CORE[configs.family(variant.arch)], opcodes),
        instructions=len(opcodes),
        conversions=_conversions(compiled),
        barriers=_matches("BAR", opcodes),
    )


def _amd_resources(compiled: Any, variant: configs.Variant) -> Resources:
    assembly = compiled.asm["amdgcn"]
    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", assembly, re.MULTILINE)
    return Resources(
        registers=_integer(r"\.vgpr_count:\s+(\d+)", assembly),
        spills=sum(_integer(rf"\.{kind}_spill_count:\s+(\d+)", assembly) for kind in ("vgpr", "sgpr")),
        stack=_integer(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        shared=compiled.metadata.shared,
        tensor_core=_matches(TENSOR_CORE[configs.family(variant.arch)], opcodes),
        instructions=len(opcodes),
        conversions=_conversions(compiled),
        barriers=_matches("s_barrier", opcodes),
    )


def _integer(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise LookupError(f"{pattern} is not in the compiler's output")
    return int(match[1])


def _matches(pattern: str, opcodes: list[str]) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)


def format_row(row: Row) -> str:
    figures = list(asdict(row.resources).values()) if row.resources else ["-"] * len(COLUMNS)
    cells = " ".join(f"{figure:>{width}}" for figure, width in zip(figures, COLUMNS.values(), strict=True))
    return f"{row.variant!s:76} {cells}  {'; '.join(row.problems)}".rstrip()
