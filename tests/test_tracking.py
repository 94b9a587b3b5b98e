import fcntl
import io
import json
import math
import os
import re
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
import torch

from shardtune import progress as progress_module
from shardtune.errors import StorageError
from shardtune.evaluation import Judged, Split
from shardtune.judging import Judge
from shardtune.loop import StepReport
from shardtune.progress import Progress, duration
from shardtune.records import Records
from shardtune.reporting import Reporter
from shardtune.state import TrainingState
from shardtune.text_table import table
from shardtune.tracking import MetricsFile, TensorBoardTracker, Tracker
from shardtune.world import World


def test_each_metrics_line_is_there_at_once_with_its_keys_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("left by an earlier run\n")
    metrics = MetricsFile(path)
    lines: list[dict[str, object]] = [
        {"step": 1, "epoch": 0.1, "loss": 2.5e-7, "lr": 1 / 3, "grad_norm": 1e30},
        {"step": 2, "split": "validation", "zeta": 1, "alpha": 2, "text": "Zürich\n日本"},
    ]
    for count, line in enumerate(lines, start=1):
        metrics.write(line)
        read = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        assert read == lines[:count]
        assert [list(one) for one in read] == [list(one) for one in lines[:count]]
    metrics.close()


def test_a_float_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_storage_that_fails_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(str(tmp_path))):
        MetricsFile(tmp_path)
    with pytest.raises(StorageError, match="absent"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        TensorBoardTracker(tmp_path / "file" / "tensorboard")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_storage_error() -> None:
    metrics = MetricsFile(Path("/dev/full"))
    with pytest.raises(StorageError, match="No space left"):
        metrics.write({"step": 1})
    with pytest.raises(StorageError, match="No space left"):  # the line is still waiting to be written
        metrics.close()


def test_tensorboards_own_reader_finds_every_value_and_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    scalars = {
        step: {"train/loss": 3.0 / step, "train/tokens": 1000.0 * step, "validation/rougeL": 0.01 * step}
        for step in range(1, 31)
    }
    scalars[31] = {"train/loss": math.nan}
    texts = {10: ["first *one*", "zwei\n\nZeilen", ""], 20: ["later", "spät", "日本"]}
    tracker: Tracker = TensorBoardTracker(tmp_path / "tensorboard")
    tracker.start({"name": "run", "optimizer": {"lr": 1e-4}})
    for step, values in scalars.items():
        tracker.scalars(step, values)
    for step, samples in texts.items():
        tracker.texts(step, "validation/predictions", samples)
    tracker.close({})

    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={SCALARS: 0, TENSORS: 0})
    reader.Reload()
    assert sorted(reader.Tags()["scalars"]) == ["train/loss", "train/tokens", "validation/rougeL"]
    for name in reader.Tags()["scalars"]:
        read = {event.step: event.value for event in reader.Scalars(name)}
        written = {step: values[name] for step, values in scalars.items() if name in values}
        assert read == pytest.approx(written, rel=1e-7, nan_ok=True)

    def text(event) -> str:
        return event.tensor_proto.string_val[0].decode()

    for index in range(3):
        events = reader.Tensors(f"validation/predictions/{index}/text_summary")
        assert {event.step: text(event) for event in events} == {step: texts[step][index] for step in texts}
    config = text(reader.Tensors("config/text_summary")[0])
    assert all(line.startswith("    ") for line in config.splitlines())
    assert json.loads(config) == {"name": "run", "optimizer": {"lr": 1e-4}}


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_when_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(300, 0, enabled=True, every=40)
    with progress.evaluating("validation", 5) as advance:
        clock.now += 1000  # the baseline's time is not the steps' time
        advance(5)
    for step in range(1, 301):
        clock.now += 2
        progress.step(step, 3.12341 / step, 9.1e-5, 1234.4)
        if step == 40:
            progress.say("a checkpoint\nof two lines")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "step 1/300  loss 3.1234  lr 9.1e-05  1,234 tokens/s  9:58 left"
    assert lines[1] == "step 40/300  loss 0.0781  lr 9.1e-05  1,234 tokens/s  8:40 left"
    assert lines[2:4] == ["a checkpoint", "of two lines"]
    assert [line.split()[1] for line in lines[4:]] == [f"{n}/300" for n in (80, 120, 160, 200, 240, 280, 300)]
    assert lines[-1].endswith("  0:00 left")


def test_time_left_counts_only_steps_of_this_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    progress = Progress(5000, 1000, enabled=True, every=10, stream=stream)
    clock.now += 1
    progress.step(1001, 1.0, 0.0, 10.0)
    assert stream.getvalue() == "step 1001/5000  loss 1.0000  lr 0  10 tokens/s  1:06:39 left\n"


def test_a_run_that_ends_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines have no number of steps, and what is left is what the clock says; the last step's line comes at the end."""
    stream = io.StringIO()
    progress = Progress(None, 100, enabled=True, every=10, stream=stream, limit=600.0)
    for step in range(101, 116):
        progress.step(step, 1.0, 0.5, 10.0, 450.0 + 10 * (step - 100))
    progress.say_last()
    progress.say_last()
    assert stream.getvalue().splitlines() == [
        "step 101  loss 1.0000  lr 0.5  10 tokens/s  2:20 left",
        "step 110  loss 1.0000  lr 0.5  10 tokens/s  0:50 left",
        "step 115  loss 1.0000  lr 0.5  10 tokens/s  0:00 left",
    ]


