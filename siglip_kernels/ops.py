"""The operator and its derivative: the only file that knows torch.library and autograd.

One opaque operator forms the loss and the gradients together. Its derivative is an autograd Function that keeps the
gradient accumulators; backward only scales them by the upstream gradient. So a loss in a traced or exported graph can
be differentiated too, once.

An operator's schema is flat. Only :func:`_flatten` and :func:`_restore` convert a request to its arguments and back. An
ordinary call of ordinary tensors bypasses the dispatcher and goes straight to :func:`_compute`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from siglip_kernels import backends, dispatch, gradients, schedule
from siglip_kernels._ops import add_op_namespace_prefix, ops
from siglip_kernels.distributed import schedule as distributed_schedule
from siglip_kernels.distributed.handshake import propagate_errors
from siglip_kernels.gradients import LossAndGrads
from siglip_kernels.host_read import is_capturing
from siglip_kernels.pairs import PairSpec
from siglip_kernels.request import NO_GRAD, ExchangeSpec, NeedsGrad, Request
from siglip_kernels.schedule import Result
from siglip_kernels.stats import SIZE
from siglip_kernels.teachers import from_tensors

_library = torch.library.Library(ops.name, "DEF")
_ARGUMENTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, SymInt? positive_offset,"
    " Tensor? image_ids, Tensor? text_ids, Tensor? image_weights, Tensor? text_weights,"
    " bool ignore_ids, str? multi_positive, str anchors, float positive_weight, float label_smoothing,"
    " Tensor[] teacher_tensors, float[] teacher_weights,"
    " str reduction, str backend, bool return_stats, bool by_image,"
    " str group_names, str algorithm, ScalarType? text_gradient_dtype, bool same_upstream,"
    " bool needs_dx, bool needs_dy, bool needs_dscale, bool needs_dbias, Tensor? upstream"
)
_ARGUMENT_NAMES = tuple(argument.split()[-1] for argument in _ARGUMENTS.split(","))
# Those of the same name in PairSpec.
_PAIR_ARGUMENTS = (
    *("positive_offset", "image_ids", "text_ids", "image_weights", "text_weights", "ignore_ids", "multi_positive"),
    *("anchors", "positive_weight", "label_smoothing"),
)
_RETURNS = "(Tensor loss, Tensor scalars, Tensor dx, Tensor dy, Tensor stats)"
_library.define(f"sigmoid_loss({_ARGUMENTS}) -> {_RETURNS}", tags=(torch.Tag.pt2_compliant_tag,))
# The same operator over a process group, for compiled graphs. It declares a write to ``order``, so that no compiler
# drops an exchange, merges two, or reorders them: the order must be the same on all ranks.
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
_library.define(f"exchange(Tensor(a!) order, {_ARGUMENTS}) -> {_RETURNS}", tags=tuple(_TAGS))
# Returns its gradient unchanged in a compiled backward. Its ``argument`` requires grad and so stays an input of that
# backward: from it AOTAutograd sees that a second derivative is requested, and refuses it.
_library.define("first_derivative(Tensor gradient, Tensor argument) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
ORDER = torch.zeros((), dtype=torch.float32, device="cpu")
# Forms the loss and the gradients in needs_grad. The last argument is the upstream gradient, given only in backward.
Compute = Callable[[Request, NeedsGrad, Tensor | None], Result]


def _flatten(request: Request, needs_grad: NeedsGrad, upstream: Tensor | None) -> dict[str, Any]:
    """The operator's arguments, by name."""
    pairs, exchange = request.pairs, request.exchange
    return {
        "x": request.x,
        "y": request.y,
        "scale": request.scale,
        "bias": request.bias,
        **{name: getattr(pairs, name) for name in _PAIR_ARGUMENTS},
        "teacher_tensors": [t for teacher in pairs.teachers for t in teacher[:4]],
        "teacher_weights": [teacher.weight for teacher in pairs.teachers],
        "reduction": request.reduction,
        "backend": request.backend,
        "return_stats": request.return_stats,
        "by_image": request.by_image,
        "group_names": exchange.group_names,
        "algorithm": exchange.algorithm,
        "text_gradient_dtype": exchange.text_gradient_dtype,
        "same_upstream": exchange.same_upstream,
        "needs_dx": needs_grad.x,
        "needs_dy": needs_grad.y,
        "needs_dscale": needs_grad.scale,
        "needs_dbias": needs_grad.bias,
        "upstream": upstream,
    }


