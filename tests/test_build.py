"""``siglip_kernels.build``: once per content, safe among processes, and a reason where there is no library."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import multiprocessing
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from siglip_kernels import backends, build, targets
from siglip_kernels.__main__ import main
from siglip_kernels.build import BuildError
from siglip_kernels.targets import Source, Target
from tests.building import ROOT, SOURCE, TARGET, Compiled, Place, new_process, value


def test_builds_and_leaves_nothing_else(place: Place) -> None:
    assert not build.is_built(TARGET)
    assert build.why_not(TARGET) == []
    assert place.compilations == 0
    library = build.library(TARGET)
    assert value(library) == 42
    assert build.is_built(TARGET)
    assert library.is_relative_to(place.cache / "siglip_kernels")
    assert place.files() == {f"tiny.{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"}
    assert list(library.parent.iterdir()) == [library], "the private folder is left"
    assert not any((place.root / "temporary").iterdir())


def test_is_quiet(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.write("cpu/tiny.cpp", '#warning "not a word"\n' + SOURCE)
    build.library(TARGET)
    assert capfd.readouterr() == ("", "")


def test_a_second_call_starts_no_compiler(place: Place) -> None:
    library = build.library(TARGET)
    asked = place.log
    assert build.library(TARGET) == library
    assert build.why_not(TARGET) == []
    assert place.log == asked
    new_process()
    assert build.library(TARGET) == library
    # A new process asks for the version, and nothing more.
    assert place.log == [*asked, "--version"]


def new_version(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.compiler('test "$1" = --version && echo 99.9 && exit')


CHANGES: dict[str, tuple[Target, Callable[[Place, pytest.MonkeyPatch], object], int]] = {
    "source": (TARGET, lambda place, _: place.write("cpu/tiny.cpp", SOURCE.replace("STEP", "1 + STEP")), 43),
    "header": (TARGET, lambda place, _: place.write("common/step.h", "#define STEP 50\n"), 52),
    "flag of the source": (replace(TARGET, sources=(Source("cpu/tiny.cpp", ("-DEXTRA=3",)),)), lambda *_: None, 43),
    "flag of the target": (replace(TARGET, flags=("-O2",)), lambda *_: None, 42),
    "flag of the link": (replace(TARGET, link_flags=("-lm",)), lambda *_: None, 42),
    "compiler": (TARGET, new_version, 42),
    "torch": (TARGET, lambda _, patch: patch.setattr(torch, "__version__", "9.9"), 42),
    "platform": (TARGET, lambda _, patch: patch.setattr("sysconfig.get_platform", lambda: "abacus"), 42),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_builds_anew(what: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build.library(TARGET)
    target, change, expected = CHANGES[what]
    with monkeypatch.context() as patch:
        change(place, patch)
        new_process()
        assert not build.is_built(target)
        new = build.library(target)
    assert new != old
    assert value(new) == expected
    assert place.compilations == 2
    assert value(old) == 42, "another process may still load it"


def test_a_source_compiled_in_two_ways(place: Place) -> None:
    text = 'extern "C" int NAME() { return NUMBER; }\n'
    place.write("cpu/level.cpp", text)
    ways = (("-DNAME=value", "-DNUMBER=1"), ("-DNAME=other", '-DNUMBER=sizeof("a b$")'))
    library = build.library(Target("levels", tuple(Source("cpu/level.cpp", flags) for flags in ways)))
    assert value(library) == 1
    assert ctypes.CDLL(str(library)).other() == 5


def build_in_child(csrc: Path, barrier: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue) -> None:
    build.CSRC = csrc
    barrier.wait(60)
    library = build.library(TARGET)
    results.put((str(library), value(library)))


def test_two_processes_at_once(place: Place) -> None:
    # Slow enough that both compile before either is done.
    place.compiler('test "$1" = --version || sleep 1')
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    children = [spawn.Process(target=build_in_child, args=(place.csrc, barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    found = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert place.compilations == 2, "they did not overlap"
    library = build.library(TARGET)
    assert found == {(str(library), 42)}
    assert place.files() == {library.name}


def test_a_failure_is_told_once_and_remembered(place: Place) -> None:
    place.write("cpu/tiny.cpp", "int value() { return nonsense; }\n")
    assert build.why_not(TARGET) == [], "nothing is known before the first build"
    with pytest.raises(BuildError, match=r"c\+\+: .*tiny\.cpp:1:\d+: error: .*nonsense") as first:
        build.library(TARGET)
    assert "\n" not in str(first.value)
    with pytest.raises(BuildError) as second:
        build.library(TARGET)
    assert str(second.value) == str(first.value)
    assert place.compilations == 1
    assert place.files() == {"failed.txt"}
    new_process()
    with pytest.raises(BuildError, match=r"error: .*python -m siglip_kernels build tries again"):
        build.library(TARGET)
    new_process()
    (reason,) = build.why_not(TARGET)
    assert str(first.value) in reason
    assert not build.is_built(TARGET)
    assert place.compilations == 1
    new_process()
    place.write("cpu/tiny.cpp", SOURCE)
    assert value(build.library(TARGET)) == 42


def test_a_failure_that_is_forgotten(place: Place) -> None:
    place.compiler('case "$*" in *" -c "*) test -e "$0.fixed" || { echo "error: the moon" >&2; exit 1; };; esac')
    with pytest.raises(BuildError, match="the moon"):
        build.library(TARGET)
    (place.bin / "c++.fixed").touch()
    with pytest.raises(BuildError, match="the moon"):
        build.library(TARGET)
    build.forget_failure(TARGET)
    assert build.why_not(TARGET) == []
    assert value(build.library(TARGET)) == 42


@pytest.mark.parametrize(
    ("link_flags", "says"), [(("-lnowhere_at_all",), "nowhere_at_all"), (("--no-such-flag",), "no-such-flag")]
)
def test_a_link_that_fails(link_flags: tuple[str, ...], says: str, place: Place) -> None:
    with pytest.raises(BuildError, match=says) as caught:
        build.library(replace(TARGET, link_flags=link_flags))
    assert "-shared" not in str(caught.value), "the command is no reason"


def test_a_build_that_takes_too_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.compiler('test "$1" = --version || { exec 9>"$0.held"; sleep 600; exit 1; }')
    held = place.bin / "c++.held"
    os.mkfifo(held)
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BuildError, match="took more than 1 s"):
            build.library(TARGET)
        assert place.compilations == 1
        # It ends when the last process that held it has: neither was the compiler waited for, nor left running.
        assert select.select([reader], [], [], 60)[0], "the compiler was left running"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
    new_process()
    with pytest.raises(BuildError, match=r"took more than 1 s .*remembered"):
        build.library(TARGET)


def test_a_source_that_is_not_there(place: Place) -> None:
    with pytest.raises(BuildError, match=r"'tiny' cannot be read: .*absent\.h"):
        build.library(replace(TARGET, headers=("common/absent.h",)))


@pytest.mark.parametrize("unusable", ["read-only", "a file", "no home"])
def test_a_cache_that_cannot_be_written(unusable: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private folder below the temporary folder serves."""
    if unusable == "read-only":
        place.cache.mkdir(mode=0o500)
        if os.access(place.cache, os.W_OK):
            pytest.skip("this user, root perhaps, writes everywhere")
    elif unusable == "a file":
        place.cache.touch()
    else:
        # A relative folder is none; a user without a home keeps the ~.
        monkeypatch.chdir(place.root)
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
    library = build.library(TARGET)
    shared = place.root / "temporary" / f"siglip_kernels-{os.getuid()}"
    assert value(library) == 42
    assert library.is_relative_to(shared)
    assert shared.stat().st_mode & 0o777 == 0o700
    new_process()
    assert build.library(TARGET) == library
    assert place.compilations == 1


