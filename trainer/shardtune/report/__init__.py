"""report.html: one self-contained page of a run, made of its files alone. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from shardtune.errors import ShardtuneError
from shardtune.report.files import read_run
from shardtune.report.page import page
from shardtune.run_folder import write_whole

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
    write_whole(folder / REPORT, made)
    return None
