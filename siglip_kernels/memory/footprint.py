"""How much memory a loss takes on every rank: eager, torch.compile of it, and ours. Runs nothing and needs no GPU.

Each of W ranks has b images and b texts of D features. The formulae count elements of the features' dtype, at the peak
of forward and backward, above the inputs, with the gradients that exist by then:

eager            max((5 + 3·(W - 1))·b² + (2·W - 1)·b·D, b² + 3·b·D, 4·b·D); on CUDA 4 and 2 in place of 5 and 3
torch.compile    max(W·b² + 2·W·b·D, 4·b·D)
ours             max(accumulators + dz + workspace + copies of operands + what the exchange holds,
                 accumulators + gradients), each in its own dtype. If the dtypes are equal, the accumulators become the
                 gradients; else, on the CPU, rounding adds a chunk of 2 MiB

eager is open_clip's SigLipLoss ("bidir", "shift"). At its peak it holds logits, labels, their product, logsigmoid and,
only on the CPU, logsigmoid's buffer. Autograd keeps labels, product and buffer of every block, its texts, and the
scaled images. torch.compile of the loss of one block keeps the logits and overwrites them with their gradient.

Ours is not a formula: the objects that hold the buffers are built on the meta device, and their allocations are
counted. All is tested against measurements on the CPU and on an H200 (tests/memory/test_doctor.py).
Libraries, the CUDA context, and freed memory that an allocator keeps are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from siglip_kernels import backends
from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.backends.triton import DTYPES as TRITON_DTYPES
from siglip_kernels.distributed.ring import GradRing, RingAxis, RingTopology, TextRing, TextShard
from siglip_kernels.gradients import CPU_CHUNK
from siglip_kernels.request import NeedsGrad, Request
from siglip_kernels.schedule import BlockLoop

BATCH_MULTIPLE = 64  # the largest batch is a multiple of this
GLOO_SEGMENTS = 2 * 2**20  # bytes on top of gloo's copy: 1.9 MiB were measured, at two sizes


class Copies(NamedTuple):
    """What a loss that materialises its logits holds at its peak, on one process."""

    peak: int  # of [b, b]
    kept: int  # of [b, b], from forward to backward: what every further block adds
    narrow: int  # of [b, D]


# On the CPU the peak, in whole copies, is the median over the rows of bench/results/amd-epyc-avx512-2-threads (commit
# c539c1e) with every gradient and B ≥ 4096.
COPIES = {
    "eager": {"cpu": Copies(5, 3, 1), "cuda": Copies(4, 2, 1)},
    "torch.compile": {"cpu": Copies(1, 1, 2), "cuda": Copies(1, 1, 2)},
}


@dataclass(frozen=True)
class Job:
    """One training step, as one rank sees it."""

    batch: int  # images, and texts, of a rank
    D: int
    dtype: torch.dtype
    device: torch.device
    ranks: int = 1
    nodes: int = 1  # of the ring; 1: it has one level
    teacher: int = 0  # features of a teacher; 0: none

    @property
    def features(self) -> int:
        """Bytes of the images and texts of a rank; their gradients are as large."""
        return 2 * self.batch * self.D * self.dtype.itemsize

    @property
    def inputs(self) -> int:
        """Bytes of a rank's images and texts, and of their teacher's."""
        return self.features + 2 * self.batch * self.teacher * self.dtype.itemsize

    def problem(self, texts: int) -> Problem:
        """The rank's images against ``texts`` texts."""
        has_weights = self.teacher > 0
        return Problem(
            self.batch, texts, self.D, self.dtype, self.device, has_weights=has_weights, teacher_width=self.teacher
        )


class Footprint(NamedTuple):
    """Bytes on a rank, and the largest batch."""

    above: int  # above the inputs and their gradients
    total: int  # inputs and gradients included
    largest: int  # batch of a rank that fits; 0: none


Peak = Callable[[Job], int]  # bytes above the inputs, gradients included


def footprints(job: Job, kernel: BlockKernel, memory: int) -> dict[str, Footprint]:
    """The footprint of every form of the loss, by name. ``memory``: bytes for inputs, gradients and all between."""
    # Nobody has counted the copies of an eager loss with a teacher.
    peaks: dict[str, Peak] = {form: partial(peak_materialised, form=form) for form in COPIES if not job.teacher}
    name = f"ours ({kernel.name})"
    if job.ranks == 1:
        peaks[name] = partial(peak_ours, kernel=kernel)
    else:
        peaks[f"{name}, ring" + f" over {job.nodes} nodes" * (job.nodes > 1)] = partial(peak_ours, kernel=kernel)
        peaks[f"{name}, gather"] = partial(peak_ours, kernel=kernel, gather=True)
    found = {}
    for form, peak in peaks.items():
        taken = peak(job)
        found[form] = Footprint(taken - job.features, taken + job.inputs, largest_batch(peak, job, memory))
    return found


