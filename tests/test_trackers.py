"""Runs whose figures are read back by TensorBoard, W&B and MLflow themselves."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import layouts
import plain
import wandb_log
from shardtune import cli
from shardtune.assemble import trackers as trackers_module
from shardtune.assemble.trackers import check_trackers, make_trackers
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.gradient_histograms import GradientHistograms, edges
from shardtune.protocols import Shard
from shardtune.records import Records
from shardtune.tracking import Histogram
from shardtune.tracking.sending import Sending
from shardtune.tracking.tracker import leaves
from shardtune.world import World

STEPS = 3
SHARED: dict[str, Any] = {
    "duration__steps": STEPS,
    "evaluation__baseline": True,
    "evaluation__every": 2,
    "optimizer__eps": 1e-4,
    "tracking": {"tensorboard": True, "every": 1, "histograms": 1},
}
ALONE = layouts.Run(
    "tracked", "t5", "single", 1, 2,
    {**SHARED, "tracking": {**SHARED["tracking"], "wandb": True, "mlflow": True}},
)  # fmt: skip
BRIEF = {**SHARED, "evaluation__baseline": False, "evaluation__examples": 2}
SPREAD = [layouts.Run("tracked", "t5", kind, 2, 2, BRIEF) for kind in ("fsdp2", "zero2", "zero3")]


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> layouts.Done:
    folder = tmp_path_factory.mktemp("tracked")
    runs = [ALONE, *SPREAD]
    made = layouts.Done(folder, int(time.time()), runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", uri(folder))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(folder)  # MLflow keeps artifacts beside where it runs
        layouts.launch_all(made, runs)
    return made


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """Every figure of metrics.jsonl, by the name of its curve and its step."""
    found = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        of = f"{line['of']}/" if "of" in line else ""
        prefix = f"{of}{line['split']}" if "split" in line else "train"
        for name, value in line.items():
            if name not in ("step", "split", "of", "examples_digest"):
                found[f"{prefix}/{name}", line["step"]] = value
    assert len(found) > 40
    assert ("validation/rougeL", STEPS) in found
    assert ("train/loss", STEPS) in found
    return found


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing import event_accumulator as reading

    sizes = {reading.SCALARS: 0, reading.TENSORS: 0, reading.HISTOGRAMS: 0}
    reader = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes)
    return reader.Reload()


@pytest.mark.parametrize("run", [ALONE, *SPREAD], ids=lambda run: run.name)
def test_tensorboards_own_reader_reads_every_scalar(done: layouts.Done, run: layouts.Run) -> None:
    reader = accumulated(done.path(run))
    read = {
        (name, event.step): event.value for name in reader.Tags()["scalars"] for event in reader.Scalars(name)
    }  # fmt: skip
    written = {key: float(np.float32(value)) for key, value in expected(done.path(run)).items()}
    assert read == written


def test_tensorboards_table_of_runs_has_the_config_and_the_final_scores(done: layouts.Done) -> None:
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = done.path(ALONE)
    reader = accumulated(folder)

    def content(tag: str) -> Any:
        data = HParamsPluginData()
        data.ParseFromString(reader.summary_metadata[tag].plugin_data.content)
        return data

    started = content(SESSION_START_INFO_TAG).session_start_info.hparams
    shown = {key: getattr(value, value.WhichOneof("kind")) for key, value in started.items()}
    config = dict(leaves(yaml.safe_load((folder / "config.yaml").read_text())))
    assert shown == config
    assert shown["optimizer.lr"] == 3e-3
    named = {metric.name.tag for metric in content(EXPERIMENT_TAG).experiment.metric_infos}
    assert named == {name for name, step in expected(folder) if step == STEPS and name.startswith("validation/")}
    assert {f"validation/{name}" for name in ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum")} <= named
    assert named <= set(reader.Tags()["scalars"])  # whose last values the table shows
    assert content(SESSION_END_INFO_TAG).HasField("session_end_info")


def test_an_offline_run_of_wandb_has_every_scalar(done: layouts.Done) -> None:
    folder = done.path(ALONE)
    read = {}
    for line in wandb_log.history(folder):
        for name, value in line.items():
            if not name.startswith("_") and name != "step" and isinstance(value, (int, float)):
                read[name, line["step"]] = value
    assert read == expected(folder)
    (run,) = wandb_log.runs(folder)
    assert run.run_id == (folder / "wandb-run-id").read_text().strip()
    assert run.display_name == ALONE.name
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optimizer"]["lr"] == 3e-3
    assert wandb_log.summary(folder)["validation/loss"] == read["validation/loss", STEPS]


def test_wandb_has_texts_and_histograms(done: layouts.Done) -> None:
    folder = done.path(ALONE)
    lines = wandb_log.history(folder)
    tables = {line["step"]: line["validation/predictions"] for line in lines if "validation/predictions" in line}
    assert sorted(tables) == [0, 2, STEPS]
    (files,) = folder.glob("wandb/offline-run-*/files")
    shown = json.loads((files / tables[STEPS]["path"]).read_text())
    predictions = plain.read_rows(folder / "predictions" / f"step-{STEPS}-validation.jsonl")
    assert [row[0] for row in shown["data"]] == list(range(5))
    for (_, text), row in zip(shown["data"], predictions, strict=False):
        assert row["reference"] in text
        assert row["source"] in text
    found = {line["step"]: line["gradients/shared.weight"] for line in lines if "gradients/shared.weight" in line}
    assert sorted(found) == list(range(1, STEPS + 1))
    assert all(sum(histogram["values"]) == 41 * 32 for histogram in found.values())


def test_mlflow_reads_every_scalar(done: layouts.Done, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    folder = done.path(ALONE)
    monkeypatch.chdir(done.folder)
    client = MlflowClient(uri(done.folder), registry_uri="file:" + str(done.folder))
    run = client.get_run((folder / "mlflow-run-id").read_text().strip())
    read = {
        (name, point.step): point.value
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    }
    assert read == expected(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", ALONE.name)
    config = dict(leaves(yaml.safe_load((folder / "config.yaml").read_text())))
    assert run.data.params == {key: str(value) for key, value in config.items()}
    artifacts = Path(run.info.artifact_uri)
    assert json.loads((artifacts / "config.json").read_text())["optimizer"]["lr"] == 3e-3
    text = (artifacts / f"validation/predictions/step-{STEPS}.md").read_text()
    assert all(f"## {number}\n\n**prediction**" in text for number in range(5))
    histograms = json.loads((artifacts / "histograms/step-2.json").read_text())
    assert sum(histograms["gradients/shared.weight"]["counts"]) == 41 * 32


def test_histograms_are_those_of_a_plain_loops_gradients(done: layouts.Done) -> None:
    """Under every strategy: in an interval lies what numpy counts in it, but for what rounding moves to the next."""
    tokenizer = plain.load_tokenizer(done.model("t5"))
    model = plain.AUTO["seq2seq"].from_pretrained(done.model("t5"))
    model(**plain.batch_of(tokenizer, "seq2seq", done.rows(ALONE)[:16])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad.any()}
    limits = edges()[1:].tolist()
    for run in (ALONE, *SPREAD):
        reader = accumulated(done.path(run))
        assert sorted(reader.Tags()["histograms"]) == sorted(f"gradients/{name}" for name in gradients), run.name
        for name, gradient in gradients.items():
            events = reader.Histograms(f"gradients/{name}")
            assert [event.step for event in events] == list(range(1, STEPS + 1))
            read = events[0].histogram_value
            counts, _ = np.histogram(gradient.numpy(), edges())
            found = dict(zip(read.bucket_limit, read.bucket, strict=True))
            moved = sum(abs(found.get(limit, 0.0) - count) for limit, count in zip(limits, counts, strict=True))
            assert moved <= 2 + 0.01 * gradient.numel(), (run.name, name, moved, done.seed)
            assert read.num == gradient.numel(), (run.name, name)
            assert read.sum_squares == pytest.approx(float(gradient.double().pow(2).sum()), rel=1e-4)
            assert read.min <= float(gradient.min()) <= float(gradient.max()) <= read.max


class Sharded:
    """A strategy with gradients of its own."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.taken: list[tuple[float, float]] = []
        self._shards = shards

    def shards(self) -> Sequence[Shard]:
        return self._shards

    def step(self, lr: float, scale: float) -> None:
        self.taken.append((lr, scale))


