"""Two ranks that save together, each noting what it had and what came of it: FOLDER SEED."""

import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

import saves
from shardtune.checkpoint import saver as saver_module
from shardtune.checkpoint import writer
from shardtune.errors import ShardtuneError
from shardtune.world import join_world


def main() -> None:
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    world = join_world()
    run = saves.Run(root / "checkpoints", world, seed + world.rank)
    noted: dict[str, object] = {}
    plain = list(writer.COMMAND)

    def until_told() -> int:
        boundaries, heard = 0, len(run.said)
        while run.saver._save is not None:
            run.boundary()
            boundaries += 1
            time.sleep(0.005)
        noted.setdefault("heard", []).append(run.said[heard:])  # type: ignore[attr-defined]
        return boundaries

    # In the background, with steps meanwhile.
    run.boundary()
    run.boundary()
    save_file(run.copies(), root / f"expected-{world.rank}.safetensors")
    run.saver.save()
    run.change()
    noted["boundaries"] = until_told()

    # The process of rank 1 ends while it writes; then all is well again.
    run.saver._writer.end()  # type: ignore[union-attr]
    if world.rank == 1:
        writer.COMMAND[:] = saves.faulty("end", 2, root / "ended")
    run.saver.save()
    until_told()
    writer.COMMAND[:] = plain
    run.change()
    run.saver.save()
    until_told()

    # The disk of rank 1 is full.
    run.saver._writer.end()  # type: ignore[union-attr]
    run.saver._writer = None
    if world.rank == 1:
        writer.COMMAND[:] = saves.faulty("error", 2, root / "full")
    run.change()
    run.saver.save()
    noted["full"] = failure(run.saver.finish)
    # Too little room is known before anything is written.
    saver_module.MARGIN = 1 << 60
    noted["no room"] = failure(run.saver.save)
    run.saver.close()
    (root / f"noted-{world.rank}.json").write_text(json.dumps(noted))
    world.close()


def failure(act) -> list[object]:
    try:
        act()
    except ShardtuneError as error:
        return [type(error).__name__, error.exit_code, str(error)]
    return []


if __name__ == "__main__":
    main()
