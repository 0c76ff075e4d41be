"""The emulation itself: what its instructions compute, and that it notices each broken rule."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch

from tests.building import HOST_CXX
from tests.hopper import emulator
from tests.hopper.emulator import SCHEDULES, TIMINGS, LaunchError, Program, Settings

KERNELS = emulator.HERE / "kernels"
pytestmark = pytest.mark.skipif(HOST_CXX is None, reason="no C++ compiler")

# Of kernels/rules.cpp: what must be said of those that break a rule, and what the others write.
BROKEN = {
    "race": "a race with a store of another warp|nobody has written",
    "race_of_stores": "st.shared: a race with a store of another warp",
    "overwrite": "st.shared: a race with a load of another warp|ld.shared: a race with a store",
    "unwritten": "shared memory that nobody has written",
    "misaligned": "is not a multiple of 8",
    "out_of_shared": "ld.shared: shared bytes",
    "out_of_global": "ld.global: 4 bytes of global memory out of bounds",
    "divergent": "wgmma.(fence|commit_group): divergent",
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
    "unequal_wgmmas": "the warps of a warpgroup differ",
    "no_tensor_map": "that is no tensor map",
}
RIGHT = {
    "same_value": [],
    "barrier": [1],
    "partial_vote": [1] * 32,
    "shuffles": [(lane ^ 5) + 300 for lane in range(32)],
    "elect": [1] + [0] * 31,
    "mbarrier_orders": [1],
    "registers": [],
}
# Threads of a CTA, where 32 are not enough.
THREADS = {name: 64 for name in ("race", "race_of_stores", "same_value", "overwrite", "barrier", "unordered_mbarrier")}
THREADS |= {
    "mbarrier_orders": 64,
    "unequal_barriers": 64,
    "unequal_wgmmas": 128,
    "registers": 384,
    "too_few_registers": 384,
}


@pytest.fixture(scope="module")
def kernels() -> Program:
    return Program((KERNELS / "rules.cpp").read_text())


def run(kernels: Program, name: str, seed: int) -> list[int]:
    out = np.zeros(32, dtype=np.uint32)
    emulator.forget()
    emulator.allow(out)
    buffer = (ctypes.c_uint32 * 32).from_buffer(out)
    try:
        kernels.launch(name, 1, THREADS.get(name, 32), [buffer], shared=1024, settings=Settings.of_seed(seed))
    finally:
        emulator.forget()
    return out.tolist()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules(kernels: Program, name: str) -> None:
    for seed in range(12):
        with pytest.raises(LaunchError, match=BROKEN[name]):
            run(kernels, name, seed)


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(kernels: Program, name: str) -> None:
    for seed in range(12):
        assert run(kernels, name, seed)[: len(RIGHT[name])] == RIGHT[name]


def test_settings_take_every_schedule_and_timing() -> None:
    seen = {(s.schedule, s.timing) for s in map(Settings.of_seed, range(12))}
    assert seen == {(schedule, timing) for schedule in SCHEDULES for timing in TIMINGS}


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
    return Program((KERNELS / "tiles.cpp").read_text())


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
