"""Folders that several processes fill at the same time, and in which any of them may die at any time.

A file's name contains a digest of its bytes, so a partial file counts as absent. A builder makes the file in a private
folder and holds that folder's lock while it lives. The file is renamed into place under the lock of the shared folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PRIVATE_PREFIX = "build-"


def roots(refusals: list[str], make: bool = False) -> Iterator[Path]:
    """The user's folder, then one below the temporary folder that only this user can write to; ``make`` creates it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # The XDG standard says to ignore a relative path. Without a home the path still begins with ~, and is relative.
    if os.path.isabs(base):
        yield Path(base, "siglip_kernels")
    else:
        refusals.append(f"{base} is no absolute path")
    try:
        yield temporary_root("siglip_kernels", make)
    except OSError as error:
        refusals.append(str(error))


def intact(folder: Path, name: str, suffix: str = ".so") -> list[Path]:
    """The files ``name.<digest><suffix>`` that match their digest, the newest first."""
    found = []
    for path in folder.glob(f"{name}.*{suffix}"):
        with suppress(OSError):
            if path.is_file() and path.name == _content_name(path, name, suffix):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def store(file: Path, folder: Path) -> Path:
    """Rename ``file`` to its place in ``folder``. Also remove files of its name there that are not intact."""
    place = folder / _content_name(file, file.stem, file.suffix)
    with folder_lock(folder) as held:
        if held:  # else another process may repair one between the check and the removal
            of_its_name = folder.glob(f"{file.stem}*{file.suffix}")
            for other in set(of_its_name) - {place, *intact(folder, file.stem, file.suffix)}:
                with suppress(OSError):
                    other.unlink()
        os.replace(file, place)
    return place


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, removed at the end. OSError if ``folder`` cannot be written to."""
    with ExitStack() as stack:
        with folder_lock(folder):  # remove_leftovers takes the same lock
            path = Path(tempfile.mkdtemp(dir=folder, prefix=PRIVATE_PREFIX))
            stack.enter_context(folder_lock(path))
        try:
            yield path
        finally:
            _remove_tree(path)


def remove_leftovers(root: Path, seconds: float) -> None:
    """Remove the private folders of dead builders below ``root``; without locks, those older than ``seconds``."""
    for path in root.glob(f"*/{PRIVATE_PREFIX}*"):
        with suppress(OSError), folder_lock(path.parent), folder_lock(path, wait=False) as held:
            if held or (held is None and time.time() - path.stat().st_mtime > seconds):
                _remove_tree(path)


def temporary_root(name: str, make: bool) -> Path:
    """A folder that only this user can write to; ``make`` creates it. OSError if it is open to others."""
    folder = Path(tempfile.gettempdir(), f"{name}-{os.getuid()}")
    if make:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    if make or os.path.lexists(folder):
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{folder} is open to others")
    return folder


def why_unusable(folder: Path) -> list[str]:
    """Why libraries cannot be stored in ``folder`` and loaded, as far as known without trying. It need not exist."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.isdir(folder):
        return [f"{folder} is no folder"]
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return [f"{folder} is mounted noexec"]
    return [] if os.access(folder, os.W_OK | os.X_OK) else [f"{folder} cannot be written to"]


@contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold the folder's lock: True. False if another process has it, None if the file system has no locks."""
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY)
    try:
        held: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        try:
            yield held
        finally:
            if held:  # closing is not enough: a process forked meanwhile has the handle too
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all. OSError if that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(path.parent) as private:
        (private / path.name).write_text(text, encoding="utf-8")
        os.replace(private / path.name, path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _content_name(file: Path, name: str, suffix: str) -> str:
    return f"{name}.{digest(file.read_bytes())}{suffix}"


def _remove_tree(folder: Path) -> None:
    # A compiler that outlives its builder may still write into it.
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
