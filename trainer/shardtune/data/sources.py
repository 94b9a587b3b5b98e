"""What `data.train`, `data.validation` and `data.test` can name, and the rows found there."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path

from shardtune.data.docs import python_docs
from shardtune.data.files import READERS, Row, read_file
from shardtune.data.saved import HUB_ID, is_saved, read_hub, read_saved
from shardtune.errors import DataError

__all__ = ["DOCS", "Row", "rows"]

DOCS = "docs:python"
"""The built-in corpus: documentation and summaries of the installed Python packages."""


def rows(spec: str, split: str, stream: bool = False) -> Iterator[Row]:
    """The rows of a source, in a fixed order.

    `spec`: a file or a glob (its files in sorted order), a folder saved by `datasets`, optionally with
    `:split`, a hub id owner/name[@config][:split], or docs:python. `split`: which split of a dataset that has
    several, unless `spec` names one. `stream`: nothing is read whole or kept, which .json cannot be. Raises
    DataError, naming the place, for all that is missing or wrong.
    """
    if spec == DOCS:
        for pair in python_docs():
            yield Row(f"{DOCS}:{pair.place}", pair.fields())
        return
    if spec.startswith("docs:"):
        raise DataError(f"{spec}: unknown; the built-in corpus is {DOCS}")
    try:
        yield from _stored(spec, split, stream)
    except OSError as error:  # a name too long, a folder that may not be listed
        raise DataError(f"{spec}: cannot be read: {error.strerror or error}") from error


def identity(spec: str) -> list[tuple[str, int, int]] | None:
    """Path, size in bytes and time of change in ns of each file of a source: as long as they stay, so does the content.

    None where it has no files of its own (the hub, docs:python), or they cannot be listed.
    """
    path, (folder, _, _) = Path(spec).expanduser(), spec.rpartition(":")
    try:
        if not path.exists() and glob.has_magic(spec) and not HUB_ID.fullmatch(spec):
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        elif not path.exists() and folder:
            path = Path(folder).expanduser()
            files = [path] if path.is_dir() else []
        else:
            files = [path] if path.exists() else []
        if any(path.is_dir() and not is_saved(path) for path in files):
            return None
        files = [file for path in files for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        found = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
    except OSError:
        return None
    return [(spec, 0, 0), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)] if found else None


def _stored(spec: str, split: str, stream: bool) -> Iterator[Row]:
    path = Path(spec).expanduser()
    folder, _, named = spec.rpartition(":")
    if path.is_dir():
        yield from _folder(path, split, named=False)
    elif path.exists():
        yield from _file(path, stream)
    elif glob.has_magic(spec) and not HUB_ID.fullmatch(spec):  # a split of the hub can be a slice: train[:10%]
        for file in _matches(path):
            yield from _file(file, stream)
    elif folder and Path(folder).expanduser().is_dir():
        yield from _folder(Path(folder).expanduser(), named, named=True)
    elif _is_hub_id(spec, path):
        yield from read_hub(spec, split, stream)
    else:
        raise DataError(_missing(path))


def _file(path: Path, stream: bool) -> Iterator[Row]:
    if stream and path.suffix.lower() == ".json":
        raise DataError(f"{path}: a .json file can only be read whole; to stream it, make it .jsonl, one object a line")
    return read_file(path)


def _folder(folder: Path, split: str, named: bool) -> Iterator[Row]:
    if not is_saved(folder):
        raise DataError(
            f"{folder}: a folder, but not saved by `datasets` (no state.json or dataset_dict.json in it); "
            f"for the files in it give a glob such as {folder}/*.jsonl"
        )
    yield from read_saved(folder, split, named)


def _matches(pattern: Path) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"{pattern}: no file matches")
    return files


def _is_hub_id(spec: str, path: Path) -> bool:
    """A path that does not exist is a hub id if it has that form and is not rather a mistyped file."""
    return HUB_ID.fullmatch(spec) is not None and path.suffix.lower() not in READERS and not _near(path)


def _near(path: Path) -> list[str]:
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    return difflib.get_close_matches(path.name, names, 1)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file; the folder {path.parent} does not exist"
    near = _near(path)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"{path}: no such file{hint}"