@pytest.mark.parametrize("how", ["open to all", "a link"])
def test_a_temporary_folder_of_others_is_not_trusted(how: str, place: Place) -> None:
    place.cache.touch()
    shared = place.root / "temporary" / f"siglip_kernels-{os.getuid()}"
    library = build.library(TARGET)
    assert library.is_relative_to(shared)
    if how == "open to all":
        shared.chmod(0o777)
    else:
        shared.rename(place.root / "theirs")
        shared.symlink_to(place.root / "theirs")
    new_process()
    assert not build.is_built(TARGET)
    with pytest.raises(BuildError, match=r"no folder to build in: .*ca che"):
        build.library(TARGET)


@pytest.mark.parametrize(
    ("cache", "temporary", "says"),
    [
        ("a file", "a file", [r"ca che", r"siglip_kernels-\d+ is open to others"]),
        ("relative", "a file", [r"here is no absolute path", r"open to others"]),
        ("no home", "none", [r"~/\.cache is no absolute path", "No usable temporary"]),
        ("a file", "none", [r"ca che", "No usable temporary"]),
    ],
)
def test_every_folder_that_does_not_serve_is_named(
    cache: str, temporary: str, says: list[str], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_folder() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.chdir(place.root)
    if cache == "a file":
        place.cache.touch()
    elif cache == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    if temporary == "a file":
        (place.root / "temporary" / f"siglip_kernels-{os.getuid()}").touch()
    else:
        monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    expected = "no folder to build in: .*" + ".*; .*".join(says)
    (reason,) = build.why_not(TARGET)
    assert re.search(expected, reason), reason
    with pytest.raises(BuildError, match=expected):
        build.load(TARGET)
    assert place.compilations == 0


def test_the_command_builds_ahead(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "TARGETS", {"tiny": TARGET})
    assert main(["build"]) == 0
    assert capsys.readouterr().out.startswith("tiny: built in ")
    new_process()
    assert main(["build"]) == 0
    assert capsys.readouterr().out.startswith("tiny: cached: ")
    place.write("cpu/broken.cpp", "nonsense;\n")
    broken = Target("broken", (Source("cpu/broken.cpp"),))
    monkeypatch.setattr(targets, "TARGETS", {"broken": broken, "tiny": TARGET})
    for times in (1, 2):
        assert main(["build"]) == 1
        first, second, third = capsys.readouterr().out.splitlines()
        assert first.startswith("broken: failed: c++: ")
        assert "nonsense" in first
        assert second.startswith("tiny: cached: ")
        assert third == "cuda: left out: not here"
        assert place.compilations == 1 + times, "what failed is tried again"
        new_process()


def test_info_builds_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(targets, "TARGETS", {"eager": TARGET, "cpu": TARGET, "cuda": TARGET})
    monkeypatch.setitem(backends.BACKENDS, "eager", Compiled())

    def line() -> str:
        new_process()
        assert main(["info"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return next(line.strip() for line in reversed(lines) if line.startswith("  eager"))

    assert line() == "eager   available, not built yet: it will be on first use"
    assert place.compilations == 0
    build.library(TARGET)
    assert line() == "eager   available"
    place.write("cpu/tiny.cpp", "nonsense;\n")
    new_process()
    with pytest.raises(BuildError):
        build.library(TARGET)
    assert line().startswith("eager   unavailable: c++: ")


@pytest.mark.parametrize("program", ["import siglip_kernels", "import siglip_kernels.build, siglip_kernels.__main__"])
def test_an_import_never_builds(program: str, place: Place) -> None:
    # Whatever torch itself may start, none of our programs is looked for.
    watch = """
import sys, torch, shutil, subprocess
def refuse(*_, **__): raise SystemExit("something was started")
shutil.which = subprocess.run = subprocess.Popen.__init__ = refuse
"""
    subprocess.run([sys.executable, "-c", watch + program], cwd=ROOT, check=True, timeout=120)
    assert place.log == []
    assert not place.cache.exists()
