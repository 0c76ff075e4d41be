"""``python -m bench scaling``: on a given cluster, when the transfers of the distributed loss hide behind its products.

All of it is predicted by the model in ``scaling.py``. Every input is an assumption, but for a rate from ``--measured``.
``--validate`` holds the model against real processes on this machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import report, scaling_validation
from bench.problems import FORWARD, FULL, PRODUCTS
from bench.scaling import Cluster, Job, Link, finish
from bench.timing import MIB
from siglip_kernels.backends.base import DZ_BYTES
from siglip_kernels.ring import ENOUGH_TO_SPLIT

HIDDEN = 0.05  # of the total time: traffic that takes less counts as hidden
GLOBAL_BATCH = 2**20
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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


# Of the table; the files have all.
COLUMNS = {
    "W": ("GPUs", "{:,}"),
    "b": ("local batch", "{:,}"),
    "compute_ms": ("compute, ms", "{:,.3f}"),
    "ring_ms": ("flat ring, ms", "{:,.3f}"),
    "two_level_ms": ("two-level ring, ms", "{:,.3f}"),
    "gather_ms": ("gather, ms", "{:,.3f}"),
    "ring_exposed": ("flat exposed", "{:.1%}"),
    "two_level_exposed": ("two-level exposed", "{:.1%}"),
    "gather_exposed": ("gather exposed", "{:.1%}"),
    "ring_mib": ("flat, MiB", "{:,.0f}"),
    "two_level_mib": ("two-level, MiB", "{:,.0f}"),
    "gather_mib": ("gather, MiB", "{:,.0f}"),
}
RINGS = {"ring_exposed": "flat ring", "two_level_exposed": "two-level ring"}


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


def table(points: Sequence[Point]) -> str:
    cells = [[form.format(getattr(p, key)) for key, (_, form) in COLUMNS.items()] for p in points]
    return report.grid([title for title, _ in COLUMNS.values()], cells)


def markdown(about: dict[str, str], points: Sequence[Point]) -> str:
    """Everything; the same text serves the terminal."""
    hidden = []
    for W in dict.fromkeys(p.W for p in points):
        hidden.append([f"{W:,}"])
        for exposed in RINGS:
            b = hidden_from({p.b: getattr(p, exposed) for p in points if p.W == W})
            hidden[-1] += ["none", ""] if b is None else [f"{b:,}", f"{W * b:,}"]
    large = [p for p in points if p.W * p.b == GLOBAL_BATCH]
    splits = {
        name: ", ".join(f"{p.W:,} × {p.b:,}" for p in large if getattr(p, exposed) < HIDDEN)
        for exposed, name in RINGS.items()
    }
    sections = [
        "# The distributed loss on a cluster: predictions of a model (bench/scaling.py), not measurements",
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        f"## From which local batch of these a ring hides its traffic (exposed < {HIDDEN:.0%})",
        report.grid(("GPUs", *(f"{name}: {n} batch" for name in RINGS.values() for n in ("local", "global"))), hidden),
        f"## A global batch of {GLOBAL_BATCH:,}",
        "\n".join(
            f"- The {name} hides its traffic with GPUs × local batch of: {s or 'none of these'}."
            for name, s in splits.items()
        ),
        table(large) if large else "",
        "## All",
        table(points),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write(about: dict[str, str], points: Sequence[Point], folder: Path) -> list[Path]:
    """scaling.json, scaling.csv and scaling.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scaling.{kind}" for kind in ("json", "csv", "md")]
    predicted = [asdict(p) for p in points]
    paths[0].write_text(json.dumps({"about": about, "predicted": predicted}, indent=1, ensure_ascii=False) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [*predicted[0], *about])
        writer.writeheader()
        writer.writerows(point | about for point in predicted)
    paths[2].write_text(markdown(about, points))
    return paths


