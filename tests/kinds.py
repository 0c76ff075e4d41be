"""Tensors that are not plain, with the same values; and a default dtype that is not float32, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """A tensor without memory of its own, as torchao's and DTensor are: it unwraps what it is given."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, Wrapper) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


class Named(Tensor):
    """A subclass that changes nothing."""


def _imaginary(t: Tensor) -> Tensor:
    """Lazily negated, by public functions alone where there are complex numbers of the dtype."""
    if t.dtype in (torch.float16, torch.bfloat16):
        return torch._neg_view(-t)
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _apart(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, from an offset on; the others are huge."""
    spread = torch.full((*t.shape, 2), 99, dtype=t.dtype)
    spread[..., 1] = t
    return spread[..., 1]


def _from_the_end(t: Tensor) -> Tensor:
    """Behind as many other elements."""
    return torch.cat([torch.full_like(t, 77).flatten(), t.flatten()])[t.numel() :].view_as(t)


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "negated": lambda t: torch._neg_view(-t),
    "conjugate's imaginary part": _imaginary,
    "wrapper subclass": Wrapper,
    "subclass": lambda t: t.as_subclass(Named),
    "spread out": _apart,
    "from the end of a buffer": _from_the_end,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "inference": _inference,
    "functional": torch._to_functional_tensor,
    "made by from_dlpack": lambda t: torch.from_dlpack(t.detach()),
}
ONLY_FLOATING = ("negated", "conjugate's imaginary part")
WITHOUT_GRAD = ("inference", "functional", "made by from_dlpack")


def unwrapped(t: Tensor) -> Tensor:
    """What a functional tensor stands for."""
    return torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
