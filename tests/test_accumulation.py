"""Accumulated gradients against those of the joined batch in float64; dropout, DistributedDataParallel, memory."""

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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
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

    def __init__(
        self, shape: tuple[int, ...] = (), dropout: float = 0.0, as_mapping: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        between = nn.BatchNorm1d(16) if norm else nn.Dropout(dropout)
        self.image = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), between, nn.Linear(16, 12))
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


def micro_batches(images: tuple[int, ...], texts: tuple[int, ...] | None = None) -> Batches:
    generator = torch.Generator().manual_seed(0)
    sizes = zip(images, texts or images, strict=True)
    return [(torch.randn(m, 7, generator=generator), torch.randn(n, 5, generator=generator)) for m, n in sizes]


def in_float64(batches: Batches) -> Batches:
    return [(images.double(), texts.double()) for images, texts in batches]


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, texts = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(texts)


def gold(like: Model, batches: Batches, factor: float = 1.0, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over the joined batch and every parameter's gradient, in float64."""
    right = copy.deepcopy(like).double()
    output = right(*(t.double() for t in joined(batches)))
    loss = sigmoid_loss_reference(*(output.values() if like.as_mapping else output), **arguments)
    (factor * loss).backward()
    return loss.detach(), gradients(right)


def in_one_graph(like: Model, batches: Batches, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every parameter's gradient where each micro-batch has a forward of its own, and all share one backward."""
    right = copy.deepcopy(like).to(dtype)
    x, y, scales, biases = zip(*(right(*(t.to(dtype) for t in batch)) for batch in batches), strict=True)
    sigmoid_loss_reference(torch.cat(x), torch.cat(y), scales[0], biases[0]).backward()
    return gradients(right)


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


# Several ranks


def data_parallel(module: nn.Module, group: Any, **options: Any) -> tuple[DistributedDataParallel, list[int]]:
    """``module`` under DistributedDataParallel, and the buckets that it averages, as it does."""
    ddp, buckets = DistributedDataParallel(module, process_group=group, **options), []

    def counted(state: Any, bucket: dist.GradBucket) -> Any:
        buckets.append(bucket.index())
        return allreduce_hook(group, bucket)

    counted.__annotations__ = {}  # as strings, DistributedDataParallel refuses them
    ddp.register_comm_hook(None, counted)
    return ddp, buckets


SIZES = ((3, 2, 5, 2), (2, 4, 4, 2), (6, 2, 2, 2))
Step = tuple[Tensor, dict[str, Tensor], list[int]]


def step(rank: int, group: Any, sizes: tuple[tuple[int, ...], ...], algorithm: str, options: dict[str, Any]) -> Step:
    """Of the second of two steps: a rank's loss, the gradients that were averaged, and how often they were."""
    batches = micro_batches(sum(sizes, ()))[slices([len(s) for s in sizes])[rank]]
    ours = model(shape=(1,), norm="norm" in options)
    if "norm" in options:
        ours, batches = ours.double(), in_float64(batches)
    ours.image.requires_grad_("frozen" not in options)
    ddp, buckets = data_parallel(ours, group, **options.get("ddp", {}))

    def encode(batch: tuple[Tensor, Tensor]) -> Any:
        return ddp(*batch)

    for _ in range(2):
        ours.zero_grad()
        buckets.clear()
        arguments = {"no_sync": ddp.no_sync, "gradient": options.get("gradient")}
        loss = accumulate(batches, encode, process_group=Exchange(group, algorithm), **arguments)
    return loss, gradients(ours), buckets


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks(ranks: Ranks, world: int, algorithm: str) -> None:
    """Four micro-batches a rank, the ranks' batches equally large: the mean of their losses is the joined batch's."""
    results = ranks.run(world, step, SIZES[:world], algorithm, {})
    loss, right = gold(model(shape=(1,)), micro_batches(sum(SIZES[:world], ())))
    assert relative_l2(torch.stack([loss for loss, _, _ in results]).mean(), loss) <= 1e-6
    for _, found, buckets in results:
        assert_close(found, right)
        assert buckets == [0], "gradients are averaged once, in the last backward"


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (((12,), (2, 4, 4, 2)), {}),
        (((5, 7), (2, 4, 4, 2)), {}),
        (SIZES[:2], {"frozen": True}),
        (SIZES[:2], {"gradient": 3.0}),
        (((5, 7), (4, 8)), {"norm": True}),
        (SIZES[:2], {"ddp": {"gradient_as_bucket_view": True}}),
    ],
)
def test_two_ranks(ranks: Ranks, sizes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    """Other numbers of micro-batches on each, a frozen tower, an upstream gradient, buffers that are broadcast."""
    like, batches = model(shape=(1,), norm="norm" in options), micro_batches(sum(sizes, ()))
    like.image.requires_grad_("frozen" not in options)
    right = in_one_graph(like, batches) if "norm" in options else gold(like, batches)[1]
    for _, found, buckets in ranks.run(2, step, sizes, "ring", options):
        assert_close(found, {name: options.get("gradient", 1.0) * g for name, g in right.items()})
        assert buckets == [0]


def forgetful_step(rank: int, group: Any) -> None:
    ddp = DistributedDataParallel(model(), process_group=group)
    accumulate(micro_batches((2, 3)), lambda batch: ddp(*batch), process_group=group)


def test_no_sync_forgotten(ranks: Ranks) -> None:
    """DistributedDataParallel misses the scale's gradient in the first backward, and says so."""
    for result in ranks.try_run(2, forgetful_step):
        assert isinstance(result, RuntimeError)
        assert "Expected to have finished reduction" in str(result)


def sharded_step(rank: int, group: Any) -> dict[str, Tensor]:
    """Under FSDP2, as ``step``."""
    batches = micro_batches(sum(SIZES[:2], ()))[slices([4, 4])[rank]]
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    ours = model(shape=(1,))
    for tower in (ours.image, ours.text, ours):
        fully_shard(tower, mesh=mesh)
    for _ in range(2):
        ours.zero_grad()
        accumulate(batches, lambda batch: ours(*batch), process_group=mesh)
    return {name: g.full_tensor() for name, g in gradients(ours).items()}


def test_two_ranks_under_fsdp2(ranks: Ranks) -> None:
    right = gold(model(shape=(1,)), micro_batches(sum(SIZES[:2], ())))[1]
    for found in ranks.run(2, sharded_step):
        assert_close(found, right)
