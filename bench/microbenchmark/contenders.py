"""What is timed: the floor, our backends and the baselines, each as a training step over the same inputs."""

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

from bench.microbenchmark.problems import FORWARD, FROZEN, FULL, GEMMS, Problem
from siglip_kernels import backends, sigmoid_loss
from siglip_kernels.backends.base import Problem as BackendProblem
from siglip_kernels.loss import Backend
from siglip_kernels.testing import Inputs, make_inputs

Loss = Callable[..., Tensor]
CUDA_GRAPH_MAX_BATCH = 4096  # up to here launches rather than GEMMs may dominate
CUDA_GRAPH_INPUT_SETS = 4  # each captured as a graph of its own
EAGER_MAX_BATCH = 32_768  # above, our eager backend would use up the time of the others
CHUNK_SIZE = 1024  # images in a chunk of open_clip's chunked loss
FLOOR_LOGIT_BYTES = 2**33  # of logits that the floor holds at once; it splits larger problems into panels of images


def eager_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one process: logits, ±1 labels, -logsigmoid, over the batch size."""
    logits = scale * x @ y.T  # scales x, not the logits
    logits += bias
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def chunked_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's ``chunk_size``: every pair of a chunk of images as a negative, then the positives' correction.

    softplus(-z) = softplus(z) - z, so it needs no labels. Autograd still saves the logits of every chunk.
    """
    total = torch.zeros((), device=x.device)
    for start in range(0, len(x), CHUNK_SIZE):
        logits = scale * x[start : start + CHUNK_SIZE] @ y.T
        logits += bias
        total = total + (F.softplus(logits).sum() - logits.diagonal(start).sum())
    return total / len(x)


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Loss | None  # None: the floor, the library's GEMMs alone
    ours: bool = False
    cuda_graph: bool = False  # captured once as a CUDA graph, then replayed

    def make_step(self, problem: Problem, input_sets: list[Inputs]) -> Step | GemmFloor:
        if self.loss is None:
            return GemmFloor(problem, input_sets)
        return (CudaGraphStep if self.cuda_graph else Step)(self.loss, problem, input_sets)


def backends_to_time(problem: Problem, device: torch.device, names: Sequence[str] | None = None) -> list[str]:
    """The backends to time here: those that "auto" may choose, and those that ``names`` has in full."""
    call = problem.for_backend(device)
    found = [
        name
        for name in backends.BACKENDS
        if is_selected(name, call, names) and not backends.why_not_prepared(name, call)
    ]
    if problem.B > EAGER_MAX_BATCH and len(found) > 1 and "ours (eager)" not in (names or ()):
        found.remove("eager")
    return found


def is_selected(backend: str, call: BackendProblem, names: Sequence[str] | None) -> bool:
    """Whether "auto" may choose the backend, or ``names`` has it in full: "ours (cuda)"."""
    return backends.BACKENDS[backend].is_automatic(call) or f"ours ({backend})" in (names or ())


def contenders_for(problem: Problem, device: torch.device, names: list[str] | None = None) -> list[Contender]:
    """Those that run here, the floor first, then ours; ``names`` selects among all but the floor."""
    found = [
        Contender(f"ours ({name})", partial(sigmoid_loss, backend=cast(Backend, name)), ours=True)
        for name in backends_to_time(problem, device, names)
    ]
    found += [
        Contender("eager", eager_loss),
        Contender("torch.compile", torch.compile(eager_loss, dynamic=False)),
        Contender(f"chunk_size={CHUNK_SIZE}", chunked_loss),
    ]
    if device.type == "cuda":
        found.append(Contender("siglip-kernel", siglip_kernel_package))
    if device.type == "cuda" and problem.B <= CUDA_GRAPH_MAX_BATCH:
        eager_and_compiled = [c for c in found if c.ours or c.loss is eager_loss or c.name == "torch.compile"]
        found += [replace(c, name=f"{c.name}, graph", cuda_graph=True, ours=False) for c in eager_and_compiled]
    chosen = [c for c in found if names is None or c.name in names or c.name.split(" ")[0] in names]
    return [Contender("floor", None), *chosen]


