"""Choosing and sizing Triton block kernels: pure functions, which need neither Triton nor a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from siglip_kernels.backends import gpu
from siglip_kernels.backends import triton as backend
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.backends.triton.configs import Config

CONFIGS = [(key, config) for table in (configs.LARGE, configs.SMALL) for key, config in table.items()]
# Labels, masses, stats and balance, as configs.fitted takes them.
USES = list(dict.fromkeys((v.labels, v.masses, v.stats, v.balance) for v in configs.shipped()))
CPU = torch.device("cpu")


def make_problem(
    M: int = 64, N: int = 64, D: int = 64, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Problem:
    return Problem(M, N, D, dtype, device)


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("sm_121", "sm_80"),
        ("gfx90a", "gfx942"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_family(arch: str, family: str) -> None:
    assert configs.family(arch) == family


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_103", "sm_120", "gfx950"])
def test_large_tiles_only_where_there_are_enough(arch: str, dtype: torch.dtype) -> None:
    key = configs.family(arch), dtype.itemsize
    large, small = configs.LARGE[key], configs.SMALL[key]
    side = configs.MIN_LARGE_TILES // 8
    enough = side * large.block_m, 8 * large.block_n
    assert configs.choose(arch, *enough, 64, dtype) == large
    assert configs.choose(arch, enough[0] - large.block_m, enough[1], 64, dtype) == small
    # With what needs more registers: fewer columns, so more tiles.
    general = configs.choose(arch, *enough, 64, dtype, "ignore")
    assert general == configs.fitted(large, "ignore", "none", False)
    assert general.block_n == min(large.block_n, 64)
    assert configs.choose(arch, 1, 1, 1, dtype, "ignore") == configs.fitted(small, "ignore", "none", False)
    # A ragged tile counts as one.
    assert configs.choose(arch, enough[0] - 1, enough[1] - 1, 64, dtype) == large
    assert configs.choose(arch, 1, 1, 1, dtype) == small


@pytest.mark.parametrize(("key", "config"), CONFIGS)
def test_configurations_are_ones_that_the_kernel_can_run(key: tuple[str, int], config: Config) -> None:
    blocks = config.block_m, config.block_n, config.block_d
    assert all(block & (block - 1) == 0 and block >= 16 for block in blocks)
    # block_shape cuts on multiples of TILE; a quarter of the columns holds a row's sums.
    assert gpu.TILE % config.block_m == gpu.TILE % config.block_n == 0
    assert set(config.dz_stores) <= {2, 4}
    for columns in (config.block_n, *config.max_columns[1:]):
        quarter = min(config.block_n, columns) // 4
        assert quarter >= max(8, config.lanes)
        # A running product of factors up to 2 stays below 2^128.
        assert 4 * quarter // min(2 * config.lanes, quarter) <= 64
    # Rows of a TMA box: at least 16 bytes, for the operands and for a quarter of dz.
    assert min(config.block_d, config.block_n // 4) * key[1] >= 16


@pytest.mark.parametrize(("key", "config"), CONFIGS)
def test_the_stages_fit_in_shared_memory(key: tuple[str, int], config: Config) -> None:
    arch, itemsize = key
    # AMD's software pipeline keeps one stage fewer in shared memory.
    stages = config.num_stages - arch.startswith("gfx")
    assert stages * (config.block_m + config.block_n) * config.block_d * itemsize <= configs.SHARED_MEMORY[arch]


@pytest.mark.parametrize(("M", "N"), [*itertools.product([1, 63, 64, 65, 128, 129, 1000, 4096], repeat=2)])
def test_max_tiles_bounds_every_configuration(M: int, N: int) -> None:
    every = [configs.fitted(config, *use) for _, config in CONFIGS for use in USES]
    tiles = [-(-M // config.block_m) * -(-N // config.block_n) for config in every]
    assert configs.max_tiles(M, N) == max(tiles)


def test_precision() -> None:
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert configs.precision(arch, torch.float32, False) == "tf32x3"
        assert configs.precision(arch, torch.float32, True) == "tf32"
        assert configs.precision(arch, torch.bfloat16, True) == "ieee"
    assert configs.precision("gfx950", torch.float32, True) == "ieee"


def test_shipped_covers_every_configuration_once() -> None:
    variants = list(configs.shipped())
    assert len(variants) == len(set(variants))
    for use in USES:
        taken = {
            (v.arch, v.dtype.itemsize, v.config) for v in variants if (v.labels, v.masses, v.stats, v.balance) == use
        }
        assert taken == {(*key, configs.fitted(config, *use)) for key, config in CONFIGS}
    assert {v.arch for v in variants if v.use_tma} == set(configs.TMA)
    for dtype in backend.DTYPES:
        assert {v.labels for v in variants if v.dtype is dtype} == set(configs.LABELS)
    every = list(configs.shipped(every=True))
    assert len(every) == len(set(every)) == len(variants) // len(configs.USES) * len(configs.ALL_USES)
    assert set(variants) < set(every)


@pytest.mark.parametrize("dtype", backend.DTYPES)
@pytest.mark.parametrize("M", [1, 127, 128, 129, 4096, 8192, 12_000, 32_768, 65_537, 1_000_000])
@pytest.mark.parametrize("N", [1, 128, 129, 8192, 20_000, 32_768, 65_537, 1_000_000])
def test_blocks_are_bounded_and_cut_evenly(M: int, N: int, dtype: torch.dtype) -> None:
    R, C = TritonBlockKernel().block_shape(make_problem(M, N, 768, dtype))
    assert R % gpu.TILE == C % gpu.TILE == 0
    # One tile a side is the least there is; beyond that rounding goes down.
    assert R * C * dtype.itemsize <= gpu.DZ_BYTES
    for length, block in ((M, R), (N, C)):
        blocks = -(-length // block)
        # No smaller multiple of TILE gives as few blocks: the last is less than a tile a block short of the others.
        assert block == gpu.TILE or -(-length // (block - gpu.TILE)) > blocks


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_blocks_fill_the_workspace_where_the_problem_does(dtype: torch.dtype) -> None:
    R, C = TritonBlockKernel().block_shape(make_problem(1_000_000, 1_000_000, 768, dtype))
    assert R * C * dtype.itemsize > 0.8 * gpu.DZ_BYTES
    assert 1.5 < C / R < 2.5
    # Few texts: the images may use what they leave.
    R, C = TritonBlockKernel().block_shape(make_problem(1_000_000, 512, 768, dtype))
    assert C == 512
    assert R * C * dtype.itemsize > 0.8 * gpu.DZ_BYTES
    # A problem that fits is one block.
    R, C = TritonBlockKernel().block_shape(make_problem(4096, 4096, 768, dtype))
    assert (R, C) == (4096, 4096)


def test_the_workspace_is_small_and_large_enough() -> None:
    kernel = TritonBlockKernel()
    problem = make_problem(1000, 3000)
    R, C = kernel.block_shape(problem)
    partials = kernel.workspace(problem, R, C)
    assert partials.dtype is torch.float32
    for _, config in CONFIGS:
        assert partials.numel() >= 3 * -(-R // config.block_m) * -(-C // config.block_n)
    assert partials.numel() <= R * C / 256


def test_why_not_the_dtype() -> None:
    reasons = TritonBlockKernel().why_not(make_problem(dtype=torch.float64))
    assert any("torch.float64" in reason and "expected float16, bfloat16 or float32" in reason for reason in reasons)


def test_why_not_without_features() -> None:
    assert "D = 0, expected at least 1" in TritonBlockKernel().why_not(make_problem(D=0))


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "is_installed", lambda: False)
    assert TritonBlockKernel().why_not(make_problem()) == ["Triton is not installed"]


def test_why_not_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    kernel = TritonBlockKernel()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        assert kernel.why_not(make_problem()) == [
            "features are on the CPU, where Triton runs only under its interpreter"
        ]
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        assert kernel.why_not(make_problem()) == []
        assert kernel.why_not(make_problem(dtype=torch.float16)) == []
        assert kernel.why_not(make_problem(dtype=torch.bfloat16)) == ["Triton's interpreter computes bfloat16 wrongly"]


def test_why_not_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "is_installed", lambda: True)
    kernel = TritonBlockKernel()
    on_mps = make_problem(device=torch.device("mps"))
    assert kernel.why_not(on_mps) == ["features are on mps, expected a CUDA or ROCm device"]
    on_cuda = make_problem(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.why_not(on_cuda) == ["no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, reasons in {
        "sm_75": ["compute capability 7.5 < 8.0"],
        "sm_80": [],
        "sm_103": [],
        "gfx942": [],
    }.items():
        monkeypatch.setattr(backend, "_architecture", lambda index, arch=arch: arch)
        assert kernel.why_not(on_cuda) == reasons


def test_never_automatic_on_the_cpu() -> None:
    assert not TritonBlockKernel().is_automatic(make_problem())
    assert TritonBlockKernel().is_automatic(make_problem(device=torch.device("cuda", 0)))
