"""``kernels benchmark``: the loss and every gradient, beside eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor


class SigmoidLossBenchmark(Benchmark):
    """``out`` is the gradient of the image features: of a sum, since that of a mean is below what `kernels` allows."""

    seed = 0

    def setup_small(self) -> None:
        self._draw(512 if self.device == "cpu" else 4096)

    def setup_large(self) -> None:
        self._draw(2048 if self.device == "cpu" else 16384)

    def benchmark_small(self) -> None:
        self._run()

    def benchmark_large(self) -> None:
        self._run()

    def verify_small(self) -> Tensor:
        return self._eager()

    def verify_large(self) -> Tensor:
        return self._eager()

    def _draw(self, B: int) -> None:
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        x, y = (F.normalize(torch.randn(B, 768, dtype=torch.float32, device=self.device)) for _ in range(2))
        self.x, self.y = (t.to(dtype).requires_grad_() for t in (x, y))
        self.scale, self.bias = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (10.0, -10.0))

    def _run(self) -> None:
        loss = self.kernel.sigmoid_loss(self.x, self.y, self.scale, self.bias, reduction="sum")
        self.out = self._differentiated(loss)

    def _eager(self) -> Tensor:
        logits = self.x @ self.y.T * self.scale + self.bias
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return self._differentiated(-F.logsigmoid(signs * logits).sum())

    def _differentiated(self, loss: Tensor) -> Tensor:
        dx, _ = torch.autograd.grad(loss, (self.x, self.y))
        return dx
