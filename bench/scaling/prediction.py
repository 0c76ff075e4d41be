"""What the model predicts for one size of the world and one local batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from bench.harness.timing import MIB
from bench.microbenchmark import report
from bench.scaling.model import Cluster, Workload, completion_times
from siglip_kernels.backends.gpu import DZ_BYTES

HIDDEN_BELOW = 0.05  # exposed communication below this share of the time counts as hidden


@dataclass(frozen=True)
class BlockRate:
    """TFLOP/s of a block by local batch."""

    label: str
    tflops: dict[int, float]

    def at(self, b: int) -> float:
        """The rate of the batch nearest to ``b`` by ratio."""
        return self.tflops[min(self.tflops, key=lambda B: abs(math.log(B / b)))]


def measured_rate(folder: Path, mode: str, dtype: str, D: int) -> BlockRate:
    """The rate of our fastest backend in the results that ``bench`` wrote into ``folder``."""
    results = report.read(folder)
    tflops: dict[int, float] = {}
    for row in results.rows:
        ours = row.contender.startswith("ours") and not row.contender.endswith("graph")
        if ours and row.tflops and (row.mode, row.dtype, row.D) == (mode, dtype, D):
            tflops[row.B] = max(row.tflops, tflops.get(row.B, 0.0))
    if not tflops:
        raise ValueError(f"{folder} has no time of ours for {mode}, {dtype}, D = {D}")
    rates = ", ".join(f"{rate:,.3g} at B = {B:,}" for B, rate in sorted(tflops.items()))
    return BlockRate(f"measured on {results.about['device']}, TFLOP/s: {rates}", tflops)


@dataclass(frozen=True)
class Prediction:
    """The prediction for W ranks with b images and b texts each. Exposed: not overlapped with computation."""

    W: int
    nodes: int  # of the two-level ring; 1: it is the flat ring
    b: int
    compute_ms: float
    ring_ms: float
    ring_exposed_ms: float
    ring_exposed: float
    own_first_ms: float  # of the flat ring with the whole own block computed first
    own_last_ms: float
    two_level_ms: float
    two_level_exposed_ms: float
    two_level_exposed: float
    gather_ms: float
    gather_exposed: float
    ring_mib: float
    two_level_mib: float
    gather_mib: float


def predict(workload: Workload, cluster: Cluster) -> Prediction:
    """Memory includes the gradients but not the inputs."""
    nodes = cluster.ring_nodes(workload.W)
    ring, two_level = workload.ring(cluster), workload.ring(cluster, nodes)
    variants = ring, replace(ring, own_split=1.0), replace(ring, own_split=0.0)
    flat, own_first, own_last = (1000 * float(completion_times(r).max()) for r in variants)
    levels = flat if nodes == 1 else 1000 * float(completion_times(two_level).max())
    compute, gather = 1000 * float(ring.compute_seconds().max()), workload.gather(cluster)
    workspace = DZ_BYTES if workload.sum_bytes else 0
    return Prediction(
        W=workload.W,
        nodes=nodes,
        b=workload.b,
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
        gather_exposed=1 - workload.gather_compute() / gather,
        ring_mib=(workload.ring_bytes() + workspace) / MIB,
        two_level_mib=(workload.ring_bytes(nodes) + workspace) / MIB,
        gather_mib=(workload.gather_bytes() + workspace) / MIB,
    )


def smallest_hidden_batch(exposed: dict[int, float]) -> int | None:
    """The smallest local batch in ``exposed`` from which on all traffic is hidden; None if there is none."""
    last = max((b for b, share in exposed.items() if share >= HIDDEN_BELOW), default=0)
    return min((b for b in exposed if b > last), default=None)
