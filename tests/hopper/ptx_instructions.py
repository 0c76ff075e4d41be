"""The instructions of PTX that our kernels use, in C++: tables by whole names, modifiers included."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple


class Type(NamedTuple):
    """A type that instructions name: what it is in C++, and how a value of it is read from bits and becomes bits."""

    cpp: str
    bits: int
    read: str
    write: str = "{}"


TYPES = {
    f"{kind}{bits}": Type(cpp := f"{unsigned}int{bits}_t", bits, f"({cpp}){{}}")
    for kind, unsigned in (("b", "u"), ("u", "u"), ("s", ""))
    for bits in (8, 16, 32, 64)
} | {
    "f32": Type("float", 32, "f32_of({})", "bits_of({})"),
    "f32.ftz": Type("float", 32, "flush(f32_of({}))", "bits_of(flush({}))"),
    "f16": Type("float", 16, "{}", "bits_of_f16({})"),
    "bf16": Type("float", 16, "{}", "bits_of_bf16({})"),
    "pred": Type("bool", 1, "{}"),
}

# A row of the tables: names, operands, C++. In a name <a|b> is either, and some lists of alternatives have names.
# Operands are written as in PTX, with a type for a value, "&" and a type for a register that is set, and a state space
# for an address; {N*T} is a vector, one list in C++; {i} is the i-th of them. After "=" too is a register, set to the
# value of C++, which is a statement otherwise. T is the last type of the name and D the one before it; U is T unsigned,
# B is T as bits if it is a float, W is twice and H half as wide; O, S and V are the first three words of the name, or
# the operators that they stand for.
Row = tuple[str, str, str]
ALTERNATIVES = {
    "ftz": "|.ftz",
    "int": "s16|u16|s32|u32|s64|u64",
    "narrow": "s16|u16|s32|u32",
    "bits": "b16|b32|b64",
    "word": "b16|u16|s16|b32|u32|s32|f32|b64|u64|s64",
    "memory": "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64",
    "convertible": "u8|s8|u16|s16|u32|s32|u64|s64",
    "ordered": "eq|ne|lt|le|gt|ge",
    "vector": "|.v2|.v4",
    "cta": "shared|shared::cta",
    "wgmma": "|".join(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32" for n in range(8, 257, 8)),
}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "min": "<", "max": ">"}
OPERATORS |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "neu": "!=", "leu": "<="}

# What a thread does by itself.
ARITHMETIC: list[Row] = [
    ("<add|sub|mul.lo>.<int>", "=T, U, U", "1u * {1} {O} {2}"),  # unsigned: the product of two u16 is too large for int
    ("mul.hi.<narrow>", "=T, T, T", "({W}){1} * {2} >> 8 * sizeof({T})"),
    ("mul.wide.<narrow>", "=W, T, T", "({W}){1} * {2}"),
    ("mad.lo.<int>", "=T, U, U, U", "1u * {1} * {2} + {3}"),
    ("mad.wide.<narrow>", "=W, T, T, W", "(uint64_t)(({W}){1} * {2}) + {3}"),
    ("div.<narrow>", "=T, T, T", "{2} ? (int64_t){1} / {2} : -1"),  # by zero as the hardware
    ("<min|max>.<int>", "=T, T, T", "{2} {O} {1} ? {2} : {1}"),
    ("<and|or|xor>.<pred|bits>", "=T, T, T", "{1} {O} {2}"),
    ("not.<pred|bits>", "=T, T", "({T})-1 ^ {1}"),
    ("popc.b32", "=u32, T", "__builtin_popcount({1})"),
    ("shl.<bits>", "=T, T, u32", "shift_left({1}, {2})"),
    ("shr.<bits|int>", "=T, T, u32", "shift_right({1}, {2})"),
    ("bfe.<s32|u32|s64|u64>", "=T, T, u32, u32", "extract({1}, {2}, {3})"),
    ("bfi.<b32|b64>", "=T, T, T, u32, u32", "insert({1}, {2}, {3}, {4})"),
    ("selp.<word>", "=B, B, B, pred", "{3} ? {1} : {2}"),
    ("mov.<pred|word>", "=B, B", "{1}"),
    ("mov.<b32|b64>", "=T, {H, H}", "{1} | ({T}){2} << 4 * sizeof({T})"),
    ("mov.<b32|b64>", "{&H, &H}, T", "{0} = {2}, {1} = {2} >> 4 * sizeof({T})"),
    ("setp.<ordered>.<int>", "=pred, T, T", "{1} {S} {2}"),
    ("setp.<eq|ne>.<bits>", "=pred, T, T", "{1} {S} {2}"),
    # C++'s < would raise FE_INVALID for a NaN.
    ("setp.<ordered><ftz>.f32", "=pred, T, T", "!__builtin_isunordered({1}, {2}) && {1} {S} {2}"),
    ("setp.<neu|leu><ftz>.f32", "=pred, T, T", "__builtin_isunordered({1}, {2}) || {1} {S} {2}"),
    ("cvta<|.to>.<global|param>.u64", "=T, T", "{1}"),
    ("cvt.<convertible>.<convertible>", "=D, T", "({D}){1}"),
    ("cvt.rn.f32.<convertible>", "=D, T", "(float){1}"),
    ("cvt.rn.<f16|bf16>.f32", "=D, T", "{1}"),
    ("cvt.rn.f16x2.f32", "=b32, T, T", "bits_of_f16({2}) | 1u * bits_of_f16({1}) << 16"),
    ("cvt.rn.bf16x2.f32", "=b32, T, T", "bits_of_bf16({2}) | 1u * bits_of_bf16({1}) << 16"),
    ("<add|sub|mul><|.rn><ftz>.f32", "=T, T, T", "{1} {O} {2}"),
    ("add.rz<ftz>.f32", "=T, T, T", "add_rz({1}, {2})"),
    ("fma.rn<ftz>.f32", "=T, T, T, T", "__builtin_fmaf({1}, {2}, {3})"),
    ("neg.s32", "=T, T", "0u - {1}"),
    ("neg<ftz>.f32", "=T, T", "-{1}"),
    ("abs<ftz>.f32", "=T, T", "__builtin_fabsf({1})"),
    ("min<ftz>.f32", "=T, T, T", "-maximum(-{1}, -{2})"),
    ("max<ftz>.f32", "=T, T, T", "maximum({1}, {2})"),
    ("rcp.<approx|rn><ftz>.f32", "=T, T", "1 / {1}"),
    ("rsqrt.approx<ftz>.f32", "=T, T", "(float)(1 / __builtin_sqrt({1}))"),
    ("ex2.approx<ftz>.f32", "=T, T", "(float)__builtin_exp2({1})"),
    ("bra<|.uni>", "label", "goto {0}"),
    ("ret", "", "return"),
]

# What others can observe, or what can break a rule.
TMA_LOAD = "cp.async.bulk.tensor.2d.<shared::cluster|shared::cta>.global.mbarrier::complete_tx::bytes"
TMA_STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
BOX, WGMMA = "[global, {s32, s32}]", "{N*&f32}, b64, b64, pred, 1, 1, 0, 0"
MACHINE: list[Row] = [
    ("ld.<shared|global|param>.<memory>", "&T, [S]", "load<{B}>(ld_{S}, {1}, {0})"),
    ("ld.<shared|global|param><vector>.<memory>", "{N*&T}, [S]", "load<{B}>(ld_{S}, {1}, {0})"),
    ("st.<shared|global>.<memory>", "[S], B", "store<{B}>(st_{S}, {0}, {1})"),
    ("st.<shared|global><vector>.<memory>", "[S], {N*B}", "store<{B}>(st_{S}, {0}, {1})"),
    ("cvta.shared.u64", "=T, T", "cvta_shared({1})"),
    ("cvta.to.shared.u64", "=T, T", "cvta_to_shared({1})"),
    ("fence.proxy.async<|.shared::cta>", "", "fence_proxy_async()"),
    ("fence.mbarrier_init.release.cluster", "", "fence_mbarrier_init()"),
    ("mbarrier.init.<cta>.b64", "[shared], u32", "mbarrier_init({0}, {1})"),
    ("mbarrier.inval.<cta>.b64", "[shared]", "mbarrier_inval({0})"),
    ("mbarrier.arrive.<cta>.b64", "_, [shared]", "mbarrier_arrive({0})"),
    ("mbarrier.arrive.expect_tx.<cta>.b64", "_, [shared], u32", "mbarrier_arrive_expect_tx({0}, {1})"),
    ("mbarrier.try_wait.parity.<cta>.b64", "=pred, [shared], u32", "mbarrier_try_wait_parity({1}, {2})"),
    (TMA_LOAD, f"[shared], {BOX}, [shared]", "tma_load_2d({0}, {1}, {2}, {3}, {4})"),
    (TMA_STORE, f"{BOX}, [shared]", "tma_store_2d({0}, {1}, {2}, {3})"),
    ("cp.async.bulk.commit_group", "", "bulk_commit_group()"),
    ("cp.async.bulk.wait_group<|.read>", "constant", "bulk_wait_group({0})"),
    ("prefetch.tensormap", "[global]", "prefetch_tensormap({0})"),
    ("bar.sync", "u32", "bar_sync({0}, 0)"),
    ("bar.sync", "u32, u32", "bar_sync({0}, {1})"),
    ("setmaxnreg.<inc|dec>.sync.aligned.u32", "constant", "setmaxnreg_{S}({0})"),
    ("vote.sync.<any|all>.pred", "=T, T, b32", "vote_{V}({1}, {2})"),
    ("elect.sync", "&b32|&pred, b32", "{1} = elect_sync({2}, {0})"),
    ("shfl.sync.<idx|bfly>.b32", "=T, T, T, T, T", "shfl_{V}({1}, {2}, {3}, {4})"),
    # The emulation has only shuffles of whole warps, where every source is in range.
    ("shfl.sync.<idx|bfly>.b32", "&T|&pred, T, T, T, T", "{0} = shfl_{V}({2}, {3}, {4}, {5}), {1} = true"),
    ("stmatrix.sync.aligned.m8n8.x4.shared.b16", "[shared], {4*b32}", "stmatrix_x4({0}, {{{1}}})"),
    ("wgmma.<fence|commit_group>.sync.aligned", "", "wgmma_{S}()"),
    ("wgmma.wait_group.sync.aligned", "constant", "wgmma_wait_group({0})"),
    ("<wgmma>.bf16.bf16", WGMMA, "wgmma(Half::kBfloat16, {1}, {2}, {3}, {0})"),
    ("<wgmma>.f16.f16", WGMMA, "wgmma(Half::kFloat16, {1}, {2}, {3}, {0})"),
]

# In operands, with how many of them: a vector has some. Else there are punctuation, "_", "0" and "1".
KIND, OPERAND = re.compile(r"(?:(\d+)\*)?([=&]?[a-z][\w.]*)"), "[^][{},|]+"
# A pattern of the operands with a group for each, the groups' kinds, C++ of them and of the line's number.
Rule = tuple[str, list[str], str]


def expand(names: str) -> Iterator[str]:
    """Every name of a row."""
    parts = re.split(r"<([^>]*)>", names)
    parts[1::2] = ["|".join(ALTERNATIVES.get(word, word) for word in part.split("|")) for part in parts[1::2]]
    yield from map("".join, itertools.product(*(part.split("|") for part in parts)))


def _rule(name: str, operands: str, code: str, is_machine: bool) -> Rule:
    """A row, for one of its names."""
    words = name.split(".")
    T, D = words[-1], words[-2:][0]
    letters = {"T": T + ".ftz" * ("ftz" in words), "B": T.replace("f", "b"), "D": D, "N": "1"}
    letters |= {letter: OPERATORS.get(word, word) for letter, word in zip("OSV", words, strict=False)}
    if match := re.fullmatch(r"([bsu])(\d+)", T):
        sign, bits = match[1], int(match[2])
        letters |= {"U": f"u{bits}", "W": f"{sign}{2 * bits}", "H": f"{sign}{bits // 2}"}
    if match := re.search(r"\.v(\d)\.|\.m64n(\d+)k16\.", name):
        letters["N"] = match[1] or str(int(match[2]) // 2)  # of m64nNk16 a thread has N / 2
    operands = re.sub(r"\b[TDUBWHSN]\b", lambda match: letters[match[0]], operands).replace(" ", "")
    kinds = [kind[2] for kind in KIND.finditer(operands)]
    if operands.startswith("="):
        code = "{0} = " + TYPES[kinds[0][1:]].write.format(code)
    cpp = {letter: TYPES[kind].cpp if kind in TYPES else kind for letter, kind in letters.items()}
    code = re.sub(r"\{([A-Z])\}", lambda match: cpp[match[1]], code)
    if is_machine or "f32" in operands:  # messages can come from it
        code = "site = {line}; " + code
    form = re.sub(r"[][{}|]", r"\\\g<0>", operands)
    form = KIND.sub(lambda kind: f"({OPERAND}(?:,{OPERAND}){{{int(kind[1] or 1) - 1}}})", form)
    return form, kinds, code


RULES: defaultdict[str, list[Rule]] = defaultdict(list)
for _row in ARITHMETIC + MACHINE:
    for _name in expand(_row[0]):
        RULES[_name].append(_rule(_name, *_row[1:], is_machine=_row in MACHINE))
