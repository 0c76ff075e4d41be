"""The operator and its derivative: the only file that knows torch.library and autograd.

One opaque operator forms the loss and the wanted gradients together. Its derivative is an autograd Function, which
keeps the accumulators of the gradients; backward only scales them by the upstream gradient. Whoever meets the operator,
in a traced or exported graph too, can differentiate its loss, once.

Where no one is there to see a difference, the call goes round the dispatcher: straight to what is behind the operator.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from siglip_kernels import backends, dispatch, distributed, schedule
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
    " str groups, str algorithm, ScalarType? text_gradient_dtype, bool same_upstream,"
    " bool dx, bool dy, bool dscale, bool dbias, bool stats, Tensor? upstream"
)
_RETURNS = "(Tensor loss, Tensor scalars, Tensor dx, Tensor dy, Tensor stats)"
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
_library.define(f"sigmoid_loss({_ARGUMENTS}) -> {_RETURNS}", tags=(torch.Tag.pt2_compliant_tag,))
# The same between ranks, as a compiled graph has it. It claims to write ``order``, so that no compiler drops an
# exchange, merges two, or runs them in another order than the program's, which is that of the other ranks.
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
_library.define(f"exchange({_ARGUMENTS}, Tensor(a!) order) -> {_RETURNS}", tags=tuple(_TAGS))
# Hands a gradient on in a compiled backward, which so keeps an argument that requires grad: by one AOTAutograd knows
# that a second derivative is asked for, and refuses it.
_library.define("first_derivative(Tensor gradient, Tensor argument) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
ORDER = torch.zeros((), dtype=torch.float32, device="cpu")
GROUPS = 14  # their place among the arguments
FLAGS = slice(18, 23)  # the places of dx to stats
# Of the tensors among the arguments: what the public function calls them, and where they are.
NAMES = (
    *("image_features", "text_features", "logit_scale", "logit_bias"),
    *("image_ids", "text_ids", "image_weights", "text_weights"),
)
DIFFERENTIABLE, LABELS = slice(0, 4), slice(5, 9)
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
    groups: str,
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
    """What is behind the operator, for ordinary tensors."""
    if image_ids is None and image_weights is None and text_weights is None:
        pairs = diagonal(positive_offset)
    else:
        labels = positive_offset, image_ids, text_ids, image_weights, text_weights
        pairs = PairSpec(*labels, ignore_ids, multi_positive, anchors)
    wanted = Wanted(dx, dy, dscale, dbias, stats)
    plain = not (ignore_ids or multi_positive or stats)
    problem = Problem(x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device, wanted.dz, plain)
    if not groups:
        kernel = backends.choose(backend, problem)
    else:
        route = Route(groups, algorithm, text_gradient_dtype, same_upstream)
        with refusing(route.process_groups()):
            kernel = backends.choose(backend, problem)
    # The products inside choose their own precision; autocast must not touch them.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        call = kernel, x, y, scale, bias, pairs, reduction, wanted
        result = distributed.run(*call, route, upstream) if groups else schedule.run(*call)
    return result.loss, result.scalars, result.dx, result.dy, result.stats


def _operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same for what the dispatcher hands on; stats are empty where none are wanted, for it returns tensors."""
    tensors = _tensors((x, *arguments))
    if not all(t is None or dispatch.may_be_read(t) for t in tensors):
        raise TypeError("sigmoid_loss got a tensor without memory of its own, which the tensor's class did not unwrap")
    if x.device.type in dispatch.DEVICES:
        dispatch.check_memory(NAMES, tensors)
    loss, scalars, dx, dy, stats = _sigmoid_loss(x, *arguments)
    return loss, scalars, dx, dy, _stats_of(x, 0) if stats is None else stats


def _is_direct(call: tuple[Any, ...]) -> bool:
    """Whether nothing but the kernels has to see this call; ValueError where the memory of a tensor is not there."""
    if not dispatch.has_no_mode():
        return False
    tensors = _tensors(call)
    if not dispatch.are_ordinary(tensors, call[0].device.type):
        return False
    dispatch.check_memory(NAMES, tensors)
    return True


