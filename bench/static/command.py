"""``python -m bench static triton`` and ``static cuda``: registers, spills and instructions of the kernels.

``triton``: every shipped configuration, compiled for each architecture. ``cuda``: the kernels in csrc/cuda/, as NVRTC
compiles them. Needs no GPU; the exit status is 1 if a kernel has a problem.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from bench.static import cuda_report, triton_report
from siglip_kernels.backends.cuda import kernels
from siglip_kernels.backends.triton import configs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__)
    commands = parser.add_subparsers(dest="kernels", required=True, metavar="{triton,cuda}")
    commands.add_parser("cuda", help=cuda_report.__doc__, description=cuda_report.__doc__)
    triton = commands.add_parser("triton", help=triton_report.__doc__, description=triton_report.__doc__)
    triton.add_argument("--arch", choices=sorted(configs.SHARED_MEMORY), help="only this architecture")
    triton.add_argument("--every", action="store_true", help="with every kind of labels, weights and outputs")
    triton.add_argument("--variants", type=int, metavar="N", help="only N variants, spread evenly over all")
    triton.add_argument("--processes", type=int, default=2, help="how many compile at once (default 2)")
    triton.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return report_cuda() if options.kernels == "cuda" else report_triton(options)


def report_cuda() -> int:
    """Print the table; 1 if a kernel has a problem."""
    print(cuda_report.HEADER)
    rows = list(map(cuda_report.inspect, kernels.EVERY))
    print("\n".join(map(str, rows)))
    failed = sum(bool(row.problems()) for row in rows)
    print(f"{len(rows)} kernels, {failed} with problems")
    return int(failed > 0)


def report_triton(options: argparse.Namespace) -> int:
    """Print the table or JSON lines; 1 if a variant has a problem."""
    variants = [variant for variant in configs.shipped(options.every) if options.arch in (None, variant.arch)]
    if options.variants and options.variants < len(variants):
        variants = [variants[index * len(variants) // options.variants] for index in range(options.variants)]
    if not options.json:
        print(triton_report.HEADER)
    failed = 0
    for row in triton_report.inspect_variants(variants, options.processes):
        failed += bool(row.problems)
        print(_as_json(row) if options.json else triton_report.format_row(row), flush=True)
    if not options.json:
        print(f"{len(variants)} variants, {failed} with problems")
    return int(failed > 0)


def _as_json(row: triton_report.Row) -> str:
    resources = asdict(row.resources) if row.resources else None
    return json.dumps({"variant": str(row.variant), "resources": resources, "problems": row.problems})
