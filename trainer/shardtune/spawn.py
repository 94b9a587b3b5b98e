"""Starts the ranks of this machine as processes and waits for them; imports no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from shardtune.errors import ConfigError, RankError, Stopped
from shardtune.world import LAUNCHER, rank_environment

GRACE_SECONDS = 10.0
"""How long the others may take to leave by themselves after one rank has failed."""
STOP_SECONDS = 60.0
"""The same, after one that was told to stop."""
KNOWN_CODES = {0, 2, 3, 4, 5, 6, 7, 75, 130}


def spawn(command: Sequence[str], ranks: int, nodes: int, node_rank: int, rendezvous: str | None) -> int:
    """Runs `command` once for each rank of this machine. Returns the run's exit code.

    The code is that of the first rank to fail, and the remaining ranks are ended then. Raises RankError where a rank
    was killed or crashed. SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks.
    """
    address, port = _address(rendezvous)
    processes: list[subprocess.Popen[bytes]] = []
    passed_on: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.add(number)
        _send(number, processes)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    for local_rank in range(ranks):
        rank = node_rank * ranks + local_rank
        variables = rank_environment(rank, nodes * ranks, local_rank, ranks, address, port)
        variables[LAUNCHER] = str(os.getpid())
        # In a session of its own, a rank has from here alone what a terminal sends, and has it once.
        processes.append(subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True))
    for number in tuple(passed_on):  # what came before all ranks were there
        _send(number, processes)
    return _wait(processes, node_rank * ranks, passed_on)


def _send(number: int, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes: list[subprocess.Popen[bytes]], first_rank: int, passed_on: set[int]) -> int:
    first: tuple[int, int] | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if first is None:
            failed = [(i, p.returncode) for i, p in enumerate(processes) if p.poll() is not None and p.returncode]
            if failed:
                first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
                if first[1] == Stopped.exit_code:
                    deadline = time.monotonic() + STOP_SECONDS
                    _send(signal.SIGTERM, processes)  # before training, a rank leaves without the others' knowing
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    if first is None:
        first = next(((i, p.returncode) for i, p in enumerate(processes) if p.returncode), None)
    if first is None:
        return 0
    index, code = first
    if -code in passed_on:  # before it listened to signals
        return Stopped.exit_code
    if code in KNOWN_CODES:
        return code
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise RankError(f"rank {first_rank + index} {how}")


def _address(rendezvous: str | None) -> tuple[str, int]:
    if rendezvous is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]
    host, colon, port = rendezvous.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"command line --rendezvous: {rendezvous!r} does not have the form HOST:PORT")
    return host, int(port)
