"""``python -m hub OWNER/NAME OUT``: lays out in OUT what the hub's `kernels` loads, and what kernel-builder reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hub.layout import lay_out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hub", description=__doc__)
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the kernel's repository on the hub")
    parser.add_argument("out", type=Path, help="a new folder")
    chosen = parser.parse_args(arguments)
    if chosen.out.exists():
        parser.error(f"{chosen.out} exists")
    for variant in lay_out(chosen.repo_id, chosen.out):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