def _tensors(call: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Those among the arguments, as NAMES has them."""
    return call[DIFFERENTIABLE] + call[LABELS]


def _stats_of(x: Tensor, size: int) -> Tensor:
    return x.new_empty((size,), dtype=schedule.sum_dtype(x.device))


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


class _SigmoidLoss(torch.autograd.Function):
    """The loss, differentiable in x, y, scale and bias; or (loss, stats) where those are wanted.

    ``rest``: as the operator's up to ``dx``, in one: each argument costs. ``run``: the operator, or what is behind it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        wanted: Wanted,
        run: Callable[..., _Outputs],
    ) -> Any:
        loss, scalars, dx, dy, stats = run(x, y, scale, bias, *rest, *wanted, None)
        outputs: Any = loss
        if wanted.stats:
            ctx.mark_non_differentiable(stats)
            outputs = loss, stats
        ctx.wanted, ctx.run = wanted, run
        ctx.dtype, ctx.scale, ctx.bias = x.dtype, _like(scale), None if bias is None else _like(bias)
        same_upstream = rest[-1]
        if same_upstream or not wanted.dy:
            argument = None if run is _sigmoid_loss else _first_wanted((scale, bias, x, y), wanted)
            ctx.save_for_backward(scalars, dx, dy, argument)
            return outputs
        # dy is still to be formed: backward calls again.
        call = x, y, scale, bias, *rest
        ctx.tensors = [i for i, t in enumerate(call) if isinstance(t, Tensor)]
        ctx.others = [None if i in ctx.tensors else t for i, t in enumerate(call)]
        ctx.save_for_backward(scalars, dx, dy, None, *(call[i] for i in ctx.tensors))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_of_stats: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sigmoid_loss cannot be differentiated twice: call backward or torch.autograd.grad without create_graph"
            )
        scalars, dx, dy, argument, *tensors = ctx.saved_tensors
        if argument is not None:
            grad = torch.ops.siglip_kernels.first_derivative(grad, argument)
        _, dscale, dbias, gain = (scalars * grad).unbind()
        y_gain = gain
        if tensors:
            _refuse_transforms()
            call = [*ctx.others]
            for i, t in zip(ctx.tensors, tensors, strict=True):
                call[i] = t
            dy = ctx.run(*call, *Wanted(False, True, False, False), grad)[3]
            y_gain = torch.ones_like(gain)  # the upstream gradient is in dy, each rank's own
        in_place = (
            ctx.run is _sigmoid_loss and dispatch.has_no_mode() and dispatch.are_ordinary((grad,), grad.device.type)
        )
        rounded, overwrite = scaled if in_place else _scaled_anywhere, in_place and _is_last_backward(dx)
        return (
            rounded(dx, gain, ctx.dtype, overwrite) if ctx.wanted.dx else None,
            rounded(dy, y_gain, ctx.dtype, overwrite) if ctx.wanted.dy else None,
            _shaped(dscale, *ctx.scale) if ctx.wanted.dscale else None,
            _shaped(dbias, *ctx.bias) if ctx.wanted.dbias else None,
            None,
            None,
            None,
        )


def differentiable(stats: bool, *call: Any) -> Any:
    """The loss, with those gradients to come that autograd will ask for; ``call`` as the operator's up to ``dx``.

    With ``stats``: (loss, stats [8]).
    """
    if not _is_direct(call):
        _refuse_transforms(call)
        run: Callable[..., Any] = _dispatched(call)
        wanted = _NOTHING
        # What is recorded above autograd must have the gradients in it, or they would be taken for constants.
        if not torch.compiler.is_compiling() and dispatch.is_traced_before_dispatch():
            wanted = _asked_by_autograd(call)
    else:
        run, wanted = _sigmoid_loss, _asked_by_autograd(call)
    if stats:
        wanted = wanted._replace(stats=True)
    if wanted.any:
        return _SigmoidLoss.apply(*call[:4], call[4:], wanted, run)
    loss, _, _, _, totals = run(*call, *wanted, None)
    return (loss, totals) if stats else loss


def loss_and_grads(
    call: tuple[Any, ...], x_dtype: torch.dtype, y_dtype: torch.dtype, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, dx, dy, dscale, dbias, stats [8]) outside autograd, for what ``differentiable`` takes.

    No dbias without a bias, no stats where they are not wanted.
    """
    _refuse_transforms()
    x, y, scale, bias, *rest = (t.detach() if isinstance(t, Tensor) else t for t in call)
    rest[-1] = True  # there is no upstream gradient that could differ
    call = x, y, scale, bias, *rest
    direct = _is_direct(call)
    run: Callable[..., Any] = _sigmoid_loss if direct else _dispatched(call)
    loss, scalars, dx, dy, totals = run(*call, True, True, True, bias is not None, stats, None)
    _, dscale, dbias, gain = scalars.unbind()
    rounded = scaled if direct else _scaled_anywhere
    return (
        loss,
        rounded(dx, gain, x_dtype, direct),
        rounded(dy, gain, y_dtype, direct),
        _shaped(dscale, *_like(scale)),
        None if bias is None else _shaped(dbias, *_like(bias)),
        totals if stats else None,
    )


def _dispatched(call: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator for the call, as a compiler, a mode or a tensor's own class is to see it."""
    if torch.compiler.is_compiling() and call[GROUPS]:
        return lambda *arguments: torch.ops.siglip_kernels.exchange(*arguments, ORDER)
    return torch.ops.siglip_kernels.sigmoid_loss


_NOTHING = Wanted(False, False, False, False)


def _asked_by_autograd(call: tuple[Any, ...]) -> Wanted:
    if not torch.is_grad_enabled():
        return _NOTHING
    x, y, scale, bias = call[DIFFERENTIABLE]
    dbias = bias is not None and bias.requires_grad
    return Wanted(x.requires_grad, y.requires_grad, scale.requires_grad, dbias)


