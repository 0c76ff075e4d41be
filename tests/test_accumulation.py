"""Accumulated gradients against those of the joined batch in float64; dropout, DistributedDataParallel, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from siglip_kernels import accumulate, accumulation
from siglip_kernels.distributed import Exchange
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import relative_l2
from tests.ranks import Ranks, slices

Batches = list[tuple[Tensor, Tensor]]
UNEVEN = (3, 8, 1, 5)


class Model(nn.Module):
    """Two small towers, and a scale and a bias, that return what open_clip's models return."""

    def __init__(self, shape: tuple[int, ...] = (), dropout: float = 0.0, as_mapping: bool = False) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 12))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 12))
        self.logit_scale = nn.Parameter(torch.full(shape, 1.5))
        self.logit_bias = nn.Parameter(torch.full(shape, -2.0))
        self.as_mapping = as_mapping
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        x, y = (F.normalize(tower(t), dim=-1) for tower, t in ((self.image, images), (self.text, texts)))
        self.calls.append((x.detach(), y.detach()))
        values = (x, y, self.logit_scale.exp(), self.logit_bias)
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        return dict(zip(names, values, strict=True)) if self.as_mapping else values


def model(**options: Any) -> Model:
    torch.manual_seed(1)
    return Model(**options)


def micro_batches(sizes: tuple[int, ...]) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 7, generator=generator), torch.randn(n, 5, generator=generator)) for n in sizes]


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, texts = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(texts)


def gold(like: Model, batches: Batches, factor: float = 1.0, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over the joined batch and every parameter's gradient, in float64."""
    right = copy.deepcopy(like).double()
    output = right(*(t.double() for t in joined(batches)))
    loss = sigmoid_loss_reference(*(output.values() if like.as_mapping else output), **arguments)
    (factor * loss).backward()
    return loss.detach(), {name: p.grad for name, p in right.named_parameters() if p.grad is not None}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], limit: float = 5e-6) -> None:
    assert found.keys() == right.keys()
    errors = {name: relative_l2(found[name], right[name]) for name in right}
    assert all(error <= limit for error in errors.values()), errors


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


def test_dropout_is_the_same_in_the_replay() -> None:
    ours, batches = model(dropout=0.5), micro_batches((4, 4, 4))
    torch.manual_seed(3)
    accumulate(batches, lambda batch: ours(*batch))
    end = torch.get_rng_state()
    first, second = ours.calls[:3], ours.calls[3:]
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    torch.manual_seed(3)
    for batch in batches:
        ours(*batch)
    assert torch.equal(end, torch.get_rng_state()), "the generator is not where one pass leaves it"


def test_dropout_gradients() -> None:
    """Of the very masks that the loss saw."""
    ours, batches = model(dropout=0.5), micro_batches((4, 4, 4))
    torch.manual_seed(3)
    accumulate(batches, lambda batch: ours(*batch))
    found = gradients(ours)
    ours.zero_grad()
    torch.manual_seed(3)
    x, y, scales, biases = zip(*(ours(*batch) for batch in batches), strict=True)
    sigmoid_loss_reference(torch.cat(x), torch.cat(y), scales[0], biases[0]).backward()
    assert_close(found, gradients(ours))


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


class Held(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that graphs hold at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        super().__init__(self._pack, lambda packed: packed.tensor)

    def _pack(self, t: Tensor) -> Any:
        held = self

        class Packed:
            def __init__(self) -> None:
                self.tensor = t
                held.now += t.nbytes
                held.most = max(held.most, held.now)

            def __del__(self) -> None:
                held.now -= t.nbytes

        return Packed()


def test_no_more_than_one_micro_batch_is_held() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.GELU())))

    def encode(images: Tensor) -> tuple[Tensor, Tensor, float]:
        return tower(images), tower(2 * images), 10.0

    images = torch.randn(512, 64)
    whole, parts = Held(), Held()
    with whole:
        accumulate([images], encode)
    with parts:
        accumulate(images.split(64), encode)
    assert parts.most < whole.most / 5  # an eighth, and the weights, which graphs hold too


@pytest.mark.parametrize(
    ("batches", "encode", "error", "says"),
    [
        ([], lambda batch: batch, ValueError, "micro_batches is empty"),
        ([1], lambda batch: torch.ones(3), TypeError, "encode must return .*, got Tensor"),
        ([1], lambda batch: {"image_features": torch.ones(2, 3)}, TypeError, r"got a mapping of \['image_features'\]"),
        ([1], lambda batch: (torch.ones(2, 3), torch.ones(2, 4), 1.0), ValueError, "text_features have D = 4"),
    ],
)
def test_misuse(batches: list[Any], encode: Callable[..., Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        accumulate(batches, encode)


def test_another_shape_in_the_replay() -> None:
    sizes = iter([2, 3, 2, 2])

    def encode(batch: int) -> tuple[Tensor, Tensor, float]:
        n = next(sizes)
        return torch.ones(n, 3, requires_grad=True), torch.ones(2, 3), 1.0

    with pytest.raises(RuntimeError, match=r"image_features of shape \[3, 3\] for micro-batch 1 .* of \[2, 3\]"):
        accumulate([0, 1], encode)


# Several ranks


def step(rank: int, group: Any, sizes: tuple[tuple[int, ...], ...], algorithm: str) -> Any:
    """A rank's loss, the gradients that DistributedDataParallel has averaged, and how often it did."""
    batches = micro_batches(sum(sizes, ()))[slices([len(s) for s in sizes])[rank]]
    ddp = DistributedDataParallel(model(shape=(1,)), process_group=group)
    buckets = []

    def counted(state: Any, bucket: dist.GradBucket) -> Any:
        buckets.append(bucket.index())
        return allreduce_hook(group, bucket)

    counted.__annotations__ = {}  # as strings, DistributedDataParallel refuses them
    ddp.register_comm_hook(None, counted)
    exchange = Exchange(group, algorithm)
    loss = accumulate(batches, lambda batch: ddp(*batch), no_sync=ddp.no_sync, process_group=exchange)
    return loss, gradients(ddp.module), buckets


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks(ranks: Ranks, world: int, algorithm: str) -> None:
    """Four micro-batches a rank, the ranks' batches equally large: the mean of their losses is the joined batch's."""
    sizes = ((3, 2, 5, 2), (1, 4, 4, 3), (6, 2, 2, 2))[:world]
    results = ranks.run(world, step, sizes, algorithm)
    loss, right = gold(model(shape=(1,)), micro_batches(sum(sizes, ())))
    assert relative_l2(torch.stack([loss for loss, _, _ in results]).mean(), loss) <= 1e-6
    for _, found, buckets in results:
        assert_close(found, right)
        assert buckets == [0], "gradients are averaged once, in the last backward"
