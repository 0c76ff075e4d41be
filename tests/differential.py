"""Random calls of the loss against its definition in float64: arguments, backends, modes and kinds of tensors.

    python -m tests.differential --cases 20000 --seed 0

An error of a result is judged by a bound of its own, element by element: what rounding may do to each pair's term,
added up. So nothing is compared with a constant, and no pair hides behind another.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import time
from collections.abc import Sequence

import hypothesis
import torch

from tests.differential_bounds import expected, wrong
from tests.differential_calls import calls
from tests.differential_modes import FEATURES, MODES, SCALARS, Call
from tests.kinds import unwrapped


def judge(call: Call) -> list[str]:
    """What is wrong with the call's results."""
    loss, grads, stats = MODES[call.mode][1](call)
    dtype = call.arguments["image_features"].dtype
    if call.mode == "autocast" and dtype is not torch.float64:
        dtype = torch.bfloat16
    right = expected(call.arguments, dtype)
    found = [wrong("loss", loss, right, None)]
    if unwrapped(loss).dtype is not (torch.float64 if dtype is torch.float64 else torch.float32):
        found.append(f"loss: {loss.dtype}")
    names = [name for name, is_wanted in zip(FEATURES + SCALARS, call.wanted, strict=True) if is_wanted]
    if grads is not None and call.mode not in ("no_grad", "inference_mode"):
        found += [wrong(n, g, right, call.arguments[n]) for n, g in zip(names, grads, strict=True)]
    for name, got, value in zip(stats._fields if stats is not None else (), stats or (), right.stats, strict=False):
        got = unwrapped(got).double()
        if not torch.allclose(
            got, value.double(), rtol=1e-4, atol=1e-4 if dtype is torch.float64 else 3e-4, equal_nan=True
        ):
            found.append(f"{name}: {got}, expected {value}")
    return [line for line in found if line is not None]


def search(cases: int, seed: int, seen: collections.Counter[str] | None = None, shrink: bool = True) -> None:
    """An error with the smallest call found that goes wrong, or with the first one."""
    phases = [phase for phase in hypothesis.Phase if shrink or phase is hypothesis.Phase.generate]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls())
    def run(call: Call) -> None:
        if seen is not None:
            seen[call.mode] += 1
            seen.update(f"kind: {kind}" for kind in call.kinds.values())
        found = judge(call)
        assert not found, f"{call}: {'; '.join(found)}"

    run()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the calls are small
    begin, seen = time.perf_counter(), collections.Counter[str]()
    for seed in itertools.count(options.seed):  # a thousand at a time, so that what Dynamo keeps does not grow
        left = options.cases - 1000 * (seed - options.seed)
        if left <= 0:
            break
        search(min(left, 1000), seed, seen)
        print(f"seed {seed}: fine, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    kinds = {name: n for name, n in seen.items() if name.startswith("kind")}
    print(f"{seen.total() - sum(kinds.values()):,} calls, no mismatch; {dict(seen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
