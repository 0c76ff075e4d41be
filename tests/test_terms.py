"""``siglip_kernels.terms``: what rounding dz costs, and that the checker allows that much and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels.terms import feature_grads_of_rounded_dz
from siglip_kernels.testing import PAIRS, Case, gold, judge, make_inputs, relative_l2


class RoundedDz(torch.autograd.Function):
    """The loss in float64, but for a dz in half precision; dx is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, factor: float, pairs: Any) -> Tensor:
        with torch.enable_grad():
            ctx.exact = gold((x, y, scale, bias), **pairs)
        ctx.inputs, ctx.factor, ctx.pairs = (x, y, scale, bias), factor, pairs
        return ctx.exact.loss.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy = feature_grads_of_rounded_dz(*ctx.inputs, float(upstream), **ctx.pairs)
        scalars = (upstream * ctx.exact.logit_scale).float(), (upstream * ctx.exact.logit_bias).float()
        return dx * ctx.factor, dy, *scalars, None, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
def test_it_is_the_gradient_but_for_rounding(pairs: str, dtype: torch.dtype) -> None:
    M, N, D = 61, 70, 40
    inputs, arguments = make_inputs(M, N, D, dtype), PAIRS[pairs](M, N, torch.device("cpu"))
    exact, eps = gold(inputs, 0.375, **arguments), torch.finfo(dtype).eps
    dx, dy = feature_grads_of_rounded_dz(*inputs, 0.375, **arguments)
    for rounded, right in ((dx, exact.image_features), (dy, exact.text_features)):
        assert rounded.dtype is dtype
        assert eps / 20 < relative_l2(rounded, right) < eps


# Eager rounds better by luck; the pairs of an image have one mass, so dz's rounding does not average out.
UNLUCKY = Case(torch.float16, (1100, 2100, 64), "init", "multi-positive weights")


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (1.001, False), (0.999, False), (0.0, False)])
def test_the_checker_allows_the_rounding_of_dz_and_no_more(factor: float, ok: bool) -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **pairs: Any) -> Tensor:
        return RoundedDz.apply(x, y, scale, bias, factor, pairs)

    assert (not judge(loss, UNLUCKY).failures) is ok