def _restore(*arguments: Any) -> tuple[Request, NeedsGrad, Tensor | None]:
    """The arguments of :func:`_flatten`, from the operator's."""
    given = dict(zip(_ARGUMENT_NAMES, arguments, strict=True))
    teachers = from_tensors(given["teacher_tensors"], given["teacher_weights"])
    of_exchange = ("group_names", "algorithm", "text_gradient_dtype", "same_upstream")
    request = Request(
        **{
            name: given[name]
            for name in ("x", "y", "scale", "bias", "reduction", "backend", "return_stats", "by_image")
        },
        pairs=PairSpec(**{name: given[name] for name in _PAIR_ARGUMENTS}, teachers=teachers),
        exchange=ExchangeSpec(**{name: given[name] for name in of_exchange}),
    )
    needs_grad = NeedsGrad(*(given[name] for name in ("needs_dx", "needs_dy", "needs_dscale", "needs_dbias")))
    return request, needs_grad, given["upstream"]


def _compute(request: Request, needs_grad: NeedsGrad, upstream: Tensor | None = None) -> Result:
    """The implementation of the operator, for ordinary tensors."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(request.x.device.type):
        # The GEMMs inside choose their own precision; autocast must not touch them.
        with torch.autocast(request.x.device.type, enabled=False):
            return _compute(request, needs_grad, upstream)
    problem, exchange = schedule.problem_of(request, needs_grad), request.exchange
    if not exchange.group_names:
        kernel = backends.choose(request.backend, problem)
    else:
        with propagate_errors(exchange.process_groups()):
            kernel = backends.choose(request.backend, problem)
    if exchange.group_names:
        return distributed_schedule.run(kernel, problem, request, needs_grad, upstream)
    return schedule.run(kernel, problem, request, needs_grad)


def _operator(*arguments: Any) -> Result:
    """:func:`_compute`, called by the dispatcher. It must return tensors: stats are empty without return_stats."""
    request, needs_grad, upstream = _restore(*arguments)
    x, tensors = request.x, request.tensors()
    if not all(t is None or dispatch.may_be_read(t) for t in tensors):
        raise TypeError("sigmoid_loss got a tensor without memory of its own, which the tensor's class did not unwrap")
    if x.device.type in dispatch.DEVICES:
        dispatch.check_memory(request.tensor_names(), tensors)
    result = _compute(request, needs_grad, upstream)
    return result if result.stats is not None else result._replace(stats=_new_stats(x, 0))


def _is_direct(request: Request) -> bool:
    """Whether only the kernels have to see this call. ValueError if the memory of a tensor is not there."""
    if not dispatch.has_no_mode():
        return False
    tensors = request.tensors()
    if not dispatch.are_ordinary(tensors):
        return False
    dispatch.check_memory(request.tensor_names(), tensors)
    return True


def _new_stats(x: Tensor, size: int) -> Tensor:
    return x.new_empty((size,), dtype=schedule.sum_dtype(x.device))


@torch.library.register_fake(add_op_namespace_prefix("sigmoid_loss"), lib=_library)
def _fake(*arguments: Any) -> Result:
    request, needs_grad, upstream = _restore(*arguments)
    x, y = request.x, request.y
    forms_dy = needs_grad.y and (request.exchange.same_upstream or upstream is not None)
    dtype = schedule.accumulator_dtype(x.dtype)
    return Result(
        loss=x.new_empty((x.shape[0],) if request.by_image else (), dtype=dtype),
        scalars=x.new_empty((4,), dtype=dtype),
        dx=x.new_empty((x.shape[0] if needs_grad.x else 0, x.shape[1]), dtype=dtype),
        dy=x.new_empty((y.shape[0] if forms_dy else 0, y.shape[1]), dtype=dtype),
        stats=_new_stats(x, SIZE if request.return_stats else 0),
    )


@torch.library.register_fake(add_op_namespace_prefix("exchange"), lib=_library)
def _exchange_fake(_order: Tensor, *arguments: Any) -> Result:
    return _fake(*arguments)


class _SigmoidLoss(torch.autograd.Function):
    """The loss, differentiable in the request's x, y, scale and bias. With return_stats: (loss, stats)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        request: Request,
        needs_grad: NeedsGrad,
        compute: Compute,
    ) -> Any:
        loss, scalars, dx, dy, stats = compute(request, needs_grad, None)
        outputs: Any = loss
        if request.return_stats:
            ctx.mark_non_differentiable(stats)
            outputs = loss, stats
        ctx.needs_grad, ctx.compute = needs_grad, compute
        ctx.dtype, ctx.scale, ctx.bias = x.dtype, _like(scale), None if bias is None else _like(bias)
        if request.exchange.same_upstream or not needs_grad.y:
            argument = None if compute is _compute else _first_needed(request, needs_grad)
            ctx.save_for_backward(scalars, dx, dy, argument)
            return outputs
        # dy is not formed yet: backward computes it.
        tensors = request.tensors()
        ctx.request = request.with_tensors([None] * len(tensors))
        ctx.save_for_backward(scalars, dx, dy, None, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_of_stats: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sigmoid_loss cannot be differentiated twice: call backward or torch.autograd.grad without create_graph"
            )
        scalars, dx, dy, argument, *tensors = ctx.saved_tensors
        if argument is not None:
            grad = ops.first_derivative(grad, argument)
        in_place = ctx.compute is _compute and dispatch.has_no_mode() and dispatch.are_ordinary((grad,))
        dscale, dbias, dx_scale = gradients.scaled_scalars(scalars, grad, in_place)
        dy_scale = dx_scale
        if tensors:
            dispatch.refuse_transforms()
            dy = ctx.compute(ctx.request.with_tensors(tensors), NO_GRAD._replace(y=True), grad).dy
            dy_scale = torch.ones_like(dx_scale)  # dy contains each rank's own upstream gradient
        scale = gradients.scaled if in_place else gradients.scaled_out_of_place
        overwrite = in_place and gradients.may_reuse(dx, ctx.dtype) and _is_last_backward(dx)
        needs_grad = ctx.needs_grad
        return (
            scale(dx, dx_scale, ctx.dtype, overwrite) if needs_grad.x else None,
            scale(dy, dy_scale, ctx.dtype, overwrite) if needs_grad.y else None,
            gradients.shaped(dscale, *ctx.scale) if needs_grad.scale else None,
            gradients.shaped(dbias, *ctx.bias) if needs_grad.bias else None,
            *[None] * 3,  # of the arguments after the bias
        )


