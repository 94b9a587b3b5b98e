"""Trains one config after the other in one process group: python or torchrun train_many.py CONFIG [CONFIG ...]"""

import sys
import time
from pathlib import Path

from shardtune.assemble.data import read_texts
from shardtune.assemble.run import quiet_libraries, train_run
from shardtune.config_file import load_config
from shardtune.world import join_world


def main() -> None:
    world = join_world()
    for path in sys.argv[1:]:
        begun = time.monotonic()
        config = load_config(Path(path), [])
        corpus = read_texts(config) if world.is_first else None
        with quiet_libraries():
            train_run(config, world, corpus, sys.argv)
        if world.is_first:
            print(f"{config.name}: {time.monotonic() - begun:.1f} s", flush=True)
    world.close()


if __name__ == "__main__":
    main()
