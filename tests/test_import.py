"""Importing the package: quick, without Triton, a compiler or a GPU, and blind to the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import siglip_kernels

PACKAGE = Path(siglip_kernels.__file__).parent

USE_IT = """
import torch
import siglip_kernels
x, y = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
loss = siglip_kernels.sigmoid_loss(x, y, 10.0, -10.0)
loss.backward()
assert loss.isfinite() and x.grad.isfinite().all()
print("fine")
"""


def run(program: str, **environment: str) -> str:
    """What ``program`` prints in an interpreter of its own, away from pytest's settings."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")}
    settings = {**inherited, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_little() -> None:
    """By count, which no busy machine changes; `python -m bench` says what it takes."""
    program = "import sys, torch; before = set(sys.modules); import siglip_kernels; print(*(set(sys.modules) - before))"
    modules = run(program).split()
    # 45 today, shlex and sysconfig among them: at most 2 ms each, torch itself takes 1000 ms and more.
    assert len(modules) <= 46, modules
    assert sum(not name.startswith("siglip_kernels") for name in modules) <= 8, modules
    added = {name.partition(".")[0] for name in modules}
    assert "siglip_kernels" in added
    assert not added & {"triton", "matplotlib", "sklearn", "transformers", "pytest"}, added
    assert not any(name.startswith(("torch._inductor", "torch._dynamo")) for name in modules), modules


@pytest.mark.parametrize("extra", ["import siglip_kernels", USE_IT])
def test_a_first_call_needs_no_triton(extra: str) -> None:
    """A module that is None in sys.modules cannot be imported: as on a machine without it."""
    blocked = "import sys\nsys.modules['triton'] = None\n"
    assert run(blocked + extra) in ("", "fine")


def test_triton_that_is_missing_is_a_reason() -> None:
    program = f"""
import sys
sys.modules['triton'] = None
{USE_IT}
try:
    siglip_kernels.sigmoid_loss(x, y, 10.0, -10.0, backend="triton")
except ValueError as error:
    print(error)
"""
    assert "backend='triton' cannot run this call: " in run(program)


def test_works_without_any_program_on_the_path() -> None:
    assert run(USE_IT, PATH="") == "fine"


def test_works_without_a_gpu() -> None:
    assert run(USE_IT, CUDA_VISIBLE_DEVICES="") == "fine"


def test_no_environment_variable_chooses_anything() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 5
    readers = ("os.environ", "getenv", "import environ", "expandvars")
    # Where the user's cache lies, by the XDG standard, and the compiler, as $CXX: places, not choices.
    allowed = {"cache.py": ('os.environ.get("XDG_CACHE_HOME")',), "build.py": ('os.path.expandvars("$CXX")',)}
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    for path in sources:
        for reader in allowed.get(path.name, ()):
            texts[path] = texts[path].replace(reader, "", 1)
    found = [f"{path.name}: {word}" for path, text in texts.items() for word in readers if word in text]
    assert not found, found


def test_import_changes_no_global_setting() -> None:
    """Neither threads, nor precision, nor determinism, nor the default dtype."""
    program = """
import torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(),
            torch.initial_seed())
torch.manual_seed(3)
before, state = settings(), torch.get_rng_state()
import siglip_kernels
x = torch.ones(5, 4, requires_grad=True)
siglip_kernels.sigmoid_loss(x, torch.ones(7, 4), 10.0, -10.0).backward()
assert before == settings(), (before, settings())
assert torch.equal(state, torch.get_rng_state())
print("fine")
"""
    assert run(program) == "fine"


def test_public_names() -> None:
    assert sorted(siglip_kernels.__all__) == [
        "DistillSigLipLoss",
        "LogitStats",
        "SigLipLoss",
        "SigmoidLoss",
        "SigmoidLossGrads",
        "Teacher",
        "accumulate",
        "distributed",
        "reference",
        "sigmoid_loss",
        "sigmoid_loss_and_grads",
        "sigmoid_losses",
        "testing",
    ]
    assert all(hasattr(siglip_kernels, name) for name in siglip_kernels.__all__)
    assert (PACKAGE / "py.typed").exists()
