"""The emulation itself: what its instructions compute, and that it notices each broken rule."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch

from tests.hopper import emulator
from tests.hopper.emulator import SCHEDULES, TIMINGS, LaunchError, Program, Settings

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")

# Kernels by name: statements that every thread runs. `shared` is the address of the dynamic shared memory, args[0] an
# array of the test's.
KERNELS = {
    "race": "const uint32_t one = 1; uint32_t got; if (tid_x() == 0) st_shared(shared, &one, 4);"
    "if (tid_x() == 32) ld_shared(shared, &got, 4);",
    "race_of_stores": "const uint32_t v = tid_x(); if (tid_x() % 32 == 0) st_shared(shared, &v, 4);",
    "same_value": "const uint32_t v = 7; if (tid_x() % 32 == 0) st_shared(shared, &v, 4);",
    "overwrite": "uint32_t v = tid_x(); if (v == 0) st_shared(shared, &v, 4); bar_sync(0, 0);"
    "if (v == 0) ld_shared(shared, &v, 4); if (v == 32) st_shared(shared, &v, 4);",
    "barrier": "const uint32_t one = 1; uint32_t got; if (tid_x() == 0) st_shared(shared, &one, 4); bar_sync(0, 0);"
    "if (tid_x() == 32) { ld_shared(shared, &got, 4); st_global(out, &got, 4); }",
    "unwritten": "uint32_t got; ld_shared(shared + 64, &got, 4);",
    "misaligned": "uint64_t got; ld_shared(shared + 4, &got, 8);",
    "out_of_shared": "uint32_t got; ld_shared(shared + 4096, &got, 4);",
    "out_of_global": "uint32_t got; ld_global(out + 4096, &got, 4);",
    "divergent": "if (lane < 16) wgmma_fence(); else wgmma_commit_group();",
    "exited_lane": "if (lane) vote_any(true, ~0u);",
    "partial_vote": "const uint32_t got = lane < 8 ? vote_all(lane < 8, 0xff) : 1; st_global(out + 4 * lane, &got, 4);",
    "foreign_mask": "vote_any(true, 1);",
    "shuffles": "const uint32_t got = shfl_sync(Shuffle::kBfly, lane, 5, 31, ~0u) + "
    "100 * shfl_sync(Shuffle::kIdx, lane, 3, 31, ~0u); st_global(out + 4 * lane, &got, 4);",
    "elect": "uint32_t leader; const uint32_t got = elect_sync(~0u, leader) + 10 * leader; st_global(out + 4 * lane, &got, 4);",
    "too_many_arrivals": "if (tid_x() == 0) { mbarrier_init(shared, 2); mbarrier_arrive_expect_tx(shared, 16);"
    "mbarrier_arrive(shared); mbarrier_arrive(shared); }",
    "never_arrives": "if (tid_x() == 0) { mbarrier_init(shared, 1); while (!mbarrier_try_wait_parity(shared, 0)) {} }",
    "no_mbarrier": "mbarrier_arrive(shared);",
    "second_init": "if (tid_x() == 0) { mbarrier_init(shared, 1); mbarrier_init(shared, 1); }",
    "store_over_mbarrier": "const uint32_t v = 0; if (tid_x() == 0) { mbarrier_init(shared, 1); st_shared(shared, &v, 4); }",
    "unordered_mbarrier": "if (tid_x() == 0) mbarrier_init(shared, 1); if (tid_x() == 32) while (true) mbarrier_arrive(shared);",
    "mbarrier_orders": "const uint32_t one = 1; uint32_t got; if (tid_x() == 0) mbarrier_init(shared, 1); bar_sync(0, 0);"
    "if (tid_x() == 0) { st_shared(shared + 64, &one, 4); mbarrier_arrive(shared); }"
    "if (tid_x() == 32) { while (!mbarrier_try_wait_parity(shared, 0)) {} ld_shared(shared + 64, &got, 4); st_global(out, &got, 4); }",
    "unequal_barriers": "bar_sync(1, tid_x() < 32 ? 64 : 32);",
    "too_few_registers": "setmaxnreg_inc(232);",
    "registers": "if (tid_x() < 128) setmaxnreg_dec(40); else setmaxnreg_inc(232);",
    "wrong_registers": "setmaxnreg_dec(100);",
    "no_tensor_map": "static int map[32]; prefetch_tensormap(map);",
    "cluster_exit": "if (tid_x() == 0) mbarrier_init(shared, 1); cluster_arrive(); cluster_wait();"
    "if (cluster_ctarank() == 1 && tid_x() == 0) for (int i = 0; i < 1000; ++i) mbarrier_arrive(mapa_shared_cluster(shared, 0));",
    "remote_arrivals": "if (tid_x() == 0) mbarrier_init(shared, 4); cluster_arrive(); cluster_wait();"
    "if (lane < 2) mbarrier_arrive(mapa_shared_cluster(shared, lane)); while (!mbarrier_try_wait_parity(shared, 0)) {}"
    "const uint32_t one = 1; if (tid_x() == 0) st_global(out + 4 * ctaid_x(), &one, 4); cluster_arrive(); cluster_wait();",
    "second_arrive": "cluster_arrive(); cluster_arrive();",
}
BROKEN = {
    "race": "a race with a store of another warp|nobody has written",
    "race_of_stores": "st.shared: a race with a store of another warp",
    "overwrite": "st.shared: a race with a load of another warp|ld.shared: a race with a store",
    "unwritten": "shared memory that nobody has written",
    "misaligned": "is not a multiple of 8",
    "out_of_shared": "ld.shared: shared bytes",
    "out_of_global": "ld.global: 4 bytes of global memory out of bounds",
    "divergent": "divergent: wgmma",
    "exited_lane": "vote.any: lanes 1 have exited|a lane exits while others of its warp wait in vote.any",
    "foreign_mask": "vote.any: its mask 1 lacks the executing lane",
    "too_many_arrivals": "more arrivals than the mbarrier's count of 2",
    "never_arrives": "deadlock; cta 0 warp 0 lane 0 in mbarrier.try_wait",
    "no_mbarrier": "mbarrier.arrive: no mbarrier at 1024",
    "second_init": "mbarrier.init: there is one already",
    "store_over_mbarrier": "shared memory that holds an mbarrier",
    "unordered_mbarrier": "no mbarrier at|nothing orders it after mbarrier.init",
    "unequal_barriers": "a barrier of (32|64) threads, which others use with|deadlock",
    "too_few_registers": "deadlock; .*in setmaxnreg.inc",
    "wrong_registers": "setmaxnreg.dec: 100 registers",
    "no_tensor_map": "that is no tensor map",
    "second_arrive": "a second time without a wait",
}
RIGHT = {
    "same_value": [],
    "barrier": [1],
    "partial_vote": [1] * 32,
    "shuffles": [(lane ^ 5) + 300 for lane in range(32)],
    "elect": [1] + [0] * 31,
    "mbarrier_orders": [1],
    "registers": [],
    "remote_arrivals": [1, 1],
}
# Threads of a CTA, where 32 are not enough, and CTAs of a cluster.
THREADS = {name: 64 for name in ("race", "race_of_stores", "same_value", "overwrite", "barrier", "unordered_mbarrier")}
THREADS |= {"mbarrier_orders": 64, "unequal_barriers": 64, "registers": 384, "too_few_registers": 384, "remote_arrivals": 64}
CLUSTERS = {"cluster_exit": 2, "remote_arrivals": 2}


def program(kernels: dict[str, str]) -> Program:
    bodies = "\n".join(
        f"void {name}(void* const* args) {{ const uint32_t lane = tid_x() % 32, shared = dynamic_shared();"
        f"const uint64_t out = uint64_t(args[0]); (void)out; (void)lane; (void)shared; {code} }}"
        for name, code in kernels.items()
    )
    table = ", ".join(f'{{"{name}", {name}, 0}}' for name in kernels)
    return Program(
        f'#include "machine.h"\nusing namespace hopper;\n{bodies}\n'
        f'extern "C" const Kernel hopper_kernels[] = {{{table}}};\nextern "C" const uint32_t hopper_kernel_count = {len(kernels)};\n'
    )


@pytest.fixture(scope="module")
def kernels() -> Program:
    return program(KERNELS)


def run(kernels: Program, name: str, seed: int) -> list[int]:
    out = np.zeros(32, dtype=np.uint32)
    emulator.forget()
    emulator.allow(out)
    cluster = CLUSTERS.get(name, 1)
    buffer = (ctypes.c_uint32 * 32).from_buffer(out)
    try:
        kernels.launch(
            name, cluster, THREADS.get(name, 32), [buffer], shared=1024, cluster=cluster, settings=Settings.of_seed(seed)
        )
    finally:
        emulator.forget()
    return out.tolist()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules(kernels: Program, name: str) -> None:
    for seed in range(12):
        with pytest.raises(LaunchError, match=BROKEN[name]):
            run(kernels, name, seed)


def test_a_cluster_whose_other_cta_has_exited(kernels: Program) -> None:
    """Not in every schedule: only if the other was quick."""
    errors = []
    for seed in range(12):
        try:
            run(kernels, "cluster_exit", seed)
        except LaunchError as error:
            errors.append(str(error))
    assert any("shared memory of CTA 0 of the cluster, which has exited" in error for error in errors), errors


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(kernels: Program, name: str) -> None:
    for seed in range(12):
        assert run(kernels, name, seed)[: len(RIGHT[name])] == RIGHT[name]


def test_settings_take_every_schedule_and_timing() -> None:
    seen = {(s.schedule, s.timing) for s in map(Settings.of_seed, range(12))}
    assert seen == {(schedule, timing) for schedule in SCHEDULES for timing in TIMINGS}


# A box is loaded, multiplied by itself or stored again. The tensor map comes first in args, then the output.
TILES = {
    "copy": "load(); bulk_copy();",
    "multiply": "load(); multiply();",
}
TILE_CODE = """
#include "machine.h"
#include <cstring>
using namespace hopper;
// args: tensor map of the source, of the destination, {span, rows, columns, row of the box, column of the box, n}, out
struct Box { uint32_t span, rows, columns; int32_t row, column; uint32_t n, bfloat16; };
static void load(void* const* args, const Box& box, uint32_t tile, uint32_t barrier) {
  if (tid_x() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, box.rows * box.columns * 2);
    tma_load_2d(tile, args[0], box.column, box.row, barrier);
  }
  bar_sync(0, 0);
  while (!mbarrier_try_wait_parity(barrier, 0)) {}
}
static void copy(void* const* args) {
  const Box& box = *static_cast<const Box*>(args[2]);
  const uint32_t tile = dynamic_shared();
  load(args, box, tile, tile + 32768);
  if (tid_x() == 0) {
    tma_store_2d(args[1], 0, 0, tile);
    bulk_commit_group();
    bulk_wait_group(0);
  }
}
// out [64, n] = tile [64, 16] · tile [n, 16]ᵀ, for every 16 columns of the box.
static void multiply(void* const* args) {
  const Box& box = *static_cast<const Box*>(args[2]);
  const uint32_t tile = dynamic_shared(), lane = tid_x() % 32, warp = tid_x() / 32;
  load(args, box, tile, tile + 32768);
  uint32_t registers[128];
  static uint16_t indices[128];
  for (int i = 0; i < 128; ++i) indices[i] = i;
  const uint64_t mode = box.span == 128 ? 1 : box.span == 64 ? 2 : 3;
  wgmma_fence();
  for (uint32_t k = 0; k < box.columns; k += 16) {
    const uint64_t desc = mode << 62 | uint64_t(box.span * 8 >> 4) << 32 | uint64_t(1) << 16 | (tile + k * 2) >> 4;
    wgmma(box.bfloat16 ? Half::kBfloat16 : Half::kFloat16, box.n, registers, indices, desc, desc, k > 0);
  }
  wgmma_commit_group();
  wgmma_wait_group(0);
  for (uint32_t i = 0; i < box.n / 2; ++i) {
    const uint32_t row = warp * 16 + lane / 4 + (i & 2) * 4, column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
    static_cast<uint32_t*>(args[3])[row * box.n + column] = registers[i];
  }
}
extern "C" const Kernel hopper_kernels[] = {{"copy", copy, 0}, {"multiply", multiply, 0}};
extern "C" const uint32_t hopper_kernel_count = 2;
"""


class Box(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("span", "rows", "columns", "row", "column", "n", "bfloat16")]


def tensor_map(t: torch.Tensor, rows: int, columns: int) -> ctypes.Array:
    """The driver's tensor map of ``t`` for boxes of [rows, columns], swizzled by their width."""
    storage = (ctypes.c_uint64 * 24)()
    aligned = -ctypes.addressof(storage) % 64 // 8
    result = (ctypes.c_uint64 * 16).from_buffer(storage, aligned * 8)
    shape, stride = (ctypes.c_uint64 * 2)(t.shape[1], t.shape[0]), (ctypes.c_uint64 * 1)(t.stride(0) * 2)
    box, ones = (ctypes.c_uint32 * 2)(columns, rows), (ctypes.c_uint32 * 2)(1, 1)
    swizzle = {128: 3, 64: 2, 32: 1}[columns * 2]
    kind = 9 if t.dtype is torch.bfloat16 else 6
    encode = emulator.runtime().cuTensorMapEncodeTiled
    assert encode(result, kind, 2, ctypes.c_void_p(t.data_ptr()), shape, stride, box, ones, 0, swizzle, 0, 0) == 0
    return result


