"""The contenders: the baselines' loss, the gradients of each mode, the floor, CUDA graphs, who is timed where."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from bench.microbenchmark import contenders
from bench.microbenchmark.problems import FORWARD, FROZEN, FULL, Problem
from siglip_kernels.testing import gold, make_inputs, relative_l2

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["eager_loss", "chunked_loss"])
def test_the_rivals_compute_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHUNK_SIZE", 40)  # several chunks, the last ragged
    inputs = make_inputs(100, 100, 16, torch.float64)
    assert relative_l2(getattr(contenders, name)(*inputs), gold(inputs).loss) < 1e-12


@pytest.mark.parametrize(("mode", "wanted"), [(FULL, 4), (FROZEN, 3), (FORWARD, 0)])
def test_a_mode_forms_its_gradients_and_no_others(mode: str, wanted: int) -> None:
    problem = Problem(32, 8, torch.float32, mode)
    step = contenders.Step(contenders.eager_loss, problem, contenders.make_input_sets(problem, CPU))
    step()
    assert sum(leaf.grad is not None for leaf in step.leaves) == wanted
    assert math.isfinite(step.loss.detach())


@pytest.mark.parametrize(("mode", "products"), [(FULL, 3), (FROZEN, 2), (FORWARD, 1)])
def test_the_floor_is_the_products_of_the_mode(mode: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(48, 8, torch.float64, mode)
    monkeypatch.setattr(contenders, "FLOOR_LOGIT_BYTES", 20 * 48 * 8)  # panels of 20 images, the last ragged
    floor = contenders.GemmFloor(problem, contenders.make_input_sets(problem, CPU))
    floor()
    x, y = (t.detach() for t in floor.input_sets[0][:2])
    assert floor.z.shape == (20, 48)
    assert relative_l2(floor.z[:8], x[40:] @ y.T) < 1e-12
    panel = floor.dz
    dz = torch.cat([panel, panel, panel[:8]])
    if products > 1:
        assert relative_l2(floor.dy, dz.T @ x) < 1e-12
    if products > 2:
        assert relative_l2(floor.dx, dz @ y) < 1e-12


def test_the_other_project_is_called_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss takes the logarithm of the scale; where it is missing, the row says so."""
    module = types.ModuleType("siglip_kernel")
    module.fused_siglip_loss = lambda x, y, log_scale, bias: contenders.eager_loss(x, y, log_scale.exp(), bias)  # type: ignore[attr-defined]
    inputs = make_inputs(20, 20, 8, torch.float64)
    monkeypatch.setitem(sys.modules, "siglip_kernel", module)
    assert relative_l2(contenders.siglip_kernel_package(*inputs), gold(inputs).loss) < 1e-12


MARK = "kept"


def marked(*inputs: torch.Tensor) -> torch.Tensor:
    """Marks the nodes that accumulate the leaves' gradients: they live as long as some graph holds them."""
    loss = contenders.eager_loss(*inputs)
    for leaf in inputs:
        torch.autograd.graph.get_gradient_edge(leaf).node.metadata[MARK] = True
    return loss


def kept(sets: list[Any]) -> int:
    leaves = [leaf for leaves in sets for leaf in leaves]
    return sum(MARK in torch.autograd.graph.get_gradient_edge(leaf).node.metadata for leaf in leaves)


def test_captures_are_few_and_meet_no_graph_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a graph's nodes run on the stream of its first backward, for which a capture cannot wait."""
    captures: list[int] = []

    class Graph:
        def pool(self) -> None: ...
        def wait_stream(self, other: Any) -> None: ...

    @contextmanager
    def capture(graph: Graph, pool: Any) -> Iterator[None]:
        captures.append(kept(sets))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    problem = Problem(16, 8, torch.float32)
    sets = [contenders.make_input_sets(problem, CPU)[0] for _ in range(12)]
    before = contenders.Step(marked, problem, sets)
    before()  # as the contenders before it leave theirs
    graphed = contenders.CudaGraphStep(marked, problem, sets)
    assert captures == [0] * contenders.CUDA_GRAPH_INPUT_SETS
    assert len(graphed.captures) == contenders.CUDA_GRAPH_INPUT_SETS
    losses = [loss for _, loss, _ in graphed.captures]
    assert not any(loss.requires_grad for loss in [before.loss, *losses])
    # The test can fail: a loss that is kept with its graph is seen.
    loss = marked(*sets[0])
    assert kept(sets) == 4
    del loss


def test_our_eager_backend_leaves_the_largest_batches_to_others() -> None:
    CUDA = torch.device("cuda")
    small, large = (Problem(B, 8, torch.float32) for B in (contenders.EAGER_MAX_BATCH, contenders.EAGER_MAX_BATCH + 1))
    assert "eager" in contenders.backends_to_time(small, CPU)
    assert "eager" not in contenders.backends_to_time(large, CPU) or contenders.backends_to_time(large, CPU) == [
        "eager"
    ]
    assert "eager" in contenders.backends_to_time(large, CPU, ["ours (eager)"])
    assert contenders.backends_to_time(large, CUDA)  # where it is the only one, it runs
