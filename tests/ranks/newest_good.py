"""What ranks find together: torchrun newest_good.py FOLDER …; for each folder, a JSON line of each rank."""

import json
import sys
from pathlib import Path

from shardtune.checkpoint.finding import newest_good
from shardtune.errors import ShardtuneError
from shardtune.world import join_world


def main() -> None:
    world = join_world()
    for folder in sys.argv[1:]:
        said: list[str] = []
        try:
            path = newest_good(Path(folder), world, said.append)
            found = {"name": path.name if path is not None else None}
        except ShardtuneError as error:
            found = {"error": str(error), "code": error.exit_code}
        for rank in range(world.size):
            if rank == world.rank:
                print(json.dumps({"rank": rank, "folder": folder, "said": said, **found}), flush=True)
            world.sum([0.0])
    world.close()


if __name__ == "__main__":
    main()
