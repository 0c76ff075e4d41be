"""A GPU kernel's first run on a device: faults are found there, and the loss and its gradients are right anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from siglip_kernels import __main__, backends, cache, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.backends import comparison, verification
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.gpu import GpuBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.backends.verification import KernelError
from siglip_kernels.testing import PAIRS, REGIMES, check, make_inputs
from tests.backends.faults import (
    FAULTS,
    KERNELS,
    HostKernel,
    InterpretedKernel,
    cannot_launch,
    faulty,
    negatives_dropped,
    wrong_sign,
)
from tests.distributed.batches import Batch, assert_right, call, even
from tests.ranks import Ranks

CPU = torch.device("cpu")
SHAPE = (300, 420, 40)  # several blocks a side
FAULTY = "plain torch does the blocks that need it"
OF_THE_INTERPRETER = "Conversion of an array with ndim > 0 to a scalar is deprecated"


Use = Callable[[GpuBlockKernel], GpuBlockKernel]


@pytest.fixture(autouse=True)
def nothing_proven_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "proven", set())
    monkeypatch.setattr(verification, "_faults", {})


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes a kernel the one that both "triton" and "auto" take."""

    def register(kernel: GpuBlockKernel) -> GpuBlockKernel:
        if isinstance(kernel, TritonBlockKernel):
            pytest.importorskip("triton", reason="Triton is not installed")
            if torch.cuda.is_available():
                pytest.skip("the interpreter is for machines without a GPU")
        monkeypatch.setitem(backends.BACKENDS, "triton", kernel)
        assert backends.choose("auto", Problem(*SHAPE, torch.float16, CPU)) is kernel
        return kernel

    return register


def messages(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """All but what NumPy says of some versions of Triton's interpreter."""
    return [text for text in (str(warning.message) for warning in caught) if not text.startswith(OF_THE_INTERPRETER)]


@pytest.mark.parametrize("output", ["loss", "scalars"])
@pytest.mark.parametrize("base", KERNELS)
def test_a_wrong_result_is_found(base: type[GpuBlockKernel], output: str, use: Use) -> None:
    """Of a loss that is one block, whose result the kernel writes."""

    def fault(task: BlockTask) -> None:
        if task.result is not None:
            getattr(task.result, output).mul_(1.001)

    use(faulty(base, fault))
    with pytest.warns(RuntimeWarning, match=FAULTY) as caught:
        report = check(sigmoid_loss, dtypes=[torch.float16], shapes=[(70, 100, 40)], pairs=["diagonal"])
    assert report.ok, report
    assert " result " in messages(caught)[0]


@pytest.mark.parametrize("base", KERNELS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "nothing written" if fault is None else fault.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_faults_are_found_and_the_loss_is_right(
    dtype: torch.dtype, fault: Callable[[BlockTask], None] | None, base: type[GpuBlockKernel], use: Use
) -> None:
    kernel: Any = use(faulty(base, fault))
    with pytest.warns(RuntimeWarning, match=FAULTY) as caught:
        report = check(sigmoid_loss, dtypes=[dtype], shapes=[SHAPE], regimes=["init"], pairs=["diagonal"])
    assert report.ok, report
    text, *others = messages(caught)
    assert FAULTS[fault] in text, text
    assert f"torch {torch.__version__}" in text
    faulty_variants = [variant for variant, _ in verification._faults]
    assert 1 + len(others) == len(faulty_variants)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_THE_INTERPRETER, DeprecationWarning)
        assert check(sigmoid_loss, dtypes=[dtype], shapes=[SHAPE], regimes=["init"], pairs=["diagonal"]).ok
    assert all(kernel.launches.count(variant) == 1 for variant in faulty_variants)
    with pytest.raises(KernelError, match=r"backend='triton' (cannot run here|disagrees with plain torch)"):
        sigmoid_loss_and_grads(*make_inputs(*SHAPE, dtype), backend="triton")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "nothing written" if fault is None else fault.__name__)
