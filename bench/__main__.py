"""``python -m bench``: gradient check, then ours compared with the floor and the baselines; table, CSV, Markdown, plot.

``python -m bench gpu``: everything to know about a GPU. ``python -m bench sweep``: which configuration to ship on it.
``python -m bench static``: registers, spills and instructions of the kernels, without a GPU.
``python -m bench readme``: the README's tables.
``python -m bench scaling``: what a model says of a cluster. ``python -m bench transformers``: whole models' steps.
``python -m bench study``: sigmoid against softmax over batch sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.end_to_end import transformers_step
from bench.gpu import command as gpu
from bench.gpu import sweep
from bench.microbenchmark import command as microbenchmark
from bench.microbenchmark import readme
from bench.scaling import command as scaling
from bench.static import command as static
from bench.study import command as study
from siglip_kernels import console

VERBS = {
    "gpu": gpu.main,
    "readme": readme.main,
    "scaling": scaling.main,
    "static": static.main,
    "study": study.main,
    "sweep": sweep.main,
    "transformers": transformers_step.main,
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in VERBS:
        return VERBS[arguments[0]](arguments[1:])
    return microbenchmark.main(arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(console.run(main))
