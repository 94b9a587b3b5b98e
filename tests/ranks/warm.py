"""Starts ranks without waiting for imports: forks them from a process that has torch and the rest in memory.

Reads one JSON object a line: {"ranks": N, "arguments": [...], "log": FILE, "port": P, "environment": {...}}, answers
with the pids; {"wait": [pids]} answers with exit codes (negative: a signal) once they have all ended.
"""

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # libraries may say something

import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.t5.modeling_t5  # noqa: E402, F401

import shardtune.assemble.run  # noqa: E402, F401
from shardtune.cli import train_as_rank  # noqa: E402
from shardtune.exit_codes import leave  # noqa: E402
from shardtune.world import rank_environment  # noqa: E402


def start(order: dict) -> list[int]:
    pids = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, order)
        pids.append(pid)
    return pids


def be_rank(rank: int, order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((0, nothing), (1, log), (2, log)):
        os.dup2(new, old)
    os.environ.update(order["environment"])
    if order["ranks"] > 1:
        os.environ.update(rank_environment(rank, order["ranks"], rank, order["ranks"], "127.0.0.1", order["port"]))
    code = 1
    try:
        sys.argv = ["launch/train.py", *order["arguments"]]
        code = train_as_rank(order["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        leave(code)
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    print("ready", file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["wait"]]
            print(json.dumps(codes), file=answers)
        else:
            print(json.dumps(start(order)), file=answers)


if __name__ == "__main__":
    main()
