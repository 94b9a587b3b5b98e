"""report.html: one self-contained page of a run, made of its files alone. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from shardtune.errors import ShardtuneError, StorageError
from shardtune.report.files import read_run
from shardtune.report.page import page

REPORT = "report.html"


def write_report(folder: Path) -> str | None:
    """Writes report.html to a run's folder, also of a run that has not come to its end.

    Returns None; or why there is none, in a line: a finished run must not fail for a page about it. Raises
    StorageError where the page cannot be written.
    """
    try:
        made = page(read_run(folder))
    except ShardtuneError as error:
        return f"no report: {error}"
    except Exception as error:
        return f"no report ({type(error).__name__}: {error}); `shardtune report --run {folder}` tries again"
    write_page(folder / REPORT, made)
    return None


def write_page(path: Path, made: str) -> None:
    """The file is the old or the new one, whenever it is interrupted. Raises StorageError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(made, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
