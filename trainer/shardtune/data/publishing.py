"""Folders of the cache: there whole or not at all, also where several processes make the same one at once."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shardtune.errors import StorageError


@contextlib.contextmanager
def published(folder: Path, what: str, is_whole: Callable[[], bool]) -> Iterator[Path]:
    """An empty folder to fill, which then becomes `folder`: unless one that `is_whole` is there already, perhaps from
    another process that wrote at the same time, which stays. One that is not whole is replaced.

    `what` stands there, in words. Raises StorageError where it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as workspace:
            made = Path(workspace) / "made"
            made.mkdir()
            yield made
            _rename(made, folder, is_whole)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write {what}: {error.strerror or error}; "
            "the environment variable SHARDTUNE_CACHE names another place"
        ) from error


def _rename(made: Path, folder: Path, is_whole: Callable[[], bool]) -> None:
    for attempt in itertools.count():
        try:
            made.rename(folder)  # never over a folder that holds anything
            return
        except OSError:
            if not folder.is_dir():
                raise
        if is_whole():
            return
        # Of two processes that find a damaged folder, one has nothing to move, or finds a whole one next time.
        with contextlib.suppress(FileNotFoundError):
            folder.rename(made.with_name(f"replaced-{attempt}"))
