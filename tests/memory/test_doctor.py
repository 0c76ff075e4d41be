"""``python -m siglip_kernels doctor``: its model of memory held to measurement, its constants to bench/results."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import load_module
from bench.harness.timing import MIB, peak_bytes
from bench.microbenchmark import contenders
from siglip_kernels import Teacher, backends, sigmoid_loss
from siglip_kernels.backends.eager import EagerBlockKernel, Workspace
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.distributed import Exchange
from siglip_kernels.memory import doctor, footprint
from siglip_kernels.memory.footprint import COPIES, Job
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
f32, bf16 = torch.float32, torch.bfloat16


# Measured peaks


def loss_of(form: str, rank: int, group: Any, world: int) -> Callable[..., Tensor]:
    """Of a form of the loss: ours by backend or exchange, a rival's name, or the path of open_clip's file."""
    if form in ("ring", "gather"):
        return partial(sigmoid_loss, process_group=Exchange(group, form))
    if form.startswith("ours "):
        return partial(sigmoid_loss, backend=form.removeprefix("ours "))  # type: ignore[arg-type]
    if form == "torch.compile":
        return torch.compile(contenders.eager_loss, dynamic=False)
    return contenders.eager_loss if form == "eager" else load_module(Path(form)).SigLipLoss(rank=rank, world_size=world)


def peak(rank: int, group: Any, form: str, job: Job) -> float:
    """Bytes above the inputs and their gradients, of steps after the first."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)  # what is freed leaves the process, and does not hide in a heap
    x, y = (torch.full((job.batch, job.D), job.D**-0.5, dtype=job.dtype, requires_grad=True) for _ in range(2))
    leaves = x, y, *(torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    loss_fn = loss_of(form, rank, group, job.ranks)
    if job.teacher:
        taught = (torch.full((job.batch, job.teacher), job.teacher**-0.5, dtype=job.dtype) for _ in range(2))
        loss_fn = partial(loss_fn, teacher=Teacher(*taught, 10.0, -10.0, 0.5))
    peaks = []
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        found = peak_bytes(lambda: loss_fn(*leaves).backward(), CPU)
        assert found is not None
        peaks.append(found - job.features)
    return statistics.median(peaks[1:])


def predicted(form: str, job: Job) -> int:
    """The same by the model."""
    if form in COPIES:
        return footprint.peak_materialised(job, form) - job.features
    backend = form.removeprefix("ours ") if form.startswith("ours ") else "auto"
    kernel = footprint.block_kernel(job) if backend == "auto" else backends.BACKENDS[backend]
    return footprint.peak_ours(job, kernel, gather=form == "gather") - job.features


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes of their own, for their malloc is told how to keep memory."""
    world = Ranks(2)
    yield world
    world.close()


def assert_as_measured(two: Ranks, form: str, job: Job, file: Path | None = None) -> None:
    found = max(two.run(job.ranks, peak, form if file is None else str(file), job))
    assert found > 3 * MIB, "too little to be told from noise"
    ratio = predicted(form, job) / found
    assert 0.9 <= ratio <= 1.1, f"{predicted(form, job) / MIB:.1f} MiB predicted, {found / MIB:.1f} measured"


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
SHAPES = [(1024, 768, f32), (3000, 192, bf16), (2048, 2048, f32)]


@needs_proc
@pytest.mark.parametrize("form", ["ours cpu", "ours eager", "eager"])
@pytest.mark.parametrize(("b", "D", "dtype"), SHAPES)
def test_one_process(two: Ranks, form: str, b: int, D: int, dtype: torch.dtype) -> None:
    job = Job(b, D, dtype, CPU)
    backend = form.removeprefix("ours ")
    if backend != form and (reasons := backends.why_not_prepared(backend, job.problem(b))):
        pytest.skip("; ".join(reasons))
    assert_as_measured(two, form, job)


@needs_proc
@pytest.mark.parametrize(("form", "ranks"), [("ours cpu", 1), ("ring", 2), ("gather", 2)])
@pytest.mark.parametrize(("b", "teacher", "dtype"), [(2048, 1152, f32), (2048, 512, bf16)])
def test_a_teacher(two: Ranks, form: str, ranks: int, b: int, teacher: int, dtype: torch.dtype) -> None:
    job = Job(b, 768, dtype, CPU, ranks, teacher=teacher)
    if reasons := backends.why_not_prepared("cpu", job.problem(b)):
        pytest.skip("; ".join(reasons))
    assert_as_measured(two, form, job)


@needs_proc
def test_torch_compile(two: Ranks) -> None:
    assert_as_measured(two, "torch.compile", Job(2048, 256, bf16, CPU))


@needs_proc
@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize(("b", "D", "dtype"), [(1024, 512, f32), (2048, 768, bf16)])
def test_two_ranks(two: Ranks, form: str, b: int, D: int, dtype: torch.dtype) -> None:
    assert_as_measured(two, form, Job(b, D, dtype, CPU, ranks=2))


@needs_proc
def test_open_clip_on_two_ranks(two: Ranks, open_clip_loss_file: Path) -> None:
    assert_as_measured(two, "eager", Job(2048, 512, f32, CPU, ranks=2), open_clip_loss_file)


# Where no measurement reaches


class Live(TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.alive:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return made


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_copies_of_eager_counted_without_the_device(device: str) -> None:
    """Its peak is in forward."""
    B, D = 4096, 4
    with FakeTensorMode(), torch.no_grad():
        x, y = (torch.empty(B, D, device=device) for _ in range(2))
        scalar = torch.empty((), device=device)
        with Live() as live:
            contenders.eager_loss(x, y, scalar, scalar)
        _, buffer = torch.ops.aten.log_sigmoid_forward(torch.empty(B, B, device=device))
    copies = COPIES["eager"][device]
    assert live.most / (4 * B * B) == pytest.approx(copies.peak, abs=0.01)
    # Labels and labels · logits are kept for backward, and the buffer.
    assert copies.kept == 2 + buffer.numel() / (B * B)


def test_what_autograd_keeps_of_eager() -> None:
    B, D = 512, 4
    x, y = (torch.ones(B, D, requires_grad=True) for _ in range(2))
    scalar = torch.ones((), requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = contenders.eager_loss(x, y, scalar, scalar)
    assert loss.requires_grad
    assert sum(n == B * B for n in kept.values()) == COPIES["eager"]["cpu"].kept


class Greedy(EagerBlockKernel):
    """Takes twice the workspace."""

    def workspace(self, problem: Any, R: int, C: int) -> Any:
        return Workspace(*(torch.empty(2, R, C) for _ in Workspace._fields))


def test_what_the_code_allocates_is_what_is_counted() -> None:
    job = Job(4096, 256, f32, CPU)
    more = footprint.peak_ours(job, Greedy()) - footprint.peak_ours(job, EagerBlockKernel())
    assert more == 3 * 1024 * 1024 * 4
    job, whole, half = Job(16_384, 64, bf16, CUDA), TritonBlockKernel(), TritonBlockKernel(dz_bytes=64 * MIB)
    pairs = [R * C for R, C in (kernel.block_shape(job.problem(job.batch)) for kernel in (whole, half))]
    more = footprint.peak_ours(job, whole) - footprint.peak_ours(job, half)
    assert 0 < more - 2 * (pairs[0] - pairs[1]) < MIB  # the rest is the sums of the tiles
    # Two text boxes, two sums and the node's own beside the ring of one level.
    one, nodes = (footprint.peak_ours(replace(job, ranks=64, nodes=n), half) for n in (1, 8))
    assert nodes - one == job.batch * job.D * (2 * 2 + 3 * 4)
    assert footprint.peak_ours(replace(job, ranks=8), half) == one


# Constants


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((ROOT / doctor.TIMES[0].source / "results.json").read_text())


def full(results: dict[str, Any], contender: str) -> list[dict[str, Any]]:
    rows = (row for row in results["rows"] if row["mode"] == "forward + backward" and row["times_ours"] is not None)
    return [row for row in rows if row["contender"] == contender]


@pytest.mark.parametrize("form", COPIES)
def test_copies_are_those_of_the_results(results: dict[str, Any], form: str) -> None:
    found = []
    for row in full(results, form):
        job = Job(row["B"], row["D"], doctor.DTYPES[row["dtype"]], CPU)
        narrow = COPIES[form]["cpu"].narrow * job.features / 2
        if job.batch >= 4096:
            found.append((row["peak_mib"] * MIB + job.features - narrow) / (job.batch**2 * job.dtype.itemsize))
    assert len(found) >= 4
    assert round(statistics.median(found)) == COPIES[form]["cpu"].peak, found


@pytest.mark.parametrize("times", doctor.TIMES, ids=lambda times: times.device)
def test_times_are_those_of_the_results(times: doctor.Times) -> None:
    results = json.loads((ROOT / times.source / "results.json").read_text())
    about = results["about"]
    assert (times.device, str(times.threads)) == (about["device"], about["threads"])
    assert (times.torch, times.commit) == (about["torch"], about["commit"])
    ours = f"ours ({times.kernel})"
    assert all(row["times_ours"] == 1 for row in full(results, ours))
    ratios = [
        {(row["dtype"], row["B"], row["D"]): round(row["times_ours"], 2) for row in full(results, form)}
        for form in ("eager", "torch.compile")
    ]
    assert times.rows == {key: (ratio, ratios[1][key]) for key, ratio in ratios[0].items() if key in ratios[1]}


@pytest.mark.parametrize("form", ["ours (triton)", "eager", "torch.compile"])
def test_peaks_on_a_gpu_are_those_of_the_results(form: str) -> None:
    """Of large problems: small ones allocate in pieces that the caching allocator rounds up."""
    results = json.loads((ROOT / doctor.TIMES[1].source / "results.json").read_text())
    rows = [row for row in full(results, form) if row["B"] >= 16_384]
    assert rows
    for row in rows:
        job = Job(row["B"], row["D"], doctor.DTYPES[row["dtype"]], CUDA)
        found = footprint.footprints(job, backends.BACKENDS["triton"], 2**40)[form]
        assert found.above / MIB == pytest.approx(row["peak_mib"], rel=0.05)


# What fits


@pytest.mark.parametrize("job", [Job(64, 768, bf16, CUDA, W, nodes) for W, nodes in ((1, 1), (8, 1), (64, 8))])
@pytest.mark.parametrize("memory", [2**28, 2**34, 80 * 2**30])
def test_the_largest_batch_fits_and_the_next_does_not(job: Job, memory: int) -> None:
    kernel = backends.BACKENDS["triton"]
    found = footprint.footprints(job, kernel, memory)
    assert len(found) == (3 if job.ranks == 1 else 4)
    for name, taken in found.items():
        assert taken.largest % 64 == 0
        totals = [
            footprint.footprints(replace(job, batch=max(1, taken.largest + more)), kernel, 0)[name].total
            for more in (0, 64)
        ]
        assert totals[0] <= memory < totals[1], (name, taken)


def test_nothing_fits() -> None:
    found = footprint.footprints(Job(64, 768, bf16, CUDA), backends.BACKENDS["triton"], 1024)
    assert [taken.largest for taken in found.values()] == [0, 0, 0]


def test_eager_takes_more_with_every_image() -> None:
    for form in COPIES:
        taken = [footprint.peak_materialised(Job(b, 64, f32, CUDA, ranks=2), form) for b in range(1, 4000, 37)]
        assert taken == sorted(taken)
