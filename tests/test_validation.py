"""Bad arguments: the error names the argument, what it was and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from siglip_kernels import SigLipLoss, SigmoidLoss, backends, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.eager import EagerBlockKernel

M, N, D = 4, 6, 8


def good() -> dict[str, Any]:
    """A call that is right; each case below spoils it."""
    return {
        "image_features": torch.arange(M * D).reshape(M, D).cos(),
        "text_features": torch.arange(N * D).reshape(N, D).sin(),
        "logit_scale": 10.0,
        "logit_bias": -10.0,
        "backend": "eager",
    }


class Bad(NamedTuple):
    """Arguments that spoil a call, the error's type, and what its message must say."""

    arguments: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]  # the argument, what it was, what was expected


META = torch.device("meta")
IDS = {"image_ids": torch.arange(M), "text_ids": torch.arange(N)}
DTYPES = "float16, bfloat16, float32 or float64"


def cases() -> list[Bad]:
    table = [
        Bad({"reduction": "none"}, ValueError, ("reduction", "'none'", "'batchmean', 'mean', 'sum'")),
        Bad({"reduction": None}, ValueError, ("reduction", "None", "'batchmean'")),
        Bad({"reduction": "Mean"}, ValueError, ("reduction", "'Mean'", "'mean'")),
        Bad({"backend": "cudnn"}, ValueError, ("backend", "'cudnn'", "'auto'", "'eager'", "'cpu'", "'cuda'")),
        Bad({"backend": None}, ValueError, ("backend", "None", "'auto'")),
        Bad({"positive_offset": 1.5}, TypeError, ("positive_offset", "float", "int or None")),
        Bad({"positive_offset": "0"}, TypeError, ("positive_offset", "str", "int or None")),
        Bad({"positive_offset": True}, TypeError, ("positive_offset", "bool", "int or None")),
        Bad({"positive_offset": torch.tensor(1)}, TypeError, ("positive_offset", "Tensor", "int or None")),
        Bad({"image_ids": torch.arange(M)}, ValueError, ("image_ids", "without text_ids", "both or neither")),
        Bad({"text_ids": torch.arange(N)}, ValueError, ("text_ids", "without image_ids", "both or neither")),
        Bad({**IDS, "positive_offset": 3}, ValueError, ("positive_offset", "3", "image_ids", "expected 0")),
        Bad({"ignore_ids": True}, ValueError, ("ignore_ids", "without image_ids and text_ids", "both")),
        Bad({**IDS, "ignore_ids": 1}, TypeError, ("ignore_ids", "int", "bool")),
        Bad({**IDS, "ignore_ids": None}, TypeError, ("ignore_ids", "NoneType", "bool")),
        Bad({**IDS, "ignore_ids": True, "positive_offset": 0.5}, TypeError, ("positive_offset", "float")),
        Bad({"multi_positive": "weights"}, ValueError, ("multi_positive", "'weights'", "without image_ids")),
        Bad({**IDS, "multi_positive": "soft"}, ValueError, ("multi_positive", "'soft'", "'soft_targets'")),
        Bad({**IDS, "multi_positive": True}, ValueError, ("multi_positive", "True", "'weights'")),
        Bad(
            {**IDS, "multi_positive": "weights", "ignore_ids": True},
            ValueError,
            ("multi_positive", "'weights'", "ignore_ids", "one of the two"),
        ),
        Bad({**IDS, "multi_positive": "weights", "anchors": "text"}, ValueError, ("anchors", "'text'", "'texts'")),
        Bad({**IDS, "anchors": "images"}, ValueError, ("anchors", "'images'", "without multi_positive")),
        Bad({"positive_weight": "2"}, TypeError, ("positive_weight", "str", "float")),
        Bad({"positive_weight": True}, TypeError, ("positive_weight", "bool", "float")),
        Bad({"positive_weight": torch.ones(())}, TypeError, ("positive_weight", "Tensor", "float")),
        Bad({"positive_weight": -1.0}, ValueError, ("positive_weight", "-1.0", "at least 0", "finite")),
        Bad({"positive_weight": math.inf}, ValueError, ("positive_weight", "inf", "finite")),
        Bad({"positive_weight": math.nan}, ValueError, ("positive_weight", "nan", "finite")),
        Bad({"label_smoothing": None}, TypeError, ("label_smoothing", "NoneType", "float")),
        Bad({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "1.5", "at least 0", "at most 1")),
        Bad({"label_smoothing": -0.1}, ValueError, ("label_smoothing", "-0.1", "at least 0")),
        Bad({"return_stats": "yes"}, TypeError, ("return_stats", "str", "bool")),
    ]
    for name, rows in (("image_features", M), ("text_features", N)):
        other = "text_features" if name == "image_features" else "image_features"
        table += [
            Bad({name: [[1.0] * D] * rows}, TypeError, (name, "list", "torch.Tensor")),
            Bad({name: None}, TypeError, (name, "NoneType", "torch.Tensor")),
            Bad({name: np.ones((rows, D))}, TypeError, (name, "ndarray", "torch.Tensor")),
            Bad({name: torch.randn(D)}, ValueError, (name, "(8,)", "2 dimensions", "[batch, D]")),
            Bad({name: torch.randn(1, rows, D)}, ValueError, (name, f"(1, {rows}, 8)", "2 dimensions")),
            Bad({name: torch.ones(rows, D, dtype=torch.int64)}, TypeError, (name, "torch.int64", DTYPES)),
            Bad({name: torch.ones(rows, D, dtype=torch.complex64)}, TypeError, (name, "torch.complex64", DTYPES)),
            Bad({name: torch.ones(rows, D).to(torch.float8_e4m3fn)}, TypeError, (name, "float8_e4m3fn", DTYPES)),
            Bad({name: torch.ones(rows, D).to_sparse()}, TypeError, (name, "sparse", "dense")),
            Bad({name: torch.randn(rows, D).half()}, TypeError, (name, other, "float16", "float32", "one dtype")),
            Bad({name: torch.randn(rows, 7)}, ValueError, (name, other, "D = 7", "D = 8", "same D")),
            Bad({name: torch.randn(rows, D, device=META)}, ValueError, (name, other, "meta", "cpu", "one device")),
        ]
    for name in ("logit_scale", "logit_bias"):
        table += [
            Bad({name: "10"}, TypeError, (name, "str", "float", "tensor of one element")),
            Bad({name: True}, TypeError, (name, "bool", "float")),
            Bad({name: 1j}, TypeError, (name, "complex", "float")),
            Bad({name: [10.0]}, TypeError, (name, "list", "float")),
            Bad({name: torch.tensor(10)}, TypeError, (name, "torch.int64", "floating")),
            Bad({name: torch.tensor(10j)}, TypeError, (name, "torch.complex64", "floating")),
            Bad({name: torch.ones(2)}, ValueError, (name, "(2,)", "one element")),
            Bad({name: torch.ones(1, 0)}, ValueError, (name, "(1, 0)", "one element")),
            Bad({name: torch.ones((), device=META)}, ValueError, (name, "meta", "image_features", "cpu", "one device")),
        ]
    table.append(Bad({"logit_scale": None}, TypeError, ("logit_scale", "NoneType", "float")))
    for name, rows, shape in (("image_ids", M, "[M] = [4]"), ("text_ids", N, "[N] = [6]")):
        table += [
            Bad({**IDS, name: ids}, error, (name, *says))
            for ids, error, says in (
                (list(range(rows)), TypeError, ("list", "must be an integer torch.Tensor")),
                (torch.arange(rows + 1), ValueError, (f"[{rows + 1}]", shape)),
                (torch.zeros(rows, 1, dtype=torch.int64), ValueError, (f"[{rows}, 1]", shape)),
                (torch.ones(rows), TypeError, ("torch.float32", "integer")),
                (torch.ones(rows, dtype=torch.bool), TypeError, ("torch.bool", "integer")),
                (torch.zeros(rows, dtype=torch.int64, device=META), ValueError, ("meta", "cpu", "one device")),
            )
        ]
    for name, rows, shape in (("image_weights", M, "[M] = [4]"), ("text_weights", N, "[N] = [6]")):
        table += [
            Bad({name: [1.0] * rows}, TypeError, (name, "list", "torch.Tensor")),
            Bad({name: 2.0}, TypeError, (name, "float", "torch.Tensor")),
            Bad({name: torch.ones(rows - 1)}, ValueError, (name, f"[{rows - 1}]", shape)),
            Bad({name: torch.ones(1, rows)}, ValueError, (name, f"[1, {rows}]", shape)),
            Bad({name: torch.ones(rows, dtype=torch.complex64)}, TypeError, (name, "torch.complex64", "real")),
            Bad({name: torch.ones(rows, device=META)}, ValueError, (name, "meta", "cpu", "one device")),
            Bad({name: torch.ones(rows, requires_grad=True)}, ValueError, (name, "requires grad", "detached")),
            Bad({name: torch.arange(rows) - 2.5}, ValueError, (name, "-2.5", "non-negative")),
            Bad({name: torch.arange(rows) - 1}, ValueError, (name, "-1", "non-negative")),
        ]
    return table