def test_a_backend_by_name_is_an_error(fault: Callable[[BlockTask], None] | None, use: Use) -> None:
    use(faulty(HostKernel, fault))
    for _ in range(2):
        with pytest.raises(KernelError, match=r"backend='triton' (cannot run here|disagrees with plain torch)"):
            sigmoid_loss_and_grads(*make_inputs(*SHAPE, torch.bfloat16), backend="triton")


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("fault", [negatives_dropped, cannot_launch])
def test_every_kind_of_pairs_falls_back(fault: Callable[[BlockTask], None], pairs: str, use: Use) -> None:
    use(faulty(HostKernel, fault))
    with pytest.warns(RuntimeWarning, match=FAULTY):
        report = check(sigmoid_loss, dtypes=[torch.bfloat16], shapes=[SHAPE], regimes=["trained"], pairs=[pairs])
    assert report.ok, report


def test_wrong_stats(use: Use) -> None:
    def one_too_many(task: BlockTask) -> None:
        if task.stats is not None:
            task.stats[2] += 1

    use(faulty(HostKernel, one_too_many))
    inputs = make_inputs(*SHAPE, torch.float32)
    with pytest.warns(RuntimeWarning, match="stats"):
        _, stats = sigmoid_loss(*inputs, return_stats=True)
    assert (stats.positive_count, stats.negative_count) == (300, 300 * 420 - 300)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("base", KERNELS)