@pytest.fixture(scope="module")
def tiles() -> Program:
    return Program(TILE_CODE)


@pytest.mark.parametrize("columns", [64, 32, 16])
def test_boxes_are_filled_and_clipped(tiles: Program, columns: int) -> None:
    source = torch.randn(50, 72).half()
    for seed, (row, column) in enumerate([(0, 0), (10, 16), (40, 40), (-5, -8), (60, 0), (0, 80)]):
        target = torch.full((20, 56), torch.nan).half()
        box = Box(columns * 2, 32, columns, row, column, 0, 0)
        maps = [tensor_map(t, 32, columns) for t in (source, target)]
        tiles.launch("copy", 1, 32, [*maps, box], shared=40_000, settings=Settings.of_seed(seed))
        padded = torch.zeros(32 + 200, columns + 200).half()
        padded[100 : 100 + 50, 100 : 100 + 72] = source
        expected = torch.full((20, 56), torch.nan).half()
        width = min(columns, 56)
        expected[:, :width] = padded[100 + row : 120 + row, 100 + column : 100 + column + width]
        assert torch.equal(target.nan_to_num(9e3), expected.nan_to_num(9e3)), (row, column)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [64, 32, 16])
def test_products(tiles: Program, dtype: torch.dtype, columns: int) -> None:
    source = (torch.randint(-8, 9, (128, columns)) / 8).to(dtype)
    for n in (8, 64, 128):
        out = torch.empty(64, n)
        box = Box(columns * 2, 128, columns, 0, 0, n, dtype is torch.bfloat16)
        array = (ctypes.c_float * out.numel()).from_address(out.data_ptr())
        same = tensor_map(source, 128, columns)
        tiles.launch("multiply", 1, 128, [same, same, box, array], shared=40_000, settings=Settings.of_seed(n // 8))
        assert torch.equal(out, source[:64].float() @ source[:n].float().T)


def test_a_message_says_where(kernels: Program) -> None:
    with pytest.raises(LaunchError) as caught:
        run(kernels, "unwritten", 0)
    assert re.match(r"cta 0 warp 0 lane \d+ at 0: ld.shared: ", str(caught.value))
