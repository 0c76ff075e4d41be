"""``siglip_kernels.build``: which compiler and ninja it takes, and what it says where there is none."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace

import pytest

from siglip_kernels import build
from siglip_kernels.build import BuildError
from tests.building import HOST_CXX, TARGET, Place, new_process, only, value


def test_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    only([], place, monkeypatch)
    with pytest.raises(BuildError, match=r"no compiler: none of c\+\+, g\+\+, clang\+\+ is on the PATH"):
        build.library(TARGET)
    assert build.why_not(TARGET)
    assert place.files() == set(), "a compiler may be installed later"


def test_a_library_built_ahead_needs_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.library(TARGET)
    new_process()
    only([], place, monkeypatch)
    assert build.library(TARGET) == library
    assert build.why_not(TARGET) == []
    new_process()
    place.write("common/step.h", "#define STEP 50\n")
    with pytest.raises(BuildError, match="no compiler"):
        build.library(TARGET)


def test_a_compiler_that_does_not_run(place: Place) -> None:
    place.compiler("exit 3")
    with pytest.raises(BuildError, match=r"no compiler: .*exit status 3"):
        build.library(TARGET)


def test_no_ninja(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.library(TARGET)
    only(["c++"], place, monkeypatch)
    monkeypatch.setitem(sys.modules, "ninja", None)
    other = replace(TARGET, flags=("-O2",))
    (reason,) = build.why_not(other)
    assert "no ninja: " in reason
    with pytest.raises(BuildError, match=r"no ninja: .*pip install ninja"):
        build.library(other)
    # What is built needs none. The compiler's path is another here.
    monkeypatch.setenv("PATH", str(place.bin))
    new_process()
    assert build.library(TARGET) == library


def test_ninja_of_the_python_module(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    only(["c++"], place, monkeypatch)
    assert build.why_not(TARGET) == []


CXX: dict[str, tuple[str, str]] = {  # what $CXX is, and what is then run
    "a name": ("our-c++", "our-c++"),
    "a path": ("{bin}/our-c++", "our-c++"),
    "words": ("wrapper our-c++ -DMORE='a b'", "wrapper our-c++"),
    "a path with a space": ("{bin}/with space/c++", "with space"),
    "quoted words": ("wrapper '{bin}/with space/c++'", "wrapper with space"),
    "relative": ("bin/our-c++", "our-c++"),
    "empty": ("", "c++"),
    "blank": ("  ", "c++"),
    "missing": ("no-such-c++ -m64", "c++"),
    "half a quotation": ("our-c++ 'x", "c++"),
    "broken": ("false", "c++"),
}


@pytest.mark.parametrize("form", CXX)
def test_cxx(form: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As conda and users set it: a command; what names no program leaves the usual ones."""
    (place.bin / "with space").mkdir()
    used = place.root / "used"
    for name, note in (
        ("our-c++", "our-c++"),
        ("with space/c++", "with space"),
        ("c++", "c++"),
        ("wrapper", "wrapper"),
    ):
        goes_on = '"$@"' if name == "wrapper" else f'{HOST_CXX} "$@"'
        (place.bin / name).write_text(f"#!/bin/sh\necho {note} >> {shlex.quote(str(used))}\nexec {goes_on}\n")
        (place.bin / name).chmod(0o755)
    value_of_cxx, expected = CXX[form]
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("CXX", value_of_cxx.format(bin=place.bin))
    assert value(build.library(TARGET)) == 42
    assert set(used.read_text().split("\n")) - {""} == set(re.findall(r"with space|\S+", expected))
    new_process()
    assert build.is_built(TARGET)


def test_no_compiler_says_what_cxx_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    only([], place, monkeypatch)
    monkeypatch.setenv("CXX", "icpx -fast")
    expected = r"no compiler: \$CXX is 'icpx -fast', which names no program; none of c\+\+, g\+\+, clang\+\+ is on"
    with pytest.raises(BuildError, match=expected):
        build.load(TARGET)
