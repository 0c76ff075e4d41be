"""Gradient accumulation over several ranks, under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from siglip_kernels import accumulate
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import relative_l2
from tests.micro_batches import assert_close, gold, gradients, in_float64, in_one_graph, micro_batches, model
from tests.ranks import Ranks, slices


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
