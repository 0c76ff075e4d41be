"""Train a small dual encoder on real images with the fused sigmoid loss, and classify held-out images by captions.

The images are scikit-learn's handwritten digits (1797 scans of 8×8 pixels), the captions say the digit in English,
Korean, German or Japanese, and the text tower reads their UTF-8 bytes. A batch holds many images of one class, so the
labels of the pairs come from ids: every caption of a 3 is positive for every image of a 3. The held-out images are then
classified as in zero-shot evaluation: by the nearest class embedding, the mean of a class's captions in one language.

    python examples/train_digits.py                   # the sigmoid loss (SigLIP, arXiv 2303.15343)
    python examples/train_digits.py --loss clip       # softmax over texts and over images, for comparison
    python examples/train_digits.py --freeze-image    # locked-image tuning (LiT, arXiv 2111.07991)
    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --parallel ddp    # or fsdp

It takes about half a minute on two CPU cores. The same seed and number of threads give the same numbers again. Several
processes, each with its part of every batch, give those of one up to rounding.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from siglip_kernels import SigmoidLoss

CLASSES = 10
CONTEXT = 36  # bytes at most in a caption
FEATURES = 64


class Language(NamedTuple):
    words: str  # of the digits from 0 to 9
    templates: tuple[str, ...]

    def captions(self) -> list[list[str]]:
        """[templates][CLASSES]"""
        return [[template.format(word) for word in self.words.split()] for template in self.templates]


LANGUAGES = {
    "English": Language(
        "zero one two three four five six seven eight nine",
        ("the digit {}", "a handwritten {}", "a scan of the number {}", "the number {}, written by hand"),
    ),
    "Korean": Language(
        "영 일 이 삼 사 오 육 칠 팔 구",
        ("숫자 {}", "손으로 쓴 숫자 {}", "종이에 쓴 {}의 사진", "손글씨 숫자 {}의 그림"),
    ),
    "German": Language(
        "Null Eins Zwei Drei Vier Fünf Sechs Sieben Acht Neun",
        ("die Ziffer {}", "eine handgeschriebene {}", "ein Bild der Zahl {}", "eine {}, von Hand geschrieben"),
    ),
    "Japanese": Language(
        "零 一 二 三 四 五 六 七 八 九",
        ("数字の{}", "手書きの{}", "紙に書かれた数字の{}", "{}という数字の画像"),
    ),
}


def tokenize(texts: Sequence[str]) -> Tensor:
    """[texts, CONTEXT] int64: UTF-8 bytes, then 0 as padding, a byte that no caption holds."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        encoded = text.encode()
        if len(encoded) > CONTEXT:
            raise ValueError(f"a caption may have {CONTEXT} bytes, {text!r} has {len(encoded)}")
        row[: len(encoded)] = torch.tensor(list(encoded))
    return tokens


class Batch(NamedTuple):
    images: Tensor  # [B, 1, 8, 8]
    tokens: Tensor  # [B, CONTEXT]
    labels: Tensor  # [B]


class Data(NamedTuple):
    """Images [·, 1, 8, 8] of about zero mean and unit variance, their labels [·], and the tokens of every caption."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    tokens: Tensor  # [languages, templates, CLASSES, CONTEXT]

    @classmethod
    def load(cls, device: torch.device) -> Data:
        """The same split whatever the seed: 1347 images to train on, 450 held out."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor((pixels - 4.9) / 6.0, dtype=torch.float32).view(-1, 1, 8, 8)
        train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
        captions = [tokenize(texts) for language in LANGUAGES.values() for texts in language.captions()]
        tokens = torch.stack(captions).unflatten(0, (len(LANGUAGES), -1))
        labels = torch.tensor(labels)
        return cls(*(t.to(device) for t in (images[train], labels[train], images[test], labels[test], tokens)))

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Random images, each with a caption of its class in a random language and template.

        Every process draws the same batch of ``batch_size`` and takes its part.
        """
        rank, world_size = place()
        generator = torch.Generator().manual_seed(seed)
        choices = len(self.train_labels), *self.tokens.shape[:2]
        for _ in range(steps):
            index, language, template = (
                torch.randint(n, (batch_size,), generator=generator)[rank::world_size].to(self.tokens.device)
                for n in choices
            )
            labels = self.train_labels[index]
            yield Batch(self.train_images[index], self.tokens[language, template, labels], labels)


class ImageTower(nn.Sequential):
    """[B, 1, 8, 8] to L2-normalised [B, FEATURES]: three convolutions and a projection."""

    def __init__(self) -> None:
        stem = nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()
        super().__init__(*stem, nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(1024, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(super().forward(images), dim=-1)


class TextTower(nn.Module):
    """Bytes [B, CONTEXT] to L2-normalised [B, FEATURES]: a two-layer transformer, averaged over the caption's bytes."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.projection = nn.Linear(width, FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.transformer(self.embedding(tokens) + self.position, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return F.normalize(self.projection((hidden * kept).sum(1) / kept.sum(1)), dim=-1)