def siglip_kernel_package(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of the PyPI package siglip-kernel, which takes log(scale); ImportError where it is not installed."""
    loss: Loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return loss(x, y, scale.log(), bias)


def make_input_sets(problem: Problem, device: torch.device) -> list[Inputs]:
    """Inputs with the requires_grad flags of the mode; on a GPU enough copies to fill its L2 cache twice."""
    inputs = make_inputs(problem.B, problem.B, problem.D, problem.dtype, device=device, drawn_on=device)
    sets = 1
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in inputs)
        sets = min(64, 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    requires_grad = {FULL: (True,) * 4, FROZEN: (False, True, True, True), FORWARD: (False,) * 4}[problem.mode]
    copies = [inputs, *(Inputs(*(t.clone() for t in inputs)) for _ in range(sets - 1))]
    return [Inputs(*(t.requires_grad_(flag) for t, flag in zip(copy, requires_grad, strict=True))) for copy in copies]


def clear_grads(input_sets: list[Inputs]) -> None:
    """Set every gradient to None."""
    for leaves in input_sets:
        for leaf in leaves:
            leaf.grad = None


class Step:
    """Forward and backward of a loss: ``reset``, call, then read ``loss`` and the gradients of ``leaves``."""

    def __init__(self, loss: Loss, problem: Problem, input_sets: list[Inputs]) -> None:
        self.loss_fn, self.forward_only, self.input_sets = loss, problem.mode == FORWARD, input_sets
        self.leaves, self.current, self.num_sets = input_sets[0], 0, len(input_sets)
        self.loss = torch.empty(0)

    def reset(self) -> None:
        """Clear the results of the last step on these inputs, of any contender; go to the next set."""
        self.loss = torch.empty(0)
        clear_grads(self.input_sets)
        self.current = (self.current + 1) % self.num_sets
        self.leaves = self.input_sets[self.current]

    def __call__(self) -> None:
        with torch.set_grad_enabled(not self.forward_only):
            loss = self.loss_fn(*self.leaves)
            if not self.forward_only:
                loss.backward()
        # Detached, or its graph would keep the leaves' AccumulateGrad nodes alive. They run on the stream of their
        # first backward, and a backward under capture that has to wait for that stream fails.
        self.loss = loss.detach()

    @property
    def grad_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if leaf.requires_grad)


class CudaGraphStep(Step):
    """The step as CUDA graphs, one for each of a few sets of inputs, in one memory pool."""

    def __init__(self, loss: Loss, problem: Problem, input_sets: list[Inputs]) -> None:
        super().__init__(loss, problem, input_sets)
        self.num_sets = min(CUDA_GRAPH_INPUT_SETS, len(input_sets))
        self.captures: list[tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor | None]]] = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.reset()
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self.current, pool = self.num_sets - 1, None
        for _ in range(self.num_sets):
            self.reset()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                super().__call__()
            pool = graph.pool()
            self.captures.append((graph, self.loss, [leaf.grad for leaf in self.leaves]))
        self.reset()

    def __call__(self) -> None:
        graph, self.loss, grads = self.captures[self.current]
        graph.replay()
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad


class GemmFloor:
    """The GEMMs that the mode needs, into preallocated outputs: x·yᵀ, then dzᵀ·x, then dz·y."""

    def __init__(self, problem: Problem, input_sets: list[Inputs]) -> None:
        self.gemms, self.input_sets, self.current = GEMMS[problem.mode], input_sets, -1
        self.reset()

    def reset(self) -> None:
        """Go to the next set, and allocate the buffers if they were freed."""
        self.current = (self.current + 1) % len(self.input_sets)
        if hasattr(self, "z"):
            return
        x, y, scale, bias = (t.detach() for t in self.input_sets[0])
        self.panel_rows = max(1, min(len(x), FLOOR_LOGIT_BYTES // (len(y) * x.element_size())))
        self.z = x.new_empty(self.panel_rows, len(y))
        # The dz of the negatives: on a GPU the speed of a GEMM depends on its values.
        torch.mm(x[: self.panel_rows], y.T, out=self.z)
        self.dz = torch.empty_like(self.z) if self.gemms > 1 else self.z
        torch.sigmoid(self.z.mul_(scale).add_(bias), out=self.dz)
        self.dx = torch.empty_like(x) if self.gemms > 2 else x
        self.dy = torch.empty_like(y) if self.gemms > 1 else y

    def free_buffers(self) -> None:
        """Free the buffers, up to 17 GB, for the other contenders."""
        for name in ("z", "dz", "dx", "dy"):
            self.__dict__.pop(name, None)

    @torch.no_grad()
    def __call__(self) -> None:
        x, y = self.input_sets[self.current][:2]
        for start in range(0, len(x), self.panel_rows):
            part = x[start : start + self.panel_rows]
            z, dz = self.z[: len(part)], self.dz[: len(part)]
            torch.mm(part, y.T, out=z)
            if self.gemms > 1:
                torch.addmm(self.dy, dz.T, part, beta=int(start > 0), out=self.dy)
            if self.gemms > 2:
                torch.mm(dz, y, out=self.dx[start : start + self.panel_rows])
