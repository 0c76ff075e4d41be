"""Who is measured: the floor, ours by backend, and the rivals, each as a step to be timed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.microbenchmark.problems import FORWARD, FROZEN, FULL, PRODUCTS, Problem
from siglip_kernels import backends, sigmoid_loss
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.loss import Backend
from siglip_kernels.testing import Inputs, make_inputs

Loss = Callable[..., Tensor]
GRAPHS_UP_TO = 4096  # a batch at which launches, not products, may take the time
GRAPHED_SETS = 4  # of inputs, each with a capture of its own
EAGER_UP_TO = 32_768  # a batch beyond which our eager backend would take the time of the others
CHUNK = 1024  # images a chunk in open_clip's chunked form
FLOOR_BYTES = 2**33  # of logits that the floor holds at once; larger problems go by panels of images


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one process: logits, ±1 labels, -logsigmoid, over the batch size."""
    logits = scale * x @ y.T  # the scale meets x, not the logits
    logits += bias
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def chunked(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's ``chunk_size``: every pair of a chunk of images as a negative, then the positives' correction.

    softplus(-z) = softplus(z) - z, so it needs no labels; autograd keeps the logits of every chunk all the same.
    """
    total = torch.zeros((), device=x.device)
    for start in range(0, len(x), CHUNK):
        logits = scale * x[start : start + CHUNK] @ y.T
        logits += bias
        total = total + (F.softplus(logits).sum() - logits.diagonal(start).sum())
    return total / len(x)


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Loss | None  # None: the floor, the library's products alone
    ours: bool = False
    graph: bool = False  # captured once as a CUDA graph, then replayed

    def step(self, problem: Problem, sets: list[Inputs]) -> Step | Floor:
        if self.loss is None:
            return Floor(problem, sets)
        return (Graphed if self.graph else Step)(self.loss, problem, sets)


def ours(problem: Problem, device: torch.device, names: Sequence[str] | None = None) -> list[str]:
    """The backends that are worth timing here: those that "auto" may take, and those that ``names`` has in full."""
    call = problem.call(device)
    found = [
        name for name in backends.BACKENDS if is_asked_for(name, call, names) and not backends.unprepared(name, call)
    ]
    if problem.B > EAGER_UP_TO and len(found) > 1 and "ours (eager)" not in (names or ()):
        found.remove("eager")
    return found


def is_asked_for(backend: str, call: Call, names: Sequence[str] | None) -> bool:
    """Whether "auto" may take the backend, or ``names`` has it in full: "ours (cuda)"."""
    return backends.BACKENDS[backend].automatic(call) or f"ours ({backend})" in (names or ())


def contenders(problem: Problem, device: torch.device, names: list[str] | None = None) -> list[Contender]:
    """Those that run here, the floor first, ours next; ``names`` selects among all but the floor."""
    entrants = [
        Contender(f"ours ({name})", partial(sigmoid_loss, backend=cast(Backend, name)), ours=True)
        for name in ours(problem, device, names)
    ]
    entrants += [
        Contender("eager", eager),
        Contender("torch.compile", torch.compile(eager, dynamic=False)),
        Contender(f"chunk_size={CHUNK}", chunked),
    ]
    if device.type == "cuda":
        entrants.append(Contender("siglip-kernel", _siglip_kernel))
    if device.type == "cuda" and problem.B <= GRAPHS_UP_TO:
        eager_and_compiled = [c for c in entrants if c.ours or c.loss is eager or c.name == "torch.compile"]
        entrants += [replace(c, name=f"{c.name}, graph", graph=True, ours=False) for c in eager_and_compiled]
    chosen = [c for c in entrants if names is None or c.name in names or c.name.split(" ")[0] in names]
    return [Contender("floor", None), *chosen]


def _siglip_kernel(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The PyPI package of that name, which takes the scale's logarithm; ImportError where it is not installed."""
    loss: Loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return loss(x, y, scale.log(), bias)


def input_sets(problem: Problem, device: torch.device) -> list[Inputs]:
    """The inputs with the requires-grad flags of the mode; on a GPU enough copies to outgrow its L2 cache twice."""
    inputs = make_inputs(problem.B, problem.B, problem.D, problem.dtype, device=device, drawn_on=device)
    sets = 1
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in inputs)
        sets = min(64, 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    wanted = {FULL: (True,) * 4, FROZEN: (False, True, True, True), FORWARD: (False,) * 4}[problem.mode]
    copies = [inputs, *(Inputs(*(t.clone() for t in inputs)) for _ in range(sets - 1))]
    return [Inputs(*(t.requires_grad_(w) for t, w in zip(copy, wanted, strict=True))) for copy in copies]


def forget(sets: list[Inputs]) -> None:
    """Drop the gradients."""
    for leaves in sets:
        for leaf in leaves:
            leaf.grad = None


class Step:
    """One training step's worth of a loss: ``forget``, call, then read ``loss`` and the gradients of ``leaves``."""

    def __init__(self, loss: Loss, problem: Problem, sets: list[Inputs]) -> None:
        self.loss_fn, self.forward_only, self.sets = loss, problem.mode == FORWARD, sets
        self.leaves, self.turn, self.turns = sets[0], 0, len(sets)
        self.loss = torch.empty(0)

    def forget(self) -> None:
        """Drop the last run's results, of whichever step over these inputs, and turn to the next set."""
        self.loss = torch.empty(0)
        forget(self.sets)
        self.turn = (self.turn + 1) % self.turns
        self.leaves = self.sets[self.turn]

    def __call__(self) -> None:
        with torch.set_grad_enabled(not self.forward_only):
            loss = self.loss_fn(*self.leaves)
            if not self.forward_only:
                loss.backward()
        # Its graph must not be kept: it holds the leaves' AccumulateGrad nodes, which run on the stream that first met
        # them, and a backward under capture that has to wait for that stream fails.
        self.loss = loss.detach()

    @property
    def grad_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if leaf.requires_grad)


