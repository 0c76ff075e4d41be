"""The device that a command times on, as its arguments name it."""

from __future__ import annotations

import argparse

import torch

from siglip_kernels.__main__ import device_here

TIMED = ("cuda", "cpu")  # types of devices


def add_device(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--device", type=timed_device, help=help)


def device_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """The device that was asked for, by default the GPU; the parser's error where there is none."""
    if options.device is None and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu shows that the command runs")
    device: torch.device = options.device or torch.device("cuda")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # the clocks are those of the current device
    return device


def timed_device(name: str) -> torch.device:
    """As argparse's type: a device that is here and that the clocks know."""
    device = device_here(name)
    if device.type not in TIMED:
        raise argparse.ArgumentTypeError(f"device {name!r} is not timed here, only CUDA devices and the CPU are")
    return device
