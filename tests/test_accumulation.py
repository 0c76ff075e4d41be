"""Accumulated gradients against those of the joined batch in float64; dropout, memory, misuse."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels import accumulate, accumulation
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import relative_l2
from tests.micro_batches import (
    UNEVEN,
    assert_close,
    gold,
    gradients,
    in_float64,
    in_one_graph,
    joined,
    micro_batches,
    model,
)


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("sizes", [(9,), (4, 4, 4, 4), UNEVEN])
def test_every_gradient(sizes: tuple[int, ...], shape: tuple[int, ...], as_mapping: bool) -> None:
    ours, batches = model(shape=shape, as_mapping=as_mapping), micro_batches(sizes)
    loss = accumulate(batches, lambda batch: ours(*batch))
    expected, right = gold(ours, batches)
    assert not loss.requires_grad
    assert relative_l2(loss, expected) <= 1e-6
    assert len(right) == 10
    assert_close(gradients(ours), right)


def test_more_texts_than_images() -> None:
    ours, batches = model(), micro_batches((3, 1, 4), (5, 2, 4))
    loss = accumulate(batches, lambda batch: ours(*batch), reduction="mean")
    expected, right = gold(ours, batches, reduction="mean")
    assert relative_l2(loss, expected) <= 1e-6
    assert_close(gradients(ours), right)


@pytest.mark.parametrize("sizes", [(12,), UNEVEN])
def test_a_scale_that_is_a_float_and_no_bias(sizes: tuple[int, ...]) -> None:
    ours, batches = model(), micro_batches(sizes)
    accumulate(batches, lambda batch: (*ours(*batch)[:2], 4.5))
    right = copy.deepcopy(ours).double()
    x, y, *_ = right(*(t.double() for t in joined(batches)))
    right.zero_grad()
    sigmoid_loss_reference(x, y, 4.5).backward()
    assert_close(gradients(ours), gradients(right))


def test_batches_that_can_be_had_only_once() -> None:
    ours, batches = model(), micro_batches(UNEVEN)
    accumulate(iter(batches), lambda batch: ours(*batch))
    assert_close(gradients(ours), gold(ours, batches)[1])


@pytest.mark.parametrize("sizes", [(9,), UNEVEN])
def test_without_grad_the_loss_alone(sizes: tuple[int, ...]) -> None:
    ours, batches = model(), micro_batches(sizes)
    with torch.no_grad():
        loss = accumulate(batches, lambda batch: ours(*batch))
    assert relative_l2(loss, gold(ours, batches)[0]) <= 1e-6
    assert not gradients(ours)
    assert len(ours.calls) == len(batches)


def test_one_micro_batch_is_encoded_once() -> None:
    ours, batches = model(), micro_batches((9,))
    accumulate(batches, lambda batch: ours(*batch))
    assert len(ours.calls) == 1


def test_every_backward_but_the_last_is_inside_no_sync() -> None:
    """Forwards too, as DistributedDataParallel asks; scale and bias get their gradient outside, once."""
    ours, batches, inside, seen = model(), micro_batches((2, 3, 4)), [False], []

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def encode(batch: tuple[Tensor, Tensor]) -> Any:
        seen.append(("forward", inside[0]))
        return ours(*batch)

    for name in ("image.0.weight", "logit_scale", "logit_bias"):
        ours.get_parameter(name).register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, inside[0])))
    accumulate(batches, encode, no_sync=no_sync)
    replays = [("forward", True), ("image.0.weight", True)] * 2 + [("forward", False)]
    assert seen[:8] == [("forward", True)] * 3 + replays
    assert sorted(seen[8:]) == [("image.0.weight", False), ("logit_bias", False), ("logit_scale", False)]


def test_the_way_of_open_clip_counts_scale_and_bias_k_times() -> None:
    """open_clip_train/train.py under ``--accum-freq``: the whole loss k times, through one micro-batch each."""
    ours, batches = model(), micro_batches((4, 4, 4))
    cached = [tuple(t.detach() for t in ours(*batch)[:2]) for batch in batches]
    for j, batch in enumerate(batches):
        x, y, *scalars = ours(*batch)
        features = zip(*cached[:j], (x, y), *cached[j + 1 :], strict=True)
        sigmoid_loss_reference(*map(torch.cat, features), *scalars).backward()
    right = gold(ours, batches)[1]
    assert_close(gradients(ours), {n: g * (len(batches) if n.startswith("logit") else 1) for n, g in right.items()})


def test_arguments_of_the_loss_and_a_gradient() -> None:
    """Labels and weights are those of the joined batch; gradients add to what is there."""
    ours, batches = model(), micro_batches(UNEVEN)
    n = sum(UNEVEN)
    arguments = {
        "image_ids": torch.arange(n) % 4,
        "text_ids": torch.arange(n) % 3,
        "text_weights": torch.arange(n) % 2 + 0.5,
        "reduction": "mean",
    }
    for gradient in (3.0, torch.tensor(4.0)):
        accumulate(batches, lambda batch: ours(*batch), gradient=gradient, **arguments)
    assert_close(gradients(ours), gold(ours, batches, factor=7.0, **arguments)[1])


def test_grad_scaler() -> None:
    ours, batches = model(), micro_batches(UNEVEN)
    scaler = torch.amp.GradScaler("cpu")
    accumulate(batches, lambda batch: ours(*batch), gradient=scaler.scale(torch.ones(())))
    right = gold(ours, batches)[1]
    assert_close(gradients(ours), {name: 2.0**16 * g for name, g in right.items()})
    scaler.unscale_(torch.optim.SGD(ours.parameters()))
    assert_close(gradients(ours), right)


@pytest.mark.parametrize("frozen", ["image", "text", "logit_scale", "image text logit_scale logit_bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, batches = model(), micro_batches(UNEVEN)
    asked: list[list[bool]] = []
    original = accumulation.sigmoid_loss

    def watched(*arguments: Any, **options: Any) -> Tensor:
        asked.append([t.requires_grad for t in arguments])
        return original(*arguments, **options)

    monkeypatch.setattr(accumulation, "sigmoid_loss", watched)
    for name in frozen.split():
        getattr(ours, name).requires_grad_(False)
    accumulate(batches, lambda batch: ours(*batch))
    assert asked == [[name not in frozen for name in ("image", "text", "logit_scale", "logit_bias")]]
    if asked == [[False] * 4]:
        assert not gradients(ours)
    else:
        assert_close(gradients(ours), gold(ours, batches)[1])


def test_dropout_is_the_same_in_the_replay(device: torch.device) -> None:
    ours, batches = model(dropout=0.5).to(device), [(x.to(device), y.to(device)) for x, y in micro_batches((4, 4, 4))]
    torch.manual_seed(3)
    accumulate(batches, lambda batch: ours(*batch))
    end = torch.rand(5, device=device)
    first, second = ours.calls[:3], ours.calls[3:]
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    torch.manual_seed(3)
    right = in_one_graph(ours, batches, torch.float32)  # in float64 the masks would be others
    assert torch.equal(end, torch.rand(5, device=device)), "the generator is not where one pass leaves it"
    assert_close(gradients(ours), right)


def test_batch_norm() -> None:
    """Of each micro-batch's own statistics; the running ones are updated twice. In float64: some gradients cancel."""
    ours, batches = model(norm=True).double(), in_float64(micro_batches((4, 3, 6)))
    right = in_one_graph(ours, batches)
    accumulate(batches, lambda batch: ours(*batch))
    assert_close(gradients(ours), right, limit=1e-12)
    assert int(ours.image[2].num_batches_tracked) == 6


