"""The documents: every block of Python runs, every diff applies, the site builds, and the README stays short."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bench.__main__
import siglip_kernels.__main__
from hub import layout
from siglip_kernels import Teacher, backends
from siglip_kernels.testing import make_inputs

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT) for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/guides/*.md")]
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRANSCRIPT = re.compile(r"^    \$ python (-m .*)\n((?:    .*\n|\n)+)", re.MULTILINE)
COMMAND = re.compile(r"python3? -m (siglip_kernels|bench) ([a-z]+)")
RULE = Path("docs/add-a-rule-for-pairs.md")  # runs on a copy of the package, to which its diffs were applied
B = 24


class Model(nn.Module):
    """Two linear towers on one batch; called on a micro-batch it returns what an encoder returns."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(10, 16), nn.Linear(12, 16)
        self.batch = torch.randn(B, 10), torch.randn(B, 12)

    def image_and_text_features(self) -> tuple[Tensor, Tensor]:
        return F.normalize(self.images(self.batch[0])), F.normalize(self.texts(self.batch[1]))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.images(images), self.texts(texts), torch.tensor(10.0), torch.tensor(-10.0)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take as given."""
    torch.manual_seed(0)
    x, y, t, b = (value.requires_grad_() for value in make_inputs(B, B, 16, torch.float32))
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    monkeypatch.setattr(backends, "NAMES", backends.NAMES)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    model = Model()
    yield {
        "image_features": x,
        "text_features": y,
        "logit_scale": t,
        "logit_bias": b,
        "x": x,
        "y": y,
        "t": t,
        "b": b,
        "labels": torch.arange(B) % 5,
        "caption_hash": torch.arange(B) % 20,
        "rank": 0,
        "world_size": 1,
        "group": dist.group.WORLD,
        "model": model,
        "teacher": Model(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "folder": tmp_path,
        "micro_batches": list(zip(*(part.split(8) for part in model.batch), strict=True)),
    }
    dist.destroy_process_group()


def blocks(page: Path) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def with_a_siglip_model(names: dict[str, Any]) -> None:
    """For the page on transformers, a tiny one."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**tower, "vocab_size": 20, "bos_token_id": None, "eos_token_id": None}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    names["model"] = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    names["batch"] = {"pixel_values": torch.randn(4, 3, 8, 8), "input_ids": torch.randint(20, (4, 6))}


def with_a_sentence_transformer(names: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from tests.integrations import sentences

    names["model"] = sentences.load(sentences.save(folder / "model"))
    names["args"] = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"), max_steps=1, report_to="none", save_strategy="no", use_cpu=True
    )
    names["train_dataset"] = sentences.pairs(16)
    names["SentenceTransformerTrainer"] = SentenceTransformerTrainer


def run(page: Path, names: dict[str, Any]) -> None:
    """The blocks of a page, one after the other, in one namespace."""
    if page.stem == "transformers":
        with_a_siglip_model(names)
    if page.stem == "sentence-transformers":
        with_a_sentence_transformer(names, names["folder"])
    if page.stem == "hub":
        pytest.importorskip("kernels", reason="needs the hub's library: pip install kernels")
        names["out"] = names["folder"] / "repository"
        layout.lay_out("someone/siglip-kernels", names["out"])
    for number, code in enumerate(blocks(page), start=1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != RULE], ids=str)
def test_every_block_runs(page: Path, names: dict[str, Any]) -> None:
    run(page, names)


def test_a_block_that_fails_is_seen(names: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page, names)


def test_what_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command after "$" prints begins with what stands below it."""
    transcripts = [found for page in PAGES for found in TRANSCRIPT.findall((ROOT / page).read_text())]
    assert transcripts
    for command, expected in transcripts:
        module, *arguments = shlex.split(command)[1:]
        assert module == "siglip_kernels"
        assert siglip_kernels.__main__.main(arguments) == 0
        assert capsys.readouterr().out.startswith(textwrap.dedent(expected).strip())


def test_commands_that_are_named_exist() -> None:
    named = {
        found for page in [*PAGES, Path("CONTRIBUTING.md")] for found in COMMAND.findall((ROOT / page).read_text())
    }
    known = {"siglip_kernels": {"info", "check", "build", "doctor"}, "bench": set(bench.__main__.VERBS)}
    assert [(module, verb) for module, verb in named if verb not in known[module]] == []
    assert {verb for module, verb in named if module == "siglip_kernels"} == known["siglip_kernels"]


def apply_diffs(page: Path, tree: Path) -> None:
    """Each hunk of the page at the first place where its old lines stand; a file has "--- path" above its hunks."""
    for diff in DIFF.findall((ROOT / page).read_text()):
        for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
            name, *hunks = part.split("\n@@\n")
            text = (tree / name).read_text()
            for hunk in hunks:
                lines = hunk.splitlines()
                old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] in kinds) for kinds in (" -", " +"))
                assert old in text, f"{name} does not have\n{old}"
                text = text.replace(old, new, 1)
            (tree / name).write_text(text)


def test_the_rule_for_pairs(tmp_path: Path) -> None:
    """Applied to a copy of the package, the page's rule is what its code says; without the rule that code fails."""
    for name in ("siglip_kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    apply_diffs(RULE, tmp_path)
    pairs = tmp_path / "siglip_kernels" / "pairs.py"
    right = pairs.read_text()
    for text in (right, right.replace("apart <= self.id_tolerance", "apart <= 0")):
        pairs.write_text(text)
        command = [sys.executable, "-c", "\n".join(blocks(RULE))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert (done.returncode == 0) == (text == right), done.stderr
        assert text == right or "not close" in done.stderr


def test_what_distillation_says_of_teachers(names: dict[str, Any]) -> None:
    run(Path("docs/guides/distillation.md"), names)
    assert isinstance(names["taught"], Teacher)
    assert names["loss"].requires_grad


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if page.name != "README.md" and str(page.relative_to("docs")) not in listed] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "guides" / "distillation" / "index.html").exists()
