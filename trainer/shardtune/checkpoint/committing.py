"""From what all ranks have written to a checkpoint, and what becomes of older ones. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtune.checkpoint import files
from shardtune.checkpoint.manifest import Kept, Manifest, hash_text
from shardtune.checkpoint.names import MANIFEST, MANIFEST_HASH, folder_name, partial_name, step_of
from shardtune.checkpoint.writing import write_text


def commit(partial: Path, step: int, reports: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> Path | None:
    """Makes the checkpoint of `step` out of the folder `partial`; where what it has taken the place of stands now.

    `reports`: size and SHA-256 of the files that stand there; `texts`: small files to add. Raises OSError.
    """
    for name, report in reports.items():
        if (partial / name).stat().st_size != report["size"]:
            raise OSError(errno.EIO, "rank 0 does not see what another rank has written", str(partial / name))
    for name, text in texts.items():
        write_text(partial / name, text)
    kept = {name: Kept(report["size"], report["sha256"]) for name, report in reports.items()}
    kept |= {name: _kept(text.encode()) for name, text in texts.items()}
    manifest = Manifest(step, kept).text()
    write_text(partial / MANIFEST, manifest)
    write_text(partial / MANIFEST_HASH, hash_text(manifest.encode()))
    files.flush_folder(partial)
    whole = partial.with_name(folder_name(step))
    replaced = None
    if whole.exists():  # of a run that went back behind it and came again
        replaced = _replace(whole, partial)
    else:
        files.rename(partial, whole)
    files.flush_folder(whole.parent)
    files.flush_folder(whole.parent.parent)  # the folder of all checkpoints may be new
    return replaced


def prune(folder: Path, newest: int, keep: int, best: int | None = None) -> None:
    """Keeps that of step `newest`, the `keep` - 1 before it and that of step `best`. Each of the others loses its name
    first: what has it is whole.

    Raises OSError.
    """
    steps = {step: path for path in folder.iterdir() if (step := step_of(path)) is not None}
    before = sorted((step, path) for step, path in steps.items() if step < newest)
    for step, old in before[: max(len(before) - keep + 1, 0)]:
        if step == best:
            continue
        aside = old.with_name(partial_name(step, f"old-{os.getpid()}"))
        files.rename(old, aside)
        files.remove(aside)


def _kept(data: bytes) -> Kept:
    return Kept(len(data), hashlib.sha256(data).hexdigest())


def _replace(whole: Path, partial: Path) -> Path:
    """At every instant there is one of the two where the file system can exchange names; where the older one is now."""
    try:
        files.exchange(whole, partial)
        return partial
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    aside = partial.with_name(f"{partial.name}-old")
    files.rename(whole, aside)
    files.rename(partial, whole)
    return aside
