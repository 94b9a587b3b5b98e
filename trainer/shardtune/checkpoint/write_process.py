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

from shardtune.checkpoint.committing import commit, prune
from shardtune.checkpoint.writing import write_file


def main() -> None:
    """Serves until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # launchers signal whole trees, and the last save is still to come
    memory = int(sys.argv[1])
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[commands], daemon=True).start()
    while True:
        command = json.loads(commands.get())
        try:
            answer = _write(memory, **command["write"]) if "write" in command else _commit(**command["commit"])
        except OSError as error:
            answer = {"failed": f"{error.filename or 'storage'}: {error.strerror or error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _read(commands: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)


def _write(memory: int, path: str, size: int, verify: bool) -> dict[str, Any]:
    with mmap.mmap(memory, 0, prot=mmap.PROT_READ) as image, memoryview(image) as data:
        return {"size": size, "sha256": write_file(Path(path), data, size, verify)}


def _commit(
    partial: str, step: int, reports: dict[str, Any], texts: dict[str, str], keep: int | None
) -> dict[str, Any]:
    """`keep`: None leaves older ones alone."""
    whole = commit(Path(partial), step, reports, texts)
    answer = {"committed": str(whole)}
    if keep is not None:
        try:
            prune(whole, keep)
        except OSError as error:  # the new one is whole all the same
            answer["not removed"] = f"{error.filename}: {error.strerror}"
    return answer


if __name__ == "__main__":
    main()
