"""``python -m bench scaling --validate``: the model against real processes over gloo on this machine.

Every round measures transfers and a block's computation on all ranks at once, then the real exchanges, which the model
predicts from the former. Ranks have one thread each and share the machine: transfers that the model overlaps with
computation for free slow it down here, the more the fewer cores there are.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from bench.harness.environment import environment
from bench.harness.tables import markdown_table
from bench.harness.timing import Spread, spread, time_interleaved
from bench.scaling.model import HopSeconds, RingModel, completion_times
from siglip_kernels import sigmoid_loss_and_grads
from siglip_kernels.distributed import Exchange
from siglip_kernels.distributed.ring import MIN_IMAGES_TO_SPLIT
from siglip_kernels.testing import make_inputs

CPU = torch.device("cpu")
ALGORITHMS = ("ring", "gather")
REPEATS = 5  # of a step in each round


class ValidationRow(NamedTuple):
    """One exchange in float32: medians over rounds of the slowest rank's times."""

    algorithm: str
    W: int
    b: int
    ping_us: float  # one element, one way
    ping_gb_s: float  # a rank's features, one way, latency included
    shift_us: float  # one element, every rank to the next at once
    shift_gb_s: float
    block_ms: float  # b × b pairs, on every rank at once
    predicted_ms: float
    measured_ms: float
    ratio: Spread  # measured / predicted, round by round


def predict(algorithm: str, block: Sequence[float], hop: float, latency: float, own_split: float) -> float:
    """Seconds; ``block``: of each rank. In float32 a hop takes as long for text gradients as for texts."""
    W = len(block)
    handshake = (W - 1) * latency
    if algorithm == "gather":
        return handshake + W * max(block) + 2 * (W - 1) * hop
    axis = HopSeconds(np.full(W, hop), np.full(W, hop))
    ring = RingModel(1, W, np.array(block)[:, None], axis, axis, own_split=own_split, handshake=handshake)
    return float(completion_times(ring).max())


def summarize(algorithm: str, b: int, D: int, ranks: Sequence[dict[str, list[float]]]) -> ValidationRow:
    """One row of the table; ``ranks``: for each rank the seconds of every step by round."""
    slowest = {name: [max(times) for times in zip(*(r[name] for r in ranks), strict=True)] for name in ranks[0]}
    blocks = zip(*(r["block"] for r in ranks), strict=True)
    own_split = 0.5 if b >= MIN_IMAGES_TO_SPLIT else 1.0
    predicted = [
        predict(algorithm, block, hop, latency, own_split)
        for block, hop, latency in zip(blocks, slowest["shift"], slowest["shift small"], strict=True)
    ]
    typical, gigabytes = {name: median(times) for name, times in slowest.items()}, 4e-9 * b * D
    return ValidationRow(
        algorithm,
        len(ranks),
        b,
        ping_us=1e6 * typical["ping small"] / 2,
        ping_gb_s=2 * gigabytes / typical["ping"],
        shift_us=1e6 * typical["shift small"],
        shift_gb_s=gigabytes / typical["shift"],
        block_ms=1e3 * typical["block"],
        predicted_ms=1e3 * median(predicted),
        measured_ms=1e3 * typical[algorithm],
        ratio=spread([m / p for m, p in zip(slowest[algorithm], predicted, strict=True)]),
    )


def measure_rank(rank: int, W: int, b: int, D: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step by round, all ranks at once; called by every rank of the default group."""
    inputs = make_inputs(b, b, D, torch.float32, seed=rank)
    buffers, small = torch.zeros(2, b * D), torch.zeros(2, 1)
    steps: dict[str, Callable[[], Any]] = {
        "ping small": partial(_ping, rank, small),
        "ping": partial(_ping, rank, buffers),
        "shift small": partial(_shift, rank, W, small),
        "shift": partial(_shift, rank, W, buffers),
        "block": partial(sigmoid_loss_and_grads, *inputs),
    }
    for algorithm in ALGORITHMS:
        steps[algorithm] = partial(sigmoid_loss_and_grads, *inputs, process_group=Exchange(None, algorithm))
    repeated = {name: partial(_repeat, step) for name, step in steps.items()}
    for step in repeated.values():
        step()
    times = time_interleaved(repeated, CPU, 0, rounds, rounds, setup=lambda name: dist.barrier())
    return {name: [t / REPEATS for t in rounds] for name, rounds in times.items()}


def _repeat(step: Callable[[], Any]) -> None:
    for _ in range(REPEATS):
        step()


def _ping(rank: int, buffers: Tensor) -> None:
    """From rank 0 to rank 1 and back; the other ranks do nothing."""
    for sender in (0, 1):
        if rank == sender:
            dist.send(buffers[0], 1 - rank)
        elif rank == 1 - sender:
            dist.recv(buffers[1], 1 - rank)


def _shift(rank: int, W: int, buffers: Tensor) -> None:
    """As in the ring: every rank sends to the next and receives from the previous one."""
    sent = dist.P2POp(dist.isend, buffers[0], (rank + 1) % W)
    received = dist.P2POp(dist.irecv, buffers[1], (rank - 1) % W)
    for work in dist.batch_isend_irecv([sent, received]):
        work.wait()


def _rank_main(rank: int, W: int, folder: str, batches: Sequence[int], D: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    times = [measure_rank(rank, W, b, D, rounds) for b in batches]
    Path(folder, f"{rank}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def run(W: int, batches: Sequence[int], D: int, rounds: int) -> list[ValidationRow]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank_main, (W, folder, batches, D, rounds), nprocs=W)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(W)]
    by_batch = zip(batches, zip(*ranks, strict=True), strict=True)
    return [summarize(algorithm, b, D, times) for b, times in by_batch for algorithm in ALGORITHMS]


def main(rounds: int, worlds: Sequence[int] = (2, 3, 4), batches: Sequence[int] = (64, 256, 1024), D: int = 768) -> int:
    load = f"{os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} CPUs"
    about = environment(CPU) | {"threads": "1 a rank", "load": load}
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print(f"float32, D = {D}, {rounds} rounds; ratio: measured / predicted, median [low-high] of rounds\n")
    trials = [t for W in worlds for t in run(W, batches, D, rounds)]
    cells = [
        [
            t.algorithm,
            str(t.W),
            f"{t.b:,}",
            *(f"{value:.3g}" for value in t[3:-1]),
            "{:.2f} [{:.2f}-{:.2f}]".format(*t.ratio),
        ]
        for t in trials
    ]
    print(markdown_table(ValidationRow._fields, cells))
    return 0
