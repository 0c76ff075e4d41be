"""``siglip_kernels.build`` when all does not end well: a damaged library, one that does not load, a killed build."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from siglip_kernels import backends, build, cache, targets
from siglip_kernels.__main__ import main
from siglip_kernels.build import BuildError
from siglip_kernels.targets import Target
from tests.building import ROOT, TARGET, Compiled, Place, built, in_child, new_process, value

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "one page": lambda whole: whole[:4096],
    "half": lambda whole: whole[: len(whole) // 2],
    "all but a byte": lambda whole: whole[:-1],
    "a byte more": lambda whole: whole + b"\0",
    "a bit": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"no library",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("by", ["a call", "the command"])
def test_a_damaged_library_is_replaced(
    damage: str, by: str, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Never loaded: that of a truncated one ends in SIGBUS."""
    monkeypatch.setattr(targets, "TARGETS", {"tiny": TARGET})
    library = built()
    whole = library.read_bytes()
    library.write_bytes(DAMAGES[damage](whole))
    assert in_child(lambda: build.is_built(TARGET)) is False
    if by == "a call":
        assert in_child(lambda: value(build.library(TARGET))) == 42
    else:
        assert in_child(lambda: main(["build"])) == 0
        assert capfd.readouterr().out.startswith("tiny: built in ")
        assert in_child(lambda: main(["build"])) == 0
        assert capfd.readouterr().out.startswith("tiny: cached: ")
    assert place.compilations == 2
    assert library.read_bytes() == whole
    assert list(library.parent.iterdir()) == [library]


@pytest.mark.parametrize("how", ["damaged", "of an older version", "unreadable", "a folder", "a pipe"])
def test_what_is_no_library_of_ours(how: str, place: Place) -> None:
    """Under names that the new one does not take: removed, if files, and never waited for."""
    library = built()
    other = library.with_name("tiny.0123456789abcdef.so")
    if how == "damaged":
        library.rename(other)
        other.write_bytes(other.read_bytes()[:-1])
    elif how == "of an older version":
        other = library.rename(library.with_name("tiny.so"))
    elif how == "unreadable":
        library.chmod(0)
        other = library if os.getuid() else other
    elif how == "a folder":
        library.unlink()
        other.mkdir()
    else:
        library.unlink()
        os.mkfifo(other)
    assert in_child(lambda: value(build.library(TARGET))) == 42
    assert library.exists()
    assert other in (library,) or how == "a folder" or not other.exists()


def unloadable(library: Path) -> None:
    """Make it one of another architecture, under the name that its bytes then have."""
    data = bytearray(library.read_bytes())
    data[18:20] = b"\xfe\xca"  # e_machine
    library.unlink()
    made = library.parents[1] / "tiny.so"
    made.write_bytes(data)
    cache.store(made, library.parent)


def test_a_library_that_does_not_load(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As of another architecture: the next folder serves; without one, only the command compiles again."""
    monkeypatch.setattr(targets, "TARGETS", {"tiny": TARGET})
    unloadable(built())
    with monkeypatch.context() as patch:
        shared = place.root / "temporary" / f"siglip_kernels-{os.getuid()}"
        shared.touch()
        for _ in range(2):
            (reason,) = in_child(lambda: build.why_not(TARGET))
            assert re.search(r"no folder to build in: /.*/tiny\.\w+\.so: .*; .*open to others", reason), reason
        assert place.compilations == 1
        shared.unlink()
        patch.setattr(tempfile, "tempdir", str(place.root / "temporary"))
        second = built()
        assert second.is_relative_to(shared)
    assert place.compilations == 2
    assert in_child(lambda: main(["build"])) == 0
    assert capfd.readouterr().out == f"tiny: cached: {second}\ncuda: left out: not here\n"
    unloadable(second)
    assert in_child(lambda: [build.is_built(TARGET), place.compilations]) == [False, 2]
    assert in_child(lambda: main(["build"])) == 0
    assert capfd.readouterr().out.startswith("tiny: built in ")
    assert in_child(lambda: value(build.library(TARGET))) == 42
    assert place.compilations == 3


@contextlib.contextmanager
def noexec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mount where this user may, else a loader that refuses."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "noexec", "none", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                yield
            finally:
                subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    load = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if path.startswith(str(folder)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", refuse)
        yield


def test_a_home_without_exec(place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(targets, "TARGETS", {"eager": TARGET, "cpu": TARGET, "cuda": TARGET})
    monkeypatch.setitem(backends.BACKENDS, "eager", Compiled())
    shared = place.root / "temporary" / f"siglip_kernels-{os.getuid()}"

    def info() -> str:
        assert in_child(lambda: main(["info"])) == 0
        return capfd.readouterr().out

    with noexec(place.cache, monkeypatch):
        assert built().is_relative_to(shared)
        compilations = place.compilations
        assert built().is_relative_to(shared)
        assert "  eager   available\n" in info()
        assert place.compilations == compilations, "it was built in the second folder"
        other = place.root / "other"
        monkeypatch.setattr(tempfile, "tempdir", str(other))
        with noexec(other, monkeypatch):
            reasons = [rf"{re.escape(str(folder))}\b.*(failed to map|noexec)" for folder in (place.cache, other)]
            with pytest.raises(BuildError, match="no folder to build in: " + ".*; ".join(reasons)):
                build.load(TARGET)
            compilations = place.compilations
            assert "  eager   unavailable: no folder to build in: " in info()
            assert place.compilations == compilations, "what does not load is not compiled by every process"
            assert in_child(lambda: main(["build"])) == 1
            assert "eager: failed: no folder to build in: " in capfd.readouterr().out


def start_build(place: Place) -> subprocess.Popen[bytes]:
    """A process, and group, whose compiler does not come to an end."""
    program = (
        f"from pathlib import Path; from tests.test_build import build, TARGET; build.CSRC = Path({str(place.csrc)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", f"{program}; build.load(TARGET)"], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while place.compilations == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert place.compilations, "it did not begin"
    return child


def private_folders(place: Place) -> list[Path]:
    return list(place.cache.glob("siglip_kernels/*/build-*"))


@pytest.mark.parametrize("killed", ["the process", "its group"])
def test_a_killed_build_leaves_nothing(
    killed: str, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "TARGETS", {"tiny": TARGET})
    other = replace(TARGET, name="other")
    place.compiler('case "$*" in *" -c "*) test -e "$0.fixed" || sleep 30;; esac')
    child = start_build(place)
    try:
        (left,) = private_folders(place)
        (place.bin / "c++.fixed").touch()
        build.load(other)
        assert private_folders(place) == [left], "its builder is alive"
        if killed == "the process":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(10)
        assert private_folders(place) == [left]
        assert main(["build"]) == 0
        assert private_folders(place) == []
        assert capfd.readouterr().out.startswith("tiny: built in ")
        assert {path.name for path in place.cache.rglob("*") if path.is_file()} == {
            build.library(target).name for target in (TARGET, other)
        }
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def test_the_command_removes_what_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is to be built too, and of other contents; by age where the file system has no locks."""
    monkeypatch.setattr(targets, "TARGETS", {"tiny": TARGET})
    folder = build.library(TARGET).parent
    old, young = folder / "build-old", folder.with_name("tiny-of-another-time") / "build-young"
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "0.o").touch()
    os.utime(old, (0, time.time() - build.TIMEOUT - 60))

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert main(["build"]) == 0
        assert not old.exists()
        assert young.exists()
        assert value(build.library(replace(TARGET, flags=("-O2",)))) == 42
    with cache.folder_lock(young):
        assert main(["build"]) == 0
        assert young.exists(), "its builder is alive"
    assert main(["build"]) == 0
    assert not young.exists()


