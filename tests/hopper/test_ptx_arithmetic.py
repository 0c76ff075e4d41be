"""What each instruction of PTX computes, against exact arithmetic."""

from __future__ import annotations

import itertools
import math
import operator
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.building import HOST_CXX
from tests.hopper import ptx_instructions
from tests.hopper.emulator import Program
from tests.hopper.ptx import translate
from tests.hopper.ptx_modules import HEADER, launch

pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

CTAS, THREADS = 2, 512
Value = Any  # int, float or bool, by the kind

# Values of PTX's types in Python, where floats are exact.
FLOATS = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}  # precision, exponents
INTEGERS = [0, 1, 2, 3, *(2**power + more for power in (3, 4, 5, 6, 7, 8, 15, 16, 31, 32, 63) for more in (-1, 0))]
INTEGERS += [33, 65, 2**64 - 1]
SPECIAL = {
    "f32": [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x3F7FFFFF, 0x40000000, 0x4B000001, 0x7F7FFFFF],
    "f16": [0x0, 0x1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x3555],
    "bf16": [0x0, 0x1, 0x7F, 0x80, 0x3F80, 0x7F7F, 0x3EAB],
}
SPECIAL["f32"] += [0x3F808000, 0x3F818000, 0x3F818001, 0x7F7F8000]  # between two of bf16
SPECIAL["f32"] += [0x3F801000, 0x3F803000, 0x33000000, 0x33C00000, 0x387FF000, 0x477FEFFF, 0x477FF000]  # of f16
INFINITY = {"f32": (0x7F800000, 0x7FC00000), "f16": (0x7C00, 0x7E00), "bf16": (0x7F80, 0x7FC0)}  # and a quiet NaN


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind.lstrip("bsuf"))


def decode(kind: str, bits: int) -> Value:
    bits &= (1 << bits_of(kind)) - 1
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if kind in FLOATS:
        return struct.unpack("<f", struct.pack("<I", bits << 32 - bits_of(kind)))[0]
    return bits - (1 << bits_of(kind)) if kind[0] == "s" and bits >> bits_of(kind) - 1 else bits


def encode(kind: str, value: Value) -> int:
    """Its bits; ``value`` must be one of a float's."""
    if kind not in FLOATS:
        return int(value) & (1 << bits_of(kind)) - 1
    if math.isnan(value):
        return (1 << bits_of(kind) - 1) - 1
    if kind == "f16":
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> 32 - bits_of(kind)


def rounded(value: Fraction | float, kind: str = "f32", toward_zero: bool = False) -> float:
    if isinstance(value, float) and (value == 0 or not math.isfinite(value)):
        return value
    precision, least, greatest = FLOATS[kind]
    exact = abs(Fraction(value))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent = max(exponent - (exact < Fraction(2) ** exponent), least)
    ulp = Fraction(2) ** (exponent - precision + 1)
    result = (int if toward_zero else round)(exact / ulp) * ulp
    if result >= Fraction(2) ** (greatest + 1):
        return math.copysign(
            float((2 - Fraction(2) ** (1 - precision)) * 2**greatest) if toward_zero else math.inf, value
        )
    return math.copysign(float(result), value)


