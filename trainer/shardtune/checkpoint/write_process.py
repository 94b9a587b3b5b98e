"""The process that writes a rank's checkpoints, beside the one that trains. Standard library only.

Started with the descriptor of the shared memory. Commands come as JSON lines on standard input, each is answered with
one on standard output. It ends when its input does, so never outlives training, whatever it is doing.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from shardtune.checkpoint import files
from shardtune.checkpoint.committing import commit, prune
from shardtune.checkpoint.writing import write_file


def main() -> None:
    """Serves until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # launchers signal whole trees, and the last save is still to come
    memory = _Memory(int(sys.argv[1]))
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[commands], daemon=True).start()
    while True:
        command = json.loads(commands.get())
        try:
            answer = memory.write(**command["write"]) if "write" in command else _commit(**command["commit"])
        except OSError as error:
            answer = {"failed": f"{error.filename or 'storage'}: {error.strerror or error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class _Memory:
    """What the training process has copied; mapped again only where it has grown, as that takes time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._image = memoryview(b"")

    def write(self, path: str, size: int, verify: bool) -> dict[str, Any]:
        if size > len(self._image):
            self._image = memoryview(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ))
        return {"size": size, "sha256": write_file(Path(path), self._image, size, verify)}


def _read(commands: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)


def _commit(
    partial: str, step: int, reports: dict[str, Any], texts: dict[str, str], keep: int | None, best: int | None
) -> dict[str, Any]:
    """`keep`: None leaves older ones alone; `best`: the step of one that stays in any case."""
    replaced = commit(Path(partial), step, reports, texts)
    try:
        if replaced is not None:
            files.remove(replaced)
        if keep is not None:
            prune(Path(partial).parent, step, keep, best)
    except OSError as error:  # the new one is whole all the same
        return {"committed": step, "not removed": f"{error.filename}: {error.strerror}"}
    return {"committed": step}


if __name__ == "__main__":
    main()
