"""Checks the public arguments, names a bad one in the error, and builds the request."""

from __future__ import annotations

import contextlib
import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from siglip_kernels import backends
from siglip_kernels.dispatch import are_ordinary, check_memory, is_traced
from siglip_kernels.pairs import ANCHORS, MULTI_POSITIVE, PairSpec
from siglip_kernels.request import ONE_PROCESS, ExchangeSpec, Request
from siglip_kernels.teachers import Teacher, as_teachers

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("batchmean", "mean", "sum")


def validate(
    image_features: Any,
    text_features: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    positive_offset: Any,
    image_ids: Any,
    text_ids: Any,
    image_weights: Any,
    text_weights: Any,
    ignore_ids: Any,
    multi_positive: Any,
    anchors: Any,
    positive_weight: Any,
    label_smoothing: Any,
    teacher: Any,
    return_stats: Any,
    reduction: Any,
    backend: Any,
    exchange: ExchangeSpec = ONE_PROCESS,
) -> Request:
    """The request for the public functions' arguments. ValueError or TypeError if one is not as documented."""
    one_of("reduction", reduction, REDUCTIONS)
    one_of("backend", backend, backends.NAMES)
    x, y = _features(image_features, text_features)
    M, N = x.shape[0], y.shape[0]
    if ignore_ids is not False or multi_positive is not None or anchors != "both" or return_stats is not False:
        _kinds(ignore_ids, multi_positive, anchors, return_stats, has_ids=image_ids is not None)
    positive_offset = _offset(positive_offset)
    _labels(positive_offset, image_ids, text_ids, ignore_ids)
    return Request(
        x=x,
        y=y,
        scale=_scalar("logit_scale", logit_scale, x),
        bias=None if logit_bias is None else _scalar("logit_bias", logit_bias, x),
        pairs=PairSpec(
            positive_offset=positive_offset,
            image_ids=_ids("image_ids", image_ids, M, "M", x),
            text_ids=_ids("text_ids", text_ids, N, "N", x),
            image_weights=_weights("image_weights", image_weights, M, "M", x),
            text_weights=_weights("text_weights", text_weights, N, "N", x),
            ignore_ids=ignore_ids,
            multi_positive=multi_positive,
            anchors=anchors,
            positive_weight=_number("positive_weight", positive_weight, math.inf),
            label_smoothing=_number("label_smoothing", label_smoothing, 1.0),
            teachers=() if teacher is None else _teachers(teacher, x, M, N),
        ),
        reduction=reduction,
        backend=backend,
        return_stats=return_stats,
        exchange=exchange,
    )


