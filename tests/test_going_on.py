"""What a run that goes on does with the files of its folder, and where `checkpoint.resume` lets it begin."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kept import Kept
from shardtune import result, run_folder
from shardtune.assemble.resuming import Beginning, begin_at
from shardtune.assemble.run_again import finished, to_resume
from shardtune.assemble.saving import how_to_go_on, restore
from shardtune.cli import main, train_as_rank
from shardtune.config_file import load_config
from shardtune.data.steps import Step, Steps
from shardtune.errors import CheckpointError, ConfigError, StorageError
from shardtune.evaluation import Evaluator
from shardtune.state import TrainingState
from shardtune.tracking import MetricsFile, TensorBoardTracker
from shardtune.world import World
from tiny import tiny_config

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4}', "\n", "\x00\x00"])
def test_metrics_are_cut_back_to_the_checkpoints_step(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "split": "validation", "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": 2.25, "text": "Zürich"},
        {"step": 3, "split": "validation", "loss": None},
        {"step": 4, "loss": 2.0},
        {"step": 4, "split": "validation", "loss": 1.0},
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + torn, encoding="utf-8")
    whole = path.read_text(encoding="utf-8")
    metrics = MetricsFile(path, after=3)
    assert metrics.kept == lines[:4]
    metrics.write({"step": 4, "loss": 7.0})
    metrics.close()
    kept = "".join(whole.splitlines(keepends=True)[:4])
    assert path.read_text(encoding="utf-8") == kept + '{"step": 4, "loss": 7.0}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    MetricsFile(path, after=100).close()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_metrics_that_are_not_there_are_begun(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after=3)
    assert metrics.kept == []
    metrics.write({"step": 4})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4}\n'


def test_tensorboards_own_reader_sees_no_point_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    folder = tmp_path / "tensorboard"
    for part, (after, last) in enumerate([(None, 9), (6, 8), (3, 11)]):
        tracker = TensorBoardTracker(folder, after)
        tracker.start({"part": part})
        for step in range((after or 0) + 1, last + 1):
            tracker.scalars(step, {"train/loss": 100.0 * part + step})
            tracker.texts(step, "validation/predictions", [f"part {part}"])
        tracker.close({})
        written = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        written.rename(folder / f"events.out.tfevents.{part}")  # names have seconds in them, which are the same here
    reader = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    reader.Reload()
    read = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert read == [(step, float(step)) for step in range(1, 4)] + [(step, 200.0 + step) for step in range(4, 12)]
    reader = plugin_event_accumulator.EventAccumulator(str(folder), {plugin_event_accumulator.TENSORS: 0})
    reader.Reload()  # what TensorBoard's pages read by
    for name, steps in (("validation/predictions/0", list(range(1, 12))), ("config", [0, 3])):
        assert [event.step for event in reader.Tensors(f"{name}/text_summary")] == steps


def test_environment_keeps_the_parts_that_count(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = run_folder.environment(["train"], "single", ["CPU"])
    descriptor = run_folder.begin(folder, "a: 1\n", one)
    with pytest.raises(ConfigError, match="another run is writing"):
        run_folder.claim(folder)
    os.close(descriptor)
    for step, devices in ((30, ["CPU", "CPU"]), (30, ["CPU"]), (50, ["CPU"] * 4)):
        run_folder.reopen(folder, step, f"step: {step}\n", run_folder.environment(["train"], "ddp", devices))
    found = run_folder.read_environment(folder)
    assert (found["ranks"], found["begins_after"], (folder / "config.yaml").read_text()) == (4, 50, "step: 50\n")
    assert [(part["steps"], part["ranks"], part["strategy"]) for part in found["earlier"]] == [
        ([0, 30], 1, "single"), ([30, 50], 1, "ddp"),
    ]  # fmt: skip
    assert found["earlier"][0]["versions"] == one["versions"]
    run_folder.reopen(folder, 20, "", run_folder.environment([], "ddp", ["CPU"]))
    assert [part["steps"] for part in run_folder.read_environment(folder)["earlier"]] == [[0, 20]]
    (folder / "environment.json").write_text('{"torn')
    run_folder.reopen(folder, 20, "", run_folder.environment([], "ddp", ["CPU"]))
    assert run_folder.read_environment(folder)["begins_after"] == 20
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "environment.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 4 steps and its config; checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(
        folder, "llama", checkpoint={"every": 2, "keep": 9}, tracking={"tensorboard": True, "every": 1},
        evaluation={"every": 2, "examples": 2, "max_new_tokens": 2, "baseline": True},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDTUNE_CACHE", str(folder / "cache"))
        assert train_as_rank(["--config", str(config)]) == 0
    return folder


class Run:
    """A copy of the finished run, to be gone on with."""

    def __init__(self, file: Path, runs: Path) -> None:
        self.file = file
        self.folder = runs / "tiny"
        self.checkpoints = self.folder / "checkpoints"
        self.own = [f"runs={runs}"]
        self.said: list[str] = []

    def begins(self, *overrides: str) -> Beginning:
        config = load_config(self.file, [*self.own, *overrides])
        return begin_at(config, ALONE, self.said.append, lambda key: "")

    def goes_on(self, *overrides: str) -> int:
        code = train_as_rank(["--config", str(self.file), *self.own, *overrides])
        if dist.is_initialized():  # after an error, when a process would end
            dist.destroy_process_group()
        return code

    def steps(self) -> list[str]:
        return sorted(entry.name.removeprefix("step-0000000") for entry in self.checkpoints.iterdir())

    def lines(self) -> list[tuple[int, str]]:
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [(line["step"], line.get("split", "")) for line in map(json.loads, text.splitlines())]


@pytest.fixture
def tiny(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(made / "cache"))
    shutil.copytree(made / "runs", tmp_path / "runs")
    return Run(made / "config.yaml", tmp_path / "runs")


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_only_a_command_that_goes_on_is_named(tmp_path: Path) -> None:
    for resume in ("auto", "never", "elsewhere"):
        said = how_to_go_on(tmp_path, TrainingState(step=5), resume)
        assert f"{tmp_path / 'checkpoints' / 'step-00000005'}; " in said
        assert ("the same command goes on" in said) == (resume != "never")
        assert f"\n  shardtune resume --run {tmp_path}" in said


def test_a_random_stream_that_was_not_saved_follows_from_seed_and_step() -> None:
    saved: Any = Kept([], step=7)  # as that of a GPU, of a run that was on the CPU
    saved.ranks = 1
    strategy: Any = SimpleNamespace(restore=lambda saved: None)
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        restore(saved, strategy, ALONE, 0)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_finished_run_says_so(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny.folder / "metrics.jsonl").read_bytes()
    for overrides in (
        [],
        ["duration.steps=3", "optimizer.lr=1e-4", "evaluation.best=loss"],
        [f"checkpoint.resume={tiny.folder}"],
    ):
        assert tiny.goes_on(*overrides) == 0
        out = capsys.readouterr().out
        assert "this run is finished" in out
        assert ("it was trained with optimizer.lr: 0.001, not 0.0001" in out) == ("optimizer.lr=1e-4" in overrides)
        assert ("it was trained with evaluation.best: null, not loss" in out) == ("optimizer.lr=1e-4" in overrides)
    assert main(["resume", "--run", str(tiny.folder)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (tiny.folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_goes_on_for_longer(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.lines()
    assert tiny.goes_on("duration.steps=6", "optimizer.lr=5e-4", "evaluation.baseline=true") == 0
    out, err = capsys.readouterr()
    assert "optimizer.lr: 0.0005, was 0.001\n" in err
    assert "duration.steps: 6, was 4; the learning rate now falls to zero at the new end" in err
    assert (tiny.folder / "final-step-4" / "model.safetensors").exists()
    assert (tiny.folder / "final" / "model.safetensors").exists()
    assert tiny.lines() == [*before, (5, ""), (6, ""), (6, "validation")]
    assert tiny.steps() == ["2", "4", "6"]
    first = next(line for line in out.splitlines() if line.startswith("validation  loss"))
    assert "-" not in first.split(), "the baseline of the first part is still known"
    described = run_folder.read_environment(tiny.folder)
    assert [part["steps"] for part in described["earlier"]] == [[0, 4]]
    assert load_config(tiny.folder / "config.yaml", []).optimizer.lr == 5e-4


def test_no_step_is_prepared_after_the_last(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    at = Steps.at

    def counted(steps: Steps, epoch: int, cursor: int) -> Step:
        prepared.append(cursor)
        return at(steps, epoch, cursor)

    monkeypatch.setattr(Steps, "at", counted)
    assert tiny.goes_on("duration.steps=6", "data.prefetch=4") == 0
    assert len(prepared) == 2


def test_what_does_not_fit_is_refused_and_nothing_is_moved(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tiny.folder.rglob("*") if path.is_file()}

    before = content()
    back = f"checkpoint.resume={tiny.checkpoints / 'step-00000002'}"
    for change, place in (
        (["seed=3", "duration.steps=8"], "command line seed: 3, was 0"),
        ([back, "tuning.method=lora"], "command line tuning.method: lora, was full"),
        ([back, "task.max_source_tokens=20"], "command line task.max_source_tokens: 20, was 48"),
        (["duration.steps=8", f"data.train={tiny.file.parent / 'validation.jsonl'}"], "command line data.train: "),
    ):
        assert tiny.goes_on(*change) == 4
        assert place in capsys.readouterr().err
    assert content() == before


def test_a_run_goes_back_to_an_earlier_step(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny.checkpoints / "step-00000004", tiny.checkpoints / "step-00000009.undone")
    (tiny.folder / "predictions" / "step-40-validation.jsonl").touch()
    old = tiny.lines()
    command = [f"checkpoint.resume={tiny.checkpoints / 'step-00000002'}", "duration.steps=5"]
    assert tiny.goes_on(*command) == 0
    assert "goes back to step 2" in capsys.readouterr().err
    assert tiny.steps() == ["2", "4", "4.undone", "5", "9.undone"]
    assert (tiny.folder / "final-step-4").is_dir()
    assert tiny.lines() == [*old, (5, ""), (5, "validation")]
    assert not (tiny.folder / "predictions" / "step-40-validation.jsonl").exists()
    assert tiny.goes_on(*command) == 0, "a requeued job does not roll back what it has done"
    assert "this run is finished" in capsys.readouterr().out
    shutil.rmtree(tiny.folder / "final")
    shutil.rmtree(tiny.checkpoints / "step-00000002")  # as a run that keeps three does sooner or later
    begins = tiny.begins(*command)
    assert begins.saved is not None
    assert begins.saved.step == 5
    assert "has begun from" in "".join(tiny.said)


def test_an_evaluation_that_was_cut_off_is_made_up_for(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tiny.folder / "final")
    shutil.rmtree(tiny.checkpoints / "step-00000004")
    kept = [line for line in (tiny.folder / "metrics.jsonl").read_text().splitlines() if '"split"' not in line]
    (tiny.folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    assert tiny.goes_on() == 0
    wanted = [(1, ""), (2, ""), (2, "validation"), (3, ""), (4, ""), (4, "validation")]
    assert tiny.lines() == wanted
    assert (tiny.folder / "predictions" / "step-2-validation.jsonl").exists()


@pytest.mark.parametrize(("at", "kept"), [(3, ["2"]), (4, ["2", "4"])])
@pytest.mark.parametrize("error", [StorageError("it is full"), RuntimeError("out of memory")])
def test_an_error_loses_no_checkpoint(
    tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int, kept: list[str],
    error: Exception,
) -> None:  # fmt: skip
    def run(evaluator: Any, name: str, *others: Any) -> Any:
        assert name == f"step-{at}"
        raise error

    monkeypatch.setattr(Evaluator, "run", run)
    shutil.rmtree(tiny.folder)
    command = ["evaluation.baseline=false", f"evaluation.every={at}"]
    if isinstance(error, StorageError):
        assert tiny.goes_on(*command) == 7
        newest = tiny.checkpoints / f"step-0000000{kept[-1]}"
        assert f"it is full\n{newest} is kept\nMake room" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            tiny.goes_on(*command)
        dist.destroy_process_group()
    assert tiny.steps() == kept


def test_a_full_disk_at_either_end(
    tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny.folder / "final")
    kept = tiny.folder / "tokenizer" / "tokenizer.json"
    kept.unlink()
    kept.symlink_to("/dev/full")
    assert tiny.goes_on() == 7
    assert f"{kept.parent}: cannot be written: No space left on device" in capsys.readouterr().err
    kept.unlink()

    def full(tokenizer: Any, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(result, "save_tokenizer", full)
        assert tiny.goes_on() == 7
    said = capsys.readouterr().err
    assert "final: the result cannot be written: No space left on device\n" in said
    assert f"{tiny.checkpoints / 'step-00000004'} is kept\nMake room" in said
    assert not (tiny.folder / "final.partial").exists()
    assert tiny.goes_on() == 0


@pytest.mark.parametrize("given", ["step", "checkpoints", "run"])
def test_a_run_begins_from_another_ones_checkpoint(tiny: Run, given: str) -> None:
    place = {"step": tiny.checkpoints / "step-00000002", "checkpoints": tiny.checkpoints, "run": tiny.folder}[given]
    fork = ["name=fork", f"checkpoint.resume={place}"]
    begins = tiny.begins(*fork)
    begins.release()
    assert begins.saved is not None
    assert (begins.saved.step, begins.goes_on, begins.began_from) == (2 if given == "step" else 4, False, str(place))
    tiny_steps = tiny.steps()
    assert tiny.goes_on(*fork, "duration.steps=6") == 0
    folder = tiny.folder.with_name("fork")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines if "split" not in line) == begins.saved.step + 1
    assert tiny.steps() == tiny_steps
    assert (tiny.folder / "final").is_dir()
    if given == "step":
        shutil.rmtree(folder / "final")
        again = tiny.begins(*fork)
        assert again.saved is not None
        assert (again.saved.step, again.goes_on) == (6, True), "it goes on from its own newest one"
        again.rename()
        assert again.held is not None
        tiny.said.clear()
        with pytest.raises(ConfigError, match="another run is writing"):
            tiny.begins(*fork)
        again.release()
        with pytest.raises(ConfigError, match=r"fork has checkpoints of its own, the newest step-00000006"):
            tiny.begins("name=fork", f"checkpoint.resume={tiny.folder}")


def test_another_runs_folder_stays_as_it_is(tiny: Run) -> None:
    damage(tiny.checkpoints / "step-00000004")
    begins = tiny.begins("name=fork", f"checkpoint.resume={tiny.folder}")
    assert begins.saved is not None
    assert begins.saved.step == 2
    assert tiny.steps() == ["2", "4"]
    assert "step-00000004 is damaged, and was left as it is" in "".join(tiny.said)


def test_paths_that_are_no_checkpoint_name_the_nearest_one(tiny: Run) -> None:
    right = tiny.checkpoints / "step-00000004"
    for wrong in (tiny.checkpoints / "step-4", Path("step-00000004"), Path("4"), tiny.folder / "step-00000004"):
        with pytest.raises(ConfigError, match=r"there is no such folder; did you mean") as caught:
            tiny.begins(f"checkpoint.resume='{wrong}'")
        assert f"did you mean {right}?" in str(caught.value)
    for empty in (tiny.folder / "final", tiny.folder / "predictions"):
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            tiny.begins(f"checkpoint.resume={empty}")


def test_damaged_checkpoints_are_said(tiny: Run) -> None:
    damage(tiny.checkpoints / "step-00000002")
    with pytest.raises(CheckpointError, match="is not whole"):
        tiny.begins(f"checkpoint.resume={tiny.checkpoints / 'step-00000002'}")
    damage(tiny.checkpoints / "step-00000004")
    with pytest.raises(CheckpointError, match="no checkpoint there is whole"):
        tiny.begins()
    tiny.begins("checkpoint.resume=never")
    assert tiny.folder.with_name("tiny.old-1").is_dir()


def test_resume_takes_the_ranks_that_a_run_had(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = run_folder.read_environment(tiny.folder)
    (tiny.folder / "environment.json").write_text(json.dumps({**described, "ranks": 3}))
    read: Callable[..., Any] = to_resume
    assert [read(tiny.folder, [], ranks, gpus)[2] for ranks, gpus in ((None, 0), (None, 2), (None, 8), (1, 8))] == [
        3, 2, 3, 1,
    ]  # fmt: skip
    moved = tiny.folder.rename(tmp_path / "007")  # by its name a number
    monkeypatch.chdir(tmp_path / "007")
    for given in (moved, Path("../007"), Path()):
        file, overrides, _ = read(given, ["duration.steps=9"], None, 0)
        config = load_config(file, overrides)
        assert (Path(config.runs) / config.name).resolve() == moved.resolve()
        assert (config.checkpoint.resume, config.duration.steps) == ("auto", 9)
        assert finished(config) is None
    shutil.rmtree(moved / "final")
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
        read(moved, [], None, 0)
    with pytest.raises(ConfigError, match="is no run's folder"):
        read(tmp_path, [], None, 0)


def test_resume_goes_on(tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tiny.folder / "final")
    damage(tiny.checkpoints / "step-00000004")
    moved = tiny.folder.rename(tiny.folder.with_name("moved"))
    assert main(["resume", "--run", str(moved), "evaluation.examples=3"]) == 0
    assert "evaluation.examples: 3, was 2" in capsys.readouterr().err
    assert (moved / "final").is_dir()
    assert (moved / "checkpoints" / "step-00000004.damaged").is_dir()
