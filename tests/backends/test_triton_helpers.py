"""The small kernels beside the block kernel, and launches past Triton's JIT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockTask, LossTask
from siglip_kernels.backends.compiled import CompiledKernels
from siglip_kernels.backends.gpu import reduce_partials
from siglip_kernels.pairs import PairSpec
from tests.bench.gpu.faulty import needs_interpreter


class FakeKernel:
    """Says what it is launched with; a compilation says so too."""

    def __init__(self, launches: list[Any], *, compiles: bool = True) -> None:
        self.launches, self.compiles = launches, compiles

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(**how: Any) -> Any:
            self.launches.append(("jit", grid, how))
            return FakeCompilation(self.launches) if self.compiles else None

        return launch


class FakeCompilation:
    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append(("compiled", grid, arguments))


def test_a_compiled_kernel_is_launched_past_the_jit() -> None:
    launches: list[Any] = []
    kernels = CompiledKernels(FakeKernel(launches))
    buffer = torch.zeros(16)
    aligned, shifted = buffer[:4], buffer[1:5]
    for key, tensor in [("a", aligned), ("a", aligned), ("a", shifted), ("b", aligned), ("a", shifted), ("a", None)]:
        kernels.launch(key, 7, {"t": tensor, "n": 3}, {"num_warps": 4}, (tensor,))
    assert [way for way, *_ in launches] == ["jit", "compiled", "jit", "jit", "compiled", "jit"]
    assert launches[0] == ("jit", (7,), {"t": aligned, "n": 3, "num_warps": 4})
    assert launches[1][1] == (7, 1, 1)
    assert launches[1][2][0] is aligned
    assert launches[1][2][1] == 3
    kernels.forget()
    kernels.launch("a", 7, {"t": aligned, "n": 3}, {}, (aligned,))
    assert launches[-1][0] == "jit"


def test_what_is_not_compiled_is_not_kept() -> None:
    launches: list[Any] = []
    kernels = CompiledKernels(FakeKernel(launches, compiles=False))  # as under the interpreter
    for _ in range(2):
        kernels.launch("a", 1, {}, {})
    assert [way for way, *_ in launches] == ["jit"] * 2


@pytest.mark.parametrize("name", ["launch", "sums", "scale"])
def test_arguments_have_the_kernels_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch past the JIT passes them by position."""
    needs_interpreter()
    from siglip_kernels.backends.triton import launch, scale, sums

    module = {"launch": launch, "sums": sums, "scale": scale}[name]
    kernel, orders = module._kernels.kernel, []
    monkeypatch.setattr(module._kernels, "launch", lambda key, programs, how, *rest: orders.append(list(how)))
    x, partials = torch.zeros(16, 16), torch.zeros(3, 4)
    task = make_task(partials, None)._replace(x=x, y=x, workspace=torch.empty(99), pairs=PairSpec())
    if module is launch:
        monkeypatch.setattr(launch, "reduce_partials", lambda *arguments: None)
        launch.launch_block(launch.variant_of("sm_90", task._replace(x=x.half(), y=x.half())), task)
    elif module is sums:
        sums.sum_partials(task, partials)
    else:
        scale.launch(x, torch.ones(()), x.half())
    assert orders == [list(kernel.arg_names)]


def make_task(partials: Tensor, result: LossTask | None, **others: Any) -> BlockTask:
    features = torch.zeros(16, 16)
    sums = torch.full((4,), torch.nan, dtype=torch.float64)
    scale, bias = torch.tensor(11.3), torch.tensor(-9.0)
    return BlockTask(features, features, scale, bias, PairSpec(), sums, None, None, None, result=result, **others)


@pytest.mark.parametrize("parts", [1, 2048, 5000])
@pytest.mark.parametrize("dz_scale", [None, 8.0])
@pytest.mark.parametrize("loss_only", [False, True])
def test_sums_and_result(loss_only: bool, dz_scale: float | None, parts: int) -> None:
    """The same bits as by torch's kernels, in whose place it stands."""
    needs_interpreter()
    from siglip_kernels.backends.triton.sums import sum_partials

    partials, written = torch.randn(3, parts), 1 if loss_only else 3
    tasks = []
    for with_result in (True, True, False):
        result = LossTask(torch.empty(()), torch.empty(4), 5000, 70_001) if with_result else None
        scale = None if dz_scale is None else torch.tensor(dz_scale)
        tasks.append(make_task(partials, result)._replace(loss_only=loss_only, dz_scale=scale))
    by_kernel, by_torch, without = tasks
    sum_partials(by_kernel, partials)
    sum_partials(without, partials)
    reduce_partials(by_torch, partials, None)
    for task in (by_kernel, without):
        torch.testing.assert_close(task.sums[:written], partials[:written].double().sum(1), rtol=1e-14, atol=1e-12)
    expected, found = by_torch.result, by_kernel.result
    assert expected is not None
    assert found is not None
    assert torch.equal(found.loss, found.scalars[0])
    which = [0, 3] if loss_only else [0, 1, 2, 3]
    torch.testing.assert_close(found.scalars[which], expected.scalars[which], rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (700, 333)])
def test_scaling_rounds_as_torch_does(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    needs_interpreter()
    from siglip_kernels.backends.triton import scale

    monkeypatch.setattr(scale, "_works", {})
    accumulator, factor = torch.randn(shape), torch.tensor(0.37)
    accumulator[0, 0] = torch.nan
    expected = (accumulator * factor).half()
    for _ in range(2):  # the first is compared with torch
        out = torch.empty_like(expected)
        assert scale.scale_and_round(accumulator, factor, out)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fault", ["wrong at the end", "an exception"])
def test_scaling_that_does_not_work_is_left_to_torch(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_interpreter()
    from siglip_kernels.backends.triton import scale

    def launch(accumulator: Tensor, factor: Tensor, out: Tensor) -> None:
        if fault == "an exception":
            raise RuntimeError("no compiler")
        out.copy_(accumulator * factor)
        out[-1, -1] = 0

    monkeypatch.setattr(scale, "_works", {})
    monkeypatch.setattr(scale, "launch", launch)
    accumulator, factor = torch.randn(70, 33), torch.tensor(0.37)
    for _ in range(2):
        assert not scale.scale_and_round(accumulator, factor, torch.empty(70, 33, dtype=torch.float16))