def test_histograms_are_numpys_and_come_when_they_are_due() -> None:
    seed = int(time.time())
    random = np.random.default_rng(seed)
    values = (random.standard_normal(1_300_000) * 10.0 ** random.uniform(-15, 8, 1_300_000)).astype(np.float32)
    values[:200] = np.repeat(edges()[1:-1].astype(np.float32), 2)[:200]  # on the edges themselves
    values[200:300] = 0.0
    value = torch.zeros(1)
    shards = [Shard("a", 0, value, torch.from_numpy(values)), Shard("b", 0, value, None)]
    strategy: Any = Sharded(shards)
    written: dict[int, Mapping[str, Histogram]] = {}
    done = iter(range(10))
    alone = World(0, 1, 0, torch.device("cpu"))
    watched = GradientHistograms(strategy, ["b", "a"], 4, lambda: next(done), alone, written.__setitem__)
    for step in range(10):
        watched.step(0.5, step)
    assert strategy.taken == [(0.5, step) for step in range(10)]
    assert watched.taken is strategy.taken
    assert sorted(written) == [4, 8]
    (name,) = written[4]
    found = written[4][name]
    counts, _ = np.histogram(values, edges().astype(np.float32))
    assert name == "gradients/a"
    assert found.counts.tolist() == counts.tolist(), seed
    assert found.sum == pytest.approx(values.astype(np.float64).sum(), rel=1e-9)
    assert found.squares == pytest.approx(np.square(values.astype(np.float64)).sum(), rel=1e-9)


