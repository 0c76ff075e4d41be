"""The sizes of ``python -m bench gpu``, by device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.microbenchmark.problems import FORWARD, FROZEN, Problem


@dataclass(frozen=True)
class Plan:
    """The sizes of ``python -m bench gpu``."""

    check_shapes: tuple[tuple[int, int, int], ...]  # M, N, D of the gradient check
    overflow_batch: int  # images and texts whose pairs overflow a 32-bit index
    block_problems: tuple[Problem, ...]  # the parts of their blocks are timed
    workspace_mib: tuple[float, ...]  # MiB of dz
    compared_problems: tuple[Problem, ...]  # the most interesting first, in case time runs out
    largest_problem: Problem


def make_plan(device: torch.device) -> Plan:
    """On a CPU the same steps at sizes that take seconds, to show that they run."""
    if device.type == "cpu":
        small = Problem(256, 32, torch.float32)
        return Plan(
            check_shapes=((127, 129, 33), (300, 200, 48)),
            overflow_batch=512,
            block_problems=(small,),
            workspace_mib=(0.125, 0.25),
            compared_problems=(
                Problem(128, 32, torch.float32),
                small,
                *(replace(small, mode=mode) for mode in (FORWARD, FROZEN)),
            ),
            largest_problem=Problem(2048, 32, torch.float32),
        )
    widths = (768, 1024, 1152)  # SigLIP's B/16, L/16, So400m
    batches = tuple(2**k for k in range(10, 19))
    first = [Problem(B, D, torch.bfloat16) for D in widths for B in (32_768, 65_536)]
    forms = [Problem(32_768, 768, torch.bfloat16, mode) for mode in (FORWARD, FROZEN)]
    sweep = [Problem(B, D, torch.bfloat16) for D in widths for B in batches]
    more = [Problem(B, 768, torch.bfloat16, mode) for mode in (FORWARD, FROZEN) for B in (4096, 262_144)]
    return Plan(
        check_shapes=((127, 129, 100), (1000, 3000, 768), (513, 700, 1024), (1100, 257, 1152)),
        overflow_batch=65_536,
        block_problems=tuple(Problem(65_536, D, torch.bfloat16) for D in widths),
        workspace_mib=(16, 32, 64, 128, 256, 512, 1024),
        compared_problems=tuple(dict.fromkeys([*first, *forms, *sweep, *more])),
        largest_problem=Problem(2**20, 768, torch.bfloat16),
    )
