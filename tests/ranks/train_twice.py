"""Trains each config, and once more from its first checkpoint on: `train_twice.py CONFIG ...`, started as ranks.

The second run is in a folder of the same name with -resumed behind it; standard output has a line for each run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

from shardtune.assemble.data import read_texts
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.resuming import Beginning, begin_at
from shardtune.assemble.run import train_run
from shardtune.checkpoint.names import FOLDER
from shardtune.config import Config
from shardtune.config_file import load_config
from shardtune.exit_codes import guarded, leave
from shardtune.stopping import Stopping
from shardtune.world import World, join_world


def train(config: Config, world: World, beginning: Beginning) -> None:
    read = []
    world.first_does("texts", lambda: read.append(read_texts(config)))
    train_run(config, world, read[0] if read else None, sys.argv, Stopping(), beginning)


def begin(config: Config) -> None:
    """The folder of a run that was stopped after its first checkpoint."""
    first = sorted((Path(config.runs) / config.name / FOLDER).glob("step-*"))[0]
    folder = Path(config.runs) / f"{config.name}-resumed"
    shutil.copytree(first, folder / FOLDER / first.name)


def main(files: list[str]) -> int:
    world = join_world()
    for file in files:
        config = load_config(Path(file), [])
        log = Path(config.runs) / f"{config.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if world.is_first:
                stack.enter_context(contextlib.redirect_stderr(stack.enter_context(log.open("w", encoding="utf-8"))))
            stack.enter_context(quiet_libraries())
            train(config, world, Beginning())
            world.first_does("begun", lambda config=config: begin(config))
            again = config.model_copy(update={"name": f"{config.name}-resumed"})
            beginning = begin_at(again, world, print, lambda key: "")
            train(again, world, beginning)
            beginning.release()
        if world.is_first:
            print(config.name, flush=True)
    world.close()
    return 0


if __name__ == "__main__":
    leave(guarded(lambda: main(sys.argv[1:])))
