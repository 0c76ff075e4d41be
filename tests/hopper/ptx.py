"""PTX as C++ that runs on the emulation: a function for each kernel, a statement for each instruction.

Every thread runs its kernel's function on a stack of its own, so registers are local arrays, one for each width: ``p``
predicates, ``h`` 16 bits, ``r`` 32, ``d`` 64. They hold bits; a float exists only within a statement. What the tables
of ptx_instructions.py lack is a PtxError.
"""

from __future__ import annotations

import itertools
import re
from collections import ChainMap
from collections.abc import Iterator
from typing import NamedTuple

from tests.hopper.ptx_instructions import RULES, TYPES

ARRAYS = {1: ("bool", "p"), 16: ("uint16_t", "h"), 32: ("uint32_t", "r"), 64: ("uint64_t", "d")}  # by width
COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.DOTALL)  # or a string, which may look like one
TOKEN = re.compile(
    r"""(?P<ignored> \s+ | \.(?:version|target|address_size|file|loc)\b[^\n]* | \.section\s+\.debug\w+\s*\{[^{}]*\}
        | \.global\s[^;]*; | \.pragma\s+"[^"\n]*"; )
      | (?:\.visible\s+)?(?P<entry> \.entry\b[^{]*\{ )
      | (?P<brace> [{}] )
      | (?P<label> [\w$]+ )\s*:(?!:)
      | (?P<directive> \.[^;]*; )
      | (?P<instruction> [^;{}][^;]*; )""",
    re.VERBOSE,
)
ENTRY = re.compile(r"\.entry ([\w$]+) ?(?:\(([^)]*)\))? ?(?:\.(?:maxntid|reqntid|minnctapersm)\b[ \d,]*)*\{")
PARAMETER = re.compile(r"\.param(?: \.(?:align \d+|[bsuf](?:8|16|32|64)|ptr|global))+ ([\w$]+)(?:\[\d+\])?")
DYNAMIC_SHARED = re.compile(r"\.extern \.shared(?: \.align \d+)? \.b8 ([\w$]+)\[\];")
REGISTERS = re.compile(r"\.reg \.(?:pred|[bsuf](16|32|64)) (.*);")
REGISTER = re.compile(r"([\w$%]+)(?:<(\d+)>)?")
INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+) )?([a-z][\w.:]*) ?(.*);")
WIDENING = re.compile(r"(?:@\S+ )?(?:cvt|ld|st)\.")  # instructions whose registers may be wider than their types
INTEGER, FLOAT = re.compile(r"-?(?:0x[0-9a-fA-F]+|0|[1-9]\d*)"), re.compile(r"0[fF]([0-9a-fA-F]{8})")


class PtxError(ValueError):
    """PTX that is not translated: the line, and why."""


class Token(NamedTuple):
    """A piece of PTX, with single spaces."""

    kind: str
    text: str
    line: int

    def error(self, why: str) -> PtxError:
        return PtxError(f"line {self.line}: {why}: {self.text[:200]}")


Block = list["Token | Block"]
Names = ChainMap[str, tuple[str, int]]  # what has a name, in C++ and its bits; 0 for a label


def translate(ptx: str) -> str:
    """The C++ translation unit of a PTX module."""
    tokens, cpp = _tokens(ptx), ['#include "ptx_arithmetic.h"\n\nusing namespace hopper;\n']
    names: Names = ChainMap({f"%{name}.x": (f"{name}_x()", 32) for name in ("tid", "ntid", "ctaid", "nctaid")})
    for token in tokens:
        if token.kind == "entry":
            cpp.append(_Kernel(token, names).translate(_parse(token, tokens)))
        elif match := DYNAMIC_SHARED.fullmatch(token.text):
            names[match[1]] = ("dynamic_shared()", 32)
        else:
            raise token.error("unknown directive")
    return "\n".join(cpp)


def _tokens(ptx: str) -> Iterator[Token]:
    ptx = COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else "\n" * match[0].count("\n"), ptx)
    at, line = 0, 1
    while at < len(ptx):
        if (match := TOKEN.match(ptx, at)) is None:
            raise Token("", ptx[at:].splitlines()[0], line).error("neither an instruction nor a directive")
        if (kind := str(match.lastgroup)) != "ignored":
            yield Token(kind, " ".join(match[kind].split()), line)
        at, line = match.end(), line + match[0].count("\n")


def _parse(opened: Token, tokens: Iterator[Token]) -> Block:
    """What follows a brace, up to the one that closes it."""
    block: Block = []
    for token in tokens:
        if token.text == "}":
            return block
        block.append(_parse(token, tokens) if token.text == "{" else token)
    raise opened.error("is not closed")


