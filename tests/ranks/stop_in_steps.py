"""One rank of a run that does nothing: FOLDER [slow | loading]. It says where it is in files in FOLDER.

The ranks agree through files that one of them has been told to stop, so torch is not needed. `slow`: the step at which
that happens takes seconds. `loading`: training never begins.
"""

import os
import sys
import time
from pathlib import Path

from shardtune.errors import Stopped
from shardtune.exit_codes import guarded, leave
from shardtune.stopping import Stopping


def work() -> int:
    folder, *how = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))  # deepspeed's
    folder, slow, loading = Path(folder), "slow" in how, "loading" in how
    rank = os.environ.get("RANK", "0")
    with Stopping() as stopping:
        if not loading:
            stopping.training()
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        while loading or not any(folder.glob("told-*")):
            time.sleep(0.05)
            if stopping.told() is not None:
                (folder / f"told-{rank}").write_text(stopping.told())
        time.sleep(6 if slow else 0.3)
        (folder / f"saved-{rank}").touch()
        raise Stopped("all is saved")


if __name__ == "__main__":
    leave(guarded(work))