def test_processes_that_repair_at_once(place: Place) -> None:
    """None removes the good library of another."""
    library = built()
    library.write_bytes(library.read_bytes()[:100])
    old = library.with_name("tiny.so")
    old.touch()
    place.compiler('test "$1" = --version || sleep 0.5')
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()

    def repair() -> None:
        new_process()
        barrier.wait(60)
        for _ in range(3):
            results.put(value(build.library(TARGET)))
            new_process()

    children = [fork.Process(target=repair) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in range(12)] == [42] * 12
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert place.compilations == 1 + 4
    assert list(library.parent.iterdir()) == [library]


def test_another_good_library_stays(place: Place) -> None:
    """Compilers need not write the same bytes twice."""
    other = built()
    good = other.read_bytes() + b"\0"
    other.unlink()

    def overtaken(target: Target, command: list[str], folder: Path) -> None:
        compile_(target, command, folder)
        made = folder / "theirs.so"
        made.write_bytes(good)
        theirs.append(made.rename(folder.parent / f"tiny.{cache.digest(good)}.so"))

    compile_, theirs = build._compile, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile", overtaken)
        library = build.library(TARGET)
    assert theirs[0] != library
    assert theirs[0].read_bytes() == good
    assert value(theirs[0]) == value(library) == 42


@pytest.mark.parametrize("end", ["kill -KILL $$", "echo 'ninja: build stopped: interrupted by user.'; exit 2"])
def test_an_interruption_is_not_remembered(end: str, place: Place) -> None:
    """By a signal to the group, of whom Python alone handles it, or to ninja."""
    ninja = place.bin / "ninja"
    ninja.write_text(f"#!/bin/sh\n{end}\n")
    ninja.chmod(0o755)
    with pytest.raises(BuildError, match=r"c\+\+ was interrupted"):
        build.library(TARGET)
    assert place.files() == set()
    ninja.unlink()
    new_process()
    assert value(build.library(TARGET)) == 42


def test_a_full_disk_is_not_remembered(place: Place) -> None:
    full = f'case "$PWD" in {shlex.quote(str(place.cache))}*) echo "error: No space left on device"; exit 1;; esac'
    place.compiler(f'test "$1" = --version || {{ {full}; }}')
    library = build.library(TARGET)
    assert library.is_relative_to(place.root / "temporary")
    assert place.files() == set()


def test_a_success_forgets_the_failure_of_another(place: Place) -> None:
    """Or a library that is damaged later would never be built again."""
    library = built()
    library.unlink()
    failed = library.with_name("failed.txt")
    compile_ = build._compile

    def meanwhile(*arguments: Any) -> None:
        compile_(*arguments)
        failed.write_text("the moon")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile", meanwhile)
        assert value(build.library(TARGET)) == 42
    assert not failed.exists()
    # A power cut may leave an empty one.
    library.unlink()
    failed.touch()
    assert in_child(lambda: value(build.library(TARGET))) == 42