TABLE = cases()


def title(case: Bad) -> str:
    return " ".join(case.says[:2]) + f" ({', '.join(case.arguments)})"


def test_the_good_call_is_good() -> None:
    assert sigmoid_loss(**good()).isfinite()
    assert sigmoid_loss(**good(), **IDS).isfinite()
    for offset in (None, 0, 3, -7, 1000):
        assert sigmoid_loss(**good(), **IDS, ignore_ids=True, positive_offset=offset).isfinite()
    assert len(TABLE) >= 30


@pytest.mark.parametrize("entry", [sigmoid_loss, sigmoid_loss_and_grads])
@pytest.mark.parametrize("case", TABLE, ids=title)
def test_the_error_says_what_is_wrong(entry: Callable[..., Any], case: Bad) -> None:
    with pytest.raises(case.error) as caught:
        entry(**{**good(), **case.arguments})
    # Exactly this type: a ValueError that happens to come from deep inside is of another.
    assert type(caught.value) is case.error
    missing = [words for words in case.says if words not in str(caught.value)]
    assert not missing, f"{caught.value}\nlacks {missing}"


@pytest.mark.parametrize("name", ["logit_scale", "image_weights", "backward"])
def test_unknown_or_misplaced_arguments_are_refused(name: str) -> None:
    arguments = good()
    x, y = arguments.pop("image_features"), arguments.pop("text_features")
    if name == "logit_scale":
        del arguments["logit_scale"]
        with pytest.raises(TypeError, match="logit_scale"):
            sigmoid_loss(x, y, **arguments)
    elif name == "image_weights":
        # Everything after the bias is by keyword only.
        with pytest.raises(TypeError, match="positional"):
            sigmoid_loss(x, y, 10.0, -10.0, 0)  # type: ignore[misc]
    else:
        with pytest.raises(TypeError, match="backward"):
            sigmoid_loss(x, y, **arguments, backward=True)


