"""The operator: opcheck, compilation, shapes without data, no unasked work, no synchronisation, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import checks
from siglip_kernels import backends, gemm, ops, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.request import ONE_PROCESS
from siglip_kernels.teachers import as_teachers
from siglip_kernels.testing import check, differentiate, make_inputs
from tests.comparison import loss_fn
from tests.operator_calls import PAIRS, SHAPE, SUBSETS, RecordingKernel, pairs_of

operator = torch.ops.siglip_kernels.sigmoid_loss.default


def operands(
    dtype: torch.dtype, kind: str, wanted: tuple[bool, ...], bias: bool = True, stats: bool = False
) -> tuple[Any, ...]:
    """What the operator takes, all detached."""
    x, y, t, b = make_inputs(*SHAPE, dtype)
    arguments = {"positive_offset": 0, "reduction": "batchmean", **pairs_of(kind, *SHAPE[:2])}
    labels = [arguments.get(name) for name in ("positive_offset", "image_ids", "text_ids")]
    weights = [arguments.get(name) for name in ("image_weights", "text_weights")]
    kinds = [arguments.get("ignore_ids", False), arguments.get("multi_positive"), arguments.get("anchors", "both")]
    balance = arguments.get("positive_weight", 1.0), arguments.get("label_smoothing", 0.0)
    teachers = as_teachers(arguments.get("teacher"))
    taught = [value for teacher in teachers for value in teacher[:4]], [teacher.weight for teacher in teachers]
    pairs = (*labels, *weights, *kinds, *balance, *taught)
    call = arguments["reduction"], "eager", stats, False
    return (x, y, t, b if bias else None, *pairs, *call, *ONE_PROCESS, *wanted, None)


def test_uninitialised_memory_is_nan() -> None:
    """Of every kind that the package allocates; the NaN comes through the poison of conftest.py."""
    like = torch.zeros(3)
    made = {
        "empty": torch.empty(3),
        "half": torch.empty(3, dtype=torch.bfloat16),
        "new_empty": like.new_empty((3, 2)),
        "empty_like": torch.empty_like(like),
        "grown": torch.zeros(1).resize_(4)[1:],
    }
    assert all(bool(t.isnan().all()) for t in made.values()), made


@pytest.mark.parametrize("buffer", ["sums", "dz"])
def test_an_unwritten_element_shows(monkeypatch: pytest.MonkeyPatch, buffer: str) -> None:
    class Forgetful(EagerBlockKernel):
        def block(self, task: BlockTask) -> None:
            # The third sum, or row, is left as it was allocated.
            tensor = getattr(task, buffer)
            super().block(task._replace(**{buffer: tensor.clone()}))
            tensor[:2] = 0

    monkeypatch.setitem(backends.BACKENDS, "eager", Forgetful())
    ours = differentiate(loss_fn, make_inputs(*SHAPE, torch.float32))
    assert any(bool(t.isnan().any()) for t in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    for wanted, bias in (((True,) * 4, True), ((True, True, True, False), False), ((False, True, False, True), True)):
        torch.library.opcheck(operator, operands(dtype, kind, wanted, bias, stats=bias))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_opcheck_of_every_subset(wanted: tuple[bool, ...], stats: bool) -> None:
    inputs = operands(torch.float32, "offset", wanted, stats=stats)
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def layout(t: Tensor) -> tuple[Any, ...]:
    """What a compiler believes of a result it has not seen."""
    return t.shape, t.dtype, t.stride(), t.storage_offset()


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_shapes_without_data(wanted: tuple[bool, ...]) -> None:
    """Fake and meta tensors tell the layout of the real result."""
    M, N, D = SHAPE
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        stats = dtype is torch.bfloat16
        inputs = operands(dtype, "weights", wanted, stats=stats)
        real = operator(*inputs)
        shapes = [(), (4,), (M if wanted[0] else 0, D), (N if wanted[1] else 0, D), (8 if stats else 0,)]
        assert [tuple(t.shape) for t in real] == shapes
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert [t.dtype for t in real] == [wide] * 4 + [torch.float64]
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs))
        meta = operator(*(t.to("meta") if isinstance(t, Tensor) else t for t in inputs))
        for kind, others in (("fake", fake), ("meta", meta)):
            for name, t, other in zip(("loss", "scalars", "dx", "dy", "stats"), real, others, strict=True):
                assert layout(t) == layout(other), (kind, name, dtype)


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_the_public_loss_on_fake_tensors(wanted: tuple[bool, ...]) -> None:
    """What FSDP and the memory estimators do: a step without data."""
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(t) for t in make_inputs(*SHAPE, torch.bfloat16)]
        for leaf, asked in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(asked)
        loss = loss_fn(*leaves)
        assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float32, any(wanted))
        if any(wanted):
            loss.backward()
        for leaf, asked in zip(leaves, wanted, strict=True):
            assert (leaf.grad is not None) == asked
            assert leaf.grad is None or (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_the_public_loss_on_meta_tensors() -> None:
    leaves = [t.to("meta").requires_grad_() for t in make_inputs(*SHAPE, torch.float32)]
    loss = loss_fn(*leaves)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[RecordingKernel, list[int]]:
    """The kernel in place of eager, and the rows of each feature-gradient product's result."""
    kernel, rows = RecordingKernel(), list[int]()
    original = gemm.gemm_

    def gemm_(out: Tensor, *inputs: Tensor, **options: Any) -> None:
        rows.append(out.shape[0])
        original(out, *inputs, **options)

    monkeypatch.setitem(backends.BACKENDS, "eager", kernel)
    monkeypatch.setattr(gemm, "gemm_", gemm_)
    return kernel, rows


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_no_work_for_gradients_not_asked_for(
    wanted: tuple[bool, ...], recorded: tuple[RecordingKernel, list[int]]
) -> None:
    kernel, rows = recorded
    leaves = [t.requires_grad_(w) for t, w in zip(make_inputs(*SHAPE, torch.float32), wanted, strict=True)]
    loss = loss_fn(*leaves)
    if any(wanted):
        loss.backward()
    assert rows == [length for length, asked in zip(SHAPE, wanted[:2], strict=False) if asked]
    assert kernel.asked == [(any(wanted[:2]), not any(wanted))]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_grad_mode_off_means_forward_only(off: Callable[[], Any], recorded: tuple[RecordingKernel, list[int]]) -> None:
    kernel, rows = recorded
    leaves = [t.requires_grad_() for t in make_inputs(*SHAPE, torch.float32)]
    with off():
        loss = loss_fn(*leaves)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert rows == []
    assert kernel.asked == [(False, True)]


