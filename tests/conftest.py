"""Poisoned memory, two threads, and Triton's interpreter where there is no GPU, for every test."""

from __future__ import annotations

import os

# OpenMP reads it when it is loaded, with torch. Threads that spin while they wait take the processors of other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gc
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu import checks
from siglip_kernels.backends import cpu_native
from tests.building import place  # noqa: F401
from tests.ranks import Ranks

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when it is first imported, which importing torch does not do.
    os.environ["TRITON_INTERPRET"] = "1"
# Deterministic algorithms, which the poison below needs, refuse cuBLAS without a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        cpu_native.load()  # else every worker of pytest-xdist compiles it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not by keywords, which have the names of folders too
            item.add_marker(skip)


_modules = 0  # that were there when garbage was last collected


@pytest.fixture(autouse=True)
def frozen_modules() -> None:
    """Torch and its compilers are a million objects, which no collection of a test's own garbage need search."""
    global _modules
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """An unwritten element shows."""
    with checks.poisoned_memory(warn_only=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def private_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The compiler's cache on disk does not see a change of our operator's fake: no run may find another's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the run, whose workers share what they compile
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test finds the compiled code, or the recompilation count, of another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device; CUDA only where there is one."""
    return torch.device(request.param)


@pytest.fixture
def native() -> cpu_native.CpuLibrary:
    """The CPU backend's library."""
    library = cpu_native.load()
    if isinstance(library, str):
        pytest.skip(library)
    return library


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Eight processes over gloo."""
    world = Ranks(8)
    yield world
    world.close()


OPEN_CLIP = "open_clip_torch==3.3.0"


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published wheel, unpacked, without what it depends on; skips where it cannot be had."""
    folder = tmp_path_factory.mktemp("open_clip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), OPEN_CLIP]
    try:
        done = subprocess.run(
            [*command, "--retries", "0", "--timeout", "10"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"pip cannot fetch {OPEN_CLIP}: {error}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"pip cannot fetch {OPEN_CLIP}: {lines[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_loss_file(open_clip_folder: Path) -> Path:
    """Its open_clip/loss.py, to be loaded alone."""
    return open_clip_folder / "open_clip" / "loss.py"