def test_weights_may_require_grad_where_no_gradient_is_formed() -> None:
    with torch.no_grad():
        assert sigmoid_loss(**good(), image_weights=torch.ones(M, requires_grad=True)).isfinite()


def test_modules_raise_the_same_errors() -> None:
    arguments = good()
    x, y = arguments["image_features"], arguments["text_features"]
    with pytest.raises(ValueError, match="text_features have D = 7"):
        SigmoidLoss()(x, y[:, :7])
    with pytest.raises(ValueError, match="image_weights must have shape"):
        SigmoidLoss()(x, y, image_weights=torch.ones(M + 1))
    with pytest.raises(ValueError, match="reduction"):
        SigmoidLoss(reduction="none")(x, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_scale must have one element"):
        SigLipLoss()(x, y, torch.ones(3), -10.0)


def test_mixed_dtypes_under_autocast_are_judged_after_the_cast() -> None:
    arguments = good()
    arguments["image_features"] = arguments["image_features"].double()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(
            TypeError, match=r"text_features are torch.float32, image_features torch.float64; .* for autocast"
        ),
    ):
        sigmoid_loss(**arguments)


@pytest.mark.parametrize("offset", [np.int64(2), np.int8(2), np.array(2), np.uint32(2)])
def test_an_offset_of_numpy(offset: Any) -> None:
    assert torch.equal(sigmoid_loss(**good(), positive_offset=offset), sigmoid_loss(**good(), positive_offset=2))


