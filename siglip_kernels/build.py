"""Compiles ``csrc/`` with ninja on first use, quietly and once: cached by content, safe when processes build at once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

TIMEOUT = 300  # seconds for a whole build
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a source below ``csrc/`` and the flags that it alone takes."""

    source: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A shared library of plain C functions. Every file of the sources' folders counts as its content."""

    name: str
    units: tuple[Unit, ...]


def sources() -> Path:
    """``csrc/``: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    return next((p for p in (package / "csrc", package.parent / "csrc") if p.is_dir()), package / "csrc")


@functools.cache
def library(target: Target) -> Path:
    """The built library; compiled if there is none of this content. BuildError if there cannot be one."""
    folder = _folder(target)
    if not (folder / "library.so").exists():
        failed = _failure(folder)
        if failed.exists():
            raise BuildError(failed.read_text())
        try:
            _build(target, folder)
        except BuildError as error:
            with contextlib.suppress(OSError):
                failed.write_text(str(error))
            raise
    return folder / "library.so"


def forget_failure(target: Target) -> None:
    """Let the next :func:`library` try again what once failed."""
    _failure(_folder(target)).unlink(missing_ok=True)
    library.cache_clear()


def is_built(target: Target) -> bool:
    return (_folder(target) / "library.so").exists()


def _build(target: Target, folder: Path) -> None:
    """Build aside, then rename into place: whoever is second takes what the first has built."""
    ninja = _ninja()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as aside:
        (Path(aside) / "build.ninja").write_text("\n".join(_rules(target)) + "\n")
        try:
            done = subprocess.run([ninja, "-C", aside], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{ninja} did not finish: {error}") from error
        if done.returncode != 0:
            raise BuildError(_reason(done.stdout + done.stderr))
        finished = Path(aside) / "finished"
        finished.mkdir()
        (Path(aside) / "library.so").rename(finished / "library.so")
        try:
            finished.rename(folder)
        except OSError:
            if not (folder / "library.so").exists():
                raise


def _rules(target: Target) -> Iterator[str]:
    compiler = _compiler()
    yield f"rule compile\n  command = {compiler} {' '.join(FLAGS)} $flags -c $in -o $out"
    yield f"rule link\n  command = {compiler} -shared $in -o $out"
    objects = [f"{index}.o" for index in range(len(target.units))]
    for unit, built in zip(target.units, objects, strict=True):
        yield f"build {built}: compile {_escaped(sources() / unit.source)}\n  flags = {' '.join(unit.flags)}"
    yield f"build library.so: link {' '.join(objects)}"


def _escaped(path: Path) -> str:
    """For ninja, and for the shell that it calls."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _reason(output: str) -> str:
    """The compiler's first complaint."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
    return f"the build failed: {first}"


def _folder(target: Target) -> Path:
    """Of the built library, named by all that it depends on."""
    content = hashlib.sha256()
    folders = sorted({(sources() / unit.source).parent for unit in target.units})
    for path in sorted(p for folder in folders for p in folder.glob("*") if p.is_file()):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    content.update(repr((target, FLAGS, _compiler(), _version(), torch.__version__, platform.machine())).encode())
    return _cache() / f"{target.name}-{content.hexdigest()[:16]}"


def _failure(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.failed")


@functools.cache
def _compiler() -> str:
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise BuildError(f"no C++ compiler on the path: none of {', '.join(COMPILERS)}")
    return found


@functools.cache
def _version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout


def _ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        try:
            from ninja import BIN_DIR
        except ImportError:
            raise BuildError("ninja is neither on the path nor installed: pip install ninja") from None
        found = str(Path(BIN_DIR) / "ninja")
    return found


@functools.cache
def _cache() -> Path:
    """The user's cache folder; where that cannot be written, a folder of the user's own among the temporary ones."""
    for root in (lambda: Path.home() / ".cache", _own_temporary):
        try:
            folder = root() / "siglip_kernels"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except (OSError, RuntimeError):  # not writable; no home
            continue
    raise BuildError("no folder to build in: neither the user's cache nor the temporary folder can be written")


def _own_temporary() -> Path:
    """Nobody else may write there: what lies in it is loaded."""
    folder = Path(tempfile.gettempdir()) / f"siglip_kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder
