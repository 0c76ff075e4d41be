"""Rates count the work, and the workspace takes its bound."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import ceilings
from bench.microbenchmark.problems import Problem
from siglip_kernels import backends
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.pairs import PairSpec

CPU = torch.device("cpu")


def test_rates_count_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "time_interleaved", lambda steps, *rest: {name: [0.5] for name in steps})
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1000)
    assert ceilings.copy_bandwidth(CPU, 0).rate == pytest.approx(2 * 1000 / 0.5 / 1e12)
    kernels = {"a": EagerBlockKernel(), "b": EagerBlockKernel()}
    rates = ceilings.block_throughput(kernels, Problem(96, 16, torch.float32), CPU, 0)
    # The products once, for both kernels have blocks of one shape.
    assert [rate.rate for rate in rates] == pytest.approx([2 * 96 * 96 * 16 / 0.5 / 1e12] * (3 + 2 * 3))
    ids = torch.arange(96)
    rates = ceilings.block_throughput(kernels, Problem(96, 16, torch.float32), CPU, 0, PairSpec(None, ids, ids))
    assert [rate.name for rate in rates][3:] == ["block (a)", "block (b)"]
    monkeypatch.undo()
    assert ceilings.block_throughput({}, Problem(96, 16, torch.float32), CPU, 0) == []  # all of them failed a check


def test_workspace_curve_takes_the_bound() -> None:
    """Under Triton's interpreter: half the workspace, about half the peak of a problem much larger than it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    bounds = ceilings.workspace_sweep(Problem(256, 16, torch.float32), CPU, 0.0, (0.0625, 1.0))
    assert [bound.dz_mib for bound in bounds] == [0.0625, 1.0]
    assert all(bound.ms > 0 for bound in bounds)
    call = backends.base.Problem(512, 512, 16, torch.float32, CPU)
    assert TritonBlockKernel(dz_bytes=2**16).block_shape(call) == (128, 128)
    assert TritonBlockKernel(dz_bytes=2**20).block_shape(call) == (512, 512)
