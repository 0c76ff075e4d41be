"""Compiles csrc/ into shared libraries on first use: once per content, with ninja, never on import.

A library lies in ``<cache>/<name>-<content>-<compiler>/``. ``<cache>`` is below the user's cache folder, or below the
temporary folder where that cannot be written. ``<content>`` hashes what ninja is told to run, every source and header,
torch's version and the platform; ``<compiler>`` the compiler's path and version. Without a compiler, a library that any
compiler built from the same content serves, as in an image that was built ahead. A failure is remembered in the folder
where the library would be.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

# Inside the package in a wheel, beside it in a source tree.
_INSIDE = Path(__file__).parent / "csrc"
CSRC = _INSIDE if _INSIDE.is_dir() else _INSIDE.parents[1] / "csrc"
TIMEOUT = 300.0  # seconds a build may take
# Programs by preference, and the flags without which their objects cannot become a shared library.
COMPILERS = {
    "cxx": (("c++", "g++", "clang++"), ("-fPIC",)),
    "nvcc": (("nvcc", "/usr/local/cuda/bin/nvcc"), ("-Xcompiler", "-fPIC")),
}


class BuildError(RuntimeError):
    """Why there is no library: the compiler's own first errors, or what is missing here."""


@dataclass(frozen=True)
class Source:
    """A file below csrc/ and the flags of its own; a target may compile one file in several ways."""

    path: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One shared library."""

    name: str
    sources: tuple[Source, ...]
    headers: tuple[str, ...] = ()  # below csrc/, all that the sources include: a change in one builds anew
    flags: tuple[str, ...] = ()  # for every source; csrc/ is on the include path
    link_flags: tuple[str, ...] = ()
    compiler: str = "cxx"  # or "nvcc"
    optional: bool = False  # few machines have its compiler


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
# The epilogue for each instruction set, whatever this machine has: the library chooses when it runs.
_X86 = (
    Source("cpu/epilogue.cpp", ("-DSIGLIP_LEVEL=avx2", "-mavx2", "-mfma")),
    Source("cpu/epilogue.cpp", ("-DSIGLIP_LEVEL=avx512", *_AVX512)),
    Source("cpu/product.cpp", (*_AVX512, "-mavx512bf16")),
)
CPU_ANYWHERE = (
    Source("cpu/interface.cpp"),
    Source("cpu/machine.cpp"),
    Source("cpu/epilogue.cpp", ("-DSIGLIP_LEVEL=portable",)),
)
_CPU_HEADERS = ("block", "convert", "epilogue", "interface", "machine", "math", "parallel", "product", "vectors")
_SM90_HEADERS = (
    *(f"{name}.h" for name in ("block", "epilogue", "fragment", "host_device", "kernels", "pipeline", "tiles")),
    *(f"{name}.cuh" for name in ("kernel", "ptx")),
)
TARGETS = {  # by the backend's name
    "cpu": Target(
        "cpu",
        CPU_ANYWHERE + (_X86 if platform.machine().lower() in ("x86_64", "amd64") else ()),
        headers=tuple(f"cpu/{name}.h" for name in _CPU_HEADERS),
        flags=("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"),
    ),
    "cuda": Target(
        "cuda",
        (
            Source("cuda/sm90/launch.cu"),
            Source("cuda/sm90/kernels.cu"),
            Source("cuda/sm90/kernels.cu", ("-DSIGLIP_FLOAT16",)),
        ),
        headers=tuple(f"cuda/sm90/{name}" for name in _SM90_HEADERS),
        flags=("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fvisibility=hidden"),
        compiler="nvcc",
        optional=True,
    ),
}

# What this process knows already: the library, or the reason why there is none.
_outcomes: dict[Target, Path | str] = {}


def library(target: Target) -> Path:
    """The shared library, compiled now where no cache holds it. BuildError, always the same, where there is none."""
    outcome = _known(target)
    if outcome is None:
        try:
            outcome = _build(target)
        except (BuildError, OSError) as error:
            outcome = str(error)
    _outcomes[target] = outcome
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


def why_not(target: Target) -> list[str]:
    """Why there is no library, as far as it is known without compiling; empty where ``library`` may succeed."""
    outcome = _known(target)
    return [outcome] if isinstance(outcome, str) else []


def is_built(target: Target) -> bool:
    """Whether ``library`` returns without compiling."""
    return isinstance(_known(target), Path)


def has_compiler(target: Target) -> bool:
    """Whether this machine could build it."""
    with suppress(BuildError):
        return bool(_compiler(target))
    return False


def forget_failure(target: Target) -> None:
    """Let the next ``library`` compile what failed before."""
    if isinstance(_outcomes.get(target), str):
        del _outcomes[target]
    with suppress(BuildError):
        for folder in _folders(target, _compiler(target)[1]):
            with suppress(OSError):
                (folder / "failed.txt").unlink()


def _known(target: Target) -> Path | str | None:
    """The library, or why there is none; None where only compiling can tell."""
    try:
        return _outcomes.get(target) or _find(target)
    except BuildError as error:
        return str(error)


def _find(target: Target) -> Path | None:
    """The library in a cache; None where it is still to be built. BuildError where that failed before, or cannot be."""
    if os.name != "posix":
        raise BuildError("native code is compiled on Linux and macOS only")
    try:
        folders = list(_folders(target, _compiler(target)[1]))
    except BuildError:
        built = [path for folder in _folders(target, "*") for path in folder.parent.glob(f"{folder.name}/*.so")]
        if not built:
            raise
        return max(built, key=lambda path: path.stat().st_mtime)
    libraries = [folder / f"{target.name}.so" for folder in folders]
    found = next((path for path in libraries if os.path.isfile(path)), None)
    if found is None:
        for folder in folders:
            with suppress(OSError):
                reason = (folder / "failed.txt").read_text(encoding="utf-8")
                raise BuildError(f"{reason} (remembered: python -m siglip_kernels build tries again)")
        _ninja()
    return found


def _build(target: Target) -> Path:
    """Compile in a private folder, then rename within the file system: no process sees half a library."""
    program, key = _compiler(target)
    refusals = []
    for folder in _folders(target, key, make=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            private = tempfile.TemporaryDirectory(dir=folder, prefix="build-", ignore_cleanup_errors=True)
        except OSError as error:
            refusals.append(f"{folder.parent}: {error.strerror}")
            continue
        with private as name:
            built, failed = Path(name, f"{target.name}.so"), Path(name, "failed.txt")
            try:
                _compile(target, program, Path(name))
            except BuildError as error:
                with suppress(OSError):
                    failed.write_text(str(error), encoding="utf-8")
                    os.replace(failed, folder / failed.name)
                raise
            # Whoever comes second takes the first one's.
            if not os.path.isfile(folder / built.name):
                os.replace(built, folder / built.name)
        return folder / built.name
    raise BuildError("no folder to build in: " + "; ".join(refusals))


def _compile(target: Target, program: str, folder: Path) -> None:
    """Run ninja in ``folder``."""
    places = f"compiler = {_words(program)}\nincludes = -I{_words(str(CSRC))}\ncsrc = {_dollars(str(CSRC))}\n"
    (folder / "build.ninja").write_text(places + _rules(target), encoding="utf-8")
    with subprocess.Popen(
        [_ninja()],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as ninja:
        try:
            output, _ = ninja.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            # Not killed: ninja ends its compilers when it is asked to end.
            ninja.terminate()
            raise BuildError(f"{Path(program).name} took more than {TIMEOUT:g} s") from None
    if ninja.returncode:
        raise BuildError(f"{Path(program).name}: {_first_errors(output)}")


def _rules(target: Target) -> str:
    """What ninja is told, but for the places of the compiler and of csrc/."""
    flags, link_flags = _words(*COMPILERS[target.compiler][1], *target.flags), _words(*target.link_flags)
    text = f"rule compile\n  command = $compiler {flags} $includes $flags -c $in -o $out\n"
    text += f"rule link\n  command = $compiler -shared $in -o $out {link_flags}\n"
    for i, source in enumerate(target.sources):
        path = _dollars(source.path).replace(" ", "$ ").replace(":", "$:")
        text += f"build {i}.o: compile $csrc/{path}\n  flags = {_words(*source.flags)}\n"
    return text + f"build {target.name}.so: link {' '.join(f'{i}.o' for i in range(len(target.sources)))}\n"


def _words(*words: str) -> str:
    return _dollars(shlex.join(words))


def _dollars(text: str) -> str:
    return text.replace("$", "$$")


def _first_errors(output: str, most: int = 3) -> str:
    skipped = ("[", "FAILED:", "ninja: build stopped")
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(skipped)]
    errors = [line for line in lines if re.search(r"error:|\bfatal\b|undefined (reference|symbol)|cannot find", line)]
    return "; ".join(errors[:most] or lines[-most:])


def _ninja() -> str:
    """The program, or that of the PyPI module, whose folder need not be on the PATH."""
    program = shutil.which("ninja")
    if program is None:
        with suppress(ImportError):
            import ninja

            program = shutil.which("ninja", path=ninja.BIN_DIR)
    if program is None:
        raise BuildError("no ninja: neither a program on the PATH nor the Python module (pip install ninja)")
    return program


def _compiler(target: Target) -> tuple[str, str]:
    """The program and its key."""
    names = COMPILERS[target.compiler][0]
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        raise BuildError(f"no compiler: none of {', '.join(names)} is on the PATH")
    try:
        version = subprocess.run([program, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"no compiler: {error}") from error
    return program, _digest(os.fsencode(program), version)


def _folders(target: Target, compiler_key: str, make: bool = False) -> Iterator[Path]:
    """The target's folder in each cache, by preference."""
    parts = [_rules(target).encode(), repr((torch.__version__, sysconfig.get_platform(), platform.libc_ver())).encode()]
    try:
        for path in [*(source.path for source in target.sources), *target.headers]:
            parts += [path.encode(), (CSRC / path).read_bytes()]
    except OSError as error:
        raise BuildError(f"a source of {target.name!r} cannot be read: {error}") from error
    name = f"{target.name}-{_digest(*parts)}-{compiler_key}"
    return (cache / name for cache in _caches(make))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _caches(make: bool) -> Iterator[Path]:
    """The user's folder, then one below the temporary folder that only this user can write to: ``make`` makes that."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A relative one is to be ignored, as the XDG standard says; a user without a home keeps the ~.
    if os.path.isabs(base):
        yield Path(base, "siglip_kernels")
    with suppress(OSError):
        shared = Path(tempfile.gettempdir(), f"siglip_kernels-{os.getuid()}")
        if make:
            with suppress(FileExistsError):
                shared.mkdir(mode=0o700)
        status = shared.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            yield shared
