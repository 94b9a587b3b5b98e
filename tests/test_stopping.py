"""A run that is told to stop saves and leaves with code 75 and nobody behind, whichever of its processes is told."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launching import BIN, REPOSITORY, command, free_port, marked, ranks_of, run, started, wait_for
from tiny import rows, tiny_config, write_rows

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


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    """As after Control-C where the output goes through another program."""
    with subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path)], stderr=subprocess.PIPE) as process:
        try:
            assert wait_for((tmp_path / "pid-0").exists, 20)
            assert process.stderr is not None
            process.stderr.close()
            process.terminate()
            assert process.wait(20) == 75
            assert (tmp_path / "saved-0").exists()
        finally:
            process.kill()


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


# ------------------------------------------------------------------------------------------------- real runs


class Stopped(NamedTuple):
    """A real run that was told to stop."""

    words: list[str]
    run: Path
    code: int
    said: str
    seconds: float

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())


def stop(
    folder: Path, launcher: str, to: str, number: signal.Signals, lines: int, wait: float = 0.0, **keys: Any
) -> Stopped:
    """Tells a run to stop `wait` seconds after so many lines of metrics, and waits until all its processes are gone."""
    config = tiny_config(folder, "llama", **keys)
    words = command(launcher, 1 if launcher == "python" else 2, "--config", config)
    folder_of_run, log = folder / "runs" / "tiny", folder / "log"
    with started(words, folder / "cache", log) as process:
        metrics = folder_of_run / "metrics.jsonl"
        assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= lines, 90), log.read_text()
        time.sleep(wait)
        told = time.monotonic()
        os.kill(process.pid if to == "launcher" else ranks_of(process.mark)[1], number)  # type: ignore[attr-defined]
        gone = wait_for(lambda: process.poll() is not None and not marked(process.mark), 30)
        assert gone, log.read_text()
        return Stopped(words, folder_of_run, process.returncode, log.read_text(), time.monotonic() - told)


REAL = [
    ("shardtune", "rank", signal.SIGTERM, "ddp"),
    ("deepspeed", "launcher", signal.SIGTERM, "ddp"),
]
MORE = [
    (launcher, to, number, kind)
    for launcher, to in (("torchrun", "launcher"), ("shardtune", "launcher"), ("deepspeed", "rank"))
    for number in SIGNALS
    for kind in ("ddp", "fsdp2", "zero1", "zero3")
    if to != "rank" or number != signal.SIGKILL
]


@pytest.mark.parametrize(("launcher", "to", "number", "kind"), REAL + WHOLE * MORE)
def test_no_step_is_lost(launcher: str, to: str, number: signal.Signals, kind: str, tmp_path: Path) -> None:
    stopped = stop(tmp_path, launcher, to, number, 5, duration__steps=120, strategy__kind=kind)
    print(f"{stopped.seconds:.1f} s")
    assert stopped.code == code_of(Case(launcher, to, number)), stopped.said
    step = stopped.metrics[-1]["step"]
    assert 5 <= step < 120
    assert stopped.checkpoints == [f"step-{step:08}"]
    assert stopped.said.count("shardtune: stopped (exit code 75)\n") == 1
    if launcher == "shardtune":
        again = run(stopped.words, tmp_path / "cache")
        assert (again.code, again.left) == (0, []), again.said
        assert f"step {step + 1}/120" in again.err
        assert f"step {step}/120" not in again.err
        assert stopped.metrics[-1]["step"] == 120
        assert (stopped.run / "final").is_dir()


@pytest.mark.parametrize("last", [False, True])
def test_an_evaluation_is_left_out(last: bool, tmp_path: Path) -> None:
    """It would take long. After the last step there is nothing more to lose, but the run is not finished."""
    long = {
        "data__validation": str(write_rows(tmp_path / "long.jsonl", rows(64, seed=3))),
        "evaluation__examples": 64, "evaluation__max_new_tokens": 250, "batch__micro_examples": 1,
    }  # fmt: skip
    keys = {"duration__steps": 2 if last else 9, "evaluation__every": 2}
    how = ("python", "launcher") if last else ("shardtune", "rank")
    stopped = stop(tmp_path, *how, signal.SIGTERM, 2, 1.0, **keys, **long)
    assert stopped.code == 75, stopped.said
    assert stopped.seconds < 10
    assert [(line["step"], "split" in line) for line in stopped.metrics] == [(1, False), (2, False)]
    assert stopped.checkpoints == ["step-00000002"]
    assert stopped.said.count("validation at step 2 left out: the run was told to stop\n") == 1
    assert not (stopped.run / "final").exists()
    assert not list(stopped.run.glob("predictions/*.jsonl*"))
    assert not list(stopped.run.glob("statistics/*"))
    if last:
        again = run([*stopped.words, "evaluation.max_new_tokens=2"], tmp_path / "cache")
        assert again.code == 0, again.said
        assert [line["split"] for line in stopped.metrics if "split" in line] == ["validation"]
        assert (stopped.run / "final").is_dir()