class ClipLoss(nn.Module):
    """Softmax cross-entropy over texts and over images, called as :class:`SigmoidLoss` is.

    The target of a row is uniform over its positives (UniCL, arXiv 2204.03610); with all ids different that is CLIP's
    diagonal, which here would push an image of a 3 away from every other caption of a 3. The loss does not go below the
    entropy of the target: 2.5 for 12.8 positives. For one process.
    """

    logit_bias = None  # softmax does not see one

    def __init__(self, init_logit_scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def forward(
        self, image_features: Tensor, text_features: Tensor, *, image_ids: Tensor, text_ids: Tensor, process_group: None
    ) -> Tensor:
        logits = self.logit_scale.exp() * image_features @ text_features.T
        positive = (image_ids[:, None] == text_ids).to(logits.dtype)
        over_texts = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
        over_images = F.cross_entropy(logits.T, positive.T / positive.T.sum(1, keepdim=True))
        return (over_texts + over_images) / 2


class Classifier(nn.Module):
    """The image tower under a linear head; returns the loss of a batch."""

    def __init__(self, image_tower: nn.Module, features: int = FEATURES) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.head = nn.Linear(features, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.head(10 * self.image_tower(batch.images)), batch.labels)


class DualEncoder(nn.Module):
    """Both towers and the loss. One module, so that the gradients of the loss's scale and bias are averaged too."""

    def __init__(self, image_tower: ImageTower, text_tower: TextTower, loss_fn: SigmoidLoss | ClipLoss) -> None:
        super().__init__()
        self.image_tower, self.text_tower, self.loss_fn = image_tower, text_tower, loss_fn
        self.process_group = dist.group.WORLD  # None without torchrun

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this process's images against the texts of every process."""
        x, y = self.image_tower(batch.images), self.text_tower(batch.tokens)
        return self.loss_fn(x, y, image_ids=batch.labels, text_ids=batch.labels, process_group=self.process_group)


def place() -> tuple[int, int]:
    """(rank, world size)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device: torch.device) -> None:
    """The group of processes that torchrun has started: over gloo on the CPU, over NCCL with a GPU for each."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()


def parallel(model: nn.Module, how: str) -> nn.Module:
    """``model``, which from now on averages its gradients over the processes; "fsdp" shards its weights too."""
    if not dist.is_initialized():
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for tower in (model.image_tower, model.text_tower):
        fully_shard(tower, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def average(loss: Tensor) -> Tensor:
    """Over the processes, whose parts of a batch are of one size."""
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


class Progress:
    """One line kept up to date on a terminal, ten lines elsewhere; the loss is read back only to be shown."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.start = name, steps, time.monotonic()
        self.live = sys.stdout.isatty()
        self.every = max(1, steps // (100 if self.live else 10))

    def show(self, step: int, loss: Tensor) -> None:
        if place()[0] or (step % self.every and step != self.steps):
            return
        eta = (time.monotonic() - self.start) / step * (self.steps - step)
        line = f"{self.name}: step {step:4}/{self.steps}, loss {loss.item():8.4f}, ETA {eta:3.0f} s"
        print(f"\r{line}" if self.live else line, end="" if self.live and step < self.steps else "\n", flush=True)


def train(name: str, model: nn.Module, batches: Iterable[Batch], steps: int, lr: float) -> list[float]:
    """AdamW with warm-up and cosine decay on what is trainable in ``model``; returns the loss of each step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The loss's scale and bias, as every vector, are not decayed.
    decayed, others = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    progress, history = Progress(name, steps), []
    for step, batch in enumerate(batches, start=1):
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(average(loss.detach()))
        progress.show(step, history[-1])
    return torch.stack(history).tolist()


def train_classifier(image_tower: ImageTower, batches: Iterable[Batch], steps: int, lr: float) -> None:
    """Train the image tower alone, under a linear head that is then thrown away."""
    classifier = Classifier(image_tower).to(next(image_tower.parameters()))
    train("classifier", parallel(classifier, "ddp"), batches, steps, lr)
    image_tower.zero_grad()


@torch.no_grad()
def zero_shot_accuracy(image_tower: ImageTower, text_tower: TextTower, data: Data) -> dict[str, float]:
    """Of the held-out images, by language."""
    image_features = image_tower(data.test_images)
    text_features = text_tower(data.tokens.flatten(0, 2)).unflatten(0, data.tokens.shape[:3])
    classes = F.normalize(text_features.mean(1), dim=-1)  # [languages, CLASSES, FEATURES]
    predicted = (image_features @ classes.mT).argmax(-1)  # [languages, images]
    return dict(zip(LANGUAGES, (predicted == data.test_labels).float().mean(1).tolist(), strict=True))


class Report(NamedTuple):
    losses: list[float]  # of each step
    accuracy: dict[str, float]  # by language, on held-out images
    logit_scale: float  # t = exp(t')
    logit_bias: float | None
    image_parameters: int
    image_gradients: int  # how many of them the last step computed
    seconds: float

    def __str__(self) -> str:
        rows = "".join(f"{n:<9} {a:>8.1%}  {LANGUAGES[n].captions()[1][3]}\n" for n, a in self.accuracy.items())
        bias = "none" if self.logit_bias is None else f"{self.logit_bias:.3f}"
        return f"""
captions  accuracy  for example
{rows}
loss         {self.losses[0]:.4f} → {self.losses[-1]:.4f}
temperature  {self.logit_scale:.3f}
bias         {bias}
image tower  {self.image_parameters} parameters, {self.image_gradients} of them with a gradient
time         {self.seconds:.1f} s"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loss", choices=("sigmoid", "clip"), default="sigmoid")
    parser.add_argument("--freeze-image", action="store_true", help="train the image tower as a classifier, lock it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    # Towers this small are slower on more: 171 s with four threads on a shared machine, 20 s with two.
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun; fsdp is FSDP2")
    parser.add_argument("--save", type=Path, help="where to write the weights in the end")
    args = parser.parse_args(argv)
    processes = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if args.batch_size % processes:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of the number of processes, {processes}")
    if args.loss == "clip" and processes > 1:
        parser.error(f"--loss clip is for one process, got {processes}")
    return args


def main(argv: Sequence[str] | None = None) -> Report:
    args = arguments(argv)
    if dist.is_torchelastic_launched():
        join(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.monotonic()

    data = Data.load(args.device)
    image_tower, text_tower = ImageTower().to(args.device), TextTower().to(args.device)
    # b starts at the log odds of a positive pair: 1 in 10 here, 1 in 22,000 for SigLIP's −10.
    sigmoid = SigmoidLoss(init_logit_scale=10.0, init_logit_bias=-math.log(CLASSES - 1), parameter_shape=(1,))
    loss_fn = (sigmoid if args.loss == "sigmoid" else ClipLoss()).to(args.device)
    if args.freeze_image:
        steps = max(1, args.steps // 2)
        train_classifier(image_tower, data.batches(steps, args.batch_size, args.seed + 1), steps, args.lr)
        image_tower.requires_grad_(False)
    model = parallel(DualEncoder(image_tower, text_tower, loss_fn), args.parallel)
    losses = train("pairs", model, data.batches(args.steps, args.batch_size, args.seed), args.steps, args.lr)

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    report = Report(
        losses,
        zero_shot_accuracy(image_tower, text_tower, data),
        weights["loss_fn.logit_scale"].exp().item(),
        None if loss_fn.logit_bias is None else weights["loss_fn.logit_bias"].item(),
        sum(p.numel() for p in image_tower.parameters()),
        sum(p.numel() for p in image_tower.parameters() if p.grad is not None),
        time.monotonic() - start,
    )
    if place()[0] == 0:
        print(report)
        if args.save:
            torch.save(weights, args.save)
    if dist.is_initialized():
        dist.destroy_process_group()
    return report


if __name__ == "__main__":
    main()
