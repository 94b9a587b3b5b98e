"""Files of a checkpoint, which may come from a hostile hand: plain ones only, and no more of them than is sensible."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from shardtune.tensor_files import NotWhole, parse_object, read_bytes

LARGEST_JSON = 64 << 20
"""Bytes."""


def open_plain(path: Path) -> FileIO:
    """Opens a file for reading, without a buffer; never what a link leads to, and without waiting for a pipe.

    Raises NotWhole where there is no plain file, or it cannot be opened.
    """
    try:
        kind = os.lstat(path).st_mode
        if stat.S_ISLNK(kind):
            raise NotWhole("a symbolic link, not a file")
        if stat.S_ISREG(kind):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            return os.fdopen(descriptor, "rb", buffering=0)
    except FileNotFoundError:
        raise NotWhole("missing") from None
    except OSError as error:
        raise unreadable(error) from None
    raise NotWhole("not a plain file")


def read_small(path: Path) -> bytes:
    """All of a file that is small by its nature. Raises NotWhole."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_JSON:
            raise NotWhole(f"has {size} bytes, more than it may")
        try:
            return read_bytes(file, 0, size)
        except OSError as error:
            raise unreadable(error) from None


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises NotWhole."""
    return parse_object(read_small(path), "it")


def unreadable(error: OSError) -> NotWhole:
    """What to say of a file that the system does not give."""
    return NotWhole(f"cannot be read: {error.strerror or error}")
