"""What goes wrong on a file system, said as an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardtune.errors import StorageError


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns errors of the file system into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