def block_kernel(job: Job) -> BlockKernel:
    """Our block kernel for the job. If no CUDA device is here: the kernel for an A100 or later."""
    if job.device.type == "cuda" and not torch.cuda.is_available():
        return backends.BACKENDS["triton" if job.dtype in TRITON_DTYPES else "eager"]
    return backends.choose("auto", job.problem(job.batch))


def largest_batch(peak: Peak, job: Job, memory: int) -> int:
    """A rank's batch, a multiple of 64, that fits into ``memory`` bytes; the next multiple does not. 0: none fits."""

    def fits(multiple: int) -> bool:
        tried = replace(job, batch=multiple * BATCH_MULTIPLE)
        return tried.inputs + peak(tried) <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * BATCH_MULTIPLE


def peak_materialised(job: Job, form: str) -> int:
    """The peak of eager or of torch.compile, by the formulae above."""
    copies, others = COPIES[form][job.device.type], job.ranks - 1
    wide, narrow = job.batch**2, job.batch * job.D
    at_peak = (copies.peak + copies.kept * others) * wide + (copies.narrow + 2 * others) * narrow
    return max(at_peak, wide + 3 * narrow, 4 * narrow) * job.dtype.itemsize


def peak_ours(job: Job, kernel: BlockKernel, gather: bool = False) -> int:
    """The peak of sigmoid_loss with every gradient, equal batches, no ids or weights; ``gather``: over one group.

    A teacher's features have the dtype of the student's.
    """
    b, D, W = job.batch, job.D, job.ranks
    x = torch.empty(b, D, dtype=job.dtype, device="meta")
    scale = torch.empty((), dtype=torch.float32, device="meta")
    of_teacher = (x.new_empty(b, job.teacher),) if job.teacher else ()
    held: list[Any] = []
    exchanged = 0  # after the last block's operands are freed
    with _AllocationCounter(x, scale, *of_teacher) as made:
        problem = job.problem(b * W if gather else b)
        loop = BlockLoop(kernel, problem, Request(x, x, scale, scale), NeedsGrad())
        held.append(loop.new_rows(b))
        if gather:
            held += [x.new_empty(b * W, D), x.new_empty(b * W, job.teacher), loop.new_rows(b * W)]
            if job.device.type == "cpu":  # gloo's reduce_scatter works on a copy
                exchanged = b * W * D * loop.dtype.itemsize + GLOO_SEGMENTS
        elif W > 1:
            topology = RingTopology(
                outer=RingAxis(size=job.nodes),
                inner=RingAxis(size=W // job.nodes),
                sizes=[b] * W,
                needs_text_grad=[True] * W,
                grad_dtype=loop.dtype,
                grad_scale=scale,
            )
            held += [TextRing(topology, TextShard(x, None, None, teachers=of_teacher)), GradRing(topology, loop)]
    accumulators = 2 * b * D * loop.dtype.itemsize
    backward = accumulators
    if loop.dtype is not job.dtype:
        chunk = CPU_CHUNK if job.device.type == "cpu" else 0
        backward += job.features + min(chunk, b * D) * loop.dtype.itemsize
    return max(made.bytes() + max(_operand_bytes(loop, kernel), exchanged), backward)


def _operand_bytes(loop: BlockLoop, kernel: BlockKernel) -> int:
    """Bytes of the copies that the block kernel takes instead of the features: widened, or with aligned rows."""
    (R, C), problem = loop.block_shape, loop.problem
    if loop.operand is not problem.dtype:
        # On one side, a block's copy is made while the previous block's copy still exists.
        further = max(R if R < problem.M else 0, C if C < problem.N else 0)
        return (R + C + further) * problem.D * loop.operand.itemsize
    if kernel.pads_to_alignment and problem.D % 16:
        return (R + C) * -(-problem.D // 16) * 16 * loop.operand.itemsize
    return 0


class _AllocationCounter(TorchFunctionMode):
    """Makes tensors on the meta device inside it, and counts their bytes, except those of ``given``."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._given = {t.untyped_storage()._cdata for t in given}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs or function is torch.empty:
            kwargs["device"] = "meta"
        made = function(*args, **kwargs)
        if isinstance(made, Tensor):
            storage = made.untyped_storage()
            self._storages[storage._cdata] = storage
        return made

    def bytes(self) -> int:
        return sum(storage.nbytes() for key, storage in self._storages.items() if key not in self._given)