def plot(about: dict[str, str], points: Sequence[Point], folder: Path) -> list[Path]:
    """scaling.png: the exposed share of either ring against local batch, a colour for each W, and the time for a global
    batch of GLOBAL_BATCH against W; nothing without matplotlib."""
    plt = report.pyplot()
    if plt is None:
        return []
    worlds, large = sorted({p.W for p in points}), [p for p in points if p.W * p.b == GLOBAL_BATCH]
    figure, axes = plt.subplots(1, 2 + bool(large), figsize=(17 if large else 12, 5))
    axes[0].sharey(axes[1])
    for axis, (key, name) in zip(axes[:2], RINGS.items(), strict=True):
        for index, W in enumerate(worlds):
            mine = {p.b: 100 * getattr(p, key) for p in points if p.W == W}
            colour = plt.get_cmap("viridis")(index / max(1, len(worlds) - 1))
            axis.plot(sorted(mine), [mine[b] for b in sorted(mine)], "o-", color=colour, label=f"{W:,} GPUs")
        axis.axhline(100 * HIDDEN, color="grey", linewidth=0.8)
        axis.set(title=f"{name}: exposed communication, % of the time", xlabel="local batch")
    if large:
        for key, style in {"gather_ms": "x--", "ring_ms": "o-", "two_level_ms": "s-", "compute_ms": "k:"}.items():
            label = COLUMNS[key][0].removesuffix(", ms")
            axes[2].plot([p.W for p in large], [getattr(p, key) for p in large], style, label=label)
        axes[2].set(title=f"global batch {GLOBAL_BATCH:,}: time, ms", xlabel="GPUs", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"predicted by a model; {about['rate']}\n{about['cluster']}", fontsize=8, wrap=True)
    figure.tight_layout()
    path = folder / "scaling.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__)
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--tflops", type=float, help="an assumed rate of a block's operations")
    rate.add_argument("--measured", type=Path, metavar="DIR", help="the rate of ours in the results of bench in DIR")
    rate.add_argument("--validate", action="store_true", help="the model against real gloo processes; nothing else")
    parser.add_argument("--rounds", type=int, default=15, help="with --validate")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2**k for k in range(3, 13)], metavar="W")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[2**k for k in range(9, 15)], metavar="B", help="local"
    )
    parser.add_argument("--dim", type=int, default=768, metavar="D")
    parser.add_argument("--dtype", default="bfloat16", choices=ELEMENT_BYTES)
    parser.add_argument("--sum-bytes", type=int, default=4, choices=(2, 4), help="of text gradients between ranks")
    parser.add_argument("--forward", action="store_true", help="forward only")
    parser.add_argument("--own-split", type=float, default=0.5, help="share of the own block that is computed first")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra", type=float, nargs=2, default=(450, 5), metavar=("GB/s", "µs"), help="in a node")
    parser.add_argument("--inter", type=float, nargs=2, default=(50, 10), metavar=("GB/s", "µs"), help="a GPU, between")
    parser.add_argument("--overhead", type=float, default=20, help="µs of launches for each block or part of one")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.validate:
        return scaling_validation.main(options.rounds)
    mode = FORWARD if options.forward else FULL
    rate = Rate(f"assumed rate of {options.tflops} TFLOP/s, measured on no device", {1: options.tflops})
    if options.measured:
        try:
            rate = measured_rate(options.measured, mode, options.dtype, options.dim)
        except (OSError, ValueError) as error:
            print(f"--measured: {error}")
            return 1
    D, e, a = options.dim, ELEMENT_BYTES[options.dtype], 0 if options.forward else options.sum_bytes
    links = [Link(1e9 * bandwidth, 1e-6 * latency) for bandwidth, latency in (options.intra, options.inter)]
    cluster = Cluster(options.gpus_per_node, *links)
    flops = 2 * PRODUCTS[mode] * D

    def job(W: int, b: int) -> Job:
        own_split = options.own_split if a and b >= ENOUGH_TO_SPLIT else 1.0
        return Job(W, b, D, flops * b * b / (1e12 * rate.at(b)), 1e-6 * options.overhead, e, a, own_split)

    fastest = 1e12 * max(rate.tflops.values())
    bandwidths = links[0].bandwidth, links[1].bandwidth, cluster.gpus * links[1].bandwidth
    within, between, node = (f"{(e + a) * D * fastest / (flops * bandwidth):,.0f}" for bandwidth in bandwidths)
    each = "{:g} GB/s and {:g} µs"
    about = {
        "rate": rate.label,
        "cluster": f"assumed nodes of {cluster.gpus} GPUs, {each.format(*options.intra)} a GPU within, "
        f"{each.format(*options.inter)} a GPU between them, in each direction",
        "overhead": f"assumed {options.overhead:g} µs a block, counted as computation",
        "problem": f"{mode}, D = {D}, {options.dtype}, text gradients between ranks of {a} bytes an element",
        "own block": f"{options.own_split:g} of it first, the rest last; all of it first below a batch of "
        f"{ENOUGH_TO_SPLIT:,} and in forward only",
        "balance": "latencies apart, the products of a block take as long as its transfers over one link at a local "
        f"batch of {within} (within a node), {between} (between nodes); those of a node's {cluster.gpus} blocks as "
        f"long as the transfers of one between nodes at {node}",
    }
    large = [(W, GLOBAL_BATCH // W) for W in options.gpus if GLOBAL_BATCH % W == 0]
    shapes = sorted({*((W, b) for W in options.gpus for b in options.batches), *large})
    points = [predict(job(W, b), cluster) for W, b in shapes]
    paths = write(about, points, options.out) + plot(about, points, options.out)
    print(markdown(about, points))
    print("written: " + ", ".join(map(str, paths)))
    return 0