@pytest.mark.parametrize("offset", [np.float64(2), np.array([2]), np.array(2.0), np.bool_(True), [2]])
def test_an_offset_that_is_no_integer_of_numpy(offset: Any) -> None:
    if isinstance(offset, np.bool_) and hasattr(offset, "__index__"):
        pytest.skip("to this NumPy a bool is an integer")
    with pytest.raises(TypeError, match=f"positive_offset must be an int or None, got {type(offset).__name__}"):
        sigmoid_loss(**good(), positive_offset=offset)


class Picky(EagerBlockKernel):
    """A kernel that cannot run anything, for two reasons."""

    name = "picky"

    def why_not(self, problem: Problem) -> list[str]:
        return ["no CUDA device", f"D = {problem.D} is not a multiple of 16"]


def test_a_backend_that_cannot_run_says_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"eager": Picky(), "last": EagerBlockKernel()})
    with pytest.raises(ValueError, match="eager") as caught:
        sigmoid_loss(**good())
    assert "no CUDA device" in str(caught.value)
    assert "D = 8 is not a multiple of 16" in str(caught.value)
    # "auto" passes it over in silence.
    assert sigmoid_loss(**{**good(), "backend": "auto"}).isfinite()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_every_backend_of_the_contract_runs_or_says_why_not(backend: str) -> None:
    """Its name is known whether or not this version, this machine or these tensors allow it."""
    # Triton's interpreter is slow and wrong in bfloat16: float32, a few elements.
    try:
        loss = sigmoid_loss(**{**good(), "backend": backend})
    except ValueError as error:
        message = str(error)
        assert f"backend={backend!r} cannot run this call: " in message, message
        assert len(message.partition(": ")[2]) > 10, message
    else:
        assert loss.isfinite()


def test_auto_never_raises_and_never_takes_the_interpreter() -> None:
    """The interpreter is for tests of Triton kernels: thousands of times slower, and wrong in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        problem = Problem(M, N, D, dtype, torch.device("cpu"))
        assert backends.choose("auto", problem).name != "triton", dtype


def call(x: Tensor) -> Tensor:
    return sigmoid_loss(**{**good(), "image_features": x})


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "vmap": lambda x: torch.func.vmap(call)(x.expand(3, M, D)),
    "vmap over another argument": lambda x: torch.func.vmap(lambda t: sigmoid_loss(**{**good(), "logit_scale": t}))(
        torch.ones(3)
    ),
    "func.grad": lambda x: torch.func.grad(call)(x),
    "func.jvp": lambda x: torch.func.jvp(call, (x,), (x,)),
    "func.jacrev": lambda x: torch.func.jacrev(call)(x),
    "func.hessian": lambda x: torch.func.hessian(call)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_raise(transform: str) -> None:
    with pytest.raises(RuntimeError, match=r"sigmoid_loss.*(vmap|grad|jvp)"):
        TRANSFORMS[transform](torch.randn(M, D))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("leaf", ["image_features", "text_features", "logit_scale", "logit_bias"])
def test_double_backward_raises(leaf: str) -> None:
    tensors = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor([-10.0])}
    arguments = {**good(), **tensors}
    arguments[leaf].requires_grad_()
    with pytest.raises(RuntimeError, match=r"sigmoid_loss cannot be differentiated twice.*create_graph"):
        torch.autograd.grad(sigmoid_loss(**arguments), arguments[leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sigmoid_loss(**arguments).backward(create_graph=True)
    assert arguments[leaf].grad is None


def test_hessian_and_forward_mode_raise() -> None:
    x = torch.randn(M, D)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.functional.hessian(call, x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        call(torch.autograd.forward_ad.make_dual(x, x))


def test_double_backward_raises_when_compiled() -> None:
    x = torch.randn(M, D, requires_grad=True)
    loss = torch.compile(call, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (loss + dx.square().sum()).backward()
