"""Compiles csrc/ into shared libraries on first use: once per content, with ninja, never on import.

A library is ``<cache>/<name>-<content>-<compiler>/<name>.<digest>.so``. ``<cache>`` is below the user's cache folder;
below the temporary folder if the first cannot be written to, or nothing loads from it. ``<content>`` hashes ninja's
rules, every source and header, torch's version and the platform. ``<compiler>`` hashes the compiler's command and
version. ``<digest>`` hashes the library: a truncated one counts as absent. Without a compiler, as in an image, any
compiler's library of the same content is used. A failure is recorded in the folder where the library would be.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from siglip_kernels import cache
from siglip_kernels.targets import Target

_INSIDE = Path(__file__).parent / "csrc"  # in a wheel; a source tree has it beside the package
CSRC = _INSIDE if _INSIDE.is_dir() else _INSIDE.parents[1] / "csrc"
TIMEOUT = 300.0  # seconds a build may take
COMPILERS = "c++", "g++", "clang++"  # by preference, after the user's own command, $CXX


class BuildError(RuntimeError):
    """Why there is no library: the compiler's first errors, or what is missing on this machine."""


class InterruptedBuildError(BuildError):
    """A signal ended the build: the next one may succeed."""


_outcomes: dict[Target, ctypes.CDLL | str] = {}  # known to this process: the library, or why there is none
_to_retry: set[Target] = set()  # the next ``load`` compiles these even if a built library does not load


def load(target: Target) -> ctypes.CDLL:
    """The shared library, compiled now if no cache holds one that loads. BuildError, always the same, if it fails."""
    outcome = _cached_outcome(target)
    if outcome is None:
        try:
            outcome = _build(target)
        except (BuildError, OSError) as error:
            outcome = str(error)
    _outcomes[target] = outcome
    _to_retry.discard(target)
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


def library(target: Target) -> Path:
    """The path of the library that ``load`` returns."""
    return Path(load(target)._name)


def why_not(target: Target) -> list[str]:
    """Why there is no library, as far as known without compiling; empty if ``load`` may succeed."""
    outcome = _cached_outcome(target)
    return [outcome] if isinstance(outcome, str) else []


def is_built(target: Target) -> bool:
    """Whether ``load`` succeeds without compiling."""
    outcome = _cached_outcome(target)
    return outcome is not None and not isinstance(outcome, str)


def forget_failure(target: Target) -> None:
    """Let the next ``load`` compile a target that failed before, or did not load."""
    if isinstance(_outcomes.get(target), str):
        del _outcomes[target]
    _to_retry.add(target)
    with suppress(BuildError):
        for folder in _candidate_folders(target, _compiler()[1], []):
            with suppress(OSError):
                (folder / "failed.txt").unlink()


def remove_leftovers() -> None:
    """Remove what killed builds left behind."""
    for root in cache.roots([]):
        cache.remove_leftovers(root, TIMEOUT)


def _cached_outcome(target: Target) -> ctypes.CDLL | str | None:
    """The library, or why there is none; None if only compiling can tell."""
    outcome = _outcomes.get(target)
    if outcome is None:
        try:
            outcome = _find_built(target)
        except (BuildError, OSError) as error:
            return str(error)
        if outcome is not None:
            _outcomes[target] = outcome
    return outcome


def _find_built(target: Target) -> ctypes.CDLL | None:
    """The library in a cache; None if it must be built first. BuildError if that failed before, or is impossible."""
    if os.name != "posix":
        raise BuildError("native code is compiled on Linux and macOS only")
    refusals: list[str] = []
    try:
        folders = _candidate_folders(target, _compiler()[1], refusals)
    except BuildError as error:
        by_any = [folder for path in _candidate_folders(target, "*", []) for folder in path.parent.glob(path.name)]
        found, reasons = _load_first(target, by_any)
        if found is None:
            raise BuildError("; ".join([str(error), *reasons])) from None
        return found
    may_build, failure = False, ""
    for folder in folders:
        found, reasons = _load_first(target, [folder])
        if found is not None:
            return found
        reasons = reasons or cache.why_unusable(folder)
        may_build |= not reasons
        refusals += reasons
        with suppress(OSError):
            failure = failure or (folder / "failed.txt").read_text(encoding="utf-8", errors="replace")
    if failure and target not in _to_retry:
        raise BuildError(f"{failure} (remembered: python -m siglip_kernels build tries again)")
    _ninja()
    if not may_build:
        raise BuildError("no folder to build in: " + "; ".join(refusals))
    return None


def _load_first(target: Target, folders: Iterable[Path]) -> tuple[ctypes.CDLL | None, list[str]]:
    """The first library in the folders that loads, and the reasons why built ones do not load."""
    reasons = []
    for folder in folders:
        for path in cache.intact(folder, target.name):
            try:
                return ctypes.CDLL(str(path)), []
            except OSError as error:
                reasons.append(_describe_error(error, folder.parent))
    return None, [] if target in _to_retry else reasons


def _build(target: Target) -> ctypes.CDLL:
    """Compile in the first folder that the library then loads from."""
    command, key = _compiler()
    remove_leftovers()
    refusals: list[str] = []
    for folder in _candidate_folders(target, key, refusals, make=True):
        found, reasons = _load_first(target, [folder])  # another process may have built it meanwhile
        reasons = reasons or cache.why_unusable(folder)
        if found is None and not reasons:
            try:
                found = ctypes.CDLL(str(_build_in(folder, target, command)))
            except OSError as error:
                reasons = [_describe_error(error, folder.parent)]
        if found is not None:
            return found
        refusals += reasons
    raise BuildError("no folder to build in: " + "; ".join(refusals))