def _features(x: Any, y: Any, of: str = "") -> tuple[Tensor, Tensor]:
    """Both feature matrices, checked, and cast to the autocast dtype under autocast. ``of``: before their names."""
    x_name, y_name = of + "image_features", of + "text_features"
    for name, t in ((x_name, x), (y_name, y)):
        _tensor(name, t, "a floating")
        if t.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions [batch, D], got shape {tuple(t.shape)}")
        if t.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if y.device != x.device:
        raise ValueError(f"{y_name} are on {y.device}, {x_name} on {x.device}; expected one device")
    autocast = _autocast_dtype(x)
    cast_x, cast_y = x, y
    if autocast is not None:
        _readable(x_name, x)
        _readable(y_name, y)
        cast_x, cast_y = (t if t.dtype is torch.float64 else t.to(autocast) for t in (x, y))
    if cast_y.dtype is not cast_x.dtype:
        why = "" if autocast is None else ", for autocast leaves float64 as it is"
        raise TypeError(f"{y_name} are {y.dtype}, {x_name} {x.dtype}; expected one dtype{why}")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"{y_name} have D = {y.shape[1]}, {x_name} D = {x.shape[1]}; expected the same D")
    return cast_x, cast_y


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype for the device of x; None outside autocast."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    # "meta" has no autocast. torch.amp.is_autocast_available says so too, but Dynamo knows it only from torch 2.10.
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def _scalar(name: str, value: Any, x: Tensor) -> Tensor:
    """A floating tensor of one element on the features' device."""
    if isinstance(value, Tensor):
        _dense(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        _same_device(name, value, x)
        return value
    if not _is_real(value):
        raise TypeError(f"{name} must be a float or a tensor of one element, got {type(value).__name__}")
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if torch.compiler.is_compiling():
        number: Any = value  # an input of the graph; new_full would make it a constant: each value would recompile
        return x.new_ones((), dtype=dtype).mul(number)
    return x.new_full((), float(value), dtype=dtype)


def _is_real(value: Any) -> bool:
    """Whether it is a number; a bool is none."""
    return type(value) in (float, int) or (isinstance(value, Real) and not isinstance(value, bool))


def _number(name: str, value: Any, most: float) -> float:
    """A finite float from 0 to ``most``."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    number = float(value)
    if not (0 <= number <= most and number < math.inf):
        bound = "finite" if most == math.inf else f"at most {most:g}"
        raise ValueError(f"{name} must be at least 0 and {bound}, got {value!r}")
    return number


def _teachers(teacher: Any, x: Tensor, M: int, N: int) -> tuple[Teacher, ...]:
    """Those that have a weight, their scales and biases as tensors."""
    is_one = isinstance(teacher, Teacher)
    every = [teacher] if is_one else teacher
    # Types as tuples, not as unions, which Dynamo of torch 2.9 does not know.
    if not isinstance(every, (list, tuple)) or not all(isinstance(one, Teacher) for one in every):
        raise TypeError(f"teacher must be a siglip_kernels.Teacher or a sequence of them, got {type(teacher).__name__}")
    checked = [_teacher("teacher" if is_one else f"teacher[{k}]", one, x, M, N) for k, one in enumerate(every)]
    total = math.fsum([one.weight for one in checked])  # a list, for Dynamo
    if total > 1 + 1e-9:
        raise ValueError(f"teacher: the weights must add up to at most 1, got {total:g}")
    return as_teachers(checked)


def _teacher(name: str, teacher: Teacher, x: Tensor, M: int, N: int) -> Teacher:
    images, texts = _features(teacher.image_features, teacher.text_features, f"{name}.")
    bias = 0.0 if teacher.logit_bias is None else teacher.logit_bias
    checked = Teacher(
        image_features=images,
        text_features=texts,
        logit_scale=_scalar(f"{name}.logit_scale", teacher.logit_scale, x),
        logit_bias=_scalar(f"{name}.logit_bias", bias, x),
        weight=_number(f"{name}.weight", teacher.weight, 1.0),
    )
    for field, length in (("image_features", M), ("text_features", N)):
        features = getattr(checked, field)
        _same_device(f"{name}.{field}", features, x)
        if features.shape[0] != length:
            raise ValueError(f"{name}.{field} must have {length} rows, as the student's, got {features.shape[0]}")
    for field in Teacher._fields[:4]:
        if torch.is_grad_enabled() and getattr(checked, field).requires_grad:
            raise ValueError(
                f"{name}.{field} requires grad, but no gradient is formed for a teacher; expected a detached tensor"
            )
    return checked


def _kinds(ignore_ids: Any, multi_positive: Any, anchors: Any, return_stats: Any, has_ids: bool) -> None:
    for name, value in (("ignore_ids", ignore_ids), ("return_stats", return_stats)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    one_of("multi_positive", multi_positive, MULTI_POSITIVE)
    one_of("anchors", anchors, tuple(ANCHORS))
    if multi_positive is None and anchors != "both":
        raise ValueError(f"anchors = {anchors!r} is given without multi_positive, whose mass they share")
    if ignore_ids and multi_positive is not None:
        raise ValueError(
            f"multi_positive = {multi_positive!r} is given with ignore_ids, under which equal ids are not positive; "
            "expected one of the two"
        )
    for name, asked in (("ignore_ids", ignore_ids), ("multi_positive", multi_positive)):
        if asked and not has_ids:
            raise ValueError(f"{name} = {asked!r} is given without image_ids and text_ids; expected both")


def _offset(value: Any) -> Any:
    """The offset as a Python int, from numpy's integers too. A compiler's symbol and None stay as they are."""
    if value is None or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)):
        return value
    if not isinstance(value, (bool, Tensor)):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"positive_offset must be an int or None, got {type(value).__name__}")


def _labels(positive_offset: Any, image_ids: Any, text_ids: Any, ignore_ids: bool) -> None:
    if (image_ids is None) != (text_ids is None):
        given, missing = ("text_ids", "image_ids") if image_ids is None else ("image_ids", "text_ids")
        raise ValueError(f"{given} is given without {missing}; expected both or neither")
    if image_ids is not None and not ignore_ids and positive_offset not in (0, None):
        raise ValueError(
            f"positive_offset = {positive_offset} is given with image_ids, which alone say what is positive; expected 0"
        )


def _ids(name: str, ids: Any, length: int, letter: str, x: Tensor) -> Tensor | None:
    if ids is None:
        return None
    _vector(name, ids, length, letter, x, "an integer")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {ids.dtype}")
    return ids


def _weights(name: str, weights: Any, length: int, letter: str, x: Tensor) -> Tensor | None:
    if weights is None:
        return None
    _vector(name, weights, length, letter, x, "a real")
    if weights.is_complex():
        raise TypeError(f"{name} must be a real tensor, got {weights.dtype}")
    if torch.is_grad_enabled() and weights.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient is formed for weights; expected a detached tensor")
    # Reading the answer would synchronise on another device, and would break a traced graph.
    if weights.device.type == "cpu" and not is_traced(weights):
        _readable(name, weights)
        if bool((weights < 0).any()):
            raise ValueError(f"{name} must be non-negative, got a minimum of {weights.min().item()}")
    return weights


def _vector(name: str, t: Any, length: int, letter: str, x: Tensor, kind: str) -> None:
    _tensor(name, t, kind)
    if t.dim() != 1 or t.shape[0] != length:
        raise ValueError(f"{name} must have shape [{letter}] = [{length}], got {list(t.shape)}")
    _same_device(name, t, x)


def _tensor(name: str, t: Any, kind: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be {kind} torch.Tensor, got {type(t).__name__}")
    _dense(name, t)


def _dense(name: str, t: Tensor) -> None:
    if type(t) is not Tensor and hasattr(t, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor of this process, got a DTensor; a parameter that FSDP2 shards is plain "
            "inside the forward of its module"
        )
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else f'layout {t.layout}'}")


def _readable(name: str, t: Tensor) -> None:
    """Check the memory of a tensor that is read before the operator checks it."""
    if not torch.compiler.is_compiling() and are_ordinary((t,)):
        check_memory([name], [t])


def _same_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, image_features on {x.device}; expected one device")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
