"""Ranks that start at once, for tests that start and kill them hundreds of times: see tests/ranks/warm.py."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from launching import environment, free_port

SERVER = Path(__file__).parent / "ranks" / "warm.py"
LONGEST = 180.0
"""Seconds that ranks may take to end."""
GRACE = 10.0
"""Seconds until a launcher ends the ranks that are left after one was killed."""


class Ranks:
    """Ranks of one run that go on."""

    def __init__(self, server: Warm, pids: list[int], log: Path) -> None:
        self._server = server
        self.pids = pids
        self.log = log
        self._codes: list[int] | None = None
        self._halved = False

    def kill(self, which: Sequence[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all ranks, or to those at these places; launchers then end what is left after a while."""
        self._halved = which is not None and number == signal.SIGKILL
        for place in range(len(self.pids)) if which is None else which:
            with suppress(ProcessLookupError):
                os.kill(self.pids[place], number)

    def wait(self) -> list[int]:
        """Their exit codes, once all have ended; a rank that hangs is killed and fails the test."""
        if self._codes is None:
            self._codes = self._server._ended(self, GRACE if self._halved else LONGEST)
        return self._codes

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class Warm:
    """The process that ranks are forked from."""

    def __init__(self, cache: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(cache),
        )
        assert self._line(120) == b"ready\n"

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def start(
        self, arguments: Sequence[str | Path], ranks: int, log: Path, variables: Mapping[str, str] | None = None
    ) -> Ranks:
        """What `launch/train.py` does with these arguments, on each of the ranks."""
        order = {
            "ranks": ranks,
            "arguments": [str(word) for word in arguments],
            "log": str(log),
            "port": free_port(),
            "environment": dict(variables or {}),
        }
        return Ranks(self, self._ask(order, 30), log)

    def _ended(self, ranks: Ranks, seconds: float) -> list[int]:
        self._tell({"wait": ranks.pids})
        line = self._line(seconds)
        if not line:
            ranks.kill()
            line = self._line(10)
            assert seconds == GRACE, f"ranks did not end within {seconds:.0f} s\n{ranks.said()[-6000:]}"
        return json.loads(line)

    def _ask(self, order: dict, seconds: float) -> list[int]:
        self._tell(order)
        return json.loads(self._line(seconds))

    def _tell(self, order: dict) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        if select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return self._process.stdout.readline()
        return b""
