"""A run that is told to stop saves and leaves with code 75 and nobody behind, whichever of its processes is told."""

from __future__ import annotations

import os
import pty
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


def name_of(case: Case) -> str:
    return f"{case.launcher}-{case.to}-{case.number.name}"


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
    }.get(case.launcher, {})
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


@pytest.mark.parametrize("launcher", ["python", "shardtune"])
def test_a_second_interrupt_leaves_at_once(launcher: str, tmp_path: Path) -> None:
    with launched(tmp_path, launcher, "slow") as (process, _):
        for _ in range(3):  # as one comes from a terminal and from launchers
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        time.sleep(1.5)
        assert process.poll() is None
        told = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, said(tmp_path)
        assert time.monotonic() - told < 2
        assert wait_for(lambda: not marked(process.mark), 2)
        assert list(tmp_path.glob("saved-*")) == []
        assert said(tmp_path).count("interrupted twice") == 1
        assert "Traceback" not in said(tmp_path)


@pytest.mark.parametrize("case", [case for case in sample() if case.launcher in ("python", "shardtune")], ids=name_of)
def test_before_training_it_leaves_at_once(case: Case, tmp_path: Path) -> None:
    with launched(tmp_path, case.launcher, "loading") as (process, ranks):
        os.kill(receiver(case, process, ranks), case.number)
        assert wait_for(lambda: process.poll() is not None and not marked(process.mark), 5), said(tmp_path)
        assert process.returncode == code_of(case), said(tmp_path)
        assert said(tmp_path).count("stopped before the first step; start it again (exit code 75)\n") == 1
        assert said(tmp_path).count("\n") == 1


def test_ranks_that_do_not_listen_yet(tmp_path: Path) -> None:
    with started([sys.executable, "-c", SPAWN, "-c", "import time; time.sleep(60)"], tmp_path, tmp_path / "log") as run:
        assert wait_for(lambda: len(marked(run.mark)) == 3, 20)
        run.terminate()
        assert run.wait(20) == 75, said(tmp_path)


def test_a_terminal(tmp_path: Path) -> None:
    """Control-C reaches each process in the foreground of the terminal."""
    ours, theirs = pty.openpty()
    in_it = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [sys.executable, "-c", in_it, sys.executable, "-c", SPAWN, str(SCRIPT), str(tmp_path)]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        assert wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)), 20)
        os.write(ours, b"\x03")
        assert process.wait(20) == 75
        assert sorted(file.name for file in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
        assert os.read(ours, 10000).decode().count("SIGINT") == 1
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def test_without_a_launcher_it_outlives_the_shell(tmp_path: Path) -> None:
    words = ["sh", "-c", 'nohup "$@" & exit 0', "sh", sys.executable, str(SCRIPT), str(tmp_path)]
    with started(words, tmp_path, tmp_path / "log") as shell:
        assert shell.wait(20) == 0
        assert wait_for((tmp_path / "pid-0").exists, 20), said(tmp_path)
        time.sleep(1)
        assert len(marked(shell.mark)) == 1, said(tmp_path)
        assert list(tmp_path.glob("told-*")) == []


def test_what_a_forked_process_is_sent() -> None:
    """It is not meant for the rank that forked it."""
    program = """if True:
    import os, signal, time
    from shardtune.stopping import Stopping
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Stopping() as stopping:
        stopping.training()
        ready, says_ready = os.pipe()
        forked = os.fork()
        if forked == 0:
            os.write(says_ready, b"1")
            time.sleep(60)
        os.read(ready, 1)
        os.kill(forked, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == -signal.SIGTERM
        time.sleep(0.6)
        assert stopping.told() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.6)
        assert stopping.told() == "SIGUSR1"
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    """
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], check=True, timeout=30)