def test_loss_and_grads_without_bias_or_autograd_forms_each_product_once(
    recorded: tuple[RecordingKernel, list[int]],
) -> None:
    _, rows = recorded
    sigmoid_loss_and_grads(*make_inputs(*SHAPE, torch.float32)[:3], backend="eager")
    assert rows == list(SHAPE[:2])


@pytest.mark.parametrize("wanted", [w for w in SUBSETS if any(w)], ids=str)
def test_backward_keeps_no_more_than_it_needs(wanted: tuple[bool, ...]) -> None:
    kept: list[Tensor] = []
    leaves = [t.requires_grad_(w) for t, w in zip(make_inputs(*SHAPE, torch.bfloat16), wanted, strict=True)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss_fn(*leaves, image_weights=torch.ones(SHAPE[0]))
    features = sum(rows * SHAPE[2] for rows, asked in zip(SHAPE, wanted[:2], strict=False) if asked)
    assert sum(t.numel() for t in kept) <= features + 4, [t.shape for t in kept]


class Watch(TorchDispatchMode):
    """Notes the operations, those inside the package's own operator too, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func._schema.name)
        if func is operator:
            with self:
                return ops._operator(*args)
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return result

    @property
    def synchronisations(self) -> list[str]:
        return [name for name in self.names if any(word in name for word in SYNCHRONISING)]


# What makes the host wait for a GPU: a number, or a shape that depends on the data.
SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique", "_to_cpu", "is_nonzero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_nothing_is_read_back_to_the_host(kind: str, dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in make_inputs(*SHAPE, dtype)]
    arguments = pairs_of(kind, *SHAPE[:2])
    with Watch() as forward:
        loss, _stats = loss_fn(*leaves, **arguments, return_stats=True)
    with Watch() as backward:
        loss.backward()
    assert any("mm" in name for name in forward.names), "the inside of the operator was not watched"
    assert backward.names
    # Validation alone reads: whether CPU weights are negative, once a side.
    reads = forward.synchronisations
    assert len(reads) == sum(name.endswith("_weights") for name in arguments), reads
    forward.names = forward.names[forward.names.index("siglip_kernels::sigmoid_loss") :]
    assert forward.synchronisations == []
    assert backward.synchronisations == []


def test_the_logits_are_never_held() -> None:
    # 3000 × 3100: nine blocks of the CPU's 1024 × 1024, and logits nine times the largest buffer.
    M, N, D = 3000, 3100, 2
    leaves = [t.requires_grad_() for t in make_inputs(M, N, D, torch.float32)]
    with Watch() as watch:
        loss_fn(*leaves).backward()
    assert watch.largest < M * N / 4, watch.largest


@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, True, False), (False, False, True, True)]
)
def test_compiled_without_unasked_gradients(
    wanted: tuple[bool, ...], recorded: tuple[RecordingKernel, list[int]]
) -> None:
    kernel, rows = recorded
    leaves = [t.requires_grad_(w) for t, w in zip(make_inputs(*SHAPE, torch.float32), wanted, strict=True)]
    torch.compile(loss_fn, backend="aot_eager", fullgraph=True)(*leaves).backward()
    assert rows == [length for length, asked in zip(SHAPE, wanted[:2], strict=False) if asked]
    assert kernel.asked == [(any(wanted[:2]), False)]
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def gpu_backends() -> list[str]:
    """Those that run a plain half-precision call on this machine's GPU."""
    problem = Problem(1024, 1024, 768, torch.bfloat16, torch.device("cuda"))
    return [name for name in backends.NAMES[1:] if not backends.why_not(name, problem)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends.NAMES[1:])
def test_gradient_check_on_the_gpu(backend: str) -> None:
    if backend not in gpu_backends():
        pytest.skip(f"{backend} does not run on this GPU")
    report = check(
        partial(sigmoid_loss, backend=backend), device="cuda", dtypes=[torch.bfloat16], shapes=[checks.SHAPE]
    )
    assert report.ok, report


@pytest.mark.gpu
def test_the_gpu_has_both_backends() -> None:
    assert {"eager", "triton"} <= set(gpu_backends())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton", "auto"])
@pytest.mark.parametrize(
    "run", [checks.bitwise_repeatable, checks.cuda_graph_replay, checks.no_host_sync, checks.index_overflow]
)
def test_on_the_gpu(run: Callable[..., list[str]], backend: str, dtype: torch.dtype) -> None:
    assert run(backend, torch.device("cuda"), dtype) == []
