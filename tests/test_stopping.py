"""A run that is told to stop saves and leaves with code 75 and nobody behind, whichever of its processes is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from launching import BIN, REPOSITORY, free_port, marked, started, wait_for

SCRIPT = REPOSITORY / "tests" / "ranks" / "stop_in_steps.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
SPAWN = "import sys; from shardtune.exit_codes import *; from shardtune.spawn import spawn; " \
        "leave(guarded(lambda: spawn([sys.executable, *sys.argv[1:]], 2, 1, 0, None)))"  # fmt: skip
WHOLE = os.environ.get("SHARDTUNE_WHOLE_MATRIX") == "1"


class Case(NamedTuple):
    launcher: str
    to: str
    """rank, launcher, or for deepspeed runner and launch."""
    number: signal.Signals


def possible() -> list[Case]:
    """Kill -9 of a rank is no order to stop."""
    receivers = {
        "python": ["rank"],
        "torchrun": ["rank", "launcher"],
        "deepspeed": ["rank", "launcher", "child"],
        "shardtune": ["rank", "launcher"],
    }
    return [
        Case(launcher, to, number)
        for launcher, some in receivers.items()
        for to in some
        for number in SIGNALS
        if to != "rank" or number != signal.SIGKILL
    ]


def sample() -> list[Case]:
    """A part of it: what is least alike."""
    slow = [
        Case("torchrun", "launcher", signal.SIGTERM),
        Case("torchrun", "launcher", signal.SIGUSR1),
        Case("deepspeed", "launcher", signal.SIGTERM),
        Case("deepspeed", "child", signal.SIGINT),
        Case("deepspeed", "child", signal.SIGKILL),
    ]
    return [case for case in possible() if case.launcher in ("python", "shardtune") or case in slow]


def code_of(case: Case) -> int:
    """75 where the launcher lets it through; a launcher that does not handle a signal dies of it."""
    if case.to == "rank":
        return 1 if case.launcher == "torchrun" else 75
    handled = {
        "torchrun": {signal.SIGTERM: 1, signal.SIGINT: 1},
        "shardtune": {signal.SIGTERM: 75, signal.SIGINT: 75, signal.SIGUSR1: 75},
        "deepspeed": {signal.SIGINT: 1},
    }[case.launcher]
    if case.to == "child":  # whose end by a signal `deepspeed` takes for success
        handled = {signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGUSR1: 0, signal.SIGKILL: 0}
    return handled.get(case.number, -case.number)


@contextmanager
def launched(folder: Path, launcher: str, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """The launcher's process and those of its ranks, once they are at work."""
    script = [str(SCRIPT), str(folder), *words]
    start = {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
        "shardtune": [sys.executable, "-c", SPAWN],
    }[launcher]
    files = [folder / f"pid-{rank}" for rank in range(1 if launcher == "python" else 2)]
    with started([*start, *script], folder, folder / "log") as process:
        working = lambda: all(file.exists() and file.read_text() for file in files)  # noqa: E731
        assert wait_for(lambda: working() or process.poll() is not None, 60), said(folder)
        assert working(), said(folder)
        yield process, [int(file.read_text()) for file in files]


def said(folder: Path) -> str:
    return (folder / "log").read_text()


def receiver(case: Case, process: subprocess.Popen[bytes], ranks: list[int]) -> int:
    if case.to == "rank":
        return ranks[-1]
    if case.to == "child":
        return int(Path(f"/proc/{ranks[0]}/stat").read_text().split()[3])
    return process.pid


@pytest.mark.parametrize(
    "case", possible() if WHOLE else sample(), ids=lambda c: f"{c.launcher}-{c.to}-{c.number.name}"
)
def test_saves_and_leaves(case: Case, tmp_path: Path) -> None:
    with launched(tmp_path, case.launcher) as (process, ranks):
        told = time.monotonic()
        os.kill(receiver(case, process, ranks), case.number)
        assert wait_for(lambda: process.poll() is not None and not marked(process.mark), 20), said(tmp_path)
        print(f"{time.monotonic() - told:.1f} s")
        assert sorted(file.name for file in tmp_path.glob("saved-*")) == [f"saved-{rank}" for rank in range(len(ranks))]
        assert process.returncode == code_of(case), said(tmp_path)
        assert said(tmp_path).count("shardtune: stopped (exit code 75)\nall is saved\n") == 1
        assert "Traceback" not in said(tmp_path) or case.launcher in ("torchrun", "deepspeed")
