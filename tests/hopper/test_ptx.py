"""PTX as C++: what each instruction computes, against exact arithmetic; control flow; and that all else is refused."""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import random
import re
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.hopper import emulator, ptx
from tests.hopper.emulator import LaunchError, Program
from tests.hopper.ptx import PtxError, translate

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
CTAS, THREADS = 2, 512
Value = Any  # int, float or bool, by the kind


def launch(program: Program, name: str, *arrays: np.ndarray, **options: Any) -> None:
    """Run a kernel whose parameters are the addresses of the arrays."""
    emulator.forget()
    emulator.allow(*arrays)
    try:
        program.launch(name, args=[ctypes.c_uint64(array.ctypes.data) for array in arrays], **options)
    finally:
        emulator.forget()


# ---- Values of PTX's types in Python, where floats are exact ----

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


def logarithm(_: int, a: float) -> float:
    return rounded(math.log2(a)) if a > 0 else -math.inf if a == 0 else math.nan


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


def permute(_: int, a: int, b: int, selector: int) -> int:
    source = struct.pack("<II", a, b)
    chosen = [(selector >> 4 * i & 8, source[selector >> 4 * i & 7]) for i in range(4)]
    return int.from_bytes(bytes(byte // 128 * 255 if sign else byte for sign, byte in chosen), "little")


def packed(kind: str) -> Callable[..., int]:
    return lambda _, a, b: encode(kind, rounded(a, kind)) << 16 | encode(kind, rounded(b, kind))


def any_nan(*values: float) -> bool:
    return any(value != value for value in values)


class Truth(NamedTuple):
    """Names as in ptx.py; kinds of the result and of the operands; the result from T's bits and the operands."""

    names: str
    kinds: str
    compute: Callable[..., Value]
    ulps: int = 0  # allowed


COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
FLOAT_COMPARE = {
    **{name: lambda a, b, ask=ask: not any_nan(a, b) and ask(a, b) for name, ask in COMPARE.items()},
    **{f"{name}u": lambda a, b, ask=ask: any_nan(a, b) or ask(a, b) for name, ask in COMPARE.items()},
    "num": lambda a, b: not any_nan(a, b),
    "nan": any_nan,
}
TRUTHS = [
    Truth("add.<int>", "T T T", lambda _, a, b: a + b),
    Truth("sub.<int>", "T T T", lambda _, a, b: a - b),
    Truth("mul.lo.<int>", "T T T", lambda _, a, b: a * b),
    Truth("mul.hi.<int>", "T T T", lambda bits, a, b: a * b >> bits),
    Truth("mul.wide.<narrow>", "W T T", lambda _, a, b: a * b),
    Truth("mad.lo.<int>", "T T T T", lambda _, a, b, c: a * b + c),
    Truth("mad.wide.<narrow>", "W T T W", lambda _, a, b, c: a * b + c),
    Truth("div.<int>", "T T T", quotient),
    Truth("rem.<int>", "T T T", lambda _, a, b: a - b * quotient(_, a, b) if b else a),
    Truth("neg.<signed>", "T T", lambda _, a: -a),
    Truth("abs.<signed>", "T T", lambda _, a: abs(a)),
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
    Truth("prmt.b32", "T T T T", permute),
    Truth("selp.<word>", "B B B pred", lambda _, a, b, chosen: a if chosen else b),
    Truth("mov.<pred|word>", "B B", lambda _, a: a),
    Truth("cvta<|.to>.<global|param>.u64", "T T", lambda _, a: a),
    Truth("cvt.<convertible>.<convertible>", "D T", lambda _, a: a),
    Truth("cvt.rn.f32.<convertible>", "D T", lambda _, a: rounded(Fraction(a)) if a else 0.0),
    Truth("cvt.f32.<f16|bf16>", "D T", lambda _, a: a),
    Truth("cvt.rn.f16.f32", "D T", lambda _, a: rounded(a, "f16")),
    Truth("cvt.rn.bf16.f32", "D T", lambda _, a: rounded(a, "bf16")),
    Truth("cvt.rn.f16x2.f32", "b32 T T", packed("f16")),
    Truth("cvt.rn.bf16x2.f32", "b32 T T", packed("bf16")),
    Truth("add<|.rn><ftz>.f32", "T T T", exact(operator.add)),
    Truth("sub<|.rn><ftz>.f32", "T T T", exact(operator.sub)),
    Truth("mul<|.rn><ftz>.f32", "T T T", exact(operator.mul)),
    Truth("add.rz<ftz>.f32", "T T T", exact(operator.add, toward_zero=True)),
    Truth("fma.rn<ftz>.f32", "T T T T", exact(lambda a, b, c: a * b + c)),
    Truth("neg<ftz>.f32", "T T", lambda _, a: -a),
    Truth("abs<ftz>.f32", "T T", lambda _, a: abs(a)),
    Truth("min<ftz>.f32", "T T T", least),
    Truth("max<ftz>.f32", "T T T", greatest),
    Truth("min<ftz>.NaN.f32", "T T T", lambda _, a, b: math.nan if any_nan(a, b) else least(_, a, b)),
    Truth("max<ftz>.NaN.f32", "T T T", lambda _, a, b: math.nan if any_nan(a, b) else greatest(_, a, b)),
    Truth("div.<approx|full|rn><ftz>.f32", "T T T", divide),
    Truth("rcp.<approx|rn><ftz>.f32", "T T", lambda _, a: divide(_, 1.0, a)),
    Truth("sqrt.<approx|rn><ftz>.f32", "T T", root),
    Truth(
        "rsqrt.approx<ftz>.f32",
        "T T",
        lambda _, a: rounded(1 / math.sqrt(a)) if a > 0 else divide(_, 1.0, root(_, a)),
        ulps=1,
    ),
    Truth("ex2.approx<ftz>.f32", "T T", power, ulps=1),
    Truth("lg2.approx<ftz>.f32", "T T", logarithm, ulps=1),
]
GATES = {"": bool, ".and": operator.and_, ".or": operator.or_, ".xor": operator.xor}
TRUTHS += [
    Truth(
        f"setp.{name}{gate}{types}",
        "pred T T pred" if gate else "pred T T",
        lambda _, a, b, *c, ask=ask, gate=gate: GATES[gate](ask(a, b), *c),
    )
    for types, comparisons in (
        (".<int>", COMPARE),
        (".<bits>", {"eq": operator.eq, "ne": operator.ne}),
        ("<ftz>.f32", FLOAT_COMPARE),
    )
    for name, ask in comparisons.items()
    for gate in GATES
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
    for name in ptx._expand(truth.names):
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
    return Program(translate(HEADER + CONTROL_FLOW + "".join(case.ptx() for truth in TRUTHS for case in cases(truth))))


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
    assert {name for names, *_ in ptx.ARITHMETIC for name in ptx._expand(names)} - control == set(tested)
    assert len(tested) == len(set(tested))


# ---- Control flow, operands, memory ----

CONTROL_FLOW = """
.visible .entry collatz(.param .u64 in, .param .u64 out)
.maxntid 32, 1, 1
{
  .reg .pred %p<3>; .reg .b32 %r<6>; .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [in];  // steps to 1, by branches forward and back
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  mad.wide.u32 %rd1, %r1, 4, %rd1;
  mad.wide.u32 %rd2, %r1, 4, %rd2;
  ld.global.u32 %r2, [%rd1];
  mov.b32 %r3, 0;
$L__head:
  setp.eq.u32 %p1, %r2, 1;
  @%p1 bra $L__done;
  add.s32 %r3, %r3, 1;
  and.b32 %r4, %r2, 1;
  setp.ne.b32 %p2, %r4, 0;
  @!%p2 shr.u32 %r2, %r2, 1;
  @%p2 mad.lo.u32 %r2, %r2, 3, 1;
  bra.uni $L__head;
$L__done:
  st.global.u32 [%rd2], %r3;
  ret;
}
.visible .entry scopes(.param .u64 out)
{
  .reg .b32 %r<4>, %i; .reg .b64 %rd1; .reg .pred %p1;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, 0;
  {
    .reg .pred done; .reg .b32 %i;
    mov.u32 %i, 3;
    again: add.s32 %r1, %r1, 1; sub.s32 %i, %i, 1; setp.eq.s32 done, %i, 0;
    @!done bra again;
  }
  mov.u32 %i, 5;
  {
    .reg .pred done;
    again:
    add.s32 %r1, %r1, 10;
    { .reg .b32 %i; mov.u32 %i, 99; again: add.s32 %r1, %r1, 1000; }  /* not the outer
      ones */
    sub.s32 %i, %i, 1; setp.eq.s32 done, %i, 0;
    @done bra.uni $L__out;
    bra again;
  }
  mov.u32 %r1, 0;
$L__out:
  st.global.u32 [%rd1], %r1;
  setp.eq.u32 %p1, %r1, %r1;
  @%p1 ret;
  st.global.u32 [%rd1], 0;
}
.visible .entry constants(.param .u64 out)
{
  .reg .b32 %r<8>; .reg .f32 %f1; .reg .b64 %rd<8>; .reg .b16 %rs<4>; .reg .pred %p<3>;
  ld.param.u64 %rd1, [out];
  mov.b32 %r1, 0f3F800000; mov.f32 %f1, 0fBF800000; mov.u32 %r2, 0xFFFFFFFF;
  add.f32 %f1, %f1, 0f40000000;
  st.global.v4.b32 [%rd1], {%r1, %f1, %r2, -2};
  mov.b64 %rd2, -1024; mov.u64 %rd3, 0x8000000000000001;
  st.global.v2.b64 [%rd1 + 16], {%rd2, %rd3};
  mov.pred %p1, -1; mov.pred %p2, 0;
  selp.b32 %r3, 1, 2, %p1; selp.b32 %r4, 1, 2, %p2;
  st.global.v2.u32 [%rd1+32], {%r3, %r4};
  mov.b32 {%rs1, %rs2}, %r2; mov.u16 %rs2, -3; mov.b32 %r5, {%rs1, %rs2};
  mov.b64 %rd4, {%r5, %r1}; mov.b64 {%r6, %r7}, %rd4;
  st.global.v2.b32 [%rd1 + 40], {%r6, %r7};
}
.visible .entry parameters(.param .align 8 .b8 block[24], .param .u32 .ptr .global .align 4 number, .param .f32 real)
{
  .reg .b32 %r<6>; .reg .f32 %f1; .reg .b64 %rd<5>;
  mov.b64 %rd1, block;
  cvta.param.u64 %rd2, %rd1;
  ld.param.u64 %rd3, [block];
  ld.param.v2.u32 {%r1, %r2}, [block+8];
  add.s64 %rd1, %rd1, 24;
  ld.param.u64 %rd4, [%rd1+-8];
  ld.param.b32 %r3, [number]; ld.param.f32 %f1, [real]; ld.global.b32 %r4, [%rd2];
  st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %f1};
  st.global.b64 [%rd3+16], %rd4;
  st.global.b32 [%rd3+24], %r4;
}
.visible .entry memory(.param .u64 in, .param .u64 out)
{
  .reg .b16 %rs<6>; .reg .b32 %r<10>; .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out];
  ld.global.s8 %r1, [%rd1 + 1]; ld.global.u8 %r2, [%rd1 + 1]; ld.global.s16 %r3, [%rd1 + 2];
  ld.global.b16 %rs1, [%rd1 + 2];
  cvt.u32.u16 %r4, %rs1;
  st.global.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};
  mov.u32 %r5, smem;
  ld.global.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [%rd1 + 8];
  st.shared.v4.b16 [smem + 8], { %rs4, %rs3, %rs2, %rs1 };
  ld.shared.v2.b32 {%r6, %r7}, [%r5+8];
  st.shared.b8 [%r5 + 16], %r6; ld.shared.u8 %r8, [%r5 + 16];
  cvt.u64.u32 %rd3, %r5;
  { .reg .b64 %t; cvta.shared.u64 %t, %rd3; cvta.to.shared.u64 %rd4, %t; }
  ld.shared.b32 { %r9 }, [ %rd4 + 8 ];
  st.global.v4.b32 [%rd2 + 16], {%r6, %r7, %r8, %r9};
}
.visible .entry signalling(.param .u64 in, .param .u64 out)
{
  .reg .f32 %f<6>; .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p1;
  ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out];
  ld.global.f32 %f1, [%rd1]; mov.f32 %f2, %f1; mov.b32 %r1, %f2; setp.eq.b32 %p1, %r1, 0;
  selp.f32 %f3, 0f00000000, %f2, %p1; mov.b64 %rd3, {%r1, %f3}; mov.b64 {%r2, %f4}, %rd3;
  st.shared.v2.f32 [smem], {%f3, %f4}; ld.shared.v2.b32 {%r2, %r3}, [smem];
  st.global.v2.b32 [%rd2], {%r2, %r3};
  add.f32 %f5, %f1, 0f3F800000;
  st.global.f32 [%rd2 + 8], %f5;
}
.visible .entry special(.param .u64 out)
.reqntid 64
.reqnctapercluster 2, 1, 1
{
  .reg .b32 %r<16>; .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %laneid;
  mov.u32 %r6, %cluster_ctarank; mov.u32 %r7, %cluster_nctarank;
  mov.u32 %r8, %tid.y; mov.u32 %r9, %ntid.z; mov.u32 %r10, %ctaid.z; mov.u32 %r11, %nctaid.y;
  mad.lo.u32 %r12, %r3, %r2, %r1; mad.wide.u32 %rd1, %r12, 48, %rd1;
  st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4}; st.global.v4.u32 [%rd1 + 16], {%r5, %r6, %r7, %r8};
  st.global.v2.u32 [%rd1 + 32], {%r9, %r10}; st.global.u32 [%rd1 + 40], %r11;
}
"""


def collatz(number: int) -> int:
    return 0 if number == 1 else 1 + collatz(3 * number + 1 if number % 2 else number // 2)


def test_branches(program: Program) -> None:
    numbers, steps = np.arange(1, 33, dtype=np.uint32), np.zeros(32, dtype=np.uint32)
    launch(program, "collatz", numbers, steps)
    assert steps.tolist() == [collatz(number) for number in range(1, 33)]


def test_scopes(program: Program) -> None:
    out = np.zeros(1, dtype=np.uint32)
    launch(program, "scopes", out)
    assert out == [3 + 5 * 1010]


def test_constants(program: Program) -> None:
    out = np.zeros(12, dtype=np.uint32)
    launch(program, "constants", out)
    assert out[:4].tolist() == [0x3F800000, 0x3F800000, 0xFFFFFFFF, 0xFFFFFFFE]
    assert out[4:8].view(np.uint64).tolist() == [2**64 - 1024, 2**63 + 1]
    assert out[8:].tolist() == [1, 2, 0xFFFDFFFF, 0x3F800000]


def test_parameters(program: Program) -> None:
    out = np.zeros(7, dtype=np.uint32)
    block = np.array([out.ctypes.data, 7 | 8 << 32, 2**40 + 9], dtype=np.uint64)
    emulator.forget()
    emulator.allow(out, block)
    args = [(ctypes.c_uint64 * 3).from_buffer(block), ctypes.c_uint32(5), ctypes.c_float(1.5)]
    program.launch("parameters", args=args)
    emulator.forget()
    assert out.tolist() == [7, 8, 5, 0x3FC00000, 9, 2**8, out.ctypes.data & 0xFFFFFFFF]


def test_memory(program: Program) -> None:
    given, out = np.array([0x8765F00F, 0, 0x22221111, 0x44443333], dtype=np.uint32), np.zeros(8, dtype=np.uint32)
    launch(program, "memory", given, out, shared=64)
    assert out.tolist() == [0xFFFFFFF0, 0xF0, 0xFFFF8765, 0x8765, 0x33334444, 0x11112222, 0x44, 0x33334444]


def test_moves_keep_a_signalling_nan_and_arithmetic_does_not_take_it(program: Program) -> None:
    given, out = np.array([0x7F800001], dtype=np.uint32), np.zeros(3, dtype=np.uint32)
    line = 1 + (HEADER + CONTROL_FLOW).partition("add.f32 %f5")[0].count("\n")
    with pytest.raises(LaunchError, match=f"at {line}: arithmetic on an accumulator in flight"):
        launch(program, "signalling", given, out, shared=64)
    assert out.tolist() == [0x7F800001, 0x7F800001, 0]


def test_special_registers(program: Program) -> None:
    out = np.zeros((4 * 64, 12), dtype=np.uint32)
    launch(program, "special", out, grid=4, threads=64, cluster=2)
    for i, (cta, thread) in enumerate(itertools.product(range(4), range(64))):
        assert out[i].tolist() == [thread, 64, cta, 4, thread % 32, cta % 2, 2, 0, 1, 0, 1, 0]


# ---- Instructions of the machine: what they are in C++ ----

DECLARATIONS = ".reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>; .reg .f32 %f<132>; .reg .b64 %rd<4>;"
TENSOR = "cp.async.bulk.tensor.2d"
TO_SHARED = "global.mbarrier::complete_tx::bytes"
MACHINE = {
    "mbarrier.init.shared::cta.b64 [%r1], 4;": "mbarrier_init(r1, 4)",
    "mbarrier.inval.shared::cta.b64 [%r1 + 8];": "mbarrier_inval(r1 + 8)",
    "fence.mbarrier_init.release.cluster;": "fence_mbarrier_init()",
    "mbarrier.arrive.shared::cta.b64 _, [%r1];": "mbarrier_arrive(r1)",
    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];": "mbarrier_arrive(r1)",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;": "mbarrier_arrive_expect_tx(r1, r2)",
    "mbarrier.arrive.expect_tx.shared.b64 _, [smem+16], 32768;": "mbarrier_arrive_expect_tx(smem + 16, 32768)",
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2;": "p1 = mbarrier_try_wait_parity(r1, r2)",
    "mapa.shared::cluster.u32 %r1, %r2, %r3;": "r1 = mapa_shared_cluster(r2, r3)",
    "fence.proxy.async.shared::cta;": "fence_proxy_async()",
    "fence.proxy.async;": "fence_proxy_async()",
    f"{TENSOR}.shared::cluster.{TO_SHARED} [%r1], [%rd1, {{%r2, %r3}}], [%r4];": "tma_load_2d(r1, map rd1, r2, r3, r4)",
    f"{TENSOR}.shared::cta.{TO_SHARED} [%r1], [%rd1, {{0, %r3}}], [%r4];": "tma_load_2d(r1, map rd1, 0, r3, r4)",
    f"{TENSOR}.shared::cluster.{TO_SHARED}.multicast::cluster [%r1], [%rd1, {{%r2, %r3}}], [%r4], %rs1;": (
        "tma_load_2d(r1, map rd1, r2, r3, r4, rs1)"
    ),
    f"{TENSOR}.global.shared::cta.bulk_group [%rd1, {{%r2, %r3}}], [%r1];": "tma_store_2d(map rd1, r2, r3, r1)",
    "cp.async.bulk.commit_group;": "bulk_commit_group()",
    "cp.async.bulk.wait_group 1;": "bulk_wait_group(1)",
    "cp.async.bulk.wait_group.read 0;": "bulk_wait_group(0)",
    "prefetch.tensormap [%rd1];": "prefetch_tensormap(map rd1)",
    "bar.sync 0;": "bar_sync(0, 0)",
    "bar.sync %r1, %r2;": "bar_sync(r1, r2)",
    "barrier.sync %r1, 128;": "bar_sync(r1, 128)",
    "barrier.cluster.arrive.release.aligned;": "cluster_arrive()",
    "barrier.cluster.arrive;": "cluster_arrive()",
    "barrier.cluster.wait.acquire;": "cluster_wait()",
    "barrier.cluster.wait.aligned;": "cluster_wait()",
    "setmaxnreg.inc.sync.aligned.u32 232;": "setmaxnreg_inc(232)",
    "setmaxnreg.dec.sync.aligned.u32 40;": "setmaxnreg_dec(40)",
    "vote.sync.any.pred %p1, %p2, %r1;": "p1 = vote_any(p2, r1)",
    "vote.sync.all.pred %p1, !%p2, -1;": "p1 = vote_all(!p2, 4294967295)",
    "elect.sync %r1|%p1, -1;": "p1 = elect_sync(4294967295, r1)",
    "shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;": "r1 = shfl_sync(Shuffle::kIdx, r2, 0, 31, 4294967295)",
    "shfl.sync.bfly.b32 %f1|%p1, %f2, %r1, %r2, %r3;": "f1 = shfl_sync(Shuffle::kBfly, f2, r1, r2, r3), p1 = true",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};": "stmatrix(r1, r2, r3, r4, r5)",
    "wgmma.fence.sync.aligned;": "wgmma_fence()",
    "wgmma.commit_group.sync.aligned;": "wgmma_commit_group()",
    "wgmma.wait_group.sync.aligned 1;": "wgmma_wait_group(1)",
    "@!%p1 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p2, 1, 1, 0, 0;": (
        "if (!p1) wgmma(Half::kFloat16, 8, r, accumulators_0, rd1, rd2, p2)"
    ),
}


def kernel(*statements: str) -> str:
    """The module of a kernel; the last statement is on its line 8."""
    return HEADER + "\n".join([".visible .entry k(.param .u64 out)", "{", DECLARATIONS, " ".join(statements), "}"])


def readable(cpp: str) -> str:
    """With the names of DECLARATIONS and decimal constants, and without casts."""
    names = {"p": "p", "h": "rs", "d": "rd"}
    cpp = re.sub(r"\bsite = \d+; |\(u?int\d+_t\)", "", cpp)
    cpp = re.sub(r"\br\[(\d+)\]", lambda match: f"f{int(match[1]) - 8}" if int(match[1]) >= 8 else f"r{match[1]}", cpp)
    cpp = re.sub(r"\b([phd])\[(\d+)\]", lambda match: names[match[1]] + match[2], cpp)
    cpp = re.sub(r"0x([0-9a-f]+)ul?", lambda match: str(int(match[1], 16)), cpp)
    return re.sub(r"pointer\((\w+)\)", r"map \1", cpp).replace("dynamic_shared()", "smem")


@pytest.mark.parametrize("instruction", MACHINE)
def test_machine(instruction: str) -> None:
    *_, statement, _, _, _, _, _ = readable(translate(kernel(instruction))).split("\n")
    assert statement.replace("{ ", "").replace("; }", ";") == MACHINE[instruction] + ";"


def test_that_every_instruction_of_the_machine_is_tested() -> None:
    memory = {"ld", "st", "cvta"}  # run by the kernels above
    tested = {match[3] for match in map(ptx.INSTRUCTION.fullmatch, MACHINE) if match}
    untested = [
        names
        for names, *_ in ptx.MACHINE
        if names.split(".")[0] not in memory and "wgmma.mma" not in names and tested.isdisjoint(ptx._expand(names))
    ]
    assert untested == []


def wgmma(accumulators: Sequence[str], rest: str = "%rd1, %rd2, 1, 1, 1, 0, 0", n: int = 0) -> str:
    n = n or 2 * len(accumulators)
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{', '.join(accumulators)}}}, {rest};"


def test_accumulators_and_their_copies() -> None:
    largest = wgmma([f"%f{i}" for i in range(1, 129)])
    copies = "mov.f32 %f130, %f129; mov.b32 %f129, %f1; selp.f32 %r2, %f0, %f129, %p1; add.f32 %f131, %f1, %f1;"
    cpp = translate(kernel(copies, largest, wgmma(["%r4", "%r5", "%r6", "%r7"]), largest, "mov.b32 %r3, %r1;"))
    first = ", ".join(str(8 + i) for i in range(1, 129))
    assert f"accumulators_0[] = {{{first}}};" in cpp
    assert "accumulators_1[] = {4, 5, 6, 7};" in cpp
    assert f"tracked[] = {{2, 4, 5, 6, 7, {first}, 137, 138}};\ntrack_registers(r, tracked, 135);" in cpp
    assert cpp.count("wgmma(Half::kBfloat16, 256, r, accumulators_0, ") == 2


UNKNOWN = {
    "unknown instruction": [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.rm.f32 %f1, %f2, %f3;",
        "add.f64 %rd1, %rd2, %rd3;",
        "fma.rz.f32 %f1, %f2, %f3, %f1;",
        "cvt.rzi.s32.f32 %r1, %f1;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2;",
        "setp.lo.s32 %p1, %r1, %r2;",
        "prmt.b32.f4e %r1, %r2, %r3, %r1;",
        "ld.volatile.global.b32 %r1, [%rd1];",
        "ld.global.L1::evict_last.b32 %r1, [%rd1];",
        "ld.local.b32 %r1, [%rd1];",
        "ld.b32 %r1, [%rd1];",
        "st.relaxed.gpu.global.b32 [%rd1], %r1;",
        "st.param.b32 [out], %r1;",
        "atom.global.add.u32 %r1, [%rd1], %r2;",
        "bar.arrive 0, 32;",
        "bar.warp.sync -1;",
        "shfl.sync.up.b32 %r1, %r2, 1, 0, -1;",
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], %r2;",
        f"{TENSOR}.shared::cluster.{TO_SHARED}.L2::cache_hint [%r1], [%rd1, {{%r2, %r3}}], [%r4], %rd2;",
        wgmma(["%f1"], n=4),
        wgmma(["%f1", "%f2", "%f3", "%f4"]).replace("k16.f32.bf16.bf16", "k8.f32.tf32.tf32"),
        "exit;",
    ],
    "unknown operand": [
        "mov.u32 %r1, %r8;",
        "mov.u32 %r8, %r1;",
        "mov.u32 %r1, %clock;",
        "mov.u64 %rd1, text;",
        "mov.u32 %r1, out;",
        "mov.u32 %r1, $L;",
        "add.s32 %r1, %r2, 1.5;",
        "add.f32 %f1, %f2, 1;",
        "add.f32 %f1, %f2, 0d3FF0000000000000;",
        "add.s32 %r1, %r2, 0f3F800000;",
        "mov.u16 %rs1, 65536;",
        "mov.u32 %r1, -2147483649;",
        "add.s32 %rd1, %r1, %r2;",
        "add.s64 %rd1, %rd1, %r2;",
        "cvt.u64.u32 %r1, %r2;",
        "setp.eq.s32 %r1, %r2, %r3;",
        "selp.b32 %r1, %r2, %r3, %r1;",
        "@%r1 mov.u32 %r1, %r2;",
        "@%q mov.u32 %r1, %r2;",
        "bar.sync %rs1;",
        "cp.async.bulk.wait_group %r1;",
        "mbarrier.arrive.shared::cta.b64 %rd1, [%r1];",
        "bra nowhere;",
        "bra %r1;",
        "{ inner: ret; } bra inner;",
        "{ .reg .b32 %t; } mov.u32 %t, 0;",
        wgmma(["%rd1", "%f1", "%f2", "%f3"]),
        wgmma(["%f1", "%f2", "%f3", "%f4"], "%rd1, %rd2, %p1, -1, 1, 0, 0"),
        wgmma(["%f1", "%f2", "%f3", "%f4"], "%rd1, %rd2, %p1, 1, 1, 0, 1"),
    ],
    "unknown address": [
        "ld.global.b32 %r1, [%r2];",
        "ld.shared.b32 %r1, [%rs1];",
        "ld.global.b32 %r1, [smem];",
        "ld.shared.b32 %r1, [%r2 - 4];",
        "ld.shared.b32 %r1, [16];",
        "ld.param.b32 %r1, [absent];",
    ],
    "unknown form of operands": [
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, %r3, %r1;",
        "ret %r1;",
        "ld.global.b32 %r1, %rd1;",
        "ld.global.v2.b32 {%r1}, [%rd1];",
        "ld.global.b32 {%r1, %r2}, [%rd1];",
        "setp.eq.s32 %p1|%p2, %r2, %r3;",
        f"{TENSOR}.shared::cluster.{TO_SHARED} [%r1], [%rd1, {{%r2}}], [%r4];",
        f"{TENSOR}.shared::cluster.{TO_SHARED} [%r1], [%rd1], [%r4];",
        wgmma(["%f1", "%f2", "%f3", "%f4"], "%rd1, %rd2, 1, 1, 1"),
    ],
    "is no register": ["mov.u32 smem, %r1;", "mov.u64 out, %rd1;", "mov.u32 %tid.x, 1;"],
    "not 64 accumulators": [wgmma(["%f1", "%f2", "%f3", "%f4"], n=128)],
    "is there already": ["twice: twice: ret;", ".reg .b32 %r1;"],
    "unknown directive": [".local .b8 stack[8];", ".reg .b8 %q;", ".reg .b128 %q;", ".branchtargets a, b;"],
    "unknown form of a register": [".reg .b32 %q<a>;", ".reg .b32 %q %s;"],
}