def flushed(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def special_bits(kind: str) -> list[int]:
    """Values where things go wrong."""
    if kind == "pred":
        return [0, 1]
    sign = 1 << bits_of(kind) - 1
    positive = (
        [*SPECIAL[kind], *INFINITY[kind]] if kind in FLOATS else [value for value in INTEGERS if value < 2 * sign]
    )
    return positive + [value ^ sign for value in positive]


def random_bits(kind: str, choose: random.Random) -> int:
    if kind not in FLOATS:
        return choose.getrandbits(bits_of(kind))
    number = choose.choice((choose.getrandbits(bits_of(kind)), encode(kind, rounded(choose.uniform(-64, 64), kind))))
    return number | (INFINITY[kind][1] if math.isnan(decode(kind, number)) else 0)  # no signalling NaN


# ---- What the instructions compute ----


def exact(operation: Callable[..., Value], toward_zero: bool = False) -> Callable[..., float]:
    """The operation with one rounding."""

    def compute(_: int, *values: float) -> float:
        nearly = operation(*values)  # in float64: zero, infinite or NaN if the result is
        return (
            rounded(operation(*map(Fraction, values)), toward_zero=toward_zero)
            if 0 < abs(nearly) < math.inf
            else nearly
        )

    return compute


def divide(_: int, a: float, b: float) -> float:
    if a == 0 or b == 0 or not math.isfinite(a + b):
        with np.errstate(all="ignore"):
            return float(np.float32(a) / np.float32(b))
    return rounded(Fraction(a) / Fraction(b))


def root(_: int, a: float) -> float:
    return rounded(math.sqrt(a)) if a >= 0 else math.nan


def power(_: int, a: float) -> float:
    return rounded(2.0**a) if a < 200 else a if math.isnan(a) else math.inf


def order(value: float) -> tuple[float, float]:
    return value, math.copysign(1, value)


def least(_: int, *values: float) -> float:
    return min((value for value in values if value == value), key=order, default=math.nan)


def greatest(_: int, *values: float) -> float:
    return max((value for value in values if value == value), key=order, default=math.nan)


def quotient(_: int, a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (-1 if (a < 0) != (b < 0) else 1) if b else -1


def extract(kind_bits: int, signed: bool, value: int, position: int, length: int) -> int:
    position, length, top = position & 255, length & 255, kind_bits - 1
    sign = value >> min(position + length - 1, top) & 1 if signed and length else 0
    bits = (value >> position + i & 1 if i < length and position + i <= top else sign for i in range(kind_bits))
    return sum(bit << i for i, bit in enumerate(bits))


def insert(kind_bits: int, field: int, value: int, position: int, length: int) -> int:
    for i in range(length & 255):
        if (at := (position & 255) + i) < kind_bits:
            value = value & ~(1 << at) | (field >> i & 1) << at
    return value


def packed(kind: str) -> Callable[..., int]:
    return lambda _, a, b: encode(kind, rounded(a, kind)) << 16 | encode(kind, rounded(b, kind))


def any_nan(*values: float) -> bool:
    return any(value != value for value in values)


class Truth(NamedTuple):
    """Names as in the tables; kinds of the result and of the operands; the result from T's bits and the operands."""

    names: str
    kinds: str
    compute: Callable[..., Value]
    ulps: int = 0  # allowed


COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
FLOAT_COMPARE = {
    **{name: lambda a, b, ask=ask: not any_nan(a, b) and ask(a, b) for name, ask in COMPARE.items()},
    "neu": lambda a, b: any_nan(a, b) or a != b,
    "leu": lambda a, b: any_nan(a, b) or a <= b,
}
TRUTHS = [
    Truth("add.<int>", "T T T", lambda _, a, b: a + b),
    Truth("sub.<int>", "T T T", lambda _, a, b: a - b),
    Truth("mul.lo.<int>", "T T T", lambda _, a, b: a * b),
    Truth("mul.hi.<narrow>", "T T T", lambda bits, a, b: a * b >> bits),
    Truth("mul.wide.<narrow>", "W T T", lambda _, a, b: a * b),
    Truth("mad.lo.<int>", "T T T T", lambda _, a, b, c: a * b + c),
    Truth("mad.wide.<narrow>", "W T T W", lambda _, a, b, c: a * b + c),
    Truth("div.<narrow>", "T T T", quotient),
    Truth("min.<int>", "T T T", lambda _, a, b: min(a, b)),
    Truth("max.<int>", "T T T", lambda _, a, b: max(a, b)),
    Truth("and.<pred|bits>", "T T T", lambda _, a, b: a & b),
    Truth("or.<pred|bits>", "T T T", lambda _, a, b: a | b),
    Truth("xor.<pred|bits>", "T T T", lambda _, a, b: a ^ b),
    Truth("not.<pred|bits>", "T T", lambda _, a: ~a),
    Truth("popc.b32", "u32 T", lambda _, a: a.bit_count()),
    Truth("shl.<bits>", "T T u32", lambda bits, a, count: a << min(count, bits)),
    Truth("shr.<bits|int>", "T T u32", lambda bits, a, count: a >> min(count, bits)),
    Truth("bfe.<s32|s64>", "T T u32 u32", lambda bits, *values: extract(bits, True, *values)),
    Truth("bfe.<u32|u64>", "T T u32 u32", lambda bits, *values: extract(bits, False, *values)),
    Truth("bfi.<b32|b64>", "T T T u32 u32", insert),
    Truth("selp.<word>", "B B B pred", lambda _, a, b, chosen: a if chosen else b),
    Truth("mov.<pred|word>", "B B", lambda _, a: a),
    Truth("cvta<|.to>.<global|param>.u64", "T T", lambda _, a: a),
    Truth("cvt.<convertible>.<convertible>", "D T", lambda _, a: a),
    Truth("cvt.rn.f32.<convertible>", "D T", lambda _, a: rounded(Fraction(a)) if a else 0.0),
    Truth("cvt.rn.f16.f32", "D T", lambda _, a: rounded(a, "f16")),
    Truth("cvt.rn.bf16.f32", "D T", lambda _, a: rounded(a, "bf16")),
    Truth("cvt.rn.f16x2.f32", "b32 T T", packed("f16")),
    Truth("cvt.rn.bf16x2.f32", "b32 T T", packed("bf16")),
    Truth("add<|.rn><ftz>.f32", "T T T", exact(operator.add)),
    Truth("sub<|.rn><ftz>.f32", "T T T", exact(operator.sub)),
    Truth("mul<|.rn><ftz>.f32", "T T T", exact(operator.mul)),
    Truth("add.rz<ftz>.f32", "T T T", exact(operator.add, toward_zero=True)),
    Truth("fma.rn<ftz>.f32", "T T T T", exact(lambda a, b, c: a * b + c)),
    Truth("neg.s32", "T T", lambda _, a: -a),
    Truth("neg<ftz>.f32", "T T", lambda _, a: -a),
    Truth("abs<ftz>.f32", "T T", lambda _, a: abs(a)),
    Truth("min<ftz>.f32", "T T T", least),
    Truth("max<ftz>.f32", "T T T", greatest),
    Truth("rcp.<approx|rn><ftz>.f32", "T T", lambda _, a: divide(_, 1.0, a)),
    Truth(
        "rsqrt.approx<ftz>.f32",
        "T T",
        lambda _, a: rounded(1 / math.sqrt(a)) if a > 0 else divide(_, 1.0, root(_, a)),
        ulps=1,
    ),
    Truth("ex2.approx<ftz>.f32", "T T", power, ulps=1),
]
TRUTHS += [
    Truth(f"setp.{name}{types}", "pred T T", lambda _, a, b, ask=ask: ask(a, b))
    for types, comparisons in (
        (".<int>", COMPARE),
        (".<bits>", {"eq": operator.eq, "ne": operator.ne}),
        ("<ftz>.f32", FLOAT_COMPARE),
    )
    for name, ask in comparisons.items()
]


class Case(NamedTuple):
    """One instruction, and a kernel with it alone."""

    truth: Truth
    name: str  # of the instruction
    kernel: str
    result: str  # kind
    operands: list[str]  # kinds

    def ptx(self) -> str:
        declared, loads = [], []
        for i, kind in enumerate([self.result, *self.operands]):
            width = max(16, bits_of(kind))
            declared.append(f".reg .pred %x{i}; .reg .b32 %bits{i};" if kind == "pred" else f".reg .b{width} %x{i};")
            if kind == "pred":
                loads.append(f"ld.global.b32 %bits{i}, [%in + {8 * i}]; setp.ne.b32 %x{i}, %bits{i}, 0;")
            else:
                loads.append(f"ld.global.b{width} %x{i}, [%in + {8 * i}];")
        operands = ", ".join(f"%x{i}" for i in range(len(declared)))
        store = f"st.global.b{max(16, bits_of(self.result))} [%out], %x0;"
        if self.result == "pred":
            store = "selp.b32 %bits0, 1, 0, %x0; st.global.b32 [%out], %bits0;"
        return f"""
.visible .entry {self.kernel}(.param .u64 in, .param .u64 out) {{
  .reg .b32 %thread, %cta, %threads; .reg .b64 %in, %out; {" ".join(declared)}
  ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
  mov.u32 %thread, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %threads, %ntid.x;
  mad.lo.u32 %thread, %cta, %threads, %thread;
  mad.wide.u32 %in, %thread, {8 * len(declared)}, %in; mad.wide.u32 %out, %thread, 8, %out;
  {" ".join(loads[1:])}
  {self.name} {operands};
  {store}
  ret;
}}"""

    def inputs(self) -> list[tuple[int, ...]]:
        """Pairs of special values, then special values and random ones."""
        choose, count = random.Random(self.name), CTAS * THREADS
        special = [special_bits(kind) for kind in self.operands]
        pairs = list(itertools.product(*special)) if len(special) < 3 else []
        return choose.sample(pairs, min(len(pairs), count // 2)) + [
            tuple(
                choose.choice((choose.choice(values), random_bits(kind, choose)))
                for kind, values in zip(self.operands, special, strict=True)
            )
            for _ in range(count - min(len(pairs), count // 2))
        ]

    def expected(self, bits: Sequence[int]) -> int:
        """The bits of the result's register."""
        is_flushed = ".ftz" in self.name
        values = [decode(kind, value) for kind, value in zip(self.operands, bits, strict=True)]
        values = [flushed(value) if is_flushed and isinstance(value, float) else value for value in values]
        value = self.truth.compute(bits_of(self.name.split(".")[-1]), *values)
        value = flushed(value) if is_flushed and isinstance(value, float) else value
        found = encode(self.result, value)
        return encode("b16", decode(self.result, found)) if bits_of(self.result) == 8 else found


def cases(truth: Truth) -> list[Case]:
    found = []
    for name in ptx_instructions.expand(truth.names):
        words = name.split(".")
        T = words[-1]
        wide = f"{T[0]}{2 * bits_of(T)}" if T[0] in "bsu" else ""
        letters = {"T": T, "D": words[-2], "W": wide, "B": T.replace("f", "b")}
        result, *operands = (letters.get(kind, kind) for kind in truth.kinds.split())
        found.append(Case(truth, name, "test_" + name.replace(".", "_"), result, operands))
    return found


@pytest.fixture(scope="module")
def program() -> Program:
    """Every kernel of this file, so that a compiler runs once."""
    return Program(translate(HEADER + "".join(case.ptx() for truth in TRUTHS for case in cases(truth))))


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.names)
def test_arithmetic(program: Program, truth: Truth) -> None:
    for case in cases(truth):
        inputs = case.inputs()
        operands = np.array([[0, *values] for values in inputs], dtype=np.uint64)
        out = np.zeros(len(inputs), dtype=np.uint64)
        launch(program, case.kernel, operands, out, grid=CTAS, threads=THREADS)
        for values, got in zip(inputs, out.tolist(), strict=True):
            expected = case.expected(values)
            assert abs(got - expected) <= truth.ulps, (
                f"{case.name} of {list(map(hex, values))}: {got:#x}, not {expected:#x}"
            )


def test_that_all_arithmetic_is_tested() -> None:
    control = {"bra", "bra.uni", "ret"}
    tested = [case.name for truth in TRUTHS for case in cases(truth)]
    assert {
        name for names, *_ in ptx_instructions.ARITHMETIC for name in ptx_instructions.expand(names)
    } - control == set(tested)
    assert len(tested) == len(set(tested))
