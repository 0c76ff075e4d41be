"""A tiny library to build, with a cache and a compiler of its own; what the tests of ``siglip_kernels.build`` share."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from siglip_kernels import build
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.cuda import nvrtc
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.targets import Source, Target

ROOT = Path(build.__file__).parents[1]
SOURCE = '#include "common/step.h"\nextern "C" int value() { return STEP + EXTRA; }\n'
TARGET = Target("tiny", (Source("cpu/tiny.cpp", ("-DEXTRA=2",)),), ("common/step.h",), ("-O1",))
HOST_CXX = next(filter(None, map(shutil.which, build.COMPILERS)), None)


@dataclass
class Place:
    """A csrc/, a cache and a compiler that notes what it is asked to do."""

    root: Path

    def __post_init__(self) -> None:
        # Spaces and dollars are what a user's path may hold.
        self.csrc, self.cache, self.bin = self.root / "c $rc", self.root / "ca che", self.root / "bin"
        for folder in (self.csrc / "cpu", self.csrc / "common", self.bin):
            folder.mkdir(parents=True)
        self.write("cpu/tiny.cpp", SOURCE)
        self.write("common/step.h", "#define STEP 40\n")
        self.compiler()

    def write(self, path: str, text: str) -> None:
        (self.csrc / path).write_text(text, encoding="utf-8")

    def compiler(self, before: str = "") -> None:
        """A c++ that notes its arguments, does ``before`` and goes on as the real one."""
        program = self.bin / "c++"
        program.write_text(
            f'#!/bin/sh\necho "$*" >> {shlex.quote(str(self.root / "log"))}\n{before}\nexec {HOST_CXX} "$@"\n'
        )
        program.chmod(0o755)

    @property
    def log(self) -> list[str]:
        """What the compiler was asked, oldest first."""
        path = self.root / "log"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def compilations(self) -> int:
        return sum(" -c " in line for line in self.log)

    def files(self) -> set[str]:
        """What the cache holds."""
        return {path.name for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if HOST_CXX is None or not (shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))):
        pytest.skip("needs a C++ compiler and ninja")
    place = Place(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache))
    monkeypatch.setenv("PATH", f"{place.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(nvrtc, "why_not", lambda: "not here")
    monkeypatch.setattr(build, "CSRC", place.csrc)
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(build, "_to_retry", set())
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return place


def new_process() -> None:
    """Forget what a process remembers, but not what the cache does."""
    build._outcomes.clear()


def value(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).value())


def only(programs: list[str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with these programs alone."""
    folder = place.root / "only"
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


def in_child(function: Callable[[], object]) -> object:
    """What ``function`` returns in a process of its own: it may die, and loads libraries anew."""

    def run() -> None:
        new_process()
        results.put(function())

    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return results.get(timeout=10)


def built() -> Path:
    """The library's file; this process has not loaded it, and could not tell what became of it."""
    return Path(str(in_child(lambda: build.library(TARGET))))


class Compiled(EagerBlockKernel):
    def why_not(self, problem: Problem) -> list[str]:
        return build.why_not(TARGET)