@pytest.mark.parametrize(("why", "statement"), [(why, text) for why, texts in UNKNOWN.items() for text in texts])
def test_unknown_statements(why: str, statement: str) -> None:
    with pytest.raises(PtxError, match=f"line 8: .*{why}"):
        translate(kernel(statement).replace(HEADER, HEADER.replace("\n.ext", ".global .b8 text[2] = {1, 2};\n.ext")))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (".shared .align 16 .b8 buffer[64];", "line 1: unknown directive: .shared"),
        (".extern .shared .align 16 .b8 buffer[64];", "line 1: unknown directive"),
        ("\n.const .b32 one = 1;", "line 2: unknown directive"),
        (".visible .func f() { ret; }", "line 1: unknown directive"),
        (".visible .entry k() .maxnreg 32 { ret; }", "line 1: unknown directive"),
        (".visible .entry k(.param .b128 x) { ret; }", "line 1: unknown form of a parameter"),
        (".visible .entry k(.reg .b32 x) { ret; }", "line 1: unknown form of a parameter"),
        (".visible .entry k() {\n{ ret;\n", "line 2: is not closed"),
        (".visible .entry k() { ret; }\n}", "line 2: unknown directive"),
        (".visible .entry k() { .visible .entry l() { ret; } }", "line 1: not in a kernel"),
        (".visible .entry k() {\n  ret", "line 2: neither an instruction nor a directive: ret"),
        (".section .text { .b8 1 }", "line 1"),
        ("ret;", "line 1: unknown directive"),
    ],
)
def test_unknown_modules(module: str, why: str) -> None:
    with pytest.raises(PtxError, match=re.escape(why)):
        translate(module)


def test_what_has_no_effect() -> None:
    text = """
// .visible .entry commented()
.version 8.7
.target sm_90a, debug
.global .align 1 .b8 string[3] = {47, 47, 0};
.visible .entry k(
  .param .u64 .ptr .global .align 1 k_param_0 // an address
)
.minnctapersm 1
.explicitcluster
.reqnctapercluster 2
.maxntid 96
{
  .pragma "nounroll; // not the end";
  .loc 1 24 0 /* k.py:24:0 */
$L__tmp0:
  .loc 2 43 17, function_name $L__info_string0, inlined_at 1 59 44
  ret;
$L__func_end0:
}
  .file 1 "/a//k.py"
  .section .debug_abbrev
  {
.b8 1  // Abbreviation Code
.b64 $L__tmp0
  }
  .section .debug_macinfo { }
"""
    cpp = translate(text)
    assert "static void kernel_0(void* const* args) {\nreturn;\n}\n" in cpp
    assert 'hopper_kernels[] = {{"k", kernel_0, 96}};' in cpp