def test_autocast() -> None:
    """Half-precision features, no worse than the joined batch under autocast."""
    ours, batches = model(), micro_batches(UNEVEN)
    with torch.autocast("cpu", torch.bfloat16):
        accumulate(batches, lambda batch: ours(*batch))
    found, right = gradients(ours), gold(ours, batches)[1]
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(*joined(batches))
    sigmoid_loss_reference(*(t.float() for t in output)).backward()
    for name, theirs in gradients(ours).items():
        assert relative_l2(found[name], right[name]) <= max(2 * relative_l2(theirs, right[name]), 1e-2), name


def test_autocast_of_a_layer_that_the_first_micro_batch_leaves_out() -> None:
    """A weight whose cast autocast caches without a graph must get its gradient all the same."""
    layer = nn.Linear(12, 12)

    def encode(batch: tuple[Tensor, Tensor]) -> Any:
        x, y, *scalars = ours(*batch)
        return (x, y if len(y) == UNEVEN[0] else F.normalize(layer(y), dim=-1), *scalars)

    ours, batches = model(), micro_batches(UNEVEN)
    with torch.autocast("cpu", torch.bfloat16):
        accumulate(batches, encode)
    found = gradients(layer)
    layer.zero_grad()
    x, y, scales, biases = zip(*map(encode, batches), strict=True)
    sigmoid_loss_reference(torch.cat(x), torch.cat(y), scales[0], biases[0]).backward()
    assert_close(found, gradients(layer), limit=2e-2)


