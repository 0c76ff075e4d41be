"""sdist and wheel: what is in them, and the wheel installed where nothing of the source tree is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import siglip_kernels
from tests.building import HOST_CXX, ROOT

ADDED = ("cpu/deep/new.cpp", "new.h", "cpu/new.cu", "cpu/new.cuh")


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    unpacked: Path  # the sdist, from which the wheel was built


class Installed(NamedTuple):
    """An environment with the wheel alone, a cache of its own, and torch by a path."""

    folder: Path

    def run(self, *arguments: str, before: tuple[str, ...] = ()) -> str:
        """What Python prints there. ``before``: an emulator's command."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
        environment = {**kept, "XDG_CACHE_HOME": str(self.folder / "cache")}
        command = [*before, str(self.folder / "venv" / "bin" / "python"), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, encoding="utf-8", timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel is built from the sdist, as installers do; and a module forgotten in pyproject.toml shows."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    tree, out = folder / "tree", folder / "out"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("siglip_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc" / "cpu" / "deep").mkdir(parents=True, exist_ok=True)
    for name in ADDED:
        (tree / "csrc" / name).write_text("// nothing\n")
    (tree / "csrc" / "cpu" / "left_over.o").touch()

    def run(what: str, source: Path) -> None:
        program = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr

    out.mkdir()
    run("sdist", tree)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("siglip_kernels-*")
    run("wheel", unpacked)
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel, unpacked)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*command, str(built.wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # On the path, but no site directory: an editable install there does not count.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder)


def test_sdist_and_wheel_carry_csrc(built: Built) -> None:
    expected = {f"csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    expected |= {f"csrc/{name}" for name in ADDED}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "siglip_kernels").rglob("*.py")}
    with tarfile.open(built.sdist) as archive:
        assert expected | modules <= {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    assert {f"siglip_kernels/{name}" for name in expected} | modules | {"siglip_kernels/py.typed"} <= names
    assert not any(name.endswith(".o") for name in names)
    assert built.wheel.name.endswith("-py3-none-any.whl"), "native code is compiled where it runs"


def test_the_installed_wheel(installed: Installed) -> None:
    """``info``, ``build`` and ``check`` of a package that was never beside its source tree."""
    if HOST_CXX is None:
        pytest.skip("needs a C++ compiler")
    place = installed.run("-c", "import siglip_kernels.build as b; print(b.CSRC)").strip()
    assert Path(place).is_relative_to(installed.folder)
    assert place.endswith("site-packages/siglip_kernels/csrc")
    first = installed.run("-m", "siglip_kernels", "info")
    assert first.startswith(f"siglip_kernels {siglip_kernels.__version__}, ")
    assert "cpu     available, not built yet" in first
    assert f"{installed.folder}/cache/siglip_kernels/cpu-" in installed.run("-m", "siglip_kernels", "build")
    assert "cpu     available\n" in installed.run("-m", "siglip_kernels", "info")
    found = installed.run("-m", "siglip_kernels", "check", "--quick", "--device", "cpu", "--backend", "cpu")
    assert "1 backend checked, 0 failed" in found


# (QEMU's name, the level that is left). torch itself does not start on a CPU before these, without AVX.
@pytest.mark.parametrize(("cpu", "level"), [("SandyBridge", "portable"), ("Haswell", "avx2")])
def test_a_library_built_here_runs_on_a_lesser_cpu(cpu: str, level: str, installed: Installed) -> None:
    """The library holds code for AVX-512, whatever the machine: none of it may run where that is missing."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64" or HOST_CXX is None:
        pytest.skip("needs an x86 machine, a C++ compiler and qemu-x86_64 (Debian: qemu-user)")
    program = """
from functools import partial
import torch
from siglip_kernels import sigmoid_loss, testing
from siglip_kernels.backends import cpu, cpu_native
loss_fn = partial(sigmoid_loss, backend="cpu")
report = testing.check(loss_fn, dtypes=[torch.float32, torch.bfloat16], shapes=[(127, 129, 100)], regimes=["init"])
assert report.ok, report
print(cpu.LEVELS[cpu_native.load().level])
"""
    installed.run("-m", "siglip_kernels", "build")
    assert installed.run("-c", program, before=(emulator, "-cpu", cpu)).strip() == level