def _first_wanted(arguments: tuple[Tensor | None, ...], wanted: Wanted) -> Tensor | None:
    """The first of scale, bias, x and y whose gradient is."""
    flags = wanted.dscale, wanted.dbias, wanted.dx, wanted.dy
    return next(t for t, is_wanted in zip(arguments, flags, strict=True) if is_wanted)


def _derivative(operator: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator as autograd meets it: with the gradients that it will ask for, and a loss that has a derivative."""
    order, call = arguments[FLAGS.stop + 1 :], arguments[: FLAGS.stop]
    _refuse_transforms(call)
    wanted = _asked_by_autograd(call)
    if not wanted.any:
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
    x, y, scale, bias, *rest = call[: FLAGS.start]
    if any(call[FLAGS][:-1]):
        raise RuntimeError(
            "sigmoid_loss is in a graph that was traced with its gradients, and cannot be differentiated twice: run "
            "the graph under no_grad, or trace the loss alone"
        )
    if y is x:
        y = y.view_as(y)  # one tensor as both arguments gets half its gradient under torch.compile (pytorch#183604)
    wanted = wanted._replace(stats=call[FLAGS][-1])
    outputs = _SigmoidLoss.apply(x, y, scale, bias, tuple(rest), wanted, lambda *again: operator(*again, *order))
    loss, stats = outputs if wanted.stats else (outputs, _stats_of(x, 0))
    # Of the gradients nothing was asked for.
    none = x.new_empty((0, x.shape[1]), dtype=loss.dtype)
    return loss, x.new_full((4,), math.nan, dtype=loss.dtype), none, none.clone(), stats


def _refuse_transforms(call: tuple[Any, ...] = ()) -> None:
    """RuntimeError under a transform of torch.func, NotImplementedError where an argument has a tangent."""
    if torch.compiler.is_dynamo_compiling():  # the operator refuses, in the graph
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("sigmoid_loss does not run under torch.func transforms (vmap, grad, vjp, jvp, jacrev, …)")
    if forward_ad._current_level < 0:
        return
    for t in call:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "sigmoid_loss has no forward-mode derivative: use backward or torch.autograd.grad"
            )


def _no_batching_rule(*_: Any) -> Any:
    raise RuntimeError("sigmoid_loss does not run under torch.vmap")


def _first_derivative(gradient: Tensor, argument: Tensor) -> Tensor:
    return gradient.clone()


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it is: under torch.compile, after a graph break, Dynamo would trace into it."""
    disabled = torch._disable_dynamo(function)  # its first call imports Dynamo
    return lambda *arguments: (disabled if "torch._dynamo" in sys.modules else function)(*arguments)


_library.impl("sigmoid_loss", _untraced(_operator), "CompositeExplicitAutograd")
_library.impl("exchange", _untraced(lambda *arguments: _operator(*arguments[:-1])), "CompositeExplicitAutograd")
_library.impl("first_derivative", _first_derivative, "CompositeExplicitAutograd")
torch.library.register_fake("siglip_kernels::first_derivative", _first_derivative, lib=_library)
for _name in ("sigmoid_loss", "exchange"):
    _overload = getattr(torch.ops.siglip_kernels, _name).default
    _library.impl(_name, _untraced(partial(_derivative, _overload)), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"siglip_kernels::{_name}", _no_batching_rule, lib=_library)


def _is_last_backward(saved: Tensor) -> bool:
    """Whether nobody will read what forward saved again, asked inside a backward: the graph is not kept.

    A captured backward may be replayed.
    """
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if is_kept is None or is_kept():
        return False
    return not (saved.is_cuda and torch.cuda.is_current_stream_capturing())


def scaled(accumulator: Tensor, gain: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """``gain * accumulator`` in ``dtype``, rounded once and without a temporary of the accumulator's dtype.

    ``overwrite``: the accumulator is not needed any more, and becomes the result where it has its dtype.
    """
    if accumulator.dtype is dtype:
        # Detached, it is a tensor that nobody else holds: autograd takes it for .grad, where it would copy another.
        return accumulator.mul_(gain).detach() if overwrite else accumulator * gain
    out = accumulator.new_empty(accumulator.shape, dtype=dtype)
    # The CPU rounds by way of a temporary after all: a piece at a time.
    rows = max(1, CPU_PIECE // max(1, out.shape[1]) if out.device.type == "cpu" else len(out))
    in_place = overwrite and out.device.type == "cpu"  # without that temporary
    for piece, rounded in zip(accumulator.split(rows), out.split(rows), strict=True):
        if in_place:
            rounded.copy_(piece.mul_(gain))
        else:
            torch.mul(piece, gain, out=rounded)
    return out


def _scaled_anywhere(accumulator: Tensor, gain: Tensor, dtype: torch.dtype, _overwrite: bool) -> Tensor:
    """The same for any kind of tensor: a traced or a batched one is not written to."""
    return (accumulator * gain).to(dtype)


def _like(t: Tensor) -> tuple[torch.dtype, torch.Size]:
    return t.dtype, t.shape


def _shaped(value: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A copy of the scalar, so that no gradient is a view of another."""
    copy = value.clone() if value.dtype is dtype else value.to(dtype)
    return copy.reshape(shape) if shape else copy
