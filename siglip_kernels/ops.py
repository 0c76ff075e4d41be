"""The operator and its derivative: the only file that knows torch.library and autograd.

One opaque operator forms the loss and the wanted gradients together. The autograd Function over it returns the loss and
keeps the accumulators; backward only scales them by the upstream gradient.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from siglip_kernels import backends, distributed, schedule
from siglip_kernels.agreement import refusing
from siglip_kernels.backends.base import Problem
from siglip_kernels.distributed import Route
from siglip_kernels.pairs import PairSpec, diagonal
from siglip_kernels.schedule import Wanted
from siglip_kernels.stats import SIZE

_library = torch.library.Library("siglip_kernels", "DEF")
_ARGUMENTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, SymInt? positive_offset,"
    " Tensor? image_ids, Tensor? text_ids, Tensor? image_weights, Tensor? text_weights,"
    " bool ignore_ids, str? multi_positive, str anchors,"
    " str reduction, str backend,"
    " str[] group_names, str algorithm, ScalarType? text_gradient_dtype, bool same_upstream,"
    " bool dx, bool dy, bool dscale, bool dbias, bool stats, Tensor? upstream"
)
_RETURNS = "(Tensor loss, Tensor scalars, Tensor dx, Tensor dy, Tensor stats)"
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
_library.define(f"sigmoid_loss({_ARGUMENTS}) -> {_RETURNS}", tags=(torch.Tag.pt2_compliant_tag,))
# The same between ranks, as a compiled graph has it. It claims to write ``order``, so that no compiler drops an
# exchange, merges two, or runs them in another order than the program's, which is that of the other ranks.
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
_library.define(f"exchange({_ARGUMENTS}, Tensor(a!) order) -> {_RETURNS}", tags=tuple(_TAGS))
ORDER = torch.zeros((), device="cpu")
GROUP_NAMES = 13  # their place among the arguments after x
CPU_PIECE = 2**19  # elements of a gradient that are rounded at once


def _sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    positive_offset: int | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    image_weights: Tensor | None,
    text_weights: Tensor | None,
    ignore_ids: bool,
    multi_positive: str | None,
    anchors: str,
    reduction: str,
    backend: str,
    group_names: list[str],
    algorithm: str,
    text_gradient_dtype: torch.dtype | None,
    same_upstream: bool,
    dx: bool,
    dy: bool,
    dscale: bool,
    dbias: bool,
    stats: bool,
    upstream: Tensor | None,
) -> _Outputs:
    if image_ids is None and image_weights is None and text_weights is None:
        pairs = diagonal(positive_offset)
    else:
        labels = positive_offset, image_ids, text_ids, image_weights, text_weights
        pairs = PairSpec(*labels, ignore_ids, multi_positive, anchors)
    wanted = Wanted(dx, dy, dscale, dbias, stats)
    plain = not (ignore_ids or multi_positive or stats)
    problem = Problem(x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device, wanted.dz, plain)
    if not group_names:
        kernel = backends.choose(backend, problem)
    else:
        route = Route(tuple(group_names), algorithm, text_gradient_dtype, same_upstream)
        with refusing(route.groups()):
            kernel = backends.choose(backend, problem)
    # The products inside choose their own precision; autocast must not touch them.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        call = kernel, x, y, scale, bias, pairs, reduction, wanted
        result = distributed.run(*call, route, upstream) if group_names else schedule.run(*call)
    return result.loss, result.scalars, result.dx, result.dy, result.stats


def _operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with empty stats where none are wanted, for an operator returns tensors."""
    loss, scalars, dx, dy, stats = _sigmoid_loss(x, *arguments)
    return loss, scalars, dx, dy, _stats_of(x, 0) if stats is None else stats


def _stats_of(x: Tensor, size: int) -> Tensor:
    return x.new_empty((size,), dtype=schedule.sum_dtype(x.device))


_library.impl("sigmoid_loss", _operator, "CompositeExplicitAutograd")
_library.impl("exchange", lambda *arguments: _operator(*arguments[:-1]), "CompositeExplicitAutograd")


@torch.library.register_fake("siglip_kernels::sigmoid_loss", lib=_library)
def _sigmoid_loss_fake(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, same_upstream, dx, dy, _, _, stats, upstream = args
    dy = dy and (same_upstream or upstream is not None)
    dtype = schedule.accumulator_dtype(x.dtype)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty((4,), dtype=dtype),
        x.new_empty((x.shape[0] if dx else 0, x.shape[1]), dtype=dtype),
        x.new_empty((y.shape[0] if dy else 0, y.shape[1]), dtype=dtype),
        _stats_of(x, SIZE if stats else 0),
    )


