"""What tells a rank to stop: a signal, or the end of the launcher that started it; imports no torch.

Before training there is nothing to lose, and the process ends at once. From then on only a flag is set, and the ranks
agree between two steps that they save and leave.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from shardtune.errors import RankError, Stopped
from shardtune.world import launched_by, launched_local_rank, launched_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP, of a terminal that is closed, only where it is not ignored, as it is under nohup."""
INTERRUPTED = 130
"""The exit code after a second SIGINT."""
SAME_SECONDS = 1.0
"""A SIGINT so soon after the first is the same one: a terminal sends it to all processes, and a launcher once more."""
LOOK_SECONDS = 0.25
"""Between two looks at whether the launcher is still there."""
OVERDUE_SECONDS = 300.0
"""How long after the launcher's end the training loop may take to notice, so longer than a step: when other ranks have
ended too, a collective may wait for them in vain."""


class Stopping:
    """Whether this process has been told to stop; listens while it is entered, which is done in the main thread.

    A thread does the work: Python runs signal handlers in the main thread only, which may be waiting for other ranks.
    """

    def __init__(self) -> None:
        self._launcher = _Launcher() if launched_ranks() is not None else None
        self._is_training = self._is_seen = False
        self._reason: str | None = None
        self._interrupted: float | None = None
        self._alone: float | None = None
        """Since when the launcher has been gone."""

    def __enter__(self) -> Stopping:
        signals, self._written_to = os.pipe()
        os.set_blocking(self._written_to, False)
        self._written_to_before = signal.set_wakeup_fd(self._written_to, warn_on_full_buffer=False)
        ignored = signal.SIGHUP if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else None
        listened = [number for number in SIGNALS if number != ignored]
        self._before = {number: signal.signal(number, _leave_it_to_the_thread) for number in listened}
        for number in listened:
            signal.siginterrupt(number, False)  # what libraries read and write goes on
        threading.Thread(target=self._watch, args=(signals,), name="stopping", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        signal.set_wakeup_fd(self._written_to_before)
        for number, handler in self._before.items():
            # A launcher that sees the first rank leave sends SIGTERM to the others, which may have something to say.
            signal.signal(number, signal.SIG_IGN if isinstance(error, Stopped) else handler)
        os.close(self._written_to)

    def training(self) -> None:
        """From now on there is something to lose: whoever is told to stop comes to the end of its step."""
        self._is_training = True

    def told(self) -> str | None:
        """What has told this process to stop, the name of a signal for instance; None: nothing has."""
        self._is_seen = self._reason is not None
        return self._reason

    def _watch(self, signals: int) -> None:
        numbers = None
        while numbers != b"":  # the other end has been closed
            if select.select([signals], [], [], LOOK_SECONDS)[0]:
                numbers = os.read(signals, 1024)
                for number in SIGNALS:
                    if number in numbers:
                        self._take(number)
            self._look_at_launcher()
        os.close(signals)

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = time.monotonic()
            elif time.monotonic() - self._interrupted > SAME_SECONDS:
                _leave(INTERRUPTED, "interrupted twice; what this run had not saved is lost")
        self._tell(number.name)

    def _look_at_launcher(self) -> None:
        if self._launcher is None:
            return
        if self._alone is None:
            if self._launcher.is_gone():
                self._alone = time.monotonic()
                self._tell("the launcher is gone")
        elif not self._is_seen and time.monotonic() - self._alone > OVERDUE_SECONDS:
            _leave(RankError.exit_code, "the launcher is gone, and the step does not end; other ranks may be gone too")

    def _tell(self, reason: str) -> None:
        if not self._is_training:
            _leave(Stopped.exit_code, f"{reason}: stopped before the first step; start it again")
        if self._reason is None:
            self._reason = reason
            again = "; once more, in a second or later, ends it at once" if reason == "SIGINT" else ""
            _say(f"{reason}: this run saves and stops after the present step{again}")


class _Launcher:
    """The process that started this rank and, for `deepspeed`, the one above it, to which users send their signals."""

    def __init__(self) -> None:
        self._process = launched_by() or os.getppid()
        by_deepspeed = b"deepspeed.launcher.launch" in _command(self._process)
        self._above = _parent(self._process) if by_deepspeed else None
        self._came_late = self._above == 1 and b"deepspeed" not in _command(1)

    def is_gone(self) -> bool:
        """A process whose parent has ended gets another one."""
        if self._came_late or os.getppid() != self._process:
            return True
        return self._above is not None and _parent(self._process) != self._above


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(process: int) -> int | None:
    """None if the process has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """The signal's number has been written to the pipe that the thread reads."""


def _stop_listening() -> None:
    """In a forked process: what it is sent is not meant for this rank."""
    for number in SIGNALS:
        if signal.getsignal(number) is _leave_it_to_the_thread:
            signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_stop_listening)


def _say(words: str) -> None:
    """On the machine's first rank. Not by `print`, whose lock the main thread may hold."""
    if launched_local_rank() == 0:
        with suppress(OSError):  # nobody may be listening any more
            os.write(2, f"shardtune: {words}\n".encode())


def _leave(code: int, words: str) -> NoReturn:
    _say(f"{words} (exit code {code})")
    os._exit(code)
