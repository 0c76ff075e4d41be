"""``python -m bench scaling``: on a given cluster, when computation hides the transfers of the distributed loss.

All of it is predicted by the model in ``model.py``. Every input is an assumption, except a rate from ``--measured``.
``--validate`` compares the model with real processes on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.microbenchmark.problems import FORWARD, FULL, GEMMS
from bench.scaling import validation
from bench.scaling.model import Cluster, Link, Workload
from bench.scaling.prediction import BlockRate, measured_rate, predict
from bench.scaling.report import GLOBAL_BATCH, markdown, plot, write
from siglip_kernels.distributed.ring import MIN_IMAGES_TO_SPLIT

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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
        return validation.main(options.rounds)
    mode = FORWARD if options.forward else FULL
    rate = BlockRate(f"assumed rate of {options.tflops} TFLOP/s, measured on no device", {1: options.tflops})
    if options.measured:
        try:
            rate = measured_rate(options.measured, mode, options.dtype, options.dim)
        except (OSError, ValueError) as error:
            print(f"--measured: {error}")
            return 1
    D, e, a = options.dim, ELEMENT_BYTES[options.dtype], 0 if options.forward else options.sum_bytes
    links = [Link(1e9 * bandwidth, 1e-6 * latency) for bandwidth, latency in (options.intra, options.inter)]
    cluster = Cluster(options.gpus_per_node, *links)
    flops = 2 * GEMMS[mode] * D

    def workload(W: int, b: int) -> Workload:
        own_split = options.own_split if a and b >= MIN_IMAGES_TO_SPLIT else 1.0
        return Workload(W, b, D, flops * b * b / (1e12 * rate.at(b)), 1e-6 * options.overhead, e, a, own_split)

    fastest = 1e12 * max(rate.tflops.values())
    bandwidths = links[0].bandwidth, links[1].bandwidth, cluster.gpus_per_node * links[1].bandwidth
    gpus = cluster.gpus_per_node
    within, between, node = (f"{(e + a) * D * fastest / (flops * bandwidth):,.0f}" for bandwidth in bandwidths)
    each = "{:g} GB/s and {:g} µs"
    about = {
        "rate": rate.label,
        "cluster": f"assumed nodes of {gpus} GPUs, {each.format(*options.intra)} a GPU within, "
        f"{each.format(*options.inter)} a GPU between them, in each direction",
        "overhead": f"assumed {options.overhead:g} µs a block, counted as computation",
        "problem": f"{mode}, D = {D}, {options.dtype}, text gradients between ranks of {a} bytes an element",
        "own block": f"{options.own_split:g} of it first, the rest last; all of it first below a batch of "
        f"{MIN_IMAGES_TO_SPLIT:,} and in forward only",
        "balance": "latencies apart, the products of a block take as long as its transfers over one link at a local "
        f"batch of {within} (within a node), {between} (between nodes); those of a node's {gpus} blocks "
        f"as long as the transfers of one between nodes at {node}",
    }
    large = [(W, GLOBAL_BATCH // W) for W in options.gpus if GLOBAL_BATCH % W == 0]
    shapes = sorted({*((W, b) for W in options.gpus for b in options.batches), *large})
    points = [predict(workload(W, b), cluster) for W, b in shapes]
    paths = write(about, points, options.out) + plot(about, points, options.out)
    print(markdown(about, points))
    print("written: " + ", ".join(map(str, paths)))
    return 0