# Without the part of torch.autograd.Function.apply that is for torch.func's transforms, which are refused before.
_apply_function = super(torch.autograd.Function, _SigmoidLoss).apply


def differentiable(request: Request) -> tuple[Tensor, Tensor | None]:
    """(loss, stats [8]). Also forms the gradients that autograd will ask for. stats is None without return_stats."""
    if not _is_direct(request):
        dispatch.refuse_transforms(request.tensors())
        compute: Compute = _dispatched
        needs_grad = NO_GRAD
        # A graph recorded above autograd must contain the gradients, or they would become constants.
        if not torch.compiler.is_compiling() and dispatch.is_traced_before_dispatch():
            needs_grad = _needed_by_autograd(request)
    else:
        compute, needs_grad = _compute, _needed_by_autograd(request)
    if needs_grad.any:
        return _apply(request, needs_grad, compute)
    result = compute(request, needs_grad, None)
    return result.loss, result.stats if request.return_stats else None


def image_losses(request: Request) -> Tensor:
    """[M] the loss of each image, outside autograd."""
    dispatch.refuse_transforms(request.tensors())
    request = request.with_tensors([None if t is None else t.detach() for t in request.tensors()])
    compute: Compute = _compute if _is_direct(request) else _dispatched
    return compute(request._replace(by_image=True), NO_GRAD, None).loss


def loss_and_grads(request: Request, x_dtype: torch.dtype, y_dtype: torch.dtype) -> LossAndGrads:
    """The loss and all gradients, outside autograd. ``x_dtype``, ``y_dtype``: of the features' gradients."""
    dispatch.refuse_transforms()
    request = request.with_tensors([None if t is None else t.detach() for t in request.tensors()])
    # There is no upstream gradient that could differ between ranks.
    request = request._replace(exchange=request.exchange._replace(same_upstream=True))
    scale, bias = request.scale, request.bias
    direct = _is_direct(request)
    compute: Compute = _compute if direct else _dispatched
    loss, scalars, dx, dy, stats = compute(request, NeedsGrad(bias=bias is not None), None)
    _, dscale, dbias, grad_scale = scalars.unbind()
    rounded = gradients.scaled if direct else gradients.scaled_out_of_place
    return LossAndGrads(
        loss=loss,
        dx=rounded(dx, grad_scale, x_dtype, direct),
        dy=rounded(dy, grad_scale, y_dtype, direct),
        dscale=gradients.copied(dscale, *_like(scale)),
        dbias=None if bias is None else gradients.copied(dbias, *_like(bias)),
        stats=stats if request.return_stats else None,
    )


def _apply(request: Request, needs_grad: NeedsGrad, compute: Compute) -> tuple[Tensor, Tensor | None]:
    # autograd sees only tensors that a Function takes as arguments of its own, or returns.
    tensors = request.x, request.y, request.scale, request.bias
    outputs = _apply_function(*tensors, request, needs_grad, compute)
    return outputs if request.return_stats else (outputs, None)


