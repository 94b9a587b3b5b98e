"""The name that a tracking service knows a run by, kept in the run's folder so that a resume goes on with the same."""

from __future__ import annotations

from pathlib import Path

from shardtune.tracking.storage import storage


def remembered(folder: Path, service: str) -> str | None:
    """The run's id at the service; None where it has none yet, or that cannot be read."""
    try:
        return (folder / f"{service}-run-id").read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def remember(folder: Path, service: str, run_id: str) -> None:
    """Keeps the id. Raises StorageError."""
    path = folder / f"{service}-run-id"
    with storage(path):
        path.write_text(run_id + "\n", encoding="utf-8")
