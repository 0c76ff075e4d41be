"""Folders that processes fill at the same time, and leave at any time.

A file is named by a digest of its bytes, so half a file is none. It is made in a private folder, whose lock its builder
holds while it lives, and is renamed into place under the lock of the folder.
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


def intact(folder: Path, name: str) -> list[Path]:
    """The ``name.<digest>.so`` whose bytes have that digest, the newest first."""
    found = []
    for path in folder.glob(f"{name}.*.so"):
        with suppress(OSError):
            if path.is_file() and path.name == _content_name(path, name):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def store(file: Path, folder: Path) -> Path:
    """Rename ``file``, a .so, to its place in ``folder``, where those of its name that are not intact are removed."""
    place = folder / _content_name(file, file.stem)
    with folder_lock(folder) as held:
        if held:  # else another process may repair one between the look at it and its removal
            for other in set(folder.glob(f"{file.stem}*.so")) - {place, *intact(folder, file.stem)}:
                with suppress(OSError):
                    other.unlink()
        os.replace(file, place)
    return place


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, which is removed at the end; OSError where that cannot be written."""
    with ExitStack() as stack:
        with folder_lock(folder):  # as it is by whoever looks for leftovers
            path = Path(tempfile.mkdtemp(dir=folder, prefix=PRIVATE_PREFIX))
            stack.enter_context(folder_lock(path))
        try:
            yield path
        finally:
            _remove_tree(path)


def remove_leftovers(root: Path, seconds: float) -> None:
    """Remove the private folders of dead builders from the folders in ``root``; without locks, those that old."""
    for path in root.glob(f"*/{PRIVATE_PREFIX}*"):
        with suppress(OSError), folder_lock(path.parent), folder_lock(path, wait=False) as held:
            if held or (held is None and time.time() - path.stat().st_mtime > seconds):
                _remove_tree(path)


def temporary_root(name: str, make: bool) -> Path:
    """A folder that only this user can write to, which ``make`` makes; OSError where it is another's."""
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
    """Why ``folder``, which need not be there yet, takes no library to be loaded, as far as it shows without trying."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.isdir(folder):
        return [f"{folder} is no folder"]
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return [f"{folder} is mounted noexec"]
    return [] if os.access(folder, os.W_OK | os.X_OK) else [f"{folder} cannot be written to"]


@contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold the folder's lock: True. False where another process has it; None where the file system has no locks."""
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
            if held:  # closing is not enough: a process that was forked meanwhile has the handle too
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _content_name(file: Path, name: str) -> str:
    return f"{name}.{digest(file.read_bytes())}.so"


def _remove_tree(folder: Path) -> None:
    # A compiler that outlived its builder may write into it once more.
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
