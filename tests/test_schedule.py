"""The block loop: any split gives the same answer, and the workspace does not grow with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import gemm, schedule
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.request import NeedsGrad, Request
from siglip_kernels.schedule import Result
from siglip_kernels.testing import gold, make_inputs, relative_l2


class Kernel(EagerBlockKernel):
    """The eager kernel with a block shape of choice, which counts the elements of its workspaces."""

    def __init__(self, R: int, C: int) -> None:
        self.shape = R, C
        self.elements: list[int] = []

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        return self.shape

    def workspace(self, problem: Problem, R: int, C: int) -> Any:
        self.elements.append(R * C)
        return super().workspace(problem, R, C)


def run(kernel: EagerBlockKernel, request: Request, needs_grad: NeedsGrad = NeedsGrad()) -> Result:  # noqa: B008
    return schedule.run(kernel, schedule.problem_of(request, needs_grad), request, needs_grad)


# One block; exact multiples; ragged last blocks a side; one-row and one-column blocks; blocks beyond the problem.
@pytest.mark.parametrize("block", [(60, 90), (20, 30), (7, 64), (1, 90), (60, 1), (1000, 1000)])
@pytest.mark.parametrize("pairs", ["offset", "ids", "weights", "none"])
def test_any_split_gives_the_same_answer(block: tuple[int, int], pairs: str) -> None:
    M, N = 60, 90
    arguments: dict[str, Any] = {
        "offset": {"positive_offset": 7},
        "ids": {"image_ids": torch.arange(M) % 9, "text_ids": torch.arange(N) % 11},
        "weights": {"positive_offset": -3, "image_weights": torch.arange(M) % 3.0, "text_weights": torch.rand(N)},
        "none": {"positive_offset": None},
    }[pairs]
    inputs = make_inputs(M, N, 24, torch.float64)
    expected = gold(inputs, **arguments)
    result = run(Kernel(*block), Request(*inputs, PairSpec(**arguments)))
    _, dscale, dbias, grad_scale = result.scalars
    values = (result.loss, grad_scale * result.dx, grad_scale * result.dy, dscale, dbias)
    for name, value, right in zip(expected._fields, values, expected, strict=True):
        assert relative_l2(value, right) < 1e-12, (name, block, pairs)


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_pairs_give_zeros_not_uninitialised_memory(M: int, N: int) -> None:
    result = run(Kernel(4, 4), Request(*make_inputs(M, N, 8, torch.float32), reduction="sum"))
    assert result.loss == 0
    assert result.dx.shape == (M, 8)
    assert result.dy.shape == (N, 8)
    assert not result.dx.any()
    assert not result.dy.any()


def test_the_workspace_does_not_grow_with_the_batch() -> None:
    kernel = EagerBlockKernel()
    problems = [Problem(B, B, 32, torch.float32, torch.device("cpu")) for B in (4096, 1 << 20)]
    assert kernel.block_shape(problems[0]) == kernel.block_shape(problems[1])
    counted = Kernel(16, 32)
    for B in (64, 256):
        run(counted, Request(*make_inputs(B, B, 8, torch.float32)))
    assert counted.elements == [16 * 32, 16 * 32]


@pytest.mark.parametrize(
    ("needs_grad", "count"),
    [(NeedsGrad(), 2), (NeedsGrad(x=False), 1), (NeedsGrad(y=False), 1), (NeedsGrad(x=False, y=False), 0)],
)
def test_only_the_needed_products_are_formed(
    monkeypatch: pytest.MonkeyPatch, needs_grad: NeedsGrad, count: int
) -> None:
    calls: list[Tensor] = []
    original = gemm.gemm_
    monkeypatch.setattr(gemm, "gemm_", lambda out, a, b, **k: (calls.append(out), original(out, a, b, **k)))
    result = run(Kernel(8, 8), Request(*make_inputs(8, 8, 4, torch.float32)), needs_grad)
    assert len(calls) == count
    assert result.dx.numel() == 32 * needs_grad.x
    assert result.dy.numel() == 32 * needs_grad.y


def test_float16_dz_is_carried_by_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """At b = -15, σ ≈ 3e-7 is five units of float16's last subnormal place; weights of 1000 must not overflow it."""
    monkeypatch.setattr(EagerBlockKernel, "operand_dtype", lambda self, problem: problem.dtype)
    x, y = (F.normalize(torch.randn(64, 256), dim=1).half() for _ in range(2))
    scale, bias = torch.tensor(1.0), torch.tensor(-15.0)

    def error(**weights: Tensor) -> float:
        pairs = {"positive_offset": None, **weights}
        expected = gold(
            make_inputs(64, 64, 256, torch.float16)._replace(
                image_features=x, text_features=y, logit_scale=scale, logit_bias=bias
            ),
            **pairs,
        )
        result = run(Kernel(32, 64), Request(x, y, scale, bias, PairSpec(**pairs)))
        return relative_l2(result.scalars[3] * result.dx, expected.image_features)

    heavy = {"image_weights": torch.full((64,), 1000.0), "text_weights": torch.full((64,), 0.3)}
    assert error() < 4e-4
    assert error(**heavy) < 4e-4
    monkeypatch.setattr(schedule, "FLOAT16_DZ_EXPONENT", 0)
    assert error() > 1e-2


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs: the sums are then float32, and still right."""
    arguments = {"image_weights": torch.rand(60), "text_weights": torch.rand(90)}
    inputs = make_inputs(60, 90, 24, torch.float32)
    expected = gold(inputs, reduction="mean", **arguments)
    monkeypatch.setattr(schedule, "sum_dtype", lambda device: torch.float32)
    result = run(Kernel(16, 32), Request(*inputs, PairSpec(**arguments), reduction="mean"))
    assert relative_l2(result.loss, expected.loss) < 1e-6
    assert relative_l2(result.scalars[3] * result.dx, expected.image_features) < 1e-6
