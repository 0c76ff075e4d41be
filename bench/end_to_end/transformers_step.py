"""``python -m bench transformers``: a training step of Hugging Face's whole SigLIP, with its own loss and with ours.

Published shapes with random weights, pixels and tokens; weights in float32, the step under bfloat16
autocast, without an optimizer. Time and peak memory of forward and backward, timed in turns on one model. Needs
transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.devices import add_device_argument, device_from
from bench.harness.environment import environment
from bench.harness.progress import Progress
from bench.harness.tables import markdown_table
from bench.harness.timing import MIB, free_cached_memory, peak_bytes, spread, time_interleaved

# Hidden size, MLP size, heads, layers, image size, patch size.
MODELS = {
    "base-patch16-224": (768, 3072, 12, 12, 224, 16),
    "large-patch16-256": (1024, 4096, 16, 24, 256, 16),
    "so400m-patch14-384": (1152, 4304, 16, 27, 384, 14),
}
TINY = {"tiny": (64, 128, 2, 2, 16, 8)}  # on a CPU, to show that it runs
LOSSES = ("theirs", "ours")
TEXT_LENGTH, VOCABULARY = 64, 32_000


@dataclass(frozen=True)
class StepRow:
    model: str
    B: int
    checkpointing: bool
    loss: str
    ms: float | None = None  # median
    ms_low: float | None = None
    ms_high: float | None = None
    rounds: int = 0
    peak_mib: float | None = None  # above weights, inputs and what was held before the step
    note: str = ""


class ModelStep:
    """Forward and backward of one model, with the loss that ``use_loss`` chose last."""

    def __init__(self, name: str, B: int, device: torch.device, checkpointing: bool) -> None:
        from transformers import SiglipConfig, SiglipModel

        hidden_size, mlp_size, heads, layers, image_size, patch_size = {**MODELS, **TINY}[name]
        tower = {
            "hidden_size": hidden_size,
            "intermediate_size": mlp_size,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
        }
        text = {**tower, "vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
        config = SiglipConfig(
            text_config=text, vision_config={**tower, "image_size": image_size, "patch_size": patch_size}
        )
        self.model: Any = SiglipModel(config).to(device)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.device = device
        self.batch = {
            "pixel_values": torch.randn(B, 3, image_size, image_size, device=device),
            "input_ids": torch.randint(VOCABULARY, (B, TEXT_LENGTH), device=device),
            "return_loss": True,
        }

    def use_loss(self, loss: str) -> None:
        from siglip_kernels.integrations.transformers import fuse_loss, unfuse_loss

        (fuse_loss if loss == "ours" else unfuse_loss)(self.model)
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()


def measure_model(name: str, B: int, device: torch.device, checkpointing: bool, seconds: float) -> list[StepRow]:
    """A row for each loss; a loss that runs out of memory has a note instead of times."""
    step = ModelStep(name, B, device, checkpointing)
    peaks: dict[str, float | None] = {}
    for loss in LOSSES:
        free_cached_memory(device)
        try:
            step.use_loss(loss)
            step()  # warm-up
            step.use_loss(loss)
            peak = peak_bytes(step, device)
            peaks[loss] = None if peak is None else peak / MIB
        except torch.OutOfMemoryError:
            pass
    times = time_interleaved(dict.fromkeys(peaks, step), device, seconds, setup=step.use_loss)
    rows = []
    for loss in LOSSES:
        if loss in times:
            ms = spread([1000 * t for t in times[loss]])
            rows.append(StepRow(name, B, checkpointing, loss, *ms, rounds=len(times[loss]), peak_mib=peaks[loss]))
        else:
            rows.append(StepRow(name, B, checkpointing, loss, note="out of memory"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench transformers", description=__doc__)
    add_device_argument(parser, "cpu: a tiny model, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: 256 1024 4096, on a CPU 32")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep every activation")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each model and batch")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    device = device_from(parser, options)
    on_cpu = device.type == "cpu"
    names = list(TINY) if on_cpu else options.models
    batches = options.batches or ([32] if on_cpu else [256, 1024, 4096])
    rows: list[StepRow] = []
    progress = Progress(len(names) * len(batches))
    for name in names:
        for B in batches:
            rows += measure_model(name, B, device, not options.no_checkpointing, options.seconds)
            free_cached_memory(device)
            progress.advance(f"{name} B={B}")
            write(rows, device, options.out)  # after every batch, so that an interruption loses nothing
    print((options.out / "transformers.md").read_text(encoding="utf-8"))
    return 0


def write(rows: Sequence[StepRow], device: torch.device, folder: Path) -> None:
    import transformers

    about = {**environment(device), "transformers": transformers.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    values = [asdict(row) for row in rows]
    (folder / "transformers.json").write_text(json.dumps({"environment": about, "rows": values}, indent=1) + "\n")
    cells = [[f"{v:,.1f}" if isinstance(v, float) else "" if v is None else str(v) for v in r.values()] for r in values]
    head = "\n".join(f"- {name}: {value}" for name, value in about.items() if value)
    table = markdown_table(list(values[0]), cells)
    (folder / "transformers.md").write_text(f"{head}\n\n{table}\n", encoding="utf-8")