class Graphed(Step):
    """The step captured as a CUDA graph for each of a few sets of inputs, its memory shared among them."""

    def __init__(self, loss: Loss, problem: Problem, sets: list[Inputs]) -> None:
        super().__init__(loss, problem, sets)
        self.turns = min(GRAPHED_SETS, len(sets))
        self.captured: list[tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]] = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forget()
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self.turn, pool = self.turns - 1, None
        for _ in range(self.turns):
            self.forget()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                super().__call__()
            pool = graph.pool()
            self.captured.append((graph, self.loss, [leaf.grad for leaf in self.leaves]))
        self.forget()

    def __call__(self) -> None:
        graph, self.loss, grads = self.captured[self.turn]
        graph.replay()
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad


class Floor:
    """The products that the mode cannot do without, into outputs allocated before: x·yᵀ, then dzᵀ·x, then dz·y."""

    def __init__(self, problem: Problem, sets: list[Inputs]) -> None:
        self.products, self.sets, self.turn = PRODUCTS[problem.mode], sets, -1
        self.forget()

    def forget(self) -> None:
        """Turn to the next set, and take the buffers where they were released."""
        self.turn = (self.turn + 1) % len(self.sets)
        if hasattr(self, "z"):
            return
        x, y, scale, bias = (t.detach() for t in self.sets[0])
        self.rows = max(1, min(len(x), FLOOR_BYTES // (len(y) * x.element_size())))
        self.z = x.new_empty(self.rows, len(y))
        # The dz of the negatives: on a GPU the speed of a product depends on the numbers in it.
        torch.mm(x[: self.rows], y.T, out=self.z)
        self.dz = torch.empty_like(self.z) if self.products > 1 else self.z
        torch.sigmoid(self.z.mul_(scale).add_(bias), out=self.dz)
        self.dx = torch.empty_like(x) if self.products > 2 else x
        self.dy = torch.empty_like(y) if self.products > 1 else y

    def release(self) -> None:
        """Give the buffers back, up to 17 GB: a rival may need the room."""
        for name in ("z", "dz", "dx", "dy"):
            self.__dict__.pop(name, None)

    @torch.no_grad()
    def __call__(self) -> None:
        x, y = self.sets[self.turn][:2]
        for start in range(0, len(x), self.rows):
            part = x[start : start + self.rows]
            z, dz = self.z[: len(part)], self.dz[: len(part)]
            torch.mm(part, y.T, out=z)
            if self.products > 1:
                torch.addmm(self.dy, dz.T, part, beta=int(start > 0), out=self.dy)
            if self.products > 2:
                torch.mm(dz, y, out=self.dx[start : start + self.rows])
