"""Hugging Face's models in the published shapes with random weights, and batches of real images with captions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

Batch = dict[str, Any]
Tensors = dict[str, Tensor]
KINDS = ("siglip", "siglip2")
# At the start of training, and late in it: t, b.
REGIMES = {"init": (10.0, -10.0), "trained": (117.0, -12.9)}
VOCABULARY = 256  # bytes; the published ones have 32,000 and 256,000 tokens


@dataclass(frozen=True)
class Shape:
    """Both towers of a published model."""

    width: int
    intermediate: int
    heads: int
    depth: int  # layers a tower
    patch: int
    side: int  # patches a side
    length: int = 64  # tokens of a text


SHAPES = {
    "base-patch16-224": Shape(768, 3072, 12, 12, 16, 14),
    "large-patch16-256": Shape(1024, 4096, 16, 24, 16, 16),
    "so400m-patch14-384": Shape(1152, 4304, 16, 27, 14, 27),
}
TINY = Shape(32, 64, 2, 2, 8, 2, 16)


def build(kind: str, shape: Shape, depth: int, regime: str = "init", seed: int = 0) -> nn.Module:
    """A model in float32, with t and b of the regime."""
    common = {
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": depth,
    }
    text: dict[str, Any] = {**common, "vocab_size": VOCABULARY, "max_position_embeddings": shape.length}
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {**common, "patch_size": shape.patch}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if kind == "siglip":
            vision["image_size"] = shape.patch * shape.side
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        else:
            vision["num_patches"] = shape.side**2
            model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    scale, bias = REGIMES[regime]
    nn.init.constant_(model.logit_scale, math.log(scale))
    nn.init.constant_(model.logit_bias, bias)
    return model


def make_batch(kind: str, shape: Shape, size: int, seed: int = 0) -> Batch:
    """Windows of real photographs through the library's own image processor; the bytes of their captions."""
    generator = np.random.default_rng(seed)
    windows, captions = zip(*(window(generator) for _ in range(size)), strict=True)
    images: Batch
    if kind == "siglip":
        edge = shape.patch * shape.side
        images = SiglipImageProcessorPil(size={"height": edge, "width": edge})(list(windows), return_tensors="pt")
    else:
        processor = Siglip2ImageProcessorPil(patch_size=shape.patch, max_num_patches=shape.side**2)
        images = processor(list(windows), return_tensors="pt")
    ids = torch.ones(size, shape.length, dtype=torch.int64)  # 1 is padding
    for row, caption in zip(ids, captions, strict=True):
        read = caption.encode()[: shape.length]
        row[: len(read)] = torch.tensor(list(read))
    return {**images, "input_ids": ids, "return_loss": True}


def window(generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """A part of one of scikit-learn's two photographs, of any aspect, and what it is."""
    which = int(generator.integers(2))
    image = photographs()[which]
    height, width = (int(generator.integers(edge // 4, edge)) for edge in image.shape[:2])
    top, left = (int(generator.integers(a - b)) for a, b in zip(image.shape, (height, width), strict=False))
    name = ("temple", "flower")[which]
    return image[top : top + height, left : left + width], f"{width} × {height} of a {name}, {left} from the left"


@functools.cache
def photographs() -> list[np.ndarray]:
    return load_sample_images().images


def cast(batch: Batch, dtype: torch.dtype, device: torch.device | None = None) -> Batch:
    """Pixels in ``dtype``."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**moved, "pixel_values": moved["pixel_values"].to(dtype)}


class Float32Products(TorchDispatchMode):
    """bfloat16 products on the CPU as a device for them has them: of float32 sums, rounded once.

    Torch's own loops, where a CPU knows no bfloat16, do the same, far more slowly.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in args):
            return func(*args, **kwargs)
        return func(*(t.float() for t in args), **kwargs).bfloat16()


def rows(batch: Batch, part: slice | Tensor) -> Batch:
    return {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()}


def gradients(model: nn.Module, batch: Batch) -> Tensors:
    """The loss and, by name, every parameter's gradient; attention's packed biases in their three parts."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **parts({name: p.grad for name, p in model.named_parameters()})}


def parts(tensors: dict[str, Any]) -> Tensors:
    split: Tensors = {}
    for name, t in tensors.items():
        if name.endswith("in_proj_bias"):
            split |= dict(zip((f"{name}.{part}" for part in ("q_proj", "k_proj", "v_proj")), t.chunk(3), strict=True))
        else:
            split[name] = t
    return split


def is_key_bias(name: str) -> bool:
    """It adds the same to every logit of a query, which softmax does not see: its gradient is rounding alone."""
    return name.endswith(("k_proj.bias", "in_proj_bias.k_proj"))
