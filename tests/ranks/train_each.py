"""Trains each config by itself in this one process, whatever becomes of the others: `train_each.py CONFIG ...`.

CONFIG.json beside each tells how it ended: the exit code of the command (1 with a traceback), and what was said.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from torch import distributed

from shardtune.cli import train_as_rank


def main(files: list[str]) -> None:
    for file in files:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = train_as_rank(["--config", file])
            except Exception:
                code = 1
                traceback.print_exc()
        if distributed.is_initialized():  # of a run that failed
            distributed.destroy_process_group()
        Path(file).with_suffix(".json").write_text(json.dumps({"code": code, "said": said.getvalue()}))


if __name__ == "__main__":
    main(sys.argv[1:])
