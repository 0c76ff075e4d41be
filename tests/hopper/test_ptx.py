"""PTX as C++: control flow, operands, memory."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from tests.building import HOST_CXX
from tests.hopper import emulator
from tests.hopper.emulator import LaunchError, Program
from tests.hopper.ptx import translate
from tests.hopper.ptx_modules import HEADER, launch

pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

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
{
  .reg .b32 %r<16>; .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %nctaid.x;
  mad.lo.u32 %r5, %r3, %r2, %r1; mad.wide.u32 %rd1, %r5, 16, %rd1;
  st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(translate(HEADER + CONTROL_FLOW))


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
    out = np.zeros((4 * 64, 4), dtype=np.uint32)
    launch(program, "special", out, grid=4, threads=64)
    for i, (cta, thread) in enumerate(itertools.product(range(4), range(64))):
        assert out[i].tolist() == [thread, 64, cta, 4]