class Service:
    """A tracker that fails when it is told, and answers once `answers` is set."""

    def __init__(self, failing: Sequence[str] = ()) -> None:
        self.calls: list[Any] = []
        self._failing = failing
        self.answers = threading.Event()
        self.answers.set()

    def _called(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        self.answers.wait()
        if name in self._failing:
            raise ConnectionError(f"no route\nto {name}")

    def start(self, config: dict[str, Any]) -> None:
        self._called("start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._called("scalars", step, values)

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        self._called("texts", step, name, texts)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        self._called("histograms", step)

    def close(self, final: Mapping[str, float] | None) -> None:
        self._called("close", final)


def test_a_service_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    service = Service(failing=["scalars", "texts"])
    tracker = Sending(service, "mlflow", said.append)
    tracker.start({})
    with Records(tmp_path, World(0, 1, 0, torch.device("cpu")), [tracker]) as records:
        for step in range(1, 4):
            records.training(step, {"loss": 1.0 / step})
        records.evaluation(3, "test", {"loss": 0.25}, shown=["a"])
        records.evaluation(3, "test", {"loss": 0.5}, of="base")
        records.evaluation(3, "test", {"loss": 0.125}, of="best")
    assert [call[:2] for call in service.calls] == [
        ("start",), *(("scalars", step) for step in (1, 2, 3)), ("scalars", 3), ("texts", 3), ("scalars", 3),
        ("texts", 3), ("scalars", 3), ("texts", 3), ("close", {"test/loss": 0.25, "best/test/loss": 0.125}),
    ]  # fmt: skip
    assert said == [
        "warning: mlflow: a record could not be sent (no route to scalars); the run goes on",
        "warning: mlflow: 9 records in all could not be sent",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_that_fails_has_no_final_scores(tmp_path: Path) -> None:
    service = Service()
    alone = World(0, 1, 0, torch.device("cpu"))

    def fail() -> None:
        with Records(tmp_path, alone, [service]) as records:
            records.evaluation(0, "test", {"loss": 0.25})
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        fail()
    assert service.calls[-1] == ("close", None)


def test_a_slow_service_keeps_nobody_waiting() -> None:
    said: list[str] = []
    service = Service()
    tracker = Sending(service, "wandb", said.append, closing_seconds=0.5)
    tracker.start({})
    service.answers.clear()
    for step in range(50):
        tracker.scalars(step, {"a": 1.0})
    tracker.close({})
    assert len(service.calls) <= 2, "the first figures were still waited for when all of this had returned"
    service.answers.set()
    (text,) = said
    assert text.startswith("warning: wandb: ")
    assert text.endswith("records could not be sent in 0.5 s")


def config_with(folder: Path, **tracking: Any) -> Any:
    run = ALONE._replace(options={"tracking": {"tensorboard": False, **tracking}})
    return load_config(layouts.Done(folder, 1, [run]).config(run), [])


def test_a_service_that_cannot_be_used_is_told_of_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, said = World(0, 1, 0, torch.device("cpu")), []
    config = config_with(tmp_path, mlflow=True)
    monkeypatch.setitem(trackers_module.SERVICES, "mlflow", lambda folder, goes_on: Service(["start"]))
    with pytest.raises(ConfigError, match=r"tracking\.mlflow: cannot be used: no route"):
        make_trackers(config, tmp_path, alone, None, said.append)
    assert said == []
    assert make_trackers(config, tmp_path, alone, 7, said.append) == []
    assert len(said) == 1
    assert said[0].endswith("the run goes on without it")


def test_wandb_never_asks_who_one_is(tmp_path: Path) -> None:
    """On a terminal or not: an error that says what to do."""
    import subprocess
    import sys

    code = (
        "from pathlib import Path; from shardtune.tracking.wandb_tracker import WandbTracker\n"
        f"WandbTracker(Path({str(tmp_path)!r}), False).start({{'name': 'x'}})"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    reading, terminal = os.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, env=environment,
        timeout=60, text=True,
    )  # fmt: skip
    os.close(reading)
    os.close(terminal)
    assert done.returncode == 1
    assert "ConfigError: tracking.wandb: no W&B account is known here; `wandb login`" in done.stderr
    assert not (tmp_path / "wandb-run-id").exists()


def test_a_missing_package_is_told_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with(tmp_path, wandb=True, mlflow=True)
    check_trackers(config)
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.wandb, tracking\.mlflow: .*pip install 'shardtune\[track\]'"):
        check_trackers(config)
    check_trackers(config_with(tmp_path))
    path = layouts.Done(tmp_path, 1, [ALONE]).config(ALONE)
    for ranks in ("1", "2"):
        words = ["--ranks", ranks, "data.train=absent.jsonl", "strategy.kind=auto"]
        assert cli.main(["train", "--config", str(path), *words]) == 2
        assert "shardtune[track]" in capsys.readouterr().err


def test_a_resume_goes_on_in_the_same_runs(done: layouts.Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(done.folder))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    alone, said = World(0, 1, 0, torch.device("cpu")), []
    config = config_with(tmp_path, wandb=True, mlflow=True)
    status = []
    for after, last, final in ((None, 3, None), (2, 4, {"validation/loss": 0.5}), (None, 1, {})):
        trackers = make_trackers(config, tmp_path, alone, after, said.append)
        for tracker in trackers:
            for step in range((after or 0) + 1, last + 1):
                tracker.scalars(step, {"train/loss": 10.0 * (after or 0) + step})
            tracker.close(final)
        run_id = (tmp_path / "mlflow-run-id").read_text().strip()
        client = MlflowClient(registry_uri="file:" + str(tmp_path))
        status.append((run_id, client.get_run(run_id).info.status))
    assert said == []
    assert [state for _, state in status] == ["KILLED", "FINISHED", "FINISHED"]
    assert status[0][0] == status[1][0] != status[2][0]
    points = client.get_metric_history(status[0][0], "train/loss")
    assert sorted((p.step, p.value) for p in points) == [(1, 1), (2, 2), (3, 3), (3, 23), (4, 24)]
    ids = [run.run_id for run in wandb_log.runs(tmp_path)]
    assert len(ids) == 3
    assert ids.count(ids[0]) == 2
