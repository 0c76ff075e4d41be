"""The package as a kernel of the Hugging Face hub: `kernels` loads it beside the installed package."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hub import layout
from hub.__main__ import main

pytest.importorskip("kernels", reason="needs the hub's library: pip install kernels")
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

REPO_ID = "someone/siglip-kernels"
# Compares every copy with float64; prints each one's module, the operators that it called, its csrc and its library.
BESIDE_EACH_OTHER = """
import importlib, pkgutil, sys
from functools import partial
from pathlib import Path
import torch
from kernels import get_local_kernel
from torch.utils._python_dispatch import TorchDispatchMode
import siglip_kernels
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import make_inputs

class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        called.add(function.name())
        return function(*args, **(kwargs or {}))

def differentiate(loss_fn, dtype=torch.float32):
    leaves = [t.to(dtype).requires_grad_() for t in make_inputs(40, 24, 16, torch.float32)]
    loss = loss_fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

def sigmoid_loss(*leaves):
    with Operators():
        return copy.sigmoid_loss(*leaves)

gold = differentiate(sigmoid_loss_reference, torch.float64)
for copy in [siglip_kernels, *(get_local_kernel(Path(path)) for path in sys.argv[1:])]:
    if copy is not siglip_kernels:
        for module in pkgutil.walk_packages(copy.__path__, copy.__name__ + "."):
            importlib.import_module(module.name)
    called = set()
    compiled = torch.compile(copy.sigmoid_loss, backend="aot_eager", fullgraph=True)
    by_name = [partial(copy.sigmoid_loss, backend=name) for name in ("eager", "triton")]
    for loss_fn in (copy.sigmoid_loss, *by_name, compiled, sigmoid_loss):
        for ours, exact in zip(differentiate(loss_fn), gold, strict=True):
            assert (ours - exact).norm() <= 1e-6 * exact.norm(), (copy, loss_fn, ours, exact)
    build, kernels = (sys.modules[copy.__name__ + name] for name in (".build", ".backends.cuda.kernels"))
    if not kernels.nvrtc.why_not():
        assert kernels.nvrtc.compile_file(kernels.SOURCE, kernels.options(kernels.EVERY[0]))
    target = sys.modules[copy.__name__ + ".targets"].TARGETS["cpu"]
    library = next(build._candidate_folders(target, "compiler", [])).name
    print(copy.__name__, *(name for name in called if "siglip" in name), build.CSRC, library)
"""


def snapshot(repository: Path, cache: Path) -> Path:
    """As the hub's cache holds it: a folder of links to files that have their digests for names."""
    for path in repository.rglob("*"):
        place = cache / "snapshots" / "0" / path.relative_to(repository)
        if path.is_file():
            blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(blob)
    return cache / "snapshots" / "0"


def run(program: str, *arguments: object) -> str:
    """What a process of its own prints, in which nothing of this one's is loaded and no network is used."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(layout.ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "repository"
    assert main([REPO_ID, str(out)]) == 0
    return out


def test_copies_share_a_process(repository: Path, tmp_path: Path) -> None:
    """The installed package, a copy as the hub's cache holds it, and a copy of a version with other native code."""
    tree = tmp_path / "tree"
    for name in ("siglip_kernels", "csrc"):
        shutil.copytree(layout.ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tree / "csrc" / "cpu" / "params.h").open("a") as header:
        header.write("// another version\n")
    layout.lay_out(REPO_ID, tmp_path / "other", root=tree)
    first = snapshot(repository, tmp_path / "cache")
    lines = [line.split() for line in run(BESIDE_EACH_OTHER, first, tmp_path / "other").splitlines()]
    modules, operators, sources, libraries = zip(*lines, strict=True)
    assert modules[0] == "siglip_kernels"
    assert len(set(modules)) == 3
    assert operators == tuple(f"{module}::sigmoid_loss" for module in modules)
    assert Path(sources[1]).is_relative_to(first)
    assert Path(sources[2]).is_relative_to(tmp_path / "other")
    assert libraries[0] == libraries[1] != libraries[2], "one library for one content, another for another"


def test_the_layout_is_what_the_hub_reads(repository: Path) -> None:
    """By the parsers of `kernels` itself."""
    backends = {str(backend) for backend in Build.open(repository).general.backends}
    assert backends == set(layout.BACKENDS)
    variants = sorted(path for path in (repository / "build").iterdir() if path.is_dir())
    assert [path.name for path in variants] == sorted(f"torch-{backend}" for backend in layout.BACKENDS)
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.id.isidentifier()
        assert metadata.name.python_name == layout.PACKAGE
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    assert not (repository / "torch-ext" / layout.PACKAGE / "_ops.py").exists()  # kernel-builder writes it
    assert REPO_ID in (repository / "build" / "CARD.md").read_text(encoding="utf-8")


def test_older_versions_of_kernels(repository: Path) -> None:
    """They load the folder that has the kernel's name."""
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("by_hash", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.sigmoid_loss.__module__)
"""
    variant = repository / "build" / "torch-cpu"
    namespace = Metadata.read_from_file(variant / "metadata.json").id
    assert run(program, variant / layout.PACKAGE / "__init__.py").strip() == f"{namespace}.loss"


@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="`kernels benchmark` takes the GPU that torch is built for",
)
def test_the_benchmark_runs(repository: Path) -> None:
    program = """
import sys
from pathlib import Path
from kernels.cli.benchmark import run_benchmark_script
path = Path(sys.argv[1])
results, _ = run_benchmark_script(path / "benchmarks/benchmark.py", 1, 0, path, str(path), True, "local")
print(*(f"{name}:{result.verified}" for name, result in results.items()))
"""
    assert run(program, repository).split() == ["SigmoidLossBenchmark.large:True", "SigmoidLossBenchmark.small:True"]


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("loss.py", "from siglip_kernels import ops", "from . import ops"),
        ("loss.py", "from siglip_kernels.stats import SIZE", "from .stats import SIZE"),
        ("a/b.py", "if 1:\n  from siglip_kernels.c import (\n    d)", "if 1:\n  from ..c import (\n    d)"),
        ("a/__init__.py", "from siglip_kernels.a.b import c", "from ..a.b import c"),
        ("loss.py", "from siglip_kernels_of_others import x", "from siglip_kernels_of_others import x"),
        ("loss.py", 'x = "from siglip_kernels import y"', 'x = "from siglip_kernels import y"'),
    ],
)  # fmt: skip
def test_imports_become_relative(path: str, line: str, expected: str) -> None:
    assert layout.with_relative_imports(line, Path(path)) == expected


def test_an_import_without_a_relative_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.py:1: import siglip_kernels has no relative form"):
        layout.with_relative_imports("import siglip_kernels.stats\n", Path("loss.py"))


def test_a_folder_is_not_overwritten(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([REPO_ID, str(repository)])
    assert "exists" in capsys.readouterr().err
