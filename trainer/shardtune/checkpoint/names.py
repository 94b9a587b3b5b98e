"""What the files and folders of checkpoints are called."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "checkpoints"
"""In the run's folder."""
STATE, CONFIG, MANIFEST = "state.json", "config.yaml", "manifest.json"
MANIFEST_HASH = "manifest.json.sha256"
WHOLE = re.compile(r"step-(\d{8,})")
DAMAGED = re.compile(r"step-(\d{8,})\.damaged(-\d+)?")
PARTIAL = re.compile(r"\.step-(\d{8,})\.partial-.*")


def folder_name(step: int) -> str:
    """Of a whole checkpoint."""
    return f"step-{step:08}"


def partial_name(step: int, token: str) -> str:
    """Of one that is being written; `token` is new for every attempt."""
    return f".{folder_name(step)}.partial-{token}"


def rank_file(rank: int, ranks: int) -> str:
    """What one rank has written."""
    return f"rank-{rank:05}-of-{ranks:05}.safetensors"


def key_of(name: str, what: str) -> str:
    """A piece's key in its file; `what` is empty for the value of a parameter."""
    return f"{name}#{what}" if what else name


def split_key(key: str) -> tuple[str, str]:
    """The name and the what of a key."""
    name, _, what = key.partition("#")
    return name, what


def step_of(folder: Path) -> int | None:
    """The step of a folder that is called as a whole checkpoint is; None for others."""
    found = WHOLE.fullmatch(folder.name)
    return int(found[1]) if found else None
