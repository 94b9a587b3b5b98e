"""The operations that change the disk: every one that makes or ends a checkpoint is one of these.

Standard library only, as everything that the write process imports.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2."""
HERE = -100
"""AT_FDCWD: paths are as they stand."""


def make_folder(path: Path) -> None:
    """Makes one folder, which must be new."""
    path.mkdir()


def create(path: Path) -> int:
    """Opens a new file for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: memoryview, at: int) -> int:
    """Writes at a place in the file; how much was written."""
    return os.pwrite(descriptor, data, at)


def cut(descriptor: int, size: int) -> None:
    """Ends the file there."""
    os.ftruncate(descriptor, size)


def flush(descriptor: int) -> None:
    """Returns when the disk has it."""
    os.fsync(descriptor)


def flush_folder(path: Path) -> None:
    """Returns when the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """In one instant. `new` is not there."""
    os.rename(old, new)


def exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, in one instant. Raises OSError where the file system cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))


def remove(folder: Path) -> None:
    """All that is in a folder, then the folder; what is not there any more does not matter."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
