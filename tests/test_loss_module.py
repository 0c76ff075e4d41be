"""SigmoidLoss, the loss with its two learnable scalars."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from siglip_kernels import SigmoidLoss
from siglip_kernels.testing import Inputs, gold, make_inputs, relative_l2


def test_module_holds_two_scalars() -> None:
    module = SigmoidLoss(backend="eager")
    assert {name: (p.shape, p.dtype) for name, p in module.named_parameters()} == {
        "logit_scale": ((), torch.float32),
        "logit_bias": ((), torch.float32),
    }
    assert list(module.state_dict()) == ["logit_scale", "logit_bias"]
    assert float(module.logit_scale) == pytest.approx(math.log(10.0), rel=1e-6)
    assert float(module.logit_bias) == -10.0
    other = SigmoidLoss(3.0, 1.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.logit_scale, module.logit_scale)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="init_logit_scale"):
            SigmoidLoss(bad)


def test_module_parameters_of_one_dimension() -> None:
    module, other = SigmoidLoss(3.0, 1.0, parameter_shape=(1,)), SigmoidLoss()
    x, y, *_ = make_inputs(6, 5, 4, torch.float32)
    module(x, y).backward()
    assert all(p.shape == p.grad.shape == (1,) for p in module.parameters())
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x, y), other(x, y))
    with pytest.raises(ValueError, match="parameter_shape"):
        SigmoidLoss(parameter_shape=(2,))


@pytest.mark.parametrize("bias", [-10.0, None])
def test_module_computes_the_loss(bias: float | None) -> None:
    module = SigmoidLoss(10.0, bias, reduction="mean", backend="eager")
    assert list(module.state_dict()) == ["logit_scale", "logit_bias"][: 1 if bias is None else 2]
    x, y, t, _ = make_inputs(6, 5, 4, torch.float64)
    loss = module(x, y, positive_offset=2, image_weights=torch.arange(6))
    loss.backward()
    arguments = {"positive_offset": 2, "image_weights": torch.arange(6), "reduction": "mean"}
    t, b = module.logit_scale.detach().exp().double(), torch.tensor(bias or 0.0, dtype=torch.float64)
    right = gold(Inputs(x, y, t, b), **arguments)
    assert relative_l2(loss.detach(), right.loss) < 1e-12
    # The parameter holds log t.
    assert relative_l2(module.logit_scale.grad, t * right.logit_scale) < 1e-6
    assert bias is None or relative_l2(module.logit_bias.grad, right.logit_bias) < 1e-6


def test_module_is_copied_and_pickled() -> None:
    module = SigmoidLoss(20.0, -5.0, reduction="sum", backend="eager")
    x, y, *_ = make_inputs(6, 5, 4, torch.float32)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, y), module(x, y))
        assert twin.logit_scale is not module.logit_scale
    assert "sum" in repr(module)
    assert "eager" in repr(module)


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    data, tower, module = torch.randn(32, 12), torch.nn.Linear(12, 8), SigmoidLoss(backend="eager")
    texts = F.normalize(torch.randn(32, 8))
    optimizer = torch.optim.Adam([*tower.parameters(), *module.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = module(F.normalize(tower(data)), texts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses[:: len(losses) // 4]
    assert float(module.logit_scale) != pytest.approx(math.log(10.0))
    assert float(module.logit_bias) != -10.0
