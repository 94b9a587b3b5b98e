"""The write process as the training process sees it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import shardtune

COMMAND = [sys.executable, "-m", "shardtune.checkpoint.write_process"]
END_SECONDS = 10.0
"""How long a process may take to end before it is left behind."""


class Writer:
    """One write process: one command at a time, whose answer is awaited or looked for now and then."""

    def __init__(self, memory: int) -> None:
        """Starts it; `memory` is the descriptor of what it writes."""
        paths = [str(Path(shardtune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [*COMMAND, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[memory],
            start_new_session=True,  # out of reach of what a terminal or a launcher sends to its group
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._received = b""
        self.busy = False

    @property
    def alive(self) -> bool:
        """Whether it can be told anything."""
        return self._process.poll() is None

    def tell(self, what: str, **arguments: Any) -> None:
        """Gives it something to do, which is answered even where it has ended."""
        assert self._process.stdin is not None
        self.busy = True
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({what: arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, wait: bool) -> dict[str, Any] | None:
        """What it answers: `lost`, how it ended, where it did; None where it is still at work and `wait` is False."""
        assert self._process.stdout is not None
        while not self._received.endswith(b"\n"):
            if not wait and not select.select([self._process.stdout], [], [], 0)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self.busy = False
                return {"lost": _how(self._process.wait())}
            self._received += data
        answer, self._received, self.busy = json.loads(self._received), b"", False
        return answer

    def end(self) -> None:
        """Ends it, whatever it is doing. Never hangs: a process that waits for a dead disk is left behind."""
        if self.busy:
            self._process.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._process.stdout.close()


def _how(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
