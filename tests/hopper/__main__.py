"""``python -m tests.hopper source --problems 1000``: random problems for the kernels on the emulated Hopper.

``source``: the CUDA kernel by the host's compiler; ``ptx``: from NVRTC's PTX; ``triton``: every shipped Triton kernel.
Prints each mismatch, race and deadlock; the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import torch

from tests.hopper import sm90, triton_kernel
from tests.hopper.problems import Outcome


def triton_problems(seeds: range) -> Iterator[Outcome]:
    for variant in triton_kernel.shipped():
        yield from triton_kernel.random_blocks(variant, seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hopper", description=__doc__)
    parser.add_argument("kernels", choices=("source", "ptx", "triton"))
    parser.add_argument("--problems", type=int, default=100, help="of the kernel, or of each variant (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(options.seed, options.seed + options.problems)
    outcomes = {
        "source": lambda: sm90.random_blocks(sm90.from_source(), seeds, sm90.KINDS),
        "ptx": lambda: sm90.random_blocks(sm90.from_ptx(), seeds, sm90.KINDS),
        "triton": lambda: triton_problems(seeds),
    }[options.kernels]()
    start, count, failed = time.perf_counter(), 0, 0
    for what, wrong in outcomes:
        count += 1
        if wrong is not None:
            failed += 1
            print(f"{what}: {wrong}", flush=True)
    print(f"{count} problems, {failed} failed, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