def _build_in(folder: Path, target: Target, command: list[str]) -> Path:
    """Compile the library in a private folder below ``folder``. OSError if ``folder`` cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = folder / "failed.txt"
    with cache.private_folder(folder) as private:
        try:
            _compile(target, command, private)
        except BuildError as error:
            if not isinstance(error, InterruptedBuildError):
                with suppress(OSError):
                    (private / failed.name).write_text(str(error), encoding="utf-8")
                    os.replace(private / failed.name, failed)
            raise
        with suppress(OSError):
            failed.unlink()  # written by another process
        return cache.store(private / f"{target.name}.so", folder)


def _describe_error(error: OSError, path: Path) -> str:
    """The system's message with the path. The loader's messages already begin with it."""
    words = error.strerror or str(error)
    return words if str(path) in words else f"{path}: {words}"


def _compile(target: Target, command: list[str], folder: Path) -> None:
    """Run ninja in ``folder``."""
    places = f"compiler = {_quote(*command)}\nincludes = -I{_quote(str(CSRC))}\ncsrc = {_escape_dollars(str(CSRC))}\n"
    (folder / "build.ninja").write_text(places + _ninja_rules(target), encoding="utf-8")
    name = shlex.join([Path(command[0]).name, *command[1:]])
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
            raise BuildError(f"{name} took more than {TIMEOUT:g} s") from None
        finally:
            ninja.terminate()  # not kill: on SIGTERM ninja ends its compilers
    if ninja.returncode < 0 or "interrupted by user" in output:
        raise InterruptedBuildError(f"{name} was interrupted")
    if re.search("No space left on device|Disk quota exceeded", output):
        raise OSError(f"{name}: {_first_errors(output)}")  # another folder may have room
    if ninja.returncode:
        raise BuildError(f"{name}: {_first_errors(output)}")


def _ninja_rules(target: Target) -> str:
    """ninja's rules, without the paths of the compiler and of csrc/."""
    flags, link_flags = _quote("-fPIC", *target.flags), _quote(*target.link_flags)
    text = f"rule compile\n  command = $compiler {flags} $includes $flags -c $in -o $out\n"
    text += f"rule link\n  command = $compiler -shared $in -o $out {link_flags}\n"
    for i, source in enumerate(target.sources):
        path = _escape_dollars(source.path).replace(" ", "$ ").replace(":", "$:")
        text += f"build {i}.o: compile $csrc/{path}\n  flags = {_quote(*source.flags)}\n"
    return text + f"build {target.name}.so: link {' '.join(f'{i}.o' for i in range(len(target.sources)))}\n"


def _quote(*words: str) -> str:
    return _escape_dollars(shlex.join(words))


def _escape_dollars(text: str) -> str:
    return text.replace("$", "$$")


def _first_errors(output: str, most: int = 3) -> str:
    skipped = ("[", "FAILED:", "ninja: build stopped")
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(skipped)]
    errors = [line for line in lines if re.search(r"error:|\bfatal\b|undefined (reference|symbol)|cannot find", line)]
    return "; ".join(errors[:most] or lines[-most:])


def _ninja() -> str:
    """The ninja program on the PATH, else that of the PyPI module, which need not be on the PATH."""
    program = shutil.which("ninja")
    if program is None:
        with suppress(ImportError):
            import ninja

            program = shutil.which("ninja", path=ninja.BIN_DIR)
    if program is None:
        raise BuildError("no ninja: neither a program on the PATH nor the Python module (pip install ninja)")
    return program


def _compiler() -> tuple[list[str], str]:
    """The compiler's command and its key: the user's own, else the first usual one on the PATH."""
    reasons = []
    for command, otherwise in _compiler_commands():
        try:
            if command:
                done = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=TIMEOUT)
                return command, _digest(os.fsencode(shlex.join(command)), done.stdout)
            reasons.append(otherwise)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    raise BuildError("no compiler: " + "; ".join(reasons))


def _compiler_commands() -> Iterator[tuple[list[str], str]]:
    """(command, reason) by preference. If there is no such program, the command is empty and the reason says why."""
    own = os.path.expandvars("$CXX")
    if own not in ("$CXX", ""):  # the variable is set
        yield _resolve_command(own), f"$CXX is {own!r}, which names no program"
    yield next(filter(None, map(_resolve_command, COMPILERS)), []), f"none of {', '.join(COMPILERS)} is on the PATH"


def _resolve_command(text: str) -> list[str]:
    """The command in ``text``: a program's path, which may hold spaces, or words as ``ccache g++``. Empty if absent."""
    with suppress(ValueError):  # an unclosed quotation
        for words in ([text], shlex.split(text)):
            program = shutil.which(words[0]) if words else None
            if program is not None:
                return [os.path.abspath(program), *words[1:]]
    return []


def _candidate_folders(target: Target, compiler_key: str, refusals: list[str], make: bool = False) -> Iterator[Path]:
    """The target's folder in each cache, by preference. Reasons against further folders go to ``refusals``."""
    parts = [
        _ninja_rules(target).encode(),
        repr((torch.__version__, sysconfig.get_platform(), platform.libc_ver())).encode(),
    ]
    try:
        for path in [*(source.path for source in target.sources), *target.headers]:
            parts += [path.encode(), (CSRC / path).read_bytes()]
    except OSError as error:
        raise BuildError(f"a source of {target.name!r} cannot be read: {error}") from error
    name = f"{target.name}-{_digest(*parts)}-{compiler_key}"
    return (root / name for root in cache.roots(refusals, make))


def _digest(*parts: bytes) -> str:
    return cache.digest(b"".join(hashlib.sha256(part).digest() for part in parts))
