"""Train a text tower and a projector onto a locked vision encoder of Hugging Face, with the fused sigmoid loss.

Locked-image tuning (LiT, arXiv 2111.07991) with the vision encoder swapped for a ``SiglipVisionModel``. Its pooled
output, normalised, is the image features as they are; the projector takes the text tower into the encoder's width. So
nothing on the image side wants a gradient, and the loss computes two matrix products instead of three. A projector on
the image side would want one.

No weights are downloaded: a small encoder is first trained as a classifier, then locked. Images and captions are those
of ``train_digits.py``. Where weights are at hand, ``SiglipVisionModel.from_pretrained`` takes the classifier's place.

    python examples/locked_tower.py

It takes about 35 s of one CPU core with ``--threads 1``, and needs transformers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_digits import (
    CLASSES,
    FEATURES,
    Classifier,
    Data,
    DualEncoder,
    Report,
    TextTower,
    train,
    zero_shot_accuracy,
)
from transformers import SiglipVisionConfig, SiglipVisionModel

from siglip_kernels import SigmoidLoss

CONFIG = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 4, "num_channels": 1}


class VisionTower(nn.Module):
    """[B, 1, ·, ·] to L2-normalised [B, hidden_size]: the encoder's pooled output for images resized to its size."""

    def __init__(self, encoder: SiglipVisionModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        size = self.encoder.config.image_size
        pixels = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return F.normalize(self.encoder(pixel_values=pixels).pooler_output, dim=-1)


class ProjectedTextTower(nn.Module):
    """Bytes [B, CONTEXT] to L2-normalised [B, width]: the text tower of ``train_digits.py`` under a projector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = TextTower()
        self.projector = nn.Sequential(nn.Linear(FEATURES, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.projector(self.tower(tokens)), dim=-1)


def locked(tower: VisionTower) -> VisionTower:
    """``tower``, which from now on wants no gradient and has none left over."""
    tower.zero_grad()
    return tower.requires_grad_(False).eval()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--classifier-steps", type=int, default=150, help="of the encoder before it is locked")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Report:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.monotonic()
    data = Data.load(args.device)

    image_tower = VisionTower(SiglipVisionModel(SiglipVisionConfig(**CONFIG, **PATCHES))).to(args.device)
    width = image_tower.encoder.config.hidden_size
    batches = data.batches(args.classifier_steps, args.batch_size, args.seed + 1)
    classifier = Classifier(image_tower, width).to(args.device)
    train("classifier", classifier, batches, args.classifier_steps, args.lr)

    # b starts at the log odds of a positive pair.
    loss_fn = SigmoidLoss(init_logit_scale=10.0, init_logit_bias=-math.log(CLASSES - 1))
    model = DualEncoder(locked(image_tower), ProjectedTextTower(width), loss_fn).to(args.device)
    losses = train("pairs", model, data.batches(args.steps, args.batch_size, args.seed), args.steps, args.lr)

    report = Report(
        losses,
        zero_shot_accuracy(image_tower, model.text_tower, data),
        loss_fn.logit_scale.exp().item(),
        loss_fn.logit_bias.item(),
        sum(p.numel() for p in image_tower.parameters()),
        sum(p.numel() for p in image_tower.parameters() if p.grad is not None),
        time.monotonic() - start,
    )
    print(report)
    return report


if __name__ == "__main__":
    main()
