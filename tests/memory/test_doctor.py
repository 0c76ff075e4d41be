"""``python -m siglip_kernels doctor``: its model of memory held to measurement, its constants to bench/results."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
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
from siglip_kernels.__main__ import main
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
SHAPES = [(1024, 768, f32), (3000, 1152, bf16), (2048, 2048, f32)]


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
    assert_as_measured(two, "torch.compile", Job(4096, 256, bf16, CPU))


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


# The command


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "base-patch16-224", "--batch", "65536", "--memory", "80GiB", "--reserved", "60 gib")
    assert "Batch 65,536; D = 768, bfloat16, cuda; memory 80.0 GiB - 60.0 GiB reserved = 20.0 GiB" in out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["eager"][-2] == "no"
    assert lines["torch.compile"][-2] == lines["ours (triton)"][-2] == "yes"
    assert "computed from what is allocated, as measured on an H200" in out
    if not torch.cuda.is_available():
        assert "Time: no measurement on this device: memory only." in out


def test_a_teacher_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "base", "--batch", "65536", "--memory", "80GiB"
    plain, taught = (printed(capsys, *arguments, *more) for more in ((), ("--teacher", "1152")))
    assert "D = 768, a teacher's 1,152, bfloat16" in taught
    assert "eager" not in taught
    ours = [next(line for line in out.splitlines() if line.startswith("ours (")).split() for out in (plain, taught)]
    assert int(ours[1][-1].replace(",", "")) < int(ours[0][-1].replace(",", ""))


def test_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--dim", "512", "--batch", "8192", "--memory", "80GB", "--world-size", "8"
    out = printed(capsys, *arguments)
    assert "ours (triton), ring " in out
    assert "ours (triton), gather " in out
    assert "8 ranks = 65,536" in out
    assert "ours (triton), ring over 2 nodes " in printed(capsys, *arguments, "--nodes", "2")


def test_time_only_of_this_very_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And of the backend that was measured, at the nearest batch."""
    monkeypatch.setattr(
        "siglip_kernels.memory.footprint.backends.choose", lambda name, problem: backends.BACKENDS["eager"]
    )
    arguments = "base", "--batch", "5000", "--device", "cpu"
    monkeypatch.setattr(doctor, "_device_name", lambda device: doctor.TIMES[0].device)
    assert "no measurement on this device" in printed(capsys, *arguments)
    monkeypatch.setattr(EagerBlockKernel, "name", "cpu")
    eager, compiled = doctor.TIMES[0].rows["bfloat16", 4096, 768]
    expected = f"B = 4,096, D = 768: eager takes {eager:.2f}× our time, torch.compile {compiled:.2f}×"
    assert expected in printed(capsys, *arguments)
    assert "no measurement" in printed(capsys, *arguments, "--dtype", "float16")
    assert "no measurement" in printed(capsys, *arguments, "--world-size", "2")
    monkeypatch.setattr(doctor, "_device_name", lambda device: "another")
    assert "no measurement" in printed(capsys, *arguments)


def test_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from siglip_kernels.__main__ import main\n"
        "main(['doctor', 'so400m-patch14-384', '--batch', '4096', '--world-size', '4', '--memory', '80GiB'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ours (" in done.stdout


@pytest.mark.parametrize(
    ("text", "D"),
    [("base", 768), ("large-patch16-256", 1024), ("google/siglip2-so400m-patch16-naflex", 1152), ("giant-opt", 1536)],
)
def test_model_shapes(text: str, D: int) -> None:
    assert doctor.model_dim(text) == D


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("80gb", 80 * 10**9), ("1.5 TiB", 3 * 2**39), ("512MiB", 2**29), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert doctor.parse_size(text) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (2**30, "1.0 GiB"), (1000 * 2**20, "1.0 GiB"), (999 * 2**20, "999 MiB")]
)
def test_readable_sizes(size: int, text: str) -> None:
    assert doctor.format_size(size) == text


SMALL = "--batch 8 --memory 8GiB"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("base --memory 8GiB", "--batch"),
        ("base --batch 0 --memory 8GiB", "--batch: '0' is no whole number from 1"),
        ("base --batch -4 --memory 8GiB", "--batch"),
        ("base --batch many --memory 8GiB", "'many'"),
        ("huge-patch16-224 " + SMALL, "unknown model shape 'huge-patch16-224'; expected base (768)"),
        ("base-patch " + SMALL, "unknown model shape"),
        (SMALL, "a MODEL-SHAPE or --dim"),
        ("base --dim 768 " + SMALL, "a MODEL-SHAPE or --dim"),
        ("base --batch 8 --memory 80", "'80' is no size"),
        ("base --batch 8 --memory lots", "'lots' is no size"),
        ("base --batch 8 --memory " + 400 * "9" + "GiB", "is no size"),
        ("base --batch 8 --memory 8GiB --reserved 8GiB", "--reserved 8.0 GiB leaves nothing of 8.0 GiB"),
        ("base --world-size 6 --nodes 4 " + SMALL, "--nodes 4 must divide --world-size 6"),
        ("base --dtype int8 " + SMALL, "int8"),
        ("base --device tpu " + SMALL, "tpu"),
    ],
)
def test_errors(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments.split()])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_memory_of_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "base", "--batch", "8"])
    assert "no CUDA device here: say --memory" in capsys.readouterr().err
    assert "memory" in printed(capsys, "base", "--batch", "8", "--device", "cpu")
