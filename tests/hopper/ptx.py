"""PTX as C++ that runs on the emulation: a function for each kernel, a statement for each instruction.

Every thread runs its kernel's function on a stack of its own, so registers are local arrays, one for each width: ``p``
predicates, ``h`` 16 bits, ``r`` 32, ``d`` 64. They hold bits; a float exists only within a statement. The tables have
each instruction under its whole name, modifiers included, with what it takes and does. What they lack is a PtxError.
"""

from __future__ import annotations

import itertools
import re
from collections import ChainMap, defaultdict
from collections.abc import Iterator
from typing import NamedTuple


class PtxError(ValueError):
    """PTX that is not translated: the line, and why."""


class Type(NamedTuple):
    """A type that instructions name: what it is in C++, and how a value of it is read from bits and becomes bits."""

    cpp: str
    bits: int
    read: str
    write: str = "{}"


def _integer(cpp: str, bits: int) -> Type:
    return Type(cpp, bits, f"({cpp}){{}}")


TYPES = {
    **{f"{kind}{bits}": _integer(f"uint{bits}_t", bits) for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": _integer(f"int{bits}_t", bits) for bits in (8, 16, 32, 64)},
    "u128": _integer("unsigned __int128", 128),
    "s128": _integer("__int128", 128),
    "f32": Type("float", 32, "f32_of({})", "bits_of({})"),
    "f32.ftz": Type("float", 32, "flush(f32_of({}))", "bits_of(flush({}))"),
    "f16": Type("float", 16, "f32_of_f16({})", "bits_of_f16({})"),
    "bf16": Type("float", 16, "f32_of_bf16({})", "bits_of_bf16({})"),
    "pred": Type("bool", 1, "{}"),
}
ARRAYS = {1: ("bool", "p"), 16: ("uint16_t", "h"), 32: ("uint32_t", "r"), 64: ("uint64_t", "d")}  # by width
SPECIAL_REGISTERS = {
    "%laneid": "tid_x() % 32",
    **{f"%{name}": f"{name}()" for name in ("cluster_ctarank", "cluster_nctarank")},
    **{f"%{name}.x": f"{name}_x()" for name in ("tid", "ntid", "ctaid", "nctaid")},
    **{f"%{name}.{axis}": str(int(name[0] == "n")) for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "yz"},
}

# ---- The tables. A row: names, operands, C++ ----
#
# In a name <a|b> is either, and some lists of alternatives have names. Operands are written as in PTX, with a type for
# a value, "&" and a type for a register that the instruction sets, and a state space for an address. After "=" too is
# a register, set to the value of C++, which is a statement otherwise. T is the last type of the name and D the one
# before it; U is T unsigned, B is T as bits if it is a float, W is twice as wide; and S and V are the second and the
# third word of the name.
Row = tuple[str, str, str]
ALTERNATIVES = {
    "ftz": "|.ftz",
    "int": "s16|u16|s32|u32|s64|u64",
    "narrow": "s16|u16|s32|u32",
    "signed": "s16|s32|s64",
    "bits": "b16|b32|b64",
    "word": "b16|u16|s16|b32|u32|s32|f32|b64|u64|s64",
    "memory": "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64",
    "convertible": "u8|s8|u16|s16|u32|s32|u64|s64",
    "ordered": "eq|ne|lt|le|gt|ge",
    "unordered": "equ|neu|ltu|leu|gtu|geu|num|nan",
    "space": "shared|global|param",
    "cta": "shared|shared::cta",
    "bar": "bar.sync|barrier.sync|barrier.sync.aligned",
}

# What a thread does by itself.
ARITHMETIC: list[Row] = [
    ("add.<int>", "=T, U, U", "{0} + {1}"),
    ("sub.<int>", "=T, U, U", "{0} - {1}"),
    ("mul.lo.<int>", "=T, U, U", "1u * {0} * {1}"),
    ("mul.hi.<int>", "=T, T, T", "({W}){0} * {1} >> 8 * sizeof({T})"),
    ("mul.wide.<narrow>", "=W, T, T", "({W}){0} * {1}"),
    ("mad.lo.<int>", "=T, U, U, U", "1u * {0} * {1} + {2}"),
    ("mad.wide.<narrow>", "=W, T, T, W", "(uint64_t)(({W}){0} * {1}) + {2}"),
    ("div.<int>", "=T, T, T", "quotient({0}, {1})"),
    ("rem.<int>", "=T, T, T", "remainder({0}, {1})"),
    ("neg.<signed>", "=T, U", "0u - {0}"),
    ("abs.<signed>", "=T, T", "{0} < 0 ? 0u - ({U}){0} : ({U}){0}"),
    ("min.<int>", "=T, T, T", "{1} < {0} ? {1} : {0}"),
    ("max.<int>", "=T, T, T", "{0} < {1} ? {1} : {0}"),
    ("and.<pred|bits>", "=T, T, T", "{0} & {1}"),
    ("or.<pred|bits>", "=T, T, T", "{0} | {1}"),
    ("xor.<pred|bits>", "=T, T, T", "{0} ^ {1}"),
    ("not.pred", "=T, T", "!{0}"),
    ("not.<bits>", "=T, T", "~{0}"),
    ("popc.b32", "=u32, T", "__builtin_popcount({0})"),
    ("shl.<bits>", "=T, T, u32", "shift_left({0}, {1})"),
    ("shr.<bits|int>", "=T, T, u32", "shift_right({0}, {1})"),
    ("bfe.<s32|u32|s64|u64>", "=T, T, u32, u32", "extract({0}, {1}, {2})"),
    ("bfi.<b32|b64>", "=T, T, T, u32, u32", "insert({0}, {1}, {2}, {3})"),
    ("prmt.b32", "=T, T, T, T", "permute({0}, {1}, {2})"),
    ("selp.<word>", "=B, B, B, pred", "{2} ? {0} : {1}"),
    ("mov.<pred|word>", "=B, B", "{0}"),
    ("mov.b32", "=T, {b16, b16}", "{0} | 1u * {1} << 16"),
    ("mov.b64", "=T, {b32, b32}", "{0} | (uint64_t){1} << 32"),
    ("mov.b32", "{&b16, &b16}, T", "{0} = {2}, {1} = {2} >> 16"),
    ("mov.b64", "{&b32, &b32}, T", "{0} = {2}, {1} = {2} >> 32"),
    ("setp.<ordered>.<int>", "=pred, T, T", "is_{S}({0}, {1})"),
    ("setp.<eq|ne>.<bits>", "=pred, T, T", "is_{S}({0}, {1})"),
    ("setp.<ordered|unordered><ftz>.f32", "=pred, T, T", "is_{S}({0}, {1})"),
    ("setp.<ordered>.<and|or|xor>.<int>", "=pred, T, T, pred", "is_{S}({0}, {1}) {V} {2}"),
    ("setp.<eq|ne>.<and|or|xor>.<bits>", "=pred, T, T, pred", "is_{S}({0}, {1}) {V} {2}"),
    ("setp.<ordered|unordered>.<and|or|xor><ftz>.f32", "=pred, T, T, pred", "is_{S}({0}, {1}) {V} {2}"),
    ("cvta<|.to>.<global|param>.u64", "=T, T", "{0}"),
    ("cvt.<convertible>.<convertible>", "=D, T", "({D}){0}"),
    ("cvt.rn.f32.<convertible>", "=D, T", "(float){0}"),
    ("cvt.f32.<f16|bf16>", "=D, T", "{0}"),
    ("cvt.rn.<f16|bf16>.f32", "=D, T", "{0}"),
    ("cvt.rn.f16x2.f32", "=b32, T, T", "bits_of_f16({1}) | 1u * bits_of_f16({0}) << 16"),
    ("cvt.rn.bf16x2.f32", "=b32, T, T", "bits_of_bf16({1}) | 1u * bits_of_bf16({0}) << 16"),
    ("add<|.rn><ftz>.f32", "=T, T, T", "{0} + {1}"),
    ("sub<|.rn><ftz>.f32", "=T, T, T", "{0} - {1}"),
    ("mul<|.rn><ftz>.f32", "=T, T, T", "{0} * {1}"),
    ("add.rz<ftz>.f32", "=T, T, T", "add_rz({0}, {1})"),
    ("fma.rn<ftz>.f32", "=T, T, T, T", "__builtin_fmaf({0}, {1}, {2})"),
    ("neg<ftz>.f32", "=T, T", "-{0}"),
    ("abs<ftz>.f32", "=T, T", "__builtin_fabsf({0})"),
    ("min<ftz>.f32", "=T, T, T", "minimum({0}, {1})"),
    ("max<ftz>.f32", "=T, T, T", "maximum({0}, {1})"),
    ("min<ftz>.NaN.f32", "=T, T, T", "is_nan({0}, {1}) ? {0} + {1} : minimum({0}, {1})"),
    ("max<ftz>.NaN.f32", "=T, T, T", "is_nan({0}, {1}) ? {0} + {1} : maximum({0}, {1})"),
    ("div.<approx|full|rn><ftz>.f32", "=T, T, T", "{0} / {1}"),
    ("rcp.<approx|rn><ftz>.f32", "=T, T", "1 / {0}"),
    ("sqrt.<approx|rn><ftz>.f32", "=T, T", "__builtin_sqrtf({0})"),
    ("rsqrt.approx<ftz>.f32", "=T, T", "(float)(1 / __builtin_sqrt({0}))"),
    ("ex2.approx<ftz>.f32", "=T, T", "(float)__builtin_exp2({0})"),
    ("lg2.approx<ftz>.f32", "=T, T", "(float)__builtin_log2({0})"),
    ("bra<|.uni>", "label", "goto {0}"),
    ("ret", "", "return"),
]

# What others can observe, or what can break a rule.
TENSOR, TO_SHARED = "cp.async.bulk.tensor.2d", "global.mbarrier::complete_tx::bytes"
MACHINE: list[Row] = [
    ("ld.<space>.<memory>", "&T, [S]", "load<{B}>(ld_{S}, {1}, {0})"),
    ("ld.<space>.<memory>", "{&T}, [S]", "load<{B}>(ld_{S}, {1}, {0})"),
    ("ld.<space>.v2.<memory>", "{&T, &T}, [S]", "load<{B}>(ld_{S}, {2}, {0}, {1})"),
    ("ld.<space>.v4.<memory>", "{&T, &T, &T, &T}, [S]", "load<{B}>(ld_{S}, {4}, {0}, {1}, {2}, {3})"),
    ("st.<shared|global>.<memory>", "[S], B", "store<{B}>(st_{S}, {0}, {1})"),
    ("st.<shared|global>.<memory>", "[S], {B}", "store<{B}>(st_{S}, {0}, {1})"),
    ("st.<shared|global>.v2.<memory>", "[S], {B, B}", "store<{B}>(st_{S}, {0}, {1}, {2})"),
    ("st.<shared|global>.v4.<memory>", "[S], {B, B, B, B}", "store<{B}>(st_{S}, {0}, {1}, {2}, {3}, {4})"),
    ("cvta.shared.u64", "=T, T", "cvta_shared({0})"),
    ("cvta.to.shared.u64", "=T, T", "cvta_to_shared({0})"),
    ("mapa.shared::cluster.u32", "=T, T, T", "mapa_shared_cluster({0}, {1})"),
    ("fence.proxy.async<|.shared::cta>", "", "fence_proxy_async()"),
    ("fence.mbarrier_init.release.cluster", "", "fence_mbarrier_init()"),
    ("mbarrier.init.<cta>.b64", "[shared], u32", "mbarrier_init({0}, {1})"),
    ("mbarrier.inval.<cta>.b64", "[shared]", "mbarrier_inval({0})"),
    ("mbarrier.arrive.<cta|release.cluster.shared::cluster>.b64", "_, [shared]", "mbarrier_arrive({1})"),
    ("mbarrier.arrive.expect_tx.<cta>.b64", "_, [shared], u32", "mbarrier_arrive_expect_tx({1}, {2})"),
    ("mbarrier.try_wait.parity.<cta>.b64", "=pred, [shared], u32", "mbarrier_try_wait_parity({0}, {1})"),
    (
        f"{TENSOR}.<shared::cluster|shared::cta>.{TO_SHARED}",
        "[shared], [global, {s32, s32}], [shared]",
        "tma_load_2d({0}, pointer({1}), {2}, {3}, {4})",
    ),
    (
        f"{TENSOR}.shared::cluster.{TO_SHARED}.multicast::cluster",
        "[shared], [global, {s32, s32}], [shared], u16",
        "tma_load_2d({0}, pointer({1}), {2}, {3}, {4}, {5})",
    ),
    (
        f"{TENSOR}.global.shared::cta.bulk_group",
        "[global, {s32, s32}], [shared]",
        "tma_store_2d(pointer({0}), {1}, {2}, {3})",
    ),
    ("cp.async.bulk.commit_group", "", "bulk_commit_group()"),
    ("cp.async.bulk.wait_group<|.read>", "constant", "bulk_wait_group({0})"),
    ("prefetch.tensormap", "[global]", "prefetch_tensormap(pointer({0}))"),
    ("<bar>", "u32", "bar_sync({0}, 0)"),
    ("<bar>", "u32, u32", "bar_sync({0}, {1})"),
    ("barrier.cluster.arrive<|.release><|.aligned>", "", "cluster_arrive()"),
    ("barrier.cluster.wait<|.acquire><|.aligned>", "", "cluster_wait()"),
    ("setmaxnreg.<inc|dec>.sync.aligned.u32", "constant", "setmaxnreg_{S}({0})"),
    ("vote.sync.<any|all>.pred", "=T, T, b32", "vote_{V}({0}, {1})"),
    ("elect.sync", "&b32|&pred, b32", "{1} = elect_sync({2}, {0})"),
    ("shfl.sync.idx.b32", "=T, T, T, T, T", "shfl_sync(Shuffle::kIdx, {0}, {1}, {2}, {3})"),
    ("shfl.sync.bfly.b32", "=T, T, T, T, T", "shfl_sync(Shuffle::kBfly, {0}, {1}, {2}, {3})"),
    # The emulation has only shuffles of whole warps, where every source is in range.
    ("shfl.sync.idx.b32", "&T|&pred, T, T, T, T", "{0} = shfl_sync(Shuffle::kIdx, {2}, {3}, {4}, {5}), {1} = true"),
    ("shfl.sync.bfly.b32", "&T|&pred, T, T, T, T", "{0} = shfl_sync(Shuffle::kBfly, {2}, {3}, {4}, {5}), {1} = true"),
    ("stmatrix.sync.aligned.m8n8.x4.shared.b16", "[shared], {b32, b32, b32, b32}", "stmatrix({0}, {1}, {2}, {3}, {4})"),
    ("wgmma.<fence|commit_group>.sync.aligned", "", "wgmma_{S}()"),
    ("wgmma.wait_group.sync.aligned", "constant", "wgmma_wait_group({0})"),
    *(
        (
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{half}.{half}",
            f"{{*{n // 2}}}, b64, b64, pred, 1, 1, 0, 0",  # {*n}: n accumulators
            f"wgmma(Half::{constant}, {n}, r, {{0}}, {{1}}, {{2}}, {{3}})",
        )
        for half, constant in (("bf16", "kBfloat16"), ("f16", "kFloat16"))
        for n in range(8, 257, 8)
    ),
]


class Rule(NamedTuple):
    """A row, for one of its names."""

    operands: list[str]
    code: str
    letters: dict[str, str]  # what they stand for in the code
    has_site: bool  # messages can come from it


def _expand(names: str) -> Iterator[str]:
    parts = re.split(r"<([^>]*)>", names)
    parts[1::2] = ["|".join(ALTERNATIVES.get(word, word) for word in part.split("|")) for part in parts[1::2]]
    yield from map("".join, itertools.product(*(part.split("|") for part in parts)))


def _split(text: str) -> list[str]:
    """The parts between the commas that are not within brackets or braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})(?![^[]*\])", text)] if text.strip() else []


def _rule(name: str, operands: str, code: str, is_machine: bool) -> Rule:
    words = name.split(".")
    T, D, S, V = words[-1], words[-2:][0], words[:2][-1], words[:3][-1]
    kinds = {"T": T + ".ftz" * ("ftz" in words), "B": T.replace("f", "b"), "D": D, "S": S, "V": V}
    if match := re.fullmatch(r"([bsu])(\d+)", T):
        kinds |= {"U": f"u{match[2]}", "W": f"{match[1]}{2 * int(match[2])}"}
    letters = {letter: TYPES[kind].cpp if kind in TYPES else kind for letter, kind in kinds.items()}
    operands = re.sub(r"\b[TDUBWS]\b", lambda match: kinds[match[0]], operands)
    return Rule(_split(operands), code, letters, is_machine or "f32" in operands)


RULES: defaultdict[str, list[Rule]] = defaultdict(list)
for _rows in (ARITHMETIC, MACHINE):
    for _names, _operands, _code in _rows:
        for _name in _expand(_names):
            RULES[_name].append(_rule(_name, _operands, _code, _rows is MACHINE))


# ---- The text ----

COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.DOTALL)  # or a string, which may look like one
TOKEN = re.compile(
    r"""(?P<ignored> \s+ | \.(?:version|target|address_size|file|loc)\b[^\n]* | \.section\s+\.debug\w+\s*\{[^{}]*\} )
      | (?P<entry> (?:\.visible\s+)?\.entry\b[^{]*\{ )
      | (?P<open> \{ )
      | (?P<close> \} )
      | (?P<label> [\w$]+ )\s*:(?!:)
      | (?P<unused> \.global\s[^;]*; | \.pragma\s+"[^"\n]*"; )
      | (?P<directive> \.[^;]*; )
      | (?P<instruction> [^;{}][^;]*; )""",
    re.VERBOSE,
)
ENTRY = re.compile(
    r"(?:\.visible )?\.entry ([\w$]+) ?(?:\(([^)]*)\))? ?"
    r"((?:\.(?:maxntid|reqntid|minnctapersm|reqnctapercluster|explicitcluster)\b[ \d,]*)*)\{"
)
PARAMETER = re.compile(
    r"\.param(?: \.align \d+)? \.[bsuf](?:8|16|32|64)(?: \.ptr(?: \.global)?(?: \.align \d+)?)? ([\w$]+)(?:\[\d+\])?"
)
DYNAMIC_SHARED = re.compile(r"\.extern \.shared(?: \.align \d+)? \.b8 ([\w$]+)\[\];")
REGISTERS = re.compile(r"\.reg \.(?:pred|[bsuf](16|32|64)) (.*);")
REGISTER = re.compile(r"([\w$%]+)(?:<(\d+)>)?")
INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+) )?([a-z][\w.:]*) ?(.*);")
ADDRESS = re.compile(r"([\w$%]+)(?: ?\+ ?(-?\w+))?")
INTEGER, FLOAT = re.compile(r"-?(?:0x[0-9a-fA-F]+|0|[1-9]\d*)"), re.compile(r"0[fF]([0-9a-fA-F]{8})")


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
    tokens = _tokens(ptx)
    names: Names = ChainMap({name: (value, 32) for name, value in SPECIAL_REGISTERS.items()})
    kernels: list[_Kernel] = []
    for token in tokens:
        if token.kind == "entry":
            kernels.append(_Kernel(token, len(kernels), names))
            kernels[-1].translate(_parse(token, tokens))
        elif match := DYNAMIC_SHARED.fullmatch(token.text):
            names[match[1]] = ("dynamic_shared()", 32)
        elif token.kind != "unused":
            raise token.error("unknown directive")
    table = ", ".join(f'{{"{kernel.name}", kernel_{kernel.number}, {kernel.threads}}}' for kernel in kernels)
    return "\n".join(
        [
            '#include "ptx_arithmetic.h"\n\nusing namespace hopper;\n',
            *map(str, kernels),
            f'extern "C" const Kernel hopper_kernels[] = {{{table}}};',
            f'extern "C" const uint32_t hopper_kernel_count = {len(kernels)};\n',
        ]
    )


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
        if token.kind == "close":
            return block
        block.append(_parse(token, tokens) if token.kind == "open" else token)
    raise opened.error("is not closed")


def _shape(operands: list[str]) -> list[str]:
    """What tells the forms of one instruction apart."""
    return ["|" if "|" in operand else operand[:1] if operand.startswith(("{", "[")) else "" for operand in operands]


class _Kernel:
    """A kernel; its C++ as a string."""

    def __init__(self, header: Token, number: int, names: Names) -> None:
        if (match := ENTRY.fullmatch(header.text)) is None:
            raise header.error("unknown directive")
        threads = re.search(r"\.(?:max|req)ntid (\d+)", match[3])
        self.token, self.number, self.name, self.threads = header, number, match[1], int(threads[1]) if threads else 0
        self.names = names.new_child()
        for i, text in enumerate(_split(match[2] or "")):
            if (parameter := PARAMETER.fullmatch(text)) is None:
                raise header.error(f"unknown form of a parameter, {text},")
            self._define(parameter[1], f"args[{i}]", 64)
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.labels: dict[str, bool] = {}  # whether a branch names it
        self.accumulators: dict[tuple[int, ...], str] = {}
        self.copies: defaultdict[int, set[int]] = defaultdict(set)  # where a register is moved to
        self.may_be_wider = False  # the registers of this instruction than its types
        self.lines: list[str] = []

    def __str__(self) -> str:
        arrays = [(cpp, name, self.sizes[bits]) for bits, (cpp, name) in ARRAYS.items() if self.sizes[bits]]
        tracked = self._tracked()
        lists = {name: numbers for numbers, name in self.accumulators.items()} | (
            {"tracked": tracked} if tracked else {}
        )
        return "\n".join(
            [
                f"static void kernel_{self.number}(void* const* args) {{",
                *(f"{cpp} {name}[{size}];\npoison({name});" for cpp, name, size in arrays),
                *(f"static const uint16_t {name}[] = {{{str(numbers)[1:-1]}}};" for name, numbers in lists.items()),
                *([f"track_registers(r, tracked, {len(tracked)});"] if tracked else []),
                *(line for line in self.lines if self.labels.get(line, True)),
                "}\n",
            ]
        )

    def _tracked(self) -> list[int]:
        """Every register that may hold an accumulator."""
        tracked = set(itertools.chain(*self.accumulators))
        pending = list(tracked)
        while pending:
            new = self.copies[pending.pop()] - tracked
            tracked |= new
            pending += new
        return sorted(tracked)

    def translate(self, block: Block) -> None:
        outer, self.names = self.names, self.names.new_child()
        for self.token in (token for token in block if isinstance(token, Token) and token.kind == "label"):
            label = f"L{len(self.labels)}:;"
            self.labels[label] = False
            self._define(self.token.text, label, 0)
        for item in block:
            if isinstance(item, Token):
                self.token = item
                self._statement()
            else:
                self.translate(item)
        self.names = outer

    def _define(self, name: str, value: str, bits: int) -> None:
        if name in self.names.maps[0]:
            raise self.token.error(f"{name} is there already")
        self.names[name] = (value, bits)

    def _statement(self) -> None:
        match self.token.kind:
            case "label":
                self.lines.append(self.names[self.token.text][0])
            case "directive":
                self._registers()
            case "instruction":
                self._instruction()
            case kind if kind != "unused":
                raise self.token.error("not in a kernel")

    def _registers(self) -> None:
        if (match := REGISTERS.fullmatch(self.token.text)) is None:
            raise self.token.error("unknown directive")
        bits = int(match[1] or 1)
        for text in _split(match[2]):
            if (register := REGISTER.fullmatch(text)) is None:
                raise self.token.error("unknown form of a register")
            for name in [f"{register[1]}{i}" for i in range(int(register[2]))] if register[2] else [register[1]]:
                self._define(name, f"{ARRAYS[bits][1]}[{self.sizes[bits]}]", bits)
                self.sizes[bits] += 1

    def _instruction(self) -> None:
        match = INSTRUCTION.fullmatch(self.token.text)
        if match is None or match[3] not in RULES:
            raise self.token.error("unknown instruction")
        negation, predicate, name, operands = match[1], match[2], match[3], _split(match[4])
        rule = next((rule for rule in RULES[name] if _shape(rule.operands) == _shape(operands)), None)
        if rule is None:
            raise self.token.error("unknown form of operands")
        self.may_be_wider = name.startswith(("cvt.", "ld.", "st."))
        values = self._values(rule.operands, operands)
        if rule.operands and rule.operands[0][0] == "=":
            value = rule.code.format(*values[1:], **rule.letters)
            code = f"{values[0]} = {TYPES[rule.operands[0][1:]].write.format(value)}"
        else:
            code = rule.code.format(*values, **rule.letters)
        if name.startswith(("mov.", "selp.")) and code.startswith("r["):
            target, *sources = (int(number) for number in re.findall(r"\br\[(\d+)\]", code))
            for source in sources:
                self.copies[source].add(target)
        if rule.has_site:
            code = f"site = {self.token.line}; {code}"
        self.lines.append(f"if ({negation}{self._named(predicate, 1)}) {{ {code}; }}" if predicate else f"{code};")

    def _values(self, kinds: list[str], operands: list[str]) -> list[str]:
        if len(kinds) != len(operands):
            raise self.token.error("unknown form of operands")
        return list(itertools.chain(*map(self._operand, kinds, operands)))

    def _operand(self, kind: str, operand: str) -> list[str]:
        """The operand in C++; the elements of a vector."""
        if kind.startswith("{*"):
            return [self._accumulators(_split(operand[1:-1]), int(kind[2:-1]))]
        if kind[0] in "{[":
            return self._values(_split(kind[1:-1]), _split(operand[1:-1]))
        if "|" in kind:
            return self._values(kind.split("|"), operand.split("|"))
        if kind[0] in "=&":
            return [self._register(operand, TYPES[kind[1:]].bits)]
        if kind in TYPES:
            return [self._source(kind, operand)]
        if kind in ("shared", "global", "param"):
            return [self._address(operand, 32 if kind == "shared" else 64)]
        if kind == "constant":
            return [self._integer(operand, 32)]
        if kind == "label":
            label = self._named(operand, 0)
            self.labels[label] = True
            return [label.removesuffix(":;")]
        if kind != operand:
            raise self.token.error(f"unknown operand {operand}")
        return [operand]

    def _named(self, name: str, bits: int) -> str:
        value, width = self.names.get(name, ("", -1))
        if width != bits and not (self.may_be_wider and width > bits > 1):
            raise self.token.error(f"unknown operand {name}")
        return value

    def _register(self, name: str, bits: int) -> str:
        if not (value := self._named(name, bits)).endswith("]") or value.startswith("args"):
            raise self.token.error(f"{name} is no register")
        return value

    def _source(self, kind: str, operand: str) -> str:
        cpp, bits, read, _ = TYPES[kind]
        name = operand.removeprefix("!") if kind == "pred" else operand
        if name in self.names:
            return read.format(operand.removesuffix(name) + self._named(name, bits))
        if (match := FLOAT.fullmatch(operand)) and (cpp == "float" or kind == "b32") and bits == 32:
            return read.format(f"0x{match[1]}u")
        if cpp == "float":
            raise self.token.error(f"unknown operand {operand}")
        return read.format(self._integer(operand, bits))

    def _integer(self, text: str, bits: int) -> str:
        if INTEGER.fullmatch(text) is None or not -(1 << bits - 1) <= int(text, 0) < 1 << bits:
            raise self.token.error(f"unknown operand {text}")
        return f"{int(text, 0) % (1 << bits):#x}u" + "l" * (bits == 64)

    def _address(self, operand: str, bits: int) -> str:
        match = ADDRESS.fullmatch(operand)
        base, width = self.names.get(match[1], ("", 0)) if match else ("", 0)
        if match is None or width not in (bits, 64):
            raise self.token.error(f"unknown address {operand}")
        return f"(uint{bits}_t){base}" + (f" + {self._integer(match[2], bits)}" if match[2] else "")

    def _accumulators(self, operands: list[str], count: int) -> str:
        """The list of the registers' numbers."""
        if len(operands) != count:
            raise self.token.error(f"not {count} accumulators")
        numbers = tuple(int(self._register(operand, 32)[2:-1]) for operand in operands)
        return self.accumulators.setdefault(numbers, f"accumulators_{len(self.accumulators)}")
