"""Tiny models of sentence-transformers, made sentences and images, and runs of the library's Trainer."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from siglip_kernels.testing import relative_l2

Tensors = dict[str, Tensor]
WORDS = [f"w{i}" for i in range(60)]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
LENGTH, EDGE = 16, 16
BIAS = -2.0  # at which negatives count


def save(folder: Path, kind: str = "texts", width: int = 32, layers: int = 2, dropout: float = 0.0) -> Path:
    """A BERT, or with kind "images" a CLIP, that its configuration builds, where the library reads them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # CLIP's embedding of a text is that of its last token.
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **SPECIAL)
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(vocabulary), "max_position_embeddings": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "texts":
            dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
            BertModel(BertConfig(**text, **dropouts)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
            vision = {**shape, "patch_size": EDGE // 2, "image_size": EDGE}
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
            size = {"height": EDGE, "width": EDGE}
            CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


def load(folder: Path) -> SentenceTransformer:
    transformer = Transformer(str(folder))
    modules: list[nn.Module] = [transformer]
    if transformer.module_output_name == "token_embeddings":
        modules.append(Pooling(transformer.get_embedding_dimension()))
    return SentenceTransformer(modules=modules, device="cpu")


def pairs(size: int = 40, negatives: int = 0, images: bool = False, labels: bool = False) -> Dataset:
    """Sentences of two to ten words, each a tuple's; anchors may be images. Two neighbours have one label."""
    generator = random.Random(0)
    pixels = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 10)))

    def image() -> Image.Image:
        return Image.fromarray(pixels.integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8))

    columns: dict[str, list[Any]] = {"anchor": [image() if images else sentence() for _ in range(size)]}
    for name in ("positive", *(f"negative_{i}" for i in range(negatives))):
        columns[name] = [sentence() for _ in range(size)]
    if labels:
        columns["label"] = [i // 2 for i in range(size)]
    return Dataset.from_dict(columns)


class Materialised(nn.Module):
    """The loss in plain torch: every logit, and every label."""

    def __init__(self, model: Any, equal_labels: str = "negative") -> None:
        super().__init__()
        self.model = model
        self.equal_labels = equal_labels
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(BIAS))

    def forward(self, sentence_features: Any, labels: Tensor | None) -> Tensor:
        x, *texts = (F.normalize(self.model(column)["sentence_embedding"]) for column in sentence_features)
        z = self.logit_scale.exp() * x @ torch.cat(texts).T + self.logit_bias
        is_positive = torch.eye(*z.shape, dtype=torch.bool)
        terms = torch.ones_like(z)
        if self.equal_labels != "negative" and labels is not None:
            is_equal = F.pad(labels[:, None] == labels[None, :], (0, z.shape[1] - len(labels)))
            if self.equal_labels == "positive":
                is_positive = is_equal
            else:
                terms = torch.where(is_equal & ~is_positive, 0.0, 1.0)
        return (F.softplus(torch.where(is_positive, -z, z)) * terms).sum() / len(x)


def train(
    make_loss: Callable[[Any], nn.Module], folder: Path, data: Dataset, batch: int = 8, **options: Any
) -> tuple[Tensors, list[float]]:
    """20 steps: every weight, scale and bias among them, and the logged losses."""
    model = load(folder)
    loss = make_loss(model)
    with tempfile.TemporaryDirectory() as output:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output,
            max_steps=20,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            learning_rate_mapping={"logit_": 1e-2},
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=loss)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append(trainer.evaluate()["eval_loss"])
    return weights(loss), losses


def weights(loss: nn.Module) -> Tensors:
    """By the names of the materialised loss; without what no output depends on, whose gradient is rounding or none."""
    found = {name.removeprefix("scalars."): p.detach() for name, p in loss.named_parameters()}
    found = {name.replace("model.module.", "model."): t for name, t in found.items()}
    return {name: t for name, t in found.items() if not name.endswith(("key.bias", "k_proj.bias")) and t.any()}


def worst(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys()
    return max(relative_l2(ours[name], theirs[name]) for name in theirs)


def as_rank(rank: int, world: int) -> None:
    """What a launcher tells accelerate; the process group is there already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
