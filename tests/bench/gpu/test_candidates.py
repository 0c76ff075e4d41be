"""The candidates of ``python -m bench sweep``, and that the one chosen is the one launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.gpu import candidates
from bench.gpu.candidates import DIAGONAL, IDS, SHIPPED, Candidate, registered_as_triton
from bench.static import compilation
from siglip_kernels import backends, sigmoid_loss
from siglip_kernels.backends import verification
from siglip_kernels.backends.base import Problem as BackendProblem
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.backends.triton.configs import Config
from siglip_kernels.pairs import PairSpec
from siglip_kernels.testing import make_inputs
from tests.bench.gpu.faulty import launch_only, needs_interpreter

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Config(32, 32, 16, num_warps=4, num_stages=2)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_candidates(arch: str, device: torch.device) -> None:
    plan, shipped = candidates.make_plan(device), configs.LARGE[arch, 2]
    every = candidates.make_candidates(shipped, plan)
    assert len(every) == len({(c.pairs_kind, c.name) for c in every})
    for use in (DIAGONAL, IDS):
        assert next(c.name for c in every if c.pairs_kind == use) == SHIPPED
    settings = [(c.pairs_kind, c.config, c.blocks, c.dz_bytes, c.cuda) for c in every]
    assert len(settings) == len(set(settings))
    assert shipped not in [c.config for c in every]
    for config in [c.config for c in every if c.config]:
        blocks = config.block_m, config.block_n, config.block_d
        assert all(block & (block - 1) == 0 and 16 <= block <= 256 for block in blocks)
        assert config.block_n // 4 >= 8
        assert config.block_n // (2 * config.lanes) <= 64
    if device == CUDA and arch == "sm_90":
        assert {(p.B, p.D, p.dtype) for p in plan.problems} == {(32_768, D, torch.bfloat16) for D in (768, 1152)}
        assert replace(shipped, block_n=256) in [c.config for c in every]
        wide = replace(shipped, max_columns=(128, 64, 64), warps=(8, 8, 8))
        assert wide in [c.config for c in every if c.pairs_kind == IDS]
        assert replace(shipped, dz_stores=(2, 4)) in [c.config for c in every]
        assert replace(shipped, num_warps=4) in [c.config for c in every]
        assert (11_008, 11_008) in [c.blocks for c in every]
        assert len({c.dz_bytes for c in every}) > 3
        assert sorted(c.cuda for c in every if c.pairs_kind == IDS)[-2:] == [False, True]
        # Within the bound of what is shipped: a block's dz takes no more.
        assert Candidate(SHIPPED).dz_bytes > 2 * 11_008**2


def test_a_candidate_takes_the_place_of_triton_only_meanwhile() -> None:
    before = backends.BACKENDS["triton"]
    kernel = TritonBlockKernel(config=SMALL)
    with registered_as_triton(kernel):
        assert backends.BACKENDS["triton"] is kernel
    assert backends.BACKENDS["triton"] is before
    with pytest.raises(RuntimeError, match="out of resource"), registered_as_triton(kernel):
        raise RuntimeError("out of resource")
    assert backends.BACKENDS["triton"] is before


def test_a_kernel_takes_a_configuration_and_blocks() -> None:
    call = BackendProblem(1000, 2000, 64, torch.bfloat16, CUDA)
    assert TritonBlockKernel(blocks=(384, 512)).block_shape(call) == (384, 512)
    assert TritonBlockKernel(config=SMALL).block_shape(call) == TritonBlockKernel().block_shape(call)
    assert configs.max_tiles(256, 256, SMALL) == 64
    assert configs.max_tiles(256, 256, replace(SMALL, block_n=256)) == 8 * 4


@pytest.mark.parametrize("use", [DIAGONAL, IDS, "ignored"])
def test_the_configuration_is_the_one_that_is_launched(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_interpreter()
    from siglip_kernels.backends.triton import launch

    launched = []
    monkeypatch.setattr(verification, "errors_of_launch", launch_only)
    kernels = {(n,): lambda *a, **how: launched.append(how) for n in range(99)}
    monkeypatch.setattr(launch._kernels, "kernel", kernels)
    ids = torch.arange(40)
    pairs = {
        DIAGONAL: {},
        IDS: {"image_ids": ids, "text_ids": ids, "text_weights": torch.ones(40)},
        "ignored": {"image_ids": ids, "text_ids": ids, "ignore_ids": True},
    }[use]
    wide = Config(32, 128, 16, num_warps=4, num_stages=2)
    with registered_as_triton(TritonBlockKernel(config=wide, blocks=(32, 40))):
        sigmoid_loss(*make_inputs(40, 40, 16, torch.float16), backend="triton", **pairs)
    columns, warps = (64, 8) if use == "ignored" else (128, 4)  # general pairs are narrowed, as the shipped ones are
    assert [(how["BLOCK_M"], how["BLOCK_N"], how["num_warps"]) for how in launched] == [(32, columns, warps)] * 2


def test_the_pairs_that_are_timed_are_the_diagonal() -> None:
    inputs = make_inputs(40, 40, 8, torch.float32)
    plain = sigmoid_loss(*inputs, backend="eager")
    pairs = candidates.timed_pairs(IDS, 40, CPU)
    assert torch.equal(sigmoid_loss(*inputs, backend="eager", **pairs), plain)
    spec = PairSpec(**pairs)
    assert spec.has_ids
    assert spec.has_weights
    assert compilation.PROCESSES <= 16
