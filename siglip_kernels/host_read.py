"""Reads a few values back to the host at a first call, which alone may wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def read(values: Tensor) -> list[float]:
    """``values`` [n] on the host, also where the user has made synchronisation an error."""
    if not values.is_cuda:
        return [float(value) for value in values.tolist()]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return [float(value) for value in values.tolist()]
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph, so that nothing can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
