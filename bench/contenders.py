"""Who is measured: the floor, ours by backend, and the rivals, each as a step to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import FORWARD, FROZEN, FULL, Problem
from siglip_kernels import backends, sigmoid_loss
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.loss import Backend
from siglip_kernels.testing import Inputs, make_inputs

Loss = Callable[..., Tensor]
CHUNK = 1024  # texts a chunk in open_clip's chunked form


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one process: logits, ±1 labels, -logsigmoid, over the batch size."""
    logits = scale.to(x.dtype) * (x @ y.T) + bias.to(x.dtype)
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def chunked(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's ``chunk_size``: texts in chunks, whose logits autograd keeps all the same."""
    total = x.new_zeros(())
    for start in range(0, len(y), CHUNK):
        part = y[start : start + CHUNK]
        logits = scale.to(x.dtype) * (x @ part.T) + bias.to(x.dtype)
        labels = -torch.ones_like(logits)
        labels.diagonal(-start)[: len(part)] = 1
        total = total - F.logsigmoid(labels * logits).sum()
    return total / len(x)


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Loss | None  # None: the floor, the library's products alone
    ours: bool = False


def contenders(problem: Problem, device: torch.device, names: list[str] | None = None) -> list[Contender]:
    """Those that run here, the floor first, ours next; ``names`` selects among all but the floor."""
    call = Call(problem.B, problem.B, problem.D, problem.dtype, device)
    ours = [
        Contender(f"ours ({name})", partial(sigmoid_loss, backend=cast(Backend, name)), ours=True)
        for name, kernel in backends.BACKENDS.items()
        if kernel.automatic(call) and not kernel.why_not(call)
    ]
    rivals = [
        Contender("eager", eager),
        Contender("torch.compile", torch.compile(eager, dynamic=False)),
        Contender(f"chunk_size={CHUNK}", chunked),
        *_siglip_kernel(device),
    ]
    chosen = [c for c in (*ours, *rivals) if names is None or c.name in names or c.name.split(" ")[0] in names]
    return [Contender("floor", None), *chosen]


def _siglip_kernel(device: torch.device) -> list[Contender]:
    """The PyPI package of that name, where it can be imported; it needs a GPU."""
    if device.type != "cuda":
        return []
    try:
        from siglip_kernel import siglip_loss
    except ImportError:
        return []
    return [Contender("siglip-kernel", siglip_loss)]


class Step:
    """One training step's worth of a contender: call it to run, then read ``loss`` and ``leaves``' gradients."""

    def __init__(self, contender: Contender, problem: Problem, device: torch.device) -> None:
        self.contender, self.problem = contender, problem
        inputs = make_inputs(problem.B, problem.B, problem.D, problem.dtype, device=device)
        wanted = {FULL: (True,) * 4, FROZEN: (False, True, True, True), FORWARD: (False,) * 4}[problem.mode]
        self.leaves = Inputs(*(t.requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)))
        self.loss = torch.empty(0)
        self.dz = torch.randn(problem.B, problem.B, device=device).to(problem.dtype) if contender.loss is None else None

    def __call__(self) -> None:
        self.forget()
        if self.contender.loss is None:
            self._products()
        elif self.problem.mode == FORWARD:
            with torch.no_grad():
                self.loss = self.contender.loss(*self.leaves)
        else:
            self.loss = self.contender.loss(*self.leaves)
            self.loss.backward()

    def forget(self) -> None:
        """Drop the last run's results."""
        self.loss = torch.empty(0)
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def grad_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if leaf.requires_grad)

    @torch.no_grad()
    def _products(self) -> None:
        x, y = self.leaves[:2]
        dz = cast(Tensor, self.dz)
        products: list[Any] = [lambda: x @ y.T, lambda: dz.T @ x, lambda: dz @ y]
        for product in products[: {FULL: 3, FROZEN: 2, FORWARD: 1}[self.problem.mode]]:
            product()
