"""Training processes that are killed with -9 while they save, one after the other: FOLDER SEED HOW COUNT.

HOW is `operations`: with their write process, at its every operation on the disk; or `random`: COUNT times, alone, at
random moments. Prints a JSON line of where it came to that; fails where a checkpoint is then not whole or absent.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import saves
from shardtune.checkpoint import writer
from shardtune.checkpoint.manifest import problems
from shardtune.checkpoint.names import step_of

# The processes are forked, so that torch is imported once.


def main() -> None:
    root, seed, how, count = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    draw = random.Random(seed)
    killed_at = []
    for number in range(1, count + 1):
        folder, mark = root / f"{how}-{number}" / "checkpoints", root / f"{how}-{number}.mark"
        before = saves.Run(folder, saves.alone(), seed)
        before.saver.save()
        before.step = 20
        before.saver.save(hurried=True)
        before.saver.close()
        process = os.fork()
        if process == 0:
            if how == "operations":
                writer.COMMAND[:] = saves.faulty("kill", number, mark)
            run = saves.Run(
                folder, saves.alone(), seed + number, scale=1000 if how == "operations" else 400_000, keep=1
            )
            run.step = 20  # a run that went back, and came again
            run.saver.save()
            run.saver.finish()
            os._exit(0)
        if how == "random":
            time.sleep(draw.uniform(0, 0.3))
            os.kill(process, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if how == "operations" and not mark.exists():
            assert ended == 0, ended
            break
        killed_at.append(mark.read_text() if mark.exists() else ended)
        check(folder, seed)
    else:
        assert how == "random", "there are more operations than that"
    print(json.dumps(killed_at))


def check(folder: Path, seed: int) -> None:
    """What has the name of a checkpoint is one, there is one of step 20, and the next run leaves no rest."""
    there = [path for path in folder.iterdir() if step_of(path) is not None]
    assert 20 in map(step_of, there), there
    for path in there:
        assert not problems(path), problems(path)
    end = time.monotonic() + 10
    while writing(folder):
        assert time.monotonic() < end, "the write process outlives the one that trains"
        time.sleep(0.01)
    after = saves.Run(folder, saves.alone(), seed, keep=1)
    after.step = 30
    after.saver.save()
    after.saver.finish()
    after.saver.close()
    assert saves.names(folder) == ["step-00000030"], saves.names(folder)


def writing(folder: Path) -> bool:
    """Whether any process has a file open there."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(folder) in os.readlink(link):
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    main()
