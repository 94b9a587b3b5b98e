"""Where a run begins: anew, or at a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from shardtune import run_folder
from shardtune.assemble.resumable import compare
from shardtune.assemble.saving import Identity
from shardtune.checkpoint.reading import Checkpoint
from shardtune.config import Config


class Beginning(NamedTuple):
    """Where a run begins."""

    saved: Checkpoint | None = None
    began_from: str | None = None

    def check(self, config: Config, identity: Identity) -> list[str]:
        return compare(self.saved.state, config, identity.data, identity.base) if self.saved is not None else []

    def claim(self, folder: Path, config_yaml: str, environment: dict[str, Any]) -> int:
        if self.saved is None:
            return run_folder.begin(folder, config_yaml, environment)
        held = run_folder.claim(folder)
        run_folder.reopen(folder, self.saved.step, config_yaml, environment)
        return held


FRESH = Beginning()
