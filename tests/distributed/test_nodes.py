"""The exchange over a mesh of nodes and GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from siglip_kernels import SigLipLoss, sigmoid_loss
from tests.distributed.batches import KINDS, Batch, assert_right, call, even, mesh_of, uneven
from tests.ranks import Ranks


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
