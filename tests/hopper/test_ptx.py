"""PTX as C++: what each instruction computes, against exact arithmetic; control flow; and that all else is refused."""

from __future__ import annotations

import ctypes
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

from tests.hopper import emulator, ptx
from tests.hopper.emulator import LaunchError, Program, Settings
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
INTEGERS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF]
INTEGERS += [0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63]
SPECIAL = {
    "f32": [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x3F7FFFFF, 0x40000000, 0x4B000001, 0x7F7FFFFF],
    "f16": [0x0, 0x1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x3555],
    "bf16": [0x0, 0x1, 0x7F, 0x80, 0x3F80, 0x7F7F, 0x3EAB],
}
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
        result = (2 - Fraction(2) ** (1 - precision)) * 2**greatest if toward_zero else math.inf
    return math.copysign(float(result), value)


def flushed(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def samples(kind: str, choose: random.Random) -> list[int]:
    """Bits of values where things go wrong, and of a random one."""
    if kind == "pred":
        return [0, 1]
    sign = 1 << bits_of(kind) - 1
    if kind in FLOATS:
        infinity, nan = INFINITY[kind]
        number = choose.getrandbits(bits_of(kind) - 1)
        positive = [*SPECIAL[kind], infinity, nan, number | (nan if number > infinity else 0)]
    else:
        positive = [value & sign - 1 for value in INTEGERS if value < 2 * sign] + [choose.getrandbits(bits_of(kind))]
    return positive + [value ^ sign for value in positive]