class Held(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that graphs hold at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        super().__init__(lambda t: Packed(self, t), lambda packed: packed.tensor)


class Packed:
    def __init__(self, held: Held, t: Tensor) -> None:
        self.held, self.tensor = held, t
        held.now += t.nbytes
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.tensor.nbytes


def test_no_more_than_one_micro_batch_is_held() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.GELU())))

    def encode(images: Tensor) -> tuple[Tensor, Tensor, float]:
        return tower(images), tower(2 * images), 10.0

    images = torch.randn(512, 64)
    one, parts = Held(), Held()
    with one:
        encode(images[:64])
    with parts:
        accumulate(images.split(64), encode)
    assert 0 < parts.most == one.most


@pytest.mark.parametrize(
    ("batches", "encode", "error", "says"),
    [
        ([], lambda batch: batch, ValueError, "micro_batches is empty"),
        ([1], lambda batch: torch.ones(3), TypeError, "encode must return .*, got Tensor"),
        ([1], lambda batch: (torch.ones(2, 3), torch.ones(2, 3)), TypeError, "got tuple of 2"),
        ([1], lambda batch: {"image_features": torch.ones(2, 3)}, TypeError, "got {'image_features': 'Tensor'}"),
        ([1, 2], lambda batch: (torch.ones(2, 3), None, 1.0), TypeError, "'text_features': 'NoneType'"),
        ([1], lambda batch: (torch.ones(2, 3), torch.ones(2, 4), 1.0), ValueError, "text_features have D = 4"),
    ],
)
def test_misuse(batches: list[Any], encode: Callable[..., Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        accumulate(batches, encode)


@pytest.mark.parametrize(("first", "got"), [(True, False), (False, True)])
def test_features_that_require_grad_in_one_micro_batch_only(first: bool, got: bool) -> None:
    """Whether the first or the second: their gradient would be lost."""
    features = [torch.ones(2, 3, requires_grad=required) for required in (first, not first)]
    with pytest.raises(RuntimeError, match=f"text_features .* requires_grad={got} for micro-batch 1 .*={first}"):
        accumulate([0, 1], lambda i: (torch.ones(2, 3), features[i], 1.0))


def test_another_shape_in_the_replay() -> None:
    sizes = iter([2, 3, 2, 2])

    def encode(batch: int) -> tuple[Tensor, Tensor, float]:
        n = next(sizes)
        return torch.ones(n, 3, requires_grad=True), torch.ones(2, 3), 1.0

    with pytest.raises(RuntimeError, match=r"image_features of shape \[2, 3\] .* micro-batch 1 .* shape \[3, 3\]"):
        accumulate([0, 1], encode)


# Proof that these tests can fail

MUTATIONS = {
    "scale and bias with every micro-batch": (
        "zip(encoded, map(_gradient, cached[i]), strict=True)",
        "zip(encoded, map(_gradient, [*cached[i][:2], *cached[-1][2:]]), strict=True)",
        lambda: test_every_gradient((4, 4, 4, 4), (), False),
    ),
    "gradients of another micro-batch": (
        "map(_gradient, cached[i])",
        "map(_gradient, [*cached[i - 1][:2], *cached[i][2:]])",
        lambda: test_every_gradient((4, 4, 4, 4), (), False),
    ),
    "the last micro-batch not replayed": (
        "enumerate(batches if grad_mode else [])",
        "enumerate(batches[:-1] if grad_mode else [])",
        lambda: test_every_gradient(UNEVEN, (), False),
    ),
    "gradient ignored": (
        "None if gradient is None else",
        "None if True else",
        lambda: test_arguments_of_the_loss_and_a_gradient(),
    ),
    "other random numbers in the replay": (
        "_restore(states[i])",
        "pass",
        lambda: test_dropout_is_the_same_in_the_replay(torch.device("cpu")),
    ),
    "every backward synchronised": (
        "with no_sync() if i + 1 < len(batches) else contextlib.nullcontext()",
        "with contextlib.nullcontext()",
        lambda: test_every_backward_but_the_last_is_inside_no_sync(),
    ),
    "every graph kept": (
        "Encoded._make(map(_leaf, encoded, needs_grad))\n",
        "Encoded._make(map(_leaf, encoded, needs_grad))\n        states[-1] = *states[-1], encode(batch)\n",
        lambda: test_no_more_than_one_micro_batch_is_held(),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, test = MUTATIONS[name]
    source = inspect.getsource(accumulation)
    assert source.count(old) == 1, "the mutation no longer fits the source"
    test()
    mutant = ModuleType("mutant")
    exec(source.replace(old, new), mutant.__dict__)
    monkeypatch.setattr(sys.modules[__name__], "accumulate", mutant.accumulate)
    with pytest.raises(AssertionError):
        test()
