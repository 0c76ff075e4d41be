"""What the exchange between ranks sends, holds, refuses and survives; the host features that it must live with."""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from bench.harness.timing import peak_bytes
from siglip_kernels import SigLipLoss, sigmoid_loss
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import relative_l2
from tests.ranks import Ranks
from tests.test_distributed import KINDS, Batch, assert_right, call, even, of_rank, uneven

# Traffic


class Traffic:
    """Counts the bytes that a rank hands to torch.distributed, by function."""

    FUNCTIONS = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = {"ring": 0, "all_gather": 0, "reduce_scatter": 0}
        for name in filter(lambda name: hasattr(dist, name), self.FUNCTIONS):
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name)))
        batched = dist.batch_isend_irecv

        def batch_isend_irecv(operations: list[Any]) -> Any:
            self.sent["ring"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
            return batched(operations)

        monkeypatch.setattr(dist, "batch_isend_irecv", batch_isend_irecv)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(out: Tensor, t: Tensor, group: Any) -> Any:
            self.sent["all_gather" if "gather" in name else "reduce_scatter"] += t.nbytes
            return original(out, t, group=group)

        return function


AGREEMENT = 8 * 16  # bytes: what a rank says before an exchange


def traffic(rank: int, group: Any, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """What a rank sends in forward, and in backward."""
    own, labels = of_rank(batch, rank)
    for t, wanted in zip(own, batch.requires_grad, strict=True):
        t.requires_grad_(wanted)
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = Traffic(monkeypatch)
        loss = sigmoid_loss(*own, **labels, process_group=Exchange(group, **batch.exchange))
        forward = dict(count.sent)
        loss.backward()
    return forward, {name: count.sent[name] - forward[name] for name in forward}


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_ring(ranks: Ranks, world: int, dtype: torch.dtype) -> None:
    b, D = 12, 40
    expected = {"ring": (world - 1) * b * D * (dtype.itemsize + 4), "all_gather": AGREEMENT, "reduce_scatter": 0}
    for forward, backward in ranks.run(world, traffic, even(world, b, D=D, dtype=dtype)):
        assert forward == expected
        assert not any(backward.values())


@pytest.mark.parametrize("world", [2, 8])
def test_bytes_of_the_gather(ranks: Ranks, world: int) -> None:
    """What the collectives are given: each sends (W - 1) / W of the gathered whole, or (W - 1) of the own part."""
    b, D = 12, 40
    expected = {"ring": 0, "all_gather": AGREEMENT + b * D * 4, "reduce_scatter": world * b * D * 4}
    for forward, backward in ranks.run(world, traffic, even(world, b, D=D, exchange={"algorithm": "gather"})):
        assert forward == expected
        assert not any(backward.values())


def test_frozen_texts_cost_no_gradient_traffic(ranks: Ranks) -> None:
    b, D, frozen = 12, 40, (True, False, True, True)
    for forward, backward in ranks.run(3, traffic, even(3, b, D=D, requires_grad=frozen)):
        assert forward["ring"] == 2 * b * D * 4
        assert not any(backward.values())
    for forward, _ in ranks.run(3, traffic, even(3, b, D=D, requires_grad=frozen, exchange={"algorithm": "gather"})):
        assert not forward["reduce_scatter"]


def test_half_precision_halves_the_gradient_traffic(ranks: Ranks) -> None:
    b, D = 12, 40
    batch = even(3, b, D=D, exchange={"text_gradient_dtype": torch.bfloat16})
    assert all(forward["ring"] == 2 * b * D * (4 + 2) for forward, _ in ranks.run(3, traffic, batch))


def test_upstream_gradients_that_differ_cost_traffic_in_backward(ranks: Ranks) -> None:
    b, D = 12, 40
    for forward, backward in ranks.run(3, traffic, even(3, b, D=D, exchange={"same_upstream": False})):
        assert forward["ring"] == 2 * b * D * 4
        assert backward["ring"] == 2 * b * D * (4 + 4)


# Memory


def peak(rank: int, group: Any, b: int, D: int, algorithm: str) -> float:
    """Bytes above the inputs: the median of three steps."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)  # what is freed leaves the process, and does not hide in a heap
    x, y = (torch.ones(b, D, requires_grad=True) for _ in range(2))

    def step() -> None:
        x.grad = y.grad = None
        sigmoid_loss(x, y, 10.0, -10.0, process_group=Exchange(group, algorithm)).backward()

    step()
    peaks = []
    for _ in range(3):
        x.grad = y.grad = None
        found = peak_bytes(step, torch.device("cpu"))
        assert found is not None
        peaks.append(found)
    return statistics.median(peaks)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_of_the_ring_does_not_grow_with_the_world(ranks: Ranks) -> None:
    two, eight = (max(ranks.run(world, peak, 1024, 512, "ring")) for world in (2, 8))
    assert eight <= 1.1 * two, (two, eight)
    # The measurement sees what grows.
    assert max(ranks.run(8, peak, 1024, 512, "gather")) > 1.5 * max(ranks.run(2, peak, 1024, 512, "gather"))


# Refusals


def refused(rank: int, group: Any, batch: Batch, odd: dict[str, Any], mode: str = "") -> list[Any]:
    """As ``call``, with what is odd about rank 1; then again with nothing odd: the group must still be in step."""
    try:
        if rank == 1 and mode == "gradients off":
            with torch.no_grad():
                call(rank, group, batch)
        elif rank == 1 and mode == "weights":
            own, _ = of_rank(batch, rank)
            sigmoid_loss(*own, text_weights=torch.ones(1000), process_group=group)
        elif rank == 1 and mode == "place":
            SigLipLoss(rank=0, world_size=batch.world, process_group=group)(*of_rank(batch, rank)[0])
        elif rank == 1 and mode == "backend":
            own, _ = of_rank(batch, rank)
            sigmoid_loss(*own, backend="cuda", process_group=group)
        else:
            call(rank, group, replace(batch, **odd) if rank == 1 else batch)
    except (TypeError, ValueError) as error:
        return [str(error), call(rank, group, batch)]
    return ["no error", []]


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"D": 34}, r"image_features and text_features: D must be the same .* 33 on ranks 0, 2; 34 on rank 1"),
        (
            {"dtype": torch.float64},
            r"text_features: the dtype must be the same .* torch.float32 on ranks 0, 2; torch.float64 on rank 1",
        ),
        ({"pairs": "ids"}, r"image_ids and text_ids: .* False on ranks 0, 2; True on rank 1"),
        ({"pairs": "ignore ids"}, r"ignore_ids must be the same .* False on ranks 0, 2; True on rank 1"),
        ({"pairs": "soft targets"}, r"multi_positive must be .* weights on ranks 0, 2; soft_targets on rank 1"),
        ({"pairs": "masses of images"}, r"anchors must be .* both on ranks 0, 2; images on rank 1"),
        ({"exchange": {"algorithm": "gather"}}, r"algorithm .* ring on ranks 0, 2; gather on rank 1"),
        ({"exchange": {"same_upstream": False}}, r"same_upstream .* True on ranks 0, 2; False on rank 1"),
        ({"exchange": {"text_gradient_dtype": torch.float16}}, r"text_gradient_dtype .* torch.float16 on rank 1"),
    ],
)
def test_what_differs_is_refused_on_every_rank(ranks: Ranks, odd: dict[str, Any], says: str) -> None:
    others = {"ignore ids": "ids", "soft targets": "masses of both", "masses of images": "masses of both"}
    batch = uneven(3, pairs=others.get(odd.get("pairs", ""), "diagonal"))
    results = ranks.run(3, refused, batch, odd)
    messages = {message for message, _ in results}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=says):
        raise ValueError(messages.pop())
    assert_right([after for _, after in results], batch, 5e-6)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("weights", "text_weights must have shape"),
        ("backend", "'cuda'"),
        ("place", "rank = 0, world_size = 3 were given, but this process is rank 1 of 3"),
    ],
)
def test_bad_arguments_of_one_rank_are_told_to_the_others(ranks: Ranks, mode: str, says: str) -> None:
    batch = uneven(3)
    results = ranks.run(3, refused, batch, {}, mode)
    assert says in results[1][0]
    assert results[0][0] == results[2][0] == "rank 1 refused the arguments; the error there says why"
    assert_right([after for _, after in results], batch, 5e-6)


def test_gradients_off_on_one_rank(ranks: Ranks) -> None:
    """Refused where others need its part of their text gradients; right where nobody does."""
    batch = uneven(3)
    results = ranks.run(3, refused, batch, {}, "gradients off")
    assert len({message for message, _ in results}) == 1
    assert "rank 1 called with gradients off" in results[0][0]
    assert_right([after for _, after in results], batch, 5e-6)
    frozen = uneven(3, requires_grad=(True, False, True, True))
    results = ranks.run(3, off_on_rank_1, frozen)
    assert all(t is None for t in results[1][1:])
    for rank in (0, 2):
        assert_right([results[rank]], frozen, 5e-6, first=rank)


def off_on_rank_1(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    with torch.set_grad_enabled(rank != 1):
        return call(rank, group, batch)


def test_text_gradients_wanted_on_some_ranks_only(ranks: Ranks) -> None:
    """Each rank's own affair where the upstream gradient is shared; else backward would wait for who does not come."""
    batch = uneven(4)
    frozen = replace(batch, requires_grad=(True, False, True, True))
    for algorithm in ("ring", "gather"):
        exchange = {"algorithm": algorithm}
        results = ranks.run(4, texts_frozen_on_some, replace(batch, exchange=exchange))
        for rank, result in enumerate(results):
            assert_right([result], frozen if rank % 2 else batch, 5e-6, first=rank)
    results = ranks.try_run(4, texts_frozen_on_some, replace(batch, exchange={"same_upstream": False}))
    assert all(isinstance(result, ValueError) and "on ranks 1, 3" in str(result) for result in results)


def texts_frozen_on_some(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    return call(rank, group, replace(batch, requires_grad=(True, rank % 2 == 0, True, True)))


def misuse(rank: int, group: Any) -> list[str]:
    """What is said of arguments that no exchange follows."""
    x = torch.ones(2, 3)
    errors = []
    for make in (
        lambda: sigmoid_loss(x, x, 1.0, process_group="gloo"),
        lambda: sigmoid_loss(x, x, 1.0, process_group=dist.GroupMember.NON_GROUP_MEMBER),
        lambda: SigLipLoss(rank=1 - rank, world_size=2, process_group=group)(x, x, 1.0),
        lambda: SigLipLoss(rank=rank, world_size=3, process_group=group)(x, x, 1.0),
        lambda: Exchange(group, "bidir"),
        lambda: Exchange(group, text_gradient_dtype=torch.int32),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            make()
        errors.append(str(error.value))
    return errors


def test_misuse(ranks: Ranks) -> None:
    for rank, errors in enumerate(ranks.run(2, misuse)):
        for error, says in zip(
            errors,
            (
                "process_group must be a group of this process",
                "process_group must be a group of this process",
                f"this process is rank {rank} of 2",
                f"world_size = 3 were given, but this process is rank {rank} of 2",
                "algorithm must be one of 'ring', 'gather'; got 'bidir'",
                "text_gradient_dtype must be a floating dtype or None; got torch.int32",
            ),
            strict=True,
        ):
            assert says in error


def mesh_of(nodes: int) -> DeviceMesh:
    """Of the whole world: nodes × ranks of a node."""
    return DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(nodes, -1))


def call_on_mesh(rank: int, group: Any, batch: Batch, nodes: int) -> list[Tensor | None]:
    return call(rank, mesh_of(nodes), batch)


@pytest.fixture(scope="module")
def six_ranks() -> Iterator[Ranks]:
    world = Ranks(6)
    yield world
    world.close()


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("sizes", [even, uneven])
@pytest.mark.parametrize(("world", "nodes"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 2), (6, 3)])
def test_nodes(ranks: Ranks, six_ranks: Ranks, world: int, nodes: int, sizes: Any, algorithm: str) -> None:
    batch = sizes(world, exchange={"algorithm": algorithm})
    assert_right((ranks if world == 8 else six_ranks).run(world, call_on_mesh, batch, nodes), batch, 5e-6)


def repeated_on_mesh(rank: int, group: Any, batch: Batch) -> bool:
    """Many times in a row: a buffer that is written too early shows sooner or later."""
    mesh = mesh_of(2)
    first, *others = (call(rank, mesh, batch) for _ in range(20))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_same_bits_over_nodes(ranks: Ranks) -> None:
    assert all(ranks.run(8, repeated_on_mesh, uneven(8)))


@pytest.mark.parametrize("pairs", ["ids", "weights", "text_weights", "none", *KINDS])
@pytest.mark.parametrize("exchange", [{}, {"same_upstream": False}, {"algorithm": "gather"}], ids=str)
def test_labels_weights_and_upstream_gradients_over_nodes(ranks: Ranks, pairs: str, exchange: dict[str, Any]) -> None:
    upstream = None if exchange.get("same_upstream", True) else (0.5, -3.0, 7.0, 2.0, 1.0, 1.0, -1.0, 4.0)
    batch = uneven(8, pairs=pairs, reduction="mean", upstream=upstream, exchange=exchange)
    assert_right(ranks.run(8, call_on_mesh, batch, 2), batch, 5e-6)


def traffic_on_mesh(rank: int, group: Any, batch: Batch, nodes: int) -> tuple[dict[str, int], dict[str, int]]:
    return traffic(rank, mesh_of(nodes), batch)


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_bytes_over_nodes(ranks: Ranks, nodes: int) -> None:
    """As many as of one ring."""
    b, D = 12, 40
    for forward, backward in ranks.run(8, traffic_on_mesh, even(8, b, D=D), nodes):
        assert forward["ring"] == 7 * b * D * (4 + 4)
        assert not any(backward.values())


def in_a_mesh_of_three_dimensions(rank: int, group: Any) -> Any:
    mesh = DeviceMesh("cpu", torch.arange(8).view(2, 2, 2), mesh_dim_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="process_group must be a DeviceMesh of one dimension or two, got 3"):
        sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, process_group=mesh)
    loss_fn = SigLipLoss(process_group=mesh["a", "b"])
    return (loss_fn.rank, loss_fn.world_size), call(rank // 2, mesh["a", "b"], even(4))


def test_a_mesh_of_three_dimensions(ranks: Ranks) -> None:
    """Refused whole, right in a part: two groups of four, of every other rank."""
    results = ranks.run(8, in_a_mesh_of_three_dimensions)
    assert [place for place, _ in results] == [(rank // 2, 4) for rank in range(8)]
    for part in (results[::2], results[1::2]):
        assert_right([result for _, result in part], even(4), 5e-6)


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