@torch.library.register_fake("siglip_kernels::exchange", lib=_library)
def _exchange_fake(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _sigmoid_loss_fake(x, y, *args[:-1])


def _call(x: Tensor, *rest: Any) -> _Outputs:
    """The operator; or, where nobody is there to see a difference, what is behind it: the dispatcher takes 15 µs."""
    if torch.compiler.is_compiling() and rest[GROUP_NAMES]:
        return torch.ops.siglip_kernels.exchange(x, *rest, ORDER)
    if type(x) is not Tensor or x.is_meta or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.ops.siglip_kernels.sigmoid_loss(x, *rest)
    return _sigmoid_loss(x, *rest)


class _SigmoidLoss(torch.autograd.Function):
    """Differentiable in x, y, scale and bias. ``rest``: as the operator's up to ``dx``, in one: each argument costs.

    The loss, or (loss, stats) where those are wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, rest: tuple[Any, ...], wanted: Wanted
    ) -> Any:
        loss, scalars, dx, dy, stats = _call(x, y, scale, bias, *rest, *wanted, None)
        outputs: Any = loss
        if wanted.stats:
            ctx.mark_non_differentiable(stats)
            outputs = loss, stats
        ctx.wanted = wanted
        ctx.dtype, ctx.scale, ctx.bias = x.dtype, _like(scale), None if bias is None else _like(bias)
        same_upstream = rest[-1]
        if same_upstream or not wanted.dy:
            ctx.save_for_backward(scalars, dx, dy)
            return outputs
        # dy is still to be formed: backward calls again.
        call = x, y, scale, bias, *rest
        ctx.tensors = [i for i, t in enumerate(call) if isinstance(t, Tensor)]
        ctx.others = [None if i in ctx.tensors else t for i, t in enumerate(call)]
        ctx.save_for_backward(scalars, dx, dy, *(call[i] for i in ctx.tensors))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_of_stats: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "sigmoid_loss cannot be differentiated twice: call backward or torch.autograd.grad without create_graph"
            )
        scalars, dx, dy, *tensors = ctx.saved_tensors
        _, dscale, dbias, gain = (scalars * grad).unbind()
        y_gain = gain
        if tensors:
            call = [*ctx.others]
            for i, t in zip(ctx.tensors, tensors, strict=True):
                call[i] = t
            dy = _call(*call, *Wanted(False, True, False, False), grad)[3]
            y_gain = torch.ones_like(gain)  # the upstream gradient is in dy, each rank's own
        overwrite = _is_last_backward(dx)
        return (
            scaled(dx, gain, ctx.dtype, overwrite) if ctx.wanted.dx else None,
            scaled(dy, y_gain, ctx.dtype, overwrite) if ctx.wanted.dy else None,
            _shaped(dscale, *ctx.scale) if ctx.wanted.dscale else None,
            _shaped(dbias, *ctx.bias) if ctx.wanted.dbias else None,
            None,
            None,
        )


def differentiable(stats: bool, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    """The loss, with those gradients to come that autograd will ask for; ``rest`` as the operator's up to ``dx``.

    With ``stats``: (loss, stats [8]).
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("sigmoid_loss does not run under torch.func transforms (vmap, grad, jvp, …)")
    grad_mode = torch.is_grad_enabled()
    wanted = Wanted(*(grad_mode and t is not None and t.requires_grad for t in (x, y, scale, bias)))
    if stats:
        wanted = wanted._replace(stats=True)
    if not wanted.any:
        outputs = _call(x, y, scale, bias, *rest, *wanted, None)
        return (outputs[0], outputs[4]) if stats else outputs[0]
    if y is x:
        y = y.view_as(y)  # one tensor as both arguments gets half its gradient under torch.compile (pytorch#183604)
    return _SigmoidLoss.apply(x, y, scale, bias, rest, wanted)


def loss_and_grads(
    call: tuple[Any, ...], x_dtype: torch.dtype, y_dtype: torch.dtype, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, dx, dy, dscale, dbias, stats [8]) outside autograd, for what ``differentiable`` takes.

    No dbias without a bias, no stats where they are not wanted.
    """
    x, y, scale, bias, *rest = (t.detach() if isinstance(t, Tensor) else t for t in call)
    rest[-1] = True  # there is no upstream gradient that could differ
    wanted = (True, True, True, bias is not None, stats)
    loss, scalars, dx, dy, totals = _call(x, y, scale, bias, *rest, *wanted, None)
    _, dscale, dbias, gain = scalars.unbind()
    return (
        loss,
        scaled(dx, gain, x_dtype, overwrite=True),
        scaled(dy, gain, y_dtype, overwrite=True),
        _shaped(dscale, *_like(scale)),
        None if bias is None else _shaped(dbias, *_like(bias)),
        totals if stats else None,
    )


def _is_last_backward(saved: Tensor) -> bool:
    """Whether nobody will read what forward saved again, asked inside a backward: the graph is not kept.

    A captured backward may be replayed.
    """
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if torch.compiler.is_compiling() or is_kept is None or is_kept():
        return False
    return not (saved.is_cuda and torch.cuda.is_current_stream_capturing())


def scaled(accumulator: Tensor, gain: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """``gain * accumulator`` in ``dtype``, rounded once and without a temporary of the accumulator's dtype.

    ``overwrite``: the accumulator is not needed any more, and becomes the result where it has its dtype.
    """
    if torch.compiler.is_compiling():
        return (accumulator * gain).to(dtype)
    if accumulator.dtype is dtype:
        # Detached, it is a tensor that nobody else holds: autograd takes it for .grad, where it would copy another.
        return accumulator.mul_(gain).detach() if overwrite else accumulator * gain
    out = accumulator.new_empty(accumulator.shape, dtype=dtype)
    # The CPU rounds by way of a temporary after all: a piece at a time.
    rows = max(1, CPU_PIECE // max(1, out.shape[1]) if out.device.type == "cpu" else len(out))
    for piece, rounded in zip(accumulator.split(rows), out.split(rows), strict=True):
        torch.mul(piece, gain, out=rounded)
    return out


def _like(t: Tensor) -> tuple[torch.dtype, torch.Size]:
    return t.dtype, t.shape


def _shaped(value: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A copy of the scalar, so that no gradient is a view of another."""
    copy = value.clone() if value.dtype is dtype else value.to(dtype)
    return copy.reshape(shape) if shape else copy
