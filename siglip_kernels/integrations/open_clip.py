"""open_clip's factories and its training script, with our SigLipLoss instead of open_clip's.

    from siglip_kernels.integrations.open_clip import create_loss  # instead of: from open_clip import create_loss

    torchrun -m siglip_kernels.integrations.open_clip --siglip …   # instead of: torchrun -m open_clip_train.main

open_clip 3.3.0 builds the loss with ``create_loss``. Its git main (June 2026) builds a task that holds the loss, with
``create_task``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import open_clip  # type: ignore[import-not-found]
from torch import nn

from siglip_kernels.drop_in import SigLipLoss


def create_loss(args: Any) -> nn.Module:
    """Replaces ``open_clip.create_loss``: our loss for ``--siglip``, otherwise open_clip's own.

    Args:
        args: of the training script. rank, world_size and loss_dist_impl apply to our loss too.
    """
    return _ours(open_clip.create_loss(args))


def create_task(args: Any, model: nn.Module, *others: Any, **named: Any) -> nn.Module:
    """Replaces ``open_clip.create_task``: the same task, with our SigLipLoss."""
    task = open_clip.create_task(args, model, *others, **named)
    if hasattr(task, "loss"):
        task.loss = _ours(task.loss)
    return task


def main(argv: Sequence[str]) -> Any:
    """Run open_clip's training script. From then on it uses these factories instead of its own.

    Raises:
        RuntimeError: the script knows neither factory.
    """
    script = importlib.import_module("open_clip_train.main")
    factories = [factory for factory in (create_loss, create_task) if hasattr(script, factory.__name__)]
    if not factories:
        raise RuntimeError(
            "open_clip_train.main must build its loss by create_loss or create_task; that of open_clip "
            f"{open_clip.__version__} has neither"
        )
    for factory in factories:
        setattr(script, factory.__name__, factory)
    return script.main(argv)


def _ours(loss: Any) -> Any:
    """Our loss for open_clip's SigLipLoss, with its settings. Any other loss is unchanged."""
    if type(loss) is not open_clip.loss.SigLipLoss:
        return loss
    chunk_size = getattr(loss, "chunk_size", 0)  # only in its git main
    return SigLipLoss(loss.cache_labels, loss.rank, loss.world_size, loss.dist_impl, chunk_size)


if __name__ == "__main__":
    main(sys.argv[1:])