class _Kernel:
    """A kernel while it is translated."""

    def __init__(self, header: Token, names: Names) -> None:
        if (match := ENTRY.fullmatch(header.text)) is None:
            raise header.error("unknown directive")
        self.token, self.name, self.names = header, match[1], names.new_child()
        for i, text in enumerate(match[2].split(",") if match[2] else []):
            if (parameter := PARAMETER.fullmatch(text.strip())) is None:
                raise header.error(f"unknown form of a parameter, {text},")
            self._define(parameter[1], f"args[{i}]", 64)
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.labels = itertools.count()
        self.lines: list[str] = []

    def translate(self, block: Block) -> str:
        self._scope(block)
        arrays = [(*ARRAYS[bits], size) for bits, size in self.sizes.items() if size]
        registers = [f"{cpp} {name}[{size}];\npoison({name});" for cpp, name, size in arrays]
        return "\n".join([f'extern "C" void kernel_{self.name}(void* const* args) {{', *registers, *self.lines, "}\n"])

    def _scope(self, block: Block) -> None:
        self.names = self.names.new_child()
        for self.token in (item for item in block if isinstance(item, Token) and item.kind == "label"):
            self._define(self.token.text, f"L{next(self.labels)}", 0)
        for item in block:
            if not isinstance(item, Token):
                self._scope(item)
                continue
            self.token = item
            if item.kind == "label":
                self.lines.append(f"{self.names[item.text][0]}:;")
            elif item.kind == "directive":
                self._registers()
            elif item.kind == "instruction":
                self._instruction()
            else:
                raise item.error("not in a kernel")
        self.names = self.names.parents

    def _define(self, name: str, value: str, bits: int) -> None:
        if name in self.names.maps[0]:
            raise self.token.error(f"{name} is there already")
        self.names[name] = (value, bits)

    def _registers(self) -> None:
        if (match := REGISTERS.fullmatch(self.token.text)) is None:
            raise self.token.error("unknown directive")
        bits = int(match[1] or 1)
        for text in match[2].split(","):
            if (register := REGISTER.fullmatch(text.strip())) is None:
                raise self.token.error("unknown form of a register")
            for name in [f"{register[1]}{i}" for i in range(int(register[2]))] if register[2] else [register[1]]:
                self._define(name, f"{ARRAYS[bits][1]}[{self.sizes[bits]}]", bits)
                self.sizes[bits] += 1

    def _instruction(self) -> None:
        match = INSTRUCTION.fullmatch(self.token.text)
        if match is None or match[3] not in RULES:
            raise self.token.error("unknown instruction")
        negation, predicate, name, operands = match[1], match[2], match[3], match[4].replace(" ", "")
        rules = ((re.fullmatch(form, operands), kinds, code) for form, kinds, code in RULES[name])
        match, kinds, code = next((rule for rule in rules if rule[0]), (None, [], ""))
        if match is None:
            raise self.token.error("unknown form of operands")
        groups = zip(kinds, (group.split(",") for group in match.groups()), strict=True)
        values = [", ".join(self._operand(kind, operand) for operand in group) for kind, group in groups]
        code = code.format(*values, line=self.token.line)
        self.lines.append(f"if ({negation}{self._named(predicate, 1)}) {{ {code}; }}" if predicate else f"{code};")

    def _operand(self, kind: str, operand: str) -> str:
        """The operand, or one element of a vector, in C++."""
        if kind == "label":
            return self._named(operand, 0)
        if kind in ("shared", "global", "param"):
            return self._address(operand, 32 if kind == "shared" else 64)
        if kind == "constant":
            return self._integer(operand, 32)
        cpp, bits, read, _ = TYPES[kind.lstrip("=&")]
        if kind[0] in "=&":
            register = self._named(operand, bits)
            if not register.endswith("]") or register.startswith("args"):
                raise self.token.error(f"{operand} is no register")
            return register
        name = operand.removeprefix("!") if kind == "pred" else operand
        if name in self.names:
            value = operand.removesuffix(name) + self._named(name, bits)
        elif (match := FLOAT.fullmatch(operand)) and kind in ("f32", "f32.ftz", "b32"):
            value = f"0x{match[1]}u"
        elif cpp == "float":
            raise self.token.error(f"unknown operand {operand}")
        else:
            value = self._integer(operand, bits)
        return read.format(value)

    def _named(self, name: str, bits: int) -> str:
        value, width = self.names.get(name, ("", -1))
        if width != bits and not (width > bits > 1 and WIDENING.match(self.token.text)):
            raise self.token.error(f"unknown operand {name}")
        return value

    def _integer(self, text: str, bits: int) -> str:
        if INTEGER.fullmatch(text) is None or not -(1 << bits - 1) <= int(text, 0) < 1 << bits:
            raise self.token.error(f"unknown operand {text}")
        return f"{int(text, 0) % (1 << bits):#x}u" + "l" * (bits == 64)

    def _address(self, operand: str, bits: int) -> str:
        name, plus, offset = operand.partition("+")
        base, width = self.names.get(name, ("", 0))
        if width not in (bits, 64):
            raise self.token.error(f"unknown address {operand}")
        return f"(uint{bits}_t){base}" + (f" + {self._integer(offset, bits)}" if plus else "")