def test_a_right_kernel_is_never_suspected(
    base: type[GpuBlockKernel], regime: str, pairs: str, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by a margin: its errors are half of what is allowed, for that is dz's rounding, or 3 % of it."""
    use(base())
    measured = []

    def measure(launch: Callable[[BlockTask], None], task: BlockTask) -> dict[str, float]:
        measured.append(comparison.errors_of_launch(launch, task))
        return {}  # nothing is proven: every block is compared

    monkeypatch.setattr(verification, "errors_of_launch", measure)
    interpreted = base is InterpretedKernel
    shape = (70, 100, 40) if interpreted else SHAPE  # one block: the interpreter is slow
    for dtype in [torch.float16, torch.float32] if interpreted else [torch.bfloat16, torch.float16]:
        arguments = PAIRS[pairs](*shape[:2], CPU)
        offset = arguments.get("positive_offset") or 0
        inputs = make_inputs(*shape, dtype, regime, positive_offset=offset)
        sigmoid_loss_and_grads(*inputs, **arguments, return_stats=True)
    assert len(measured) == 2 * (1 if interpreted else 9)
    for errors in measured:
        assert errors.pop("result", 0.0) <= 0.5  # the rounding of a division
        assert set(errors) == {"loss", "Σ dz·u", "Σ dz", "dz", "stats"}
        assert errors.pop("dz") < 0.6
        assert max(errors.values()) < 0.03


def test_later_calls_compare_nothing(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = use(HostKernel())
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    sigmoid_loss_and_grads(*inputs)
    assert len(kernel.launches) == 9
    assert len(verification.proven) == len(set(kernel.launches)) == 2
    monkeypatch.setattr(verification, "launch_unproven", None)
    sigmoid_loss_and_grads(*inputs)
    assert len(kernel.launches) == 18


def test_under_capture_nothing_is_compared(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(faulty(HostKernel, wrong_sign))
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    with monkeypatch.context() as capture:
        capture.setattr(verification, "is_capturing", lambda device: True)
        capture.setattr(verification, "errors_of_launch", None)
        sigmoid_loss_and_grads(*inputs)
    with pytest.warns(RuntimeWarning, match=FAULTY):  # the first call outside
        sigmoid_loss_and_grads(*inputs)


@pytest.mark.parametrize("name", ["image_features", "text_features", "image_weights"])
def test_zeros_prove_nothing(name: str, use: Use) -> None:
    use(HostKernel())
    inputs = make_inputs(*SHAPE, torch.float32)._asdict() | {"image_weights": torch.ones(300)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigmoid_loss_and_grads(**(inputs | {name: torch.zeros_like(inputs[name])}))
        assert not verification.proven
        sigmoid_loss_and_grads(**inputs)
    assert verification.proven


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_inputs_that_overflow_prove_nothing(value: float, use: Use) -> None:
    use(HostKernel())
    inputs = make_inputs(*SHAPE, torch.float32)
    inputs.image_features[:, 5] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = sigmoid_loss(*inputs._replace(logit_scale=inputs.logit_scale * 1e5))
    assert not loss.isfinite() or value == 1e38
    assert not verification.proven
    sigmoid_loss(*make_inputs(*SHAPE, torch.float32))
    assert verification.proven


def test_lack_of_memory_proves_nothing(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(HostKernel())
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    right = sigmoid_loss_and_grads(*inputs, backend="eager")

    def no_memory(task: BlockTask, inspect: Any = None) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as short:
        short.setattr(comparison, "run_eager", no_memory)
        loss = sigmoid_loss_and_grads(*inputs).loss
    torch.testing.assert_close(loss, right.loss)
    assert not verification.proven


def test_a_kernel_without_memory_says_so(use: Use) -> None:
    def no_memory(task: BlockTask) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    use(faulty(HostKernel, no_memory))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        sigmoid_loss(*make_inputs(*SHAPE, torch.bfloat16))


def test_records(use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cache, "roots", lambda refusals, make=False: iter([tmp_path / "absent" / "x", tmp_path]))
    (tmp_path / "absent").write_text("no folder")
    monkeypatch.setattr(verification, "RECORDED_DEVICES", ("cpu",))
    kernel: Any = use(HostKernel())
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    sigmoid_loss_and_grads(*inputs)
    names = {f"triton: {variant}" for variant in kernel.launches}
    assert set(verification.recorded(CPU)) == names
    __main__.info()
    shown = capsys.readouterr().out
    assert all(f"verified here: {name}" in shown for name in names)

    verification.proven.clear()  # as in the next process
    monkeypatch.setattr(verification, "errors_of_launch", None)
    sigmoid_loss_and_grads(*inputs)
    assert len(verification.proven) == 2

    verification.proven.clear()
    monkeypatch.setattr(verification, "environment", lambda device: "another driver")
    assert verification.recorded(CPU) == []
    with pytest.warns(RuntimeWarning, match="cannot run here: 'NoneType' object is not callable"):
        sigmoid_loss_and_grads(*inputs)


def test_faults_are_not_recorded(use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(cache, "roots", lambda refusals, make=False: iter([tmp_path]))
    monkeypatch.setattr(verification, "RECORDED_DEVICES", ("cpu",))
    use(faulty(HostKernel, wrong_sign))
    with pytest.warns(RuntimeWarning, match=FAULTY):
        sigmoid_loss_and_grads(*make_inputs(*SHAPE, torch.bfloat16))
    assert verification.recorded(CPU) == []


def test_backward_and_compiled_graphs(use: Use) -> None:
    use(faulty(HostKernel, negatives_dropped))
    inputs = [t.requires_grad_() for t in make_inputs(*SHAPE, torch.float32)]
    with pytest.warns(RuntimeWarning, match=FAULTY):
        loss = torch.compile(sigmoid_loss, backend="aot_eager", fullgraph=True)(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    right = torch.autograd.grad(sigmoid_loss(*inputs, backend="eager"), inputs)
    for grad, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, expected)


def call_with_a_fault_on_rank_1(rank: int, group: Any, batch: Batch) -> list[Any]:
    before = backends.BACKENDS["triton"]
    backends.BACKENDS["triton"] = faulty(HostKernel, negatives_dropped) if rank == 1 else HostKernel()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = call(rank, group, batch)
        assert [FAULTY in str(w.message) for w in caught] == ([True, True] if rank == 1 else [])
    finally:
        backends.BACKENDS["triton"] = before
        verification.proven.clear()
        verification._faults.clear()
    return result


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
def test_ranks_need_not_agree(ranks: Ranks, algorithm: str) -> None:
    """The texts of other ranks need a variant of their own, without positives."""
    batch = even(3, b=200, exchange={"algorithm": algorithm})
    assert_right(ranks.run(3, call_with_a_fault_on_rank_1, batch), batch, 5e-6)
