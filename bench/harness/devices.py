"""The device that a command times on, as its arguments name it."""

from __future__ import annotations

import argparse

import torch

from siglip_kernels.__main__ import available_device

TIMED_DEVICE_TYPES = ("cuda", "cpu")  # that bench.harness.timing has clocks for


def add_device_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--device", type=timed_device, help=help)


def device_from(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """The chosen device, by default the GPU; a parser error where there is none."""
    if options.device is None and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu shows that the command runs")
    device: torch.device = options.device or torch.device("cuda")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA events belong to the current device
    return device


def timed_device(name: str) -> torch.device:
    """An argparse type: a device that is present and that can be timed."""
    device = available_device(name)
    if device.type not in TIMED_DEVICE_TYPES:
        raise argparse.ArgumentTypeError(f"device {name!r} is not timed here, only CUDA devices and the CPU are")
    return device
