"""Random calls of the loss: their arguments, and what kind of tensor each of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.differential_modes import FEATURES, IDS, MODE_NAMES, SCALARS, TENSORS, WEIGHTS, WITHOUT_KINDS, Call
from tests.kinds import KINDS, ONLY_FLOATING, WITHOUT_GRAD


@st.composite
def calls(draw: Callable[..., Any]) -> Call:
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    M, N, D = (draw(st.integers(1, most)) for most in one_of((4, 4, 3), (40, 40, 20), (90, 70, 9)))
    dtype = one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, y = (F.normalize(random(n, D), dim=1).to(dtype) for n in (M, N))
    t, b = one_of((10.0, -10.0), (117.0, -12.9), (0.01, 3.0), (1.5, 0.5))
    arguments: dict[str, Any] = {"image_features": x, "text_features": y}
    for name, value in (("logit_scale", t), ("logit_bias", b)):
        form = one_of("float", "tensor", "tensor", "tensor", "half", "none" if name == "logit_bias" else "tensor")
        scalar_dtype = torch.bfloat16 if form == "half" else one_of(torch.float32, torch.float64, dtype)
        made = torch.full(one_of((), (), (1,), (1, 1)), value, dtype=scalar_dtype)
        arguments[name] = {"float": value, "none": None}.get(form, made)
    arguments |= draw(labels(M, N)) | draw(weights(M, N)) | draw(balance())
    arguments["reduction"] = one_of("batchmean", "mean", "sum")
    arguments["return_stats"] = one_of(False, False, True)
    given_tensors = [name for name in TENSORS if isinstance(arguments.get(name), Tensor)]
    kinds = {name: one_of("plain", "plain", "plain", *KINDS) for name in given_tensors}
    kinds = {k: v for k, v in kinds.items() if v != "plain" and (k not in IDS + WEIGHTS or v not in ONLY_FLOATING)}
    mode = draw(st.sampled_from(MODE_NAMES))
    if mode in WITHOUT_KINDS:
        kinds = {}
    gradless = {name for name, kind in kinds.items() if kind in WITHOUT_GRAD}
    able = [isinstance(arguments[name], Tensor) and name not in gradless for name in FEATURES + SCALARS]
    wanted = tuple(can and "functional" not in kinds.values() and draw(st.booleans()) for can in able)
    return Call(arguments, kinds, wanted, one_of("cpu", "cpu", "eager", "auto"), mode)


@st.composite
def labels(draw: Callable[..., Any], M: int, N: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(["offset", "offset", "none", "ids", "ignore", "weights", "soft_targets"]))
    offset = draw(st.integers(-M - 1, N + 1))
    if kind in ("offset", "none"):
        return {"positive_offset": offset if kind == "offset" else None}
    dtypes = st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8])
    several = draw(st.integers(1, 9))
    ids = [torch.arange(n).remainder(several).to(draw(dtypes)) for n in (M, N)]
    found: dict[str, Any] = dict(zip(IDS, ids, strict=True))
    if kind == "ignore":
        return {**found, "ignore_ids": True, "positive_offset": offset}
    if kind == "ids":
        return found
    return {**found, "multi_positive": kind, "anchors": draw(st.sampled_from(["both", "images", "texts"]))}


@st.composite
def balance(draw: Callable[..., Any]) -> dict[str, float]:
    """positive_weight and label_smoothing, in one call of three."""
    if draw(st.integers(0, 2)):
        return {}
    weight, smoothing = draw(st.sampled_from([0.0, 0.3, 1.0, 7.0])), draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    return {"positive_weight": weight, "label_smoothing": smoothing}


@st.composite
def weights(draw: Callable[..., Any], M: int, N: int) -> dict[str, Any]:
    found = {}
    for name, n in zip(WEIGHTS, (M, N), strict=True):
        if draw(st.integers(0, 2)) == 0:
            dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]))
            found[name] = (
                torch.arange(1, n + 1).remainder(draw(st.integers(2, 5))) * draw(st.sampled_from([1, 3]))
            ).to(dtype)
    return found
