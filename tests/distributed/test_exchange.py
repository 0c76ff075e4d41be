"""What the exchange between ranks survives, and the host features that it must live with."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from siglip_kernels import SigLipLoss, sigmoid_loss
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import relative_l2
from tests.distributed.batches import Batch, assert_right, call, even, mesh_of, of_rank, uneven
from tests.ranks import Ranks

# Ranks that go away


def die_or_wait(rank: int, group: Any, batch: Batch, when: str) -> str:
    """Rank 1 goes away; the others return the error that ends their wait for it."""
    if rank == 1 and when == "before":
        os._exit(1)
    if rank == 1:
        shift = dist.batch_isend_irecv

        def shift_and_die(operations: list[Any]) -> Any:
            shift(operations[:1])
            os._exit(1)

        dist.batch_isend_irecv = shift_and_die
    with pytest.raises(RuntimeError) as caught:
        call(rank, group, batch)
    return str(caught.value)


@pytest.mark.parametrize("when", ["before", "in the ring"])
def test_a_killed_rank(when: str) -> None:
    world = Ranks(3, timeout=10)
    try:
        world.run(3, call, uneven(3))
        results = world.try_run(3, die_or_wait, uneven(3), when)  # TimeoutError where one waits on
        world.run(3, call, uneven(3))  # on processes that take their places
    finally:
        world.close()
    assert isinstance(results[1], ProcessLookupError)
    assert all(isinstance(results[rank], str) and results[rank] for rank in (0, 2)), results


# Where it is used


def in_hosts(rank: int, group: Any, batch: Batch, host: str) -> list[Tensor | None]:
    own, _ = of_rank(batch, rank)
    for t in own:
        t.requires_grad_()
    if host == "default group":
        loss = SigLipLoss(rank=rank, world_size=dist.get_world_size())(*own)
    elif host == "mesh":
        loss = SigLipLoss(process_group=DeviceMesh("cpu", torch.arange(batch.world)))(*own)
    elif host == "compile":
        loss_fn = SigLipLoss(rank=rank, world_size=batch.world, process_group=group)
        loss = torch.compile(loss_fn, fullgraph=True)(*own)
    elif host == "compile, functional":
        loss = torch.compile(sigmoid_loss, fullgraph=True)(*own, process_group=Exchange(group, **batch.exchange))
    elif host == "compile, group":
        loss = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")(*own, process_group=group)
    elif host == "compile, nodes":
        loss = torch.compile(sigmoid_loss, fullgraph=True)(*own, process_group=mesh_of(2))
    elif host == "checkpoint":
        loss = checkpoint(SigLipLoss(process_group=group), *own, use_reentrant=False)
    else:
        raise ValueError(host)
    loss.backward()
    return [loss.detach(), *(t.grad for t in own)]


@pytest.mark.parametrize("host", ["default group", "mesh"])
def test_groups(ranks: Ranks, host: str) -> None:
    batch = uneven(8)
    assert_right(ranks.run(8, in_hosts, batch, host), batch, 5e-6)


@pytest.mark.parametrize("host", ["compile", "compile, functional", "compile, group", "checkpoint"])
@pytest.mark.parametrize("exchange", [{}, {"algorithm": "gather"}, {"same_upstream": False}], ids=str)
def test_hosts(ranks: Ranks, host: str, exchange: dict[str, Any]) -> None:
    batch = uneven(2, exchange=exchange)
    assert_right(ranks.run(2, in_hosts, batch, host), batch, 5e-6)


def test_compiled_over_nodes(ranks: Ranks) -> None:
    batch = even(8)
    assert_right(ranks.run(8, in_hosts, batch, "compile, nodes"), batch, 5e-6)


def two_losses(x: Tensor, y: Tensor, v: Tensor, w: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Which of them inductor runs first, if it may, depends on how much memory either takes: on the rank's batches."""
    first = sigmoid_loss(v.exp(), w, 10.0, -10.0, process_group=group)
    return first, sigmoid_loss((x @ x.T).softmax(0) @ y, y, 10.0, -10.0, process_group=group)


def compiled_and_not(rank: int, group: Any) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(rank)
    large, small = [(1024, 3), (5, 4000)][rank]
    inputs = [torch.randn(n, 8, requires_grad=True) for n in (large, large, small, small)]
    results = []
    for function in (two_losses, torch.compile(two_losses, fullgraph=True)):
        losses = function(*inputs, group)
        results.append([*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), inputs)])
    return results[0], results[1]


def test_a_compiled_graph_keeps_the_order_of_exchanges(ranks: Ranks) -> None:
    """One text matrix would meet the images of another, whose D and dtype are the same."""
    for eager, compiled in ranks.run(2, compiled_and_not):
        for a, b in zip(eager, compiled, strict=True):
            assert relative_l2(b, a) < 1e-4


def same_twice(x: Tensor, y: Tensor, group: Any) -> Tensor:
    """And once in vain."""
    sigmoid_loss(x.exp(), y, 10.0, process_group=group)
    return sigmoid_loss(x, y, 10.0, process_group=group) + sigmoid_loss(x, y, 10.0, process_group=group)


def compiled_on_rank_1(rank: int, group: Any) -> float:
    x, y = torch.eye(3, 4), torch.eye(3, 4)
    return float((torch.compile(same_twice, fullgraph=True) if rank == 1 else same_twice)(x, y, group))


def test_a_compiled_graph_keeps_every_exchange(ranks: Ranks) -> None:
    first, second = ranks.run(2, compiled_on_rank_1)
    assert first == pytest.approx(second)


def several_losses(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    """Three forwards before the backwards, which come in another order on every rank; two losses in one step."""
    results = []
    losses = []
    for _ in range(3):
        own, _labels = of_rank(batch, rank)
        for t in own:
            t.requires_grad_()
        losses.append((own, sigmoid_loss(*own, process_group=group)))
    for own, loss in losses[rank:] + losses[:rank]:
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in own)])
    own, _labels = of_rank(batch, rank)
    for t in own:
        t.requires_grad_()
    ((sigmoid_loss(*own, process_group=group) + sigmoid_loss(*own, process_group=group)) / 2).backward()
    results.append([results[0][0], *(t.grad for t in own)])
    return results


def test_several_forwards_and_losses(ranks: Ranks) -> None:
    batch = uneven(3)
    for results in zip(*ranks.run(3, several_losses, batch), strict=True):
        assert_right(results, batch, 5e-6)
