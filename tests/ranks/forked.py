"""Starts process groups without waiting for imports: forks them from a process that has torch and the rest in memory.

Reads one JSON object a line, see `tests/forked.py`, and answers each with the pid of the group's leader. The leader
forks the ranks, waits for them as a launcher does, and writes their exit codes into a file.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # libraries may say something

from shardtune.exit_codes import SPINS  # noqa: E402

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as in a rank; read when torch is imported

import bitsandbytes  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import schedulefree  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

import shardtune.assemble.many  # noqa: E402
import shardtune.cli  # noqa: E402, F401
from shardtune.world import rank_environment  # noqa: E402

for family in ("t5", "bart", "llama", "gpt2", "bert", "distilbert"):
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")

GRACE = 10.0
"""Seconds that the others may take to leave after one rank has failed."""


def start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()  # so that all of it can be ended
    answers.close()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for old, new in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(new, old)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    ranks = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, order)
        ranks.append(pid)
    codes = wait(ranks)
    partial = Path(order["codes"] + ".partial")
    partial.write_text(json.dumps(codes), encoding="utf-8")
    partial.rename(order["codes"])
    os._exit(0)


def wait(ranks: list[int]) -> list[int]:
    """Exit codes, negative for a signal; once one has failed, the others have little time left."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in ranks]


def be_rank(rank: int, order: dict[str, Any]) -> None:
    if order["ranks"] > 1:
        os.environ.update(rank_environment(rank, order["ranks"], rank, order["ranks"], "127.0.0.1", order["port"]))
    script, *arguments = order["words"]
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent)]
    code: Any = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


def main() -> None:
    gc.freeze()
    print("ready", file=answers)
    for line in sys.stdin:
        print(start(json.loads(line)), file=answers)
        while has_ended():
            pass


def has_ended() -> int:
    """Takes note of a leader that has ended; 0 if there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


if __name__ == "__main__":
    main()
