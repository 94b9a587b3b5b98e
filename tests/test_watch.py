"""`shardtune watch`: of a run that grows, is cut back, ends; on a terminal and in a file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from shardtune import cli
from shardtune.tracking import MetricsFile
from shardtune.watching import run as run_module
from shardtune.watching.run import WatchedRun
from shardtune.watching.tail import Tail
from shardtune.watching.view import facts, heading, plain_page, sparkline

CODE = (
    "import sys; from shardtune import cli; code = cli.main(sys.argv[1:]);"
    "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules); sys.exit(code)"
)


def trained(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 10, "loss": 4.0 / step, "lr": 1e-3, "grad_norm": 2.5, "padding_share": 0.25,
        "step_seconds": 2.0, "data_seconds": 0.5, "tokens_per_second": 1234.4, "peak_memory_bytes": 3 * 10**9, **more,
    }  # fmt: skip


def begin(folder: Path, duration: str = "{steps: 40, epochs: null, minutes: null}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nduration: {duration}\n")
    return folder


def write(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_growing_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.look() == (False, [])
    whole = b'{"step": 1, "loss": 2.5}\n{"step": 2, "split": "test"}\n[1]\n{"step": 3}\n'
    seen: list[dict[str, Any]] = []
    for end in range(len(whole) + 1):  # whatever the moment at which the writer is seen
        path.write_bytes(whole[:end])
        news = tail.look()
        assert not news.anew
        seen += news.lines
        assert len(seen) == sum(line.startswith(b"{") for line in whole[:end].split(b"\n")[:-1])
    assert seen == [{"step": 1, "loss": 2.5}, {"step": 2, "split": "test"}, {"step": 3}]


def test_a_file_that_a_resume_cuts_back_is_read_anew(tmp_path: Path) -> None:
    run = WatchedRun(begin(tmp_path / "run"))
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    for step in range(1, 9):
        metrics.write({**trained(step), "part": 1})
    metrics.write({"step": 8, "split": "test", "loss": 1.0})
    metrics.close()
    assert len(run.look()) == 9
    metrics = MetricsFile(run.folder / "metrics.jsonl", after=5)
    for step in range(6, 12):  # longer than it was, before anybody looks
        metrics.write({**trained(step), "part": 2})
    assert len(run.look()) == 11
    assert [(line["step"], line["part"]) for line in run.training] == [(n, 1 + (n > 5)) for n in range(1, 12)]
    assert run.judged == {}
    metrics.write(trained(12))
    assert [line["step"] for line in run.look()] == [12]
    metrics.close()
    (run.folder / "metrics.jsonl").unlink()
    run.look()
    assert run.training == []


def test_how_far_a_run_is(tmp_path: Path) -> None:
    for name, duration, share, total, left in (
        ("steps", "{steps: 40}", 0.25, 40, 60.0),
        ("epochs", "{epochs: 4}", 0.25, 40, 60.0),
        ("minutes", "{minutes: 1}", 1 / 3, 30, 40.0),
        ("none", "{}", None, None, None),
    ):
        run = WatchedRun(begin(tmp_path / name, duration))
        run.look()
        assert run.share is None
        assert heading(run).startswith(f"{name}  step 0  running")
        assert ("training", "no step yet") in facts(run)
        write(run.folder, trained(1), trained(5), trained(10))
        run.look()
        assert run.share == (pytest.approx(share) if share is not None else None)
        assert run.total_steps == total
        assert run.seconds_left == (pytest.approx(left) if left is not None else None)


def test_whether_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = WatchedRun(begin(tmp_path / "run"))
    write(run.folder, *(trained(step) for step in range(1, 5)))
    run.look()
    begun = time.time()
    for seconds, step_seconds, state in ((55, 2.0, "running"), (65, 2.0, "silent"), (65, 30.0, "running")):
        run.training[-1]["step_seconds"] = 4 * step_seconds - 6.0  # the mean of a line
        monkeypatch.setattr(run_module.time, "time", lambda seconds=seconds: begun + seconds)
        assert run.state == state, (seconds, step_seconds)
    monkeypatch.setattr(run_module.time, "time", lambda: begun + 3000)
    assert "no line for 50:00: it has stopped, or is evaluating or saving" in heading(run)
    (run.folder / "final").mkdir()
    assert heading(run) == "run  step 4/40 (10%)  finished"


def test_what_is_shown(tmp_path: Path) -> None:
    run = WatchedRun(begin(tmp_path / "run"))
    for step in (5, 10, 15, 20):
        (run.folder / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    (run.folder / "checkpoints" / ".step-00000025.partial").mkdir()
    write(
        run.folder,
        {"step": 0, "split": "validation", "of": "base", "loss": 5.0, "rougeL": 0.1},
        {"step": 0, "split": "validation", "loss": 4.0, "rougeL": None},
        *(trained(step) for step in range(1, 20)),
        {"step": 10, "split": "validation", "loss": 0.5, "rougeL": 0.3},
        trained(20, loss=None, mfu=0.4321, memory_allocated_bytes=10**9, slowest_rank=3, slowest_rank_share=0.125),
    )
    run.look()
    page = plain_page(run)
    assert page.splitlines() == [
        "run  step 20/40 (50%)  running, last line 0:00 ago",
        "time left         0:40",
        f"loss              not finite  {sparkline([4.0 / step for step in range(1, 20)], 40)}",
        "learning rate     0.001",
        "gradient norm     2.5",
        "tokens a second   1,234 (MFU 43.2%)",
        "padding           25.0%",
        "waiting for data  25.0% of a step of 2 s",
        "memory            3.00 GB at most, 1.00 GB now",
        "slowest rank      3, 12% longer than the mean by itself",
        "base, validation  loss 5.0000  rougeL 0.1000  at step 0",
        "validation        loss 0.5000  rougeL 0.3000  at step 10",
        "checkpoints       … step-00000010 step-00000015 step-00000020",
    ]


def test_sparklines() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([3.0], 10) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, 3, 4], 3) == "▁█▄" or sparkline([0, 0, 7, 7, 3, 4], 3) == "▁█▅"
    assert len(sparkline([float(n) for n in range(1001)], 40)) == 40


def test_once_and_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begin(tmp_path / "run")
    write(folder, trained(1))
    assert cli.main(["watch", "--run", str(folder), "--once"]) == 0
    assert capsys.readouterr().out.startswith(
        "run  step 1/40 (2%)  running, last line 0:00 ago\ntime left         1:18\n"
    )
    assert cli.main(["watch", "--run", str(tmp_path)]) == 2
    assert "is no run's folder (no config.yaml)" in capsys.readouterr().err


def test_lines_as_they_come_until_the_run_is_finished(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    write(folder, trained(1))
    out = tmp_path / "out"
    with out.open("w") as file:
        environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C"}
        watching = subprocess.Popen(
            [sys.executable, "-c", CODE, "watch", "--run", str(folder)], stdout=file, env=environment
        )
    try:
        wait_for(lambda: "step 1/40" in out.read_text())
        write(
            folder,
            trained(2),
            {"step": 2, "split": "test", "loss": 0.25, "examples_per_second": 9.5, "train_loss": 0.5},
        )
        (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        wait_for(lambda: "checkpoint" in out.read_text())
        write(folder, trained(3))
        (folder / "final").mkdir()
        assert watching.wait(30) == 0
    finally:
        watching.kill()
    assert out.read_text().splitlines() == [
        "step 1/40  loss 4.0000  lr 0.001  grad norm 2.5  1,234 tokens/s",
        "step 2/40  loss 2.0000  lr 0.001  grad norm 2.5  1,234 tokens/s",
        "test at step 2  loss 0.2500",
        "checkpoint step-00000002",
        "step 3/40  loss 1.3333  lr 0.001  grad norm 2.5  1,234 tokens/s",
        "run  step 3/40 (8%)  finished",
    ]


def test_a_terminal_shows_a_page_until_one_has_seen_enough(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    write(folder, trained(1))
    reading, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    watching = subprocess.Popen(
        [sys.executable, "-c", CODE, "watch", "--run", str(folder)], stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm"}, preexec_fn=listen,
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(reading, False)
    shown = b""

    def seen(text: str) -> bool:
        nonlocal shown
        with contextlib.suppress(OSError):  # nothing new, or nobody writes any more
            shown += os.read(reading, 100_000)
        return text in shown.decode(errors="ignore")

    try:
        wait_for(lambda: seen("step 1/40 (2%)"))
        write(folder, trained(2, loss=0.1234))
        wait_for(lambda: seen("step 2/40 (5%)") and seen("0.1234"))
        watching.send_signal(signal.SIGINT)
        wait_for(lambda: watching.poll() is not None or seen("never"))
        assert watching.returncode == 0
        assert not seen("Traceback")
    finally:
        watching.kill()
        os.close(reading)


def listen() -> None:
    """What a shell starts in the background ignores Ctrl-C, and what that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(happened: Any) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
