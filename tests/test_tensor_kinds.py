"""Tensors that are not plain, as every argument: the true value and gradients, or an error that says what they are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map

from siglip_kernels import dispatch, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.reference import sigmoid_loss_reference
from tests.kinds import KINDS, ONLY_FLOATING, WITHOUT_GRAD, Named, Wrapper, unwrapped

M, N, D = 12, 9, 5
BACKENDS = ("cpu", "eager")
ARGUMENTS = (
    *("image_features", "text_features", "logit_scale", "logit_bias"),
    *("image_ids", "text_ids", "image_weights", "text_weights"),
)
FLOATING = (*ARGUMENTS[:4], *ARGUMENTS[6:])


def plain() -> dict[str, Tensor]:
    """Every tensor argument, with values that a reader of others' memory, or of a wrong sign, would not find."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, D, generator=generator) for n in (M, N))
    scalars = torch.tensor(1.5), torch.tensor(-2.0)
    ids = torch.arange(M) % 4, torch.arange(N) % 5
    weights = torch.arange(1, M + 1) * 0.5, torch.arange(N) % 3 + 1.0
    return dict(zip(ARGUMENTS, (x, y, *scalars, *ids, *weights), strict=True))


class Doubled(Tensor):
    """A subclass whose meaning is twice what its memory holds: only its own rules know."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def meant(t: Any) -> Any:
            return t.as_subclass(Tensor) * 2 if isinstance(t, Doubled) else t

        if func in (Tensor.as_subclass, Tensor.requires_grad.__get__):  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(meant, args), **tree_map(meant, kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_every_kind(kind: str, backend: Any) -> None:
    right = float(sigmoid_loss_reference(**{k: t.double() if t.is_floating_point() else t for k, t in plain().items()}))
    for name in (*ARGUMENTS, "all"):
        changed = [argument for argument in ARGUMENTS if name in (argument, "all")]
        if kind in ONLY_FLOATING:
            changed = [argument for argument in changed if argument in FLOATING]
        arguments = {k: KINDS[kind](t) if k in changed else t for k, t in plain().items()}
        losses = sigmoid_loss(**arguments, backend=backend), sigmoid_loss_and_grads(**arguments, backend=backend).loss
        assert [float(unwrapped(loss)) for loss in losses] == pytest.approx([right] * 2, rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_GRAD])
def test_gradients_go_through_every_kind(kind: str, backend: Any) -> None:
    """By autograd through whatever made the tensor; a wrapper or a parameter is a leaf."""
    leaf = kind in ("parameter", "wrapper subclass")
    right = differentiated(plain(), lambda t: t, "eager", False)
    got = differentiated(plain(), KINDS[kind], backend, leaf)
    for name, expected in right.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def differentiated(arguments: dict[str, Tensor], kind: Any, backend: Any, leaf: bool) -> dict[str, Tensor]:
    leaves = {name: arguments[name].clone().requires_grad_(not leaf) for name in ARGUMENTS[:4]}
    made = {name: kind(t) for name, t in leaves.items()}
    if leaf:
        leaves = {name: t.requires_grad_() for name, t in made.items()}
    loss = sigmoid_loss(**{**arguments, **made}, backend=backend)
    return dict(zip(leaves, torch.autograd.grad(loss * 3, list(leaves.values())), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_is_asked_what_it_means(backend: Any) -> None:
    arguments = plain()
    twice = arguments["image_features"].as_subclass(Doubled)
    right = sigmoid_loss(**{**arguments, "image_features": arguments["image_features"] * 2}, backend="eager")
    got = sigmoid_loss(**{**arguments, "image_features": twice}, backend=backend)
    assert float(got) == pytest.approx(float(right), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*ARGUMENTS[:4], *ARGUMENTS[6:]])
def test_a_zero_tensor(name: str, backend: Any) -> None:
    """What autograd makes of an undefined gradient: zeros without memory."""
    arguments = plain()
    zeros = torch._efficientzerotensor(arguments[name].shape)
    assert zeros.data_ptr() == 0
    if name == "image_weights":
        arguments["reduction"] = "sum"  # type: ignore[assignment]
    right = sigmoid_loss(**{**arguments, name: torch.zeros(arguments[name].shape)}, backend="eager")  # type: ignore[arg-type]
    got = sigmoid_loss(**{**arguments, name: zeros}, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(got, right)


@pytest.fixture
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["image_features", "text_features", "text_ids", "text_weights", "logit_bias"])
def test_what_is_still_on_its_way_is_waited_for(one_rank: None, name: str) -> None:
    """An AsyncCollectiveTensor has nothing in its memory until a dispatched operation waits for it."""
    arguments = plain()
    right = sigmoid_loss(**arguments, backend="eager")
    gather = getattr(functional_collectives, "all_gather_single", None) or functional_collectives.all_gather_tensor
    moving = gather(arguments[name].reshape(-1), 0, dist.group.WORLD)
    assert type(moving) is not Tensor
    arguments[name] = moving.view(arguments[name].shape)
    for backend in BACKENDS:
        torch.testing.assert_close(torch.as_tensor(sigmoid_loss(**arguments, backend=backend)), right)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_dtensor_is_refused_by_its_argument_s_name(one_rank: None, name: str) -> None:
    from torch.distributed.tensor import distribute_tensor

    arguments = plain()
    arguments[name] = distribute_tensor(arguments[name], init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=f"{name} must be a plain tensor.*DTensor"):
        sigmoid_loss(**arguments)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "sparse": (Tensor.to_sparse, TypeError, "must be a dense tensor"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), TypeError, "must be a dense tensor"),
    "nested": (lambda t: torch.nested.nested_tensor([t]), TypeError, "must be a dense tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([t], layout=torch.jagged), TypeError, "must be a dense tensor"),
    "meta": (lambda t: t.to("meta"), ValueError, "meta"),
    "freed": (lambda t: _resized(t, 0), ValueError, "must be in memory, but its storage holds 0 bytes"),
    "shrunk": (lambda t: _resized(t, t.nbytes - 1), ValueError, "must be in memory, but its storage holds"),
    "a list": (Tensor.tolist, TypeError, "got list|got float|float or a tensor"),
    "numpy": (Tensor.numpy, TypeError, "got ndarray"),
}


def _resized(t: Tensor, size: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(size)
    return t


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_its_argument_s_name(kind: str, name: str) -> None:
    make, error, said = REFUSED[kind]
    arguments = plain()
    if arguments[name].dim() == 0 and kind in ("a list", "numpy", "nested", "jagged", "mkldnn"):
        pytest.skip("a number is a number")
    arguments[name] = make(arguments[name])
    for backend in BACKENDS:
        with pytest.raises(error, match=said) as caught:
            sigmoid_loss(**arguments, backend=backend)  # type: ignore[arg-type]
        names = (name, "image_features") if kind == "meta" else (name,)
        assert any(n in str(caught.value) for n in names), caught.value


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_fake_tensor_among_real_ones_reaches_no_kernel(name: str) -> None:
    arguments = plain()
    arguments[name] = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(arguments[name])
    loss = sigmoid_loss(**arguments, backend="cpu")
    assert isinstance(loss, torch._subclasses.FakeTensor)
    arguments[name] = FakeTensorMode().from_tensor(plain()[name])
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        sigmoid_loss(**arguments, backend="cpu")


def test_what_is_ordinary() -> None:
    """The keys that torch gives its plain tensors are the ones that the short cut knows; any other kind has more."""
    t = torch.ones(3, 4)
    assert dispatch.has_no_mode()
    for ordinary in (t, t[1:, ::2], t.int(), nn.Parameter(t), KINDS["inference"](t)):
        assert dispatch.are_ordinary((ordinary, None))
        dispatch.check_memory(["t"], [ordinary])
    for other in (torch._neg_view(t), t.to_sparse(), Wrapper(t), t.as_subclass(Named), t.to("meta")):
        assert not dispatch.are_ordinary((t, other))
    # Nothing is known of a device that torch has no name for: its tensors go by the dispatcher, and are not refused.
    assert dispatch.may_be_read(t.to("meta"))
    assert not dispatch.may_be_read(torch._neg_view(t))
    with torch.inference_mode():
        assert dispatch.has_no_mode()
    with torch.autograd.forward_ad.dual_level():
        assert not dispatch.has_no_mode()
    with FakeTensorMode():
        assert not dispatch.has_no_mode()