def test_a_bar_of_time() -> None:
    terminal = Terminal()
    progress = Progress(None, 0, enabled=True, every=10, stream=terminal, limit=60.0)
    for step, seconds in enumerate((15.0, 45.0, 66.0), 1):
        progress.step(step, 2.5, 1e-4, 12345.6, seconds)
        progress._bar.refresh()  # pyright: ignore[reportOptionalMemberAccess] - not at every step by itself
    progress.say_last()
    progress.close()
    shown = terminal.getvalue()
    for text in (
        "  0%|",
        " 25%|",
        "| step 1, loss 2.5000, 12,346 tokens/s, 0:45 left",
        " 75%|",
        "100%|",
        "| step 3, loss",
    ):
        assert text in shown
    assert "\nstep 3" not in shown


def test_other_ranks_are_silent(capsys) -> None:
    for stream in (None, Terminal()):
        progress = Progress(10, 0, enabled=False, every=1, stream=stream)
        progress.step(1, 1.0, 1.0, 1.0)
        progress.say("hello")
        with progress.evaluating("test", 2) as advance:
            advance(2)
        progress.close()
        assert stream is None or stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal() -> None:
    terminal = Terminal()
    progress = Progress(20, 4, enabled=True, every=10, stream=terminal)
    with progress.evaluating("validation", 8) as advance:
        for _ in range(8):
            advance(1)
    for step in range(5, 21):
        progress.step(step, 2.5, 1e-4, 12345.6)
    progress.say("saved")
    progress.close()
    progress.say("written")
    shown = terminal.getvalue()
    assert "4/20" in shown
    assert "evaluating validation" in shown
    assert "20/20, loss 2.5000, 12,346 tokens/s, 0:00 left" in shown
    assert re.search(r"\rsaved\n|\nsaved\n", shown), "the line stands by itself"
    assert shown.endswith("written\n")
    assert "step 5/20" not in shown


@pytest.mark.parametrize(("rows", "columns"), [(30, 90), (0, 0), (0, 90)])
def test_a_terminal_of_no_size_gets_plain_lines(rows: int, columns: int) -> None:
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(writing, "w") as terminal:
        progress = Progress(2, 0, enabled=True, every=1, stream=terminal)
        progress.step(1, 2.5, 1e-4, 10.0)
        progress.close()
        terminal.write("the end")
        terminal.flush()
        shown = ""
        while "the end" not in shown:  # a terminal hands over what it has got so far, not all that was written
            shown += os.read(reading, 10_000).decode()
    os.close(reading)
    assert ("step 1/2  loss 2.5000" in shown) == (rows == 0)
    assert ("| 1/2, loss 2.5000" in shown) == (rows > 0)


def test_the_last_step_is_logged_and_judged_once_where_it_was_not_known(tmp_path: Path) -> None:
    class Evaluator:
        def run(self, name: str, split: Split, advance: Any) -> Judged:
            return Judged({"loss": int(name.removeprefix("step-")) / 2}, [], {"examples_per_second": 1.0})

    state, alone = TrainingState(seconds=60.0), World(0, 1, 0, torch.device("cpu"))
    nothing: Any = None
    splits = [Split(name, nothing, 5, []) for name in ("validation", "test")]
    judges: Any = Evaluator()
    progress = Progress(None, 0, False, 4, limit=120.0)
    with Records(tmp_path, alone, []) as records:
        reporter = Reporter(records, progress, alone.device, state, None, lambda epoch: 100, 4)
        judge = Judge(judges, splits, records, progress, state, None, 3)
        judge.before_training()
        for step in range(1, 7):
            state.step = step
            reporter.after_step(StepReport(1 / step, 0.5, 1e-3, 10 * step, 0.25, 2.0, 0.5 * step))
            judge.where_due()
        reporter.after_training()
        judge.after_training()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["data_seconds"], line["tokens_per_second"]) for line in lines if "lr" in line]
    assert logged == [(1, 0.5, 5.0), (4, 1.5, 15.0), (6, 2.75, 27.5)]
    judged = [(line["step"], line["split"]) for line in lines if "split" in line]
    assert judged == [(0, "validation"), (0, "test"), (3, "validation"), (6, "validation"), (6, "test")]


def test_what_ends_a_run_is_said_not_what_closing_says_then(tmp_path: Path) -> None:
    def end_with(error: Exception | None) -> None:
        alone = World(0, 1, 0, torch.device("cpu"))
        with Records(tmp_path, alone, [Full()]):
            if error is not None:
                raise error

    with pytest.raises(ValueError, match="the cause"):
        end_with(ValueError("the cause"))
    with pytest.raises(StorageError, match="full"):
        end_with(None)


class Full:
    """A tracker whose disk is full when it is closed."""

    def start(self, config: dict[str, Any]) -> None: ...

    def scalars(self, step: int, values: Any) -> None: ...

    def texts(self, step: int, name: str, texts: Any) -> None: ...

    def histograms(self, step: int, values: Any) -> None: ...

    def close(self, final: Any) -> None:
        raise StorageError("full")


def test_durations() -> None:
    assert [duration(s) for s in (0, 9.6, 151, 3599.6, 3751, 90061)] == [
        "0:00", "0:10", "2:31", "1:00:00", "1:02:31", "25:01:01",
    ]  # fmt: skip


def test_a_table_is_aligned() -> None:
    rows = [["rouge1", "0.1234", "-"], ["loss", "12.5", "50%"], ["perplexity of it", "1,234.0", ""]]
    assert table(rows, ["metric", "before", "after training"]).splitlines() == [
        "metric             before  after training",
        "----------------  -------  --------------",
        "rouge1             0.1234               -",
        "loss                 12.5             50%",
        "perplexity of it  1,234.0",
    ]
    assert table([], ["a", "bc"]) == "a  bc\n-  --"
    with pytest.raises(ValueError, match="row of 1 cells"):
        table([["x"]], ["a", "b"])