def _dispatched(request: Request, needs_grad: NeedsGrad, upstream: Tensor | None) -> Result:
    """Call the operator, so that a compiler, a mode or a tensor's own class sees it."""
    arguments = _flatten(request, needs_grad, upstream)
    if torch.compiler.is_compiling() and request.exchange.group_names:
        return Result(*ops.exchange(ORDER, **arguments))
    return Result(*ops.sigmoid_loss(**arguments))


def _needed_by_autograd(request: Request) -> NeedsGrad:
    if not torch.is_grad_enabled():
        return NO_GRAD
    bias = request.bias
    needs_dbias = bias is not None and bias.requires_grad
    return NeedsGrad(request.x.requires_grad, request.y.requires_grad, request.scale.requires_grad, needs_dbias)


def _first_needed(request: Request, needs_grad: NeedsGrad) -> Tensor | None:
    """The first of scale, bias, x and y that needs a gradient."""
    if needs_grad.scale:
        return request.scale
    return request.bias if needs_grad.bias else request.x if needs_grad.x else request.y


def _derivative(run: Callable[..., Any], run_below_autograd: Callable[..., Any], *arguments: Any) -> Result:
    """The operator's autograd kernel: forms the gradients that autograd will ask for, and a differentiable loss."""
    request, asked, _ = _restore(*arguments)
    dispatch.refuse_transforms(request.tensors())
    needs_grad = _needed_by_autograd(request)
    if not needs_grad.any:
        return Result(*run_below_autograd(*arguments))
    if asked.any:
        raise RuntimeError(
            "sigmoid_loss is in a graph that was traced with its gradients, and cannot be differentiated twice: run "
            "the graph under no_grad, or trace the loss alone"
        )
    x, y = request.x, request.y
    if y is x:
        # Under torch.compile, a tensor that is both arguments gets only half its gradient (pytorch#183604).
        request = request._replace(y=y.view_as(y))

    def compute(request: Request, needs_grad: NeedsGrad, upstream: Tensor | None) -> Result:
        return Result(*run(**_flatten(request, needs_grad, upstream)))

    loss, stats = _apply(request, needs_grad, compute)
    # The caller asked for no gradients.
    none = x.new_empty((0, x.shape[1]), dtype=loss.dtype)
    scalars = x.new_full((4,), math.nan, dtype=loss.dtype)
    return Result(loss, scalars, none, none.clone(), _new_stats(x, 0) if stats is None else stats)


def _sigmoid_loss_derivative(keys: Any, *arguments: Any) -> Result:
    operator = ops.sigmoid_loss.default
    return _derivative(operator, partial(operator.redispatch, keys & torch._C._after_autograd_keyset), *arguments)


def _exchange_derivative(keys: Any, order: Tensor, *arguments: Any) -> Result:
    operator = ops.exchange.default
    below_autograd = partial(operator.redispatch, keys & torch._C._after_autograd_keyset, order)
    return _derivative(partial(operator, order), below_autograd, *arguments)


def _no_batching_rule(*_: Any) -> Any:
    raise RuntimeError("sigmoid_loss does not run under torch.vmap")


def _first_derivative(gradient: Tensor, argument: Tensor) -> Tensor:
    return gradient.clone()


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, hidden from Dynamo, which under torch.compile would trace into it after a graph break."""
    disabled = torch._disable_dynamo(function)  # its first call imports Dynamo
    return lambda *arguments: (disabled if "torch._dynamo" in sys.modules else function)(*arguments)


_library.impl("sigmoid_loss", _untraced(_operator), "CompositeExplicitAutograd")
_library.impl("exchange", _untraced(lambda _order, *arguments: _operator(*arguments)), "CompositeExplicitAutograd")
_library.impl("first_derivative", _first_derivative, "CompositeExplicitAutograd")
torch.library.register_fake(add_op_namespace_prefix("first_derivative"), _first_derivative, lib=_library)
for _name, _kernel in (("sigmoid_loss", _sigmoid_loss_derivative), ("exchange", _exchange_derivative)):
    _library.impl(_name, _untraced(_kernel), "Autograd", with_keyset=True)
    torch.library.register_vmap(add_op_namespace_prefix(_name), _no_batching_rule, lib=_library)


def _is_last_backward(saved: Tensor) -> bool:
    """Whether the backward that calls this is the last to read what forward saved: the graph is not kept.

    It is never the last while it is captured, because a captured backward may be replayed.
    """
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if is_kept is None or is_kept():
        return False
    return not is_capturing(saved.device)


def _like(t: Tensor) -> tuple[torch.dtype, torch.Size]:
    return t.dtype, t.shape
