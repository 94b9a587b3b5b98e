"""Trains one config after the other in one process group: `python -m shardtune.assemble.many CONFIG [CONFIG ...]`.

What a run would say goes to `<runs>/<name>.log`; standard output has a line for each run that has ended.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shardtune.assemble.data import read_texts
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.run import train_run
from shardtune.config_file import load_config
from shardtune.data.corpus import Corpus
from shardtune.exit_codes import guarded, leave
from shardtune.stopping import Stopping
from shardtune.world import World, join_world


def train_many(files: Sequence[str]) -> int:
    """One rank of all these runs; returns 0.

    Raises ShardtuneError with the first run that fails.
    """
    with Stopping():  # there is nothing to save: a rank that is told to stop leaves at once
        world = join_world()
        with world.others_may_end():
            _train_each(files, world)
        world.close()
    return 0


def _train_each(files: Sequence[str], world: World) -> None:
    for number, file in enumerate(files, 1):
        begun = time.monotonic()
        config = load_config(Path(file), [])
        log = Path(config.runs) / f"{config.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.open("w", encoding="utf-8") if world.is_first else contextlib.nullcontext(sys.stderr)
        with out as stream, contextlib.redirect_stderr(stream):
            read: list[Corpus] = []
            world.first_does("texts", lambda config=config, read=read: read.append(read_texts(config)))
            with quiet_libraries():
                train_run(config, world, read[0] if read else None, sys.argv, Stopping())
        if world.is_first:
            sys.stdout.write(f"[{number}/{len(files)}] {config.name}: {time.monotonic() - begun:.1f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    leave(guarded(lambda: train_many(sys.argv[1:])))
