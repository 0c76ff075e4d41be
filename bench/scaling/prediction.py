"""What the model predicts for one size of the world and one local batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from bench.harness.timing import MIB
from bench.microbenchmark import report
from bench.scaling.model import Cluster, Job, finish
from siglip_kernels.backends.base import DZ_BYTES

HIDDEN = 0.05  # of the total time: traffic that takes less counts as hidden


@dataclass(frozen=True)
class Rate:
    """TFLOP/s of a block, by local batch."""

    label: str
    tflops: dict[int, float]

    def at(self, b: int) -> float:
        """Of the batch that is nearest to ``b``, by ratio."""
        return self.tflops[min(self.tflops, key=lambda B: abs(math.log(B / b)))]


def measured_rate(folder: Path, mode: str, dtype: str, D: int) -> Rate:
    """Of our fastest backend, from the results that ``bench`` wrote into ``folder``."""
    results = report.read(folder)
    tflops: dict[int, float] = {}
    for row in results.rows:
        ours = row.contender.startswith("ours") and not row.contender.endswith("graph")
        if ours and row.tflops and (row.mode, row.dtype, row.D) == (mode, dtype, D):
            tflops[row.B] = max(row.tflops, tflops.get(row.B, 0.0))
    if not tflops:
        raise ValueError(f"{folder} has no time of ours for {mode}, {dtype}, D = {D}")
    rates = ", ".join(f"{rate:,.3g} at B = {B:,}" for B, rate in sorted(tflops.items()))
    return Rate(f"measured on {results.about['device']}, TFLOP/s: {rates}", tflops)


@dataclass(frozen=True)
class Point:
    """What the model predicts for W ranks of b images and texts each. Exposed: beyond the computation, as a share."""

    W: int
    nodes: int  # of the ring of two levels; 1: it is the flat ring
    b: int
    compute_ms: float
    ring_ms: float
    ring_exposed_ms: float
    ring_exposed: float
    own_first_ms: float  # of the flat ring, had all of the own block been computed first
    own_last_ms: float
    two_level_ms: float
    two_level_exposed_ms: float
    two_level_exposed: float
    gather_ms: float
    gather_exposed: float
    ring_mib: float
    two_level_mib: float
    gather_mib: float


def predict(job: Job, cluster: Cluster) -> Point:
    """Memory is above the inputs, gradients included."""
    nodes = cluster.nodes(job.W)
    ring, two_level = job.ring(cluster), job.ring(cluster, nodes)
    variants = ring, replace(ring, own_split=1.0), replace(ring, own_split=0.0)
    flat, own_first, own_last = (1000 * float(finish(r).max()) for r in variants)
    levels = flat if nodes == 1 else 1000 * float(finish(two_level).max())
    compute, gather = 1000 * float(ring.compute().max()), job.gather(cluster)
    workspace = DZ_BYTES if job.sum_bytes else 0
    return Point(
        W=job.W,
        nodes=nodes,
        b=job.b,
        compute_ms=compute,
        ring_ms=flat,
        ring_exposed_ms=flat - compute,
        ring_exposed=1 - compute / flat,
        own_first_ms=own_first,
        own_last_ms=own_last,
        two_level_ms=levels,
        two_level_exposed_ms=levels - compute,
        two_level_exposed=1 - compute / levels,
        gather_ms=1000 * gather,
        gather_exposed=1 - job.gather_compute() / gather,
        ring_mib=(job.ring_bytes() + workspace) / MIB,
        two_level_mib=(job.ring_bytes(nodes) + workspace) / MIB,
        gather_mib=(job.gather_bytes() + workspace) / MIB,
    )


def hidden_from(exposed: dict[int, float]) -> int | None:
    """The least local batch from which on traffic is hidden, of those whose exposed share is given."""
    last = max((b for b, share in exposed.items() if share >= HIDDEN), default=0)
    return min((b for b in exposed if b > last), default=None)
