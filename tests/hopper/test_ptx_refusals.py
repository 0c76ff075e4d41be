"""The instructions of the machine as C++, and that all else is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from tests.building import HOST_CXX
from tests.hopper import ptx, ptx_instructions
from tests.hopper.ptx import PtxError, translate
from tests.hopper.ptx_modules import HEADER

pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

DECLARATIONS = ".reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>; .reg .f32 %f<132>; .reg .b64 %rd<4>;"
TENSOR = "cp.async.bulk.tensor.2d"
TO_SHARED = "global.mbarrier::complete_tx::bytes"
MACHINE = {
    "mbarrier.init.shared::cta.b64 [%r1], 4;": "mbarrier_init(r1, 4)",
    "mbarrier.inval.shared::cta.b64 [%r1 + 8];": "mbarrier_inval(r1 + 8)",
    "fence.mbarrier_init.release.cluster;": "fence_mbarrier_init()",
    "mbarrier.arrive.shared::cta.b64 _, [%r1];": "mbarrier_arrive(r1)",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;": "mbarrier_arrive_expect_tx(r1, r2)",
    "mbarrier.arrive.expect_tx.shared.b64 _, [smem+16], 32768;": "mbarrier_arrive_expect_tx(smem + 16, 32768)",
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2;": "p1 = mbarrier_try_wait_parity(r1, r2)",
    "fence.proxy.async.shared::cta;": "fence_proxy_async()",
    "fence.proxy.async;": "fence_proxy_async()",
    f"{TENSOR}.shared::cluster.{TO_SHARED} [%r1], [%rd1, {{%r2, %r3}}], [%r4];": "tma_load_2d(r1, rd1, r2, r3, r4)",
    f"{TENSOR}.shared::cta.{TO_SHARED} [%r1], [%rd1, {{0, %r3}}], [%r4];": "tma_load_2d(r1, rd1, 0, r3, r4)",
    f"{TENSOR}.global.shared::cta.bulk_group [%rd1, {{%r2, %r3}}], [%r1];": "tma_store_2d(rd1, r2, r3, r1)",
    "cp.async.bulk.commit_group;": "bulk_commit_group()",
    "cp.async.bulk.wait_group 1;": "bulk_wait_group(1)",
    "cp.async.bulk.wait_group.read 0;": "bulk_wait_group(0)",
    "prefetch.tensormap [%rd1];": "prefetch_tensormap(rd1)",
    "bar.sync 0;": "bar_sync(0, 0)",
    "bar.sync %r1, %r2;": "bar_sync(r1, r2)",
    "setmaxnreg.inc.sync.aligned.u32 232;": "setmaxnreg_inc(232)",
    "setmaxnreg.dec.sync.aligned.u32 40;": "setmaxnreg_dec(40)",
    "vote.sync.any.pred %p1, %p2, %r1;": "p1 = vote_any(p2, r1)",
    "vote.sync.all.pred %p1, !%p2, -1;": "p1 = vote_all(!p2, 4294967295)",
    "elect.sync %r1|%p1, -1;": "p1 = elect_sync(4294967295, r1)",
    "shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;": "r1 = shfl_idx(r2, 0, 31, 4294967295)",
    "shfl.sync.bfly.b32 %f1|%p1, %f2, %r1, %r2, %r3;": "f1 = shfl_bfly(f2, r1, r2, r3), p1 = true",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};": "stmatrix_x4(r1, {r2, r3, r4, r5})",
    "wgmma.fence.sync.aligned;": "wgmma_fence()",
    "wgmma.commit_group.sync.aligned;": "wgmma_commit_group()",
    "wgmma.wait_group.sync.aligned 1;": "wgmma_wait_group(1)",
    "@!%p1 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p2, 1, 1, 0, 0;": (
        "if (!p1) wgmma(Half::kFloat16, rd1, rd2, p2, f1, f2, f3, f4)"
    ),
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %f2, %r3, %f4}, %rd1, %rd2, 1, 1, 1, 0, 0;": (
        "wgmma(Half::kBfloat16, rd1, rd2, 1, r1, f2, r3, f4)"
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
    return cpp.replace("dynamic_shared()", "smem")


@pytest.mark.parametrize("instruction", MACHINE)
def test_machine(instruction: str) -> None:
    *_, statement, _, _ = readable(translate(kernel(instruction))).split("\n")
    assert statement.replace("{ ", "").replace("; }", ";") == MACHINE[instruction] + ";"


def test_that_every_instruction_of_the_machine_is_tested() -> None:
    memory = {"ld", "st", "cvta"}  # run by the kernels above
    tested = {match[3] for match in map(ptx.INSTRUCTION.fullmatch, MACHINE) if match}
    untested = [
        names
        for names, *_ in ptx_instructions.MACHINE
        if names.split(".")[0] not in memory and tested.isdisjoint(ptx_instructions.expand(names))
    ]
    assert untested == []


def wgmma(accumulators: Sequence[str], rest: str = "%rd1, %rd2, 1, 1, 1, 0, 0", n: int = 0) -> str:
    n = n or 2 * len(accumulators)
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{', '.join(accumulators)}}}, {rest};"


def test_accumulators() -> None:
    largest, few = [f"%f{i}" for i in range(1, 129)], ["%r4", "%r5", "%r6", "%r7"]
    cpp = readable(translate(kernel(wgmma(largest), wgmma(few), wgmma(largest))))
    assert cpp.count(f"wgmma(Half::kBfloat16, rd1, rd2, 1, {', '.join(largest).replace('%', '')});") == 2
    assert "wgmma(Half::kBfloat16, rd1, rd2, 1, r4, r5, r6, r7);" in cpp


UNKNOWN = {
    "unknown instruction": [
        "barrier.sync %r1, 128;",
        "cnot.b32 %r1, %r2;",
        "div.s64 %rd1, %rd2, %rd3;",
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
        "barrier.cluster.arrive;",
        "mbarrier.arrive.shared::cluster.b64 _, [%r1];",
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
        "mov.u32 %r1, %laneid;",
        "mov.u32 %r1, %tid.y;",
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
        "bra nowhere;",
        "bra %r1;",
        "{ inner: ret; } bra inner;",
        "{ .reg .b32 %t; } mov.u32 %t, 0;",
        wgmma(["%rd1", "%f1", "%f2", "%f3"]),
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
        wgmma(["%f1", "%f2", "%f3", "%f4"], "%rd1, %rd2, %p1, 1, 1, 0, 1"),
        wgmma(["%f1", "%f2", "%f3", "%f4"], "%rd1, %rd2, %p1, -1, 1, 0, 0"),
        "mbarrier.arrive.shared::cta.b64 %rd1, [%r1];",
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
        wgmma(["%f1", "%f2", "%f3", "%f4"], n=128),
    ],
    "is no register": ["mov.u32 smem, %r1;", "mov.u64 out, %rd1;", "mov.u32 %tid.x, 1;"],
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
        (".visible .entry k() .reqnctapercluster 2 { ret; }", "line 1: unknown directive"),
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
    assert "void kernel_k(void* const* args) {\nL0:;\nreturn;\nL1:;\n}\n" in cpp
