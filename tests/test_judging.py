"""Which step is the best, when there is no hope for a better one, where overfitting begins; and runs that end so."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

import tiny
from forked import MANY, run_group
from shardtune.assemble.of_step import write_result_of
from shardtune.best import Best
from shardtune.checkpoint.reading import open_checkpoint
from shardtune.cli import main, train_as_rank
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.evaluation import Judged, Split
from shardtune.judging import Contender, Judge
from shardtune.overfitting import Losses, parted, standard_error, warnings_in
from shardtune.progress import Progress
from shardtune.records import Records
from shardtune.state import TrainingState
from shardtune.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_step_is_the_first_of_the_best_values(seed: int) -> None:
    rng = random.Random(seed)
    lower, patience = rng.random() < 0.5, rng.randint(1, 4)
    best, values = Best("score", lower, patience), list[float]()
    sign = -1 if lower else 1
    for index in range(30):
        value = rng.choice([1.0, 2.0, 3.0, rng.random() * 4, float("nan")])
        values.append(value if value == value else -sign * float("inf"))
        best.add(10 * index, value)
        scored = [sign * value for value in values]
        at = scored.index(max(scored)) if max(scored) > -float("inf") else None
        assert best.step == (None if at is None else 10 * at), (seed, values)
        assert best.hopeless == (index - (-1 if at is None else at) >= patience), (seed, values)
        before = rng.randrange(index + 1)
        early = scored[: before + 1]
        wanted = [10 * early.index(max(early))] if max(early) > -float("inf") else []
        assert best.ranked(10 * before)[:1] == wanted, (seed, values)


def test_a_step_whose_model_is_gone_only_counts() -> None:
    best = Best("loss", True, 2)
    best.add(2, 1.0, kept=False)
    best.add(4, 3.0)
    assert (best.step, best.hopeless) == (4, False)
    best.add(6, None)
    best.add(8, 3.0)
    assert (best.step, best.hopeless, best.ranked()) == (4, True, [4, 8])


def course(validation: list[float], training: list[float | None]) -> list[Losses]:
    pairs = zip(validation, training, strict=True)
    return [Losses(10 * index, *pair) for index, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    ("validation", "training", "since"),
    [
        ([3.0, 2.0, 2.1, 2.3], [None, 2.0, 1.5, 1.0], 10),
        ([3.0, 2.0, 2.3, 2.1], [None, 2.0, 1.5, 1.0], None),  # falls again
        ([3.0, 2.0, 2.1], [None, 2.0, 1.5], None),  # only once so far
        ([3.0, 2.0, 2.1, 2.3], [None, 2.0, 2.5, 3.0], None),  # both rise: the learning rate, rather
        ([3.0, 2.0, 2.001, 2.002], [None, 2.0, 1.5, 1.0], None),  # within the noise
        ([2.0, 2.1, 2.3], [None, 2.0, 1.0], 0),  # never better than before training
        ([3.0, 2.0, 2.5, 2.1, 2.2, 2.3], [None, 2.0, 1.8, 1.6, 1.4, 1.2], 10),
        ([3.0, 3.1, 2.0, 2.1], [4.0, 3.0, 2.0, 1.0], None),
    ],
)
def test_where_the_losses_part(validation: list[float], training: list[float | None], since: int | None) -> None:
    found = parted(course(validation, training), lambda first, second: None)
    assert (found.lowest.step if found else None) == since
    loud = parted(course(validation, training), lambda first, second: 1.0)
    assert loud is None, "a difference of less than two standard errors"


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_is_that_of_resampled_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(1, 40, 400).astype(float)
    first = np.stack([targets * rng.gamma(2, 1, 400), targets], axis=1)
    second = np.stack([first[:, 0] + targets * rng.normal(0.1, 0.5, 400), targets], axis=1)

    def difference(rows: Any) -> Any:
        return (second[rows, 0] - first[rows, 0]).sum(-1) / targets[rows].sum(-1)

    resampled = stats.bootstrap(
        (np.arange(400),), lambda rows, axis: difference(rows), n_resamples=2000, vectorized=True, rng=rng
    )
    assert standard_error(first, second) == pytest.approx(resampled.standard_error, rel=0.08), seed
    even = np.ones(400)
    plain = standard_error(np.stack([first[:, 0], even], 1), np.stack([second[:, 0], even], 1))
    assert plain == pytest.approx(stats.sem(second[:, 0] - first[:, 0]))


class Scores:
    """An evaluator whose scores are known before."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.asked: list[str] = []

    def run(self, name: str, split: Split, advance: Any) -> Judged:
        self.asked.append(f"{name}-{split.name}")
        step = int(name.split("-")[1]) if name.startswith("step-") else 0
        return Judged({"loss": self.losses[step]}, [], {})


@contextmanager
def judging(folder: Path, evaluator: Scores, state: TrainingState, after: int | None) -> Iterator[Judge]:
    nothing: Any = None
    splits = [Split(name, nothing, 5, []) for name in ("validation", "test")]
    best, quiet = Best("loss", True, 3), Progress(None, 0, False, 4, limit=120.0)
    known: Any = evaluator
    with Records(folder, ALONE, [], after) as records:
        yield Judge(known, splits, records, quiet, state, None, 1, best, keeps=True)


def train(judge: Judge, state: TrainingState, first: int, last: int) -> None:
    for step in range(first, last + 1):
        state.step, state.recent_loss, state.recent_steps = step, 6.0 - step, 1
        judge.where_due()
        assert judge.is_best() == (step <= 2)
        assert judge.best_until(1) == 1
        assert judge.is_enough() == (step == 5)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 5])
def test_nothing_is_judged_twice_and_nothing_is_forgotten(tmp_path: Path, cut: int) -> None:
    """A run that goes on after any step ends as the one that was not interrupted."""
    evaluator, state = Scores([5.0, 4.0, 3.0, 3.5, 3.75, 9.0]), TrainingState()
    contender = Contender("lead", lambda split, advance: evaluator.run("lead", split, advance))
    with judging(tmp_path, evaluator, state, None) as judge:
        assert judge.before_training([contender])
        train(judge, state, 1, cut)
    with judging(tmp_path, evaluator, state, cut) as judge:
        judge.where_due()
        train(judge, state, cut + 1, 5)
        assert judge.is_enough()
        for _ in range(2):
            assert judge.after_training()
            assert judge.of_best()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [f"step-{step}-validation" for step in range(1, 6)]
    wanted = ["step-0-validation", "step-0-test", "lead-validation", "lead-test", *steps, "step-5-test", "best-test"]
    assert evaluator.asked == wanted
    assert [line.get("of", f"step-{line['step']}") + f"-{line['split']}" for line in lines] == wanted
    assert [line.get("train_loss") for line in lines if line["step"] and line["split"] == "validation"] == [
        5,
        4,
        3,
        2,
        1,
    ]
    assert [(line["step"], line["parted_since"]) for line in lines if "parted_since" in line] == [(4, 2)]
    (said,) = warnings_in(lines)
    assert "rises since step 2 (3.0000 → 3.7500 at step 4) while training loss falls (4.0000 → 2.0000)" in said


OVERFITS: dict[str, Any] = {
    "optimizer__lr": 0.03, "optimizer__schedule": "constant", "duration__steps": 60, "batch__examples": 6,
    "evaluation": {
        "every": 3, "best": "loss", "patience": 3, "baseline": True, "examples": 7, "max_new_tokens": 4,
        "metrics": ["exact_match"],
    },
    "checkpoint": {"every": 4, "keep": 1},
}  # fmt: skip
"""Six examples, learned by heart in a few steps."""


def overfitting(folder: Path, **overrides: Any) -> Path:
    path = tiny.tiny_config(folder, **{**OVERFITS, **overrides})
    tiny.write_rows(folder / "train.jsonl", tiny.rows(6, seed=1))
    given = yaml.safe_load(path.read_text())
    given["data"]["test"] = str(tiny.write_rows(folder / "test.jsonl", tiny.rows(5, seed=4)))
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def goes(path: Path, *overrides: str) -> int:
    code = train_as_rank(["--config", str(path), *overrides])
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def judged(run: Path, split: str = "validation") -> dict[int, float]:
    """The losses of a split by their steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line.get("split") == split and "of" not in line}


def best_of(run: Path) -> int:
    losses = {step: loss for step, loss in judged(run).items() if step}
    return min(losses, key=lambda step: losses[step])


def saved_values(checkpoint: Path) -> dict[str, Tensor]:
    """Of each parameter, flattened, put together from what the ranks have written."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, "pt") as file:
            pieces = json.loads(file.metadata()["pieces"])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                if "#" not in key:
                    parts.setdefault(key, []).append((pieces[key][0], file.get_tensor(key)))
    return {key: torch.cat([values for _, values in sorted(held, key=lambda p: p[0])]) for key, held in parts.items()}


def check_final_is(run: Path, step: int) -> None:
    """Bit for bit."""
    final = load_file(run / "final" / "model.safetensors")
    saved = saved_values(run / "checkpoints" / f"step-{step:08}")
    names = final.keys() & saved.keys()
    assert len(names) >= 10
    for name in names:
        assert torch.equal(final[name].view(-1), saved[name]), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that has overfitted and was stopped, all of its checkpoints kept."""
    folder = tmp_path_factory.mktemp("judged")
    path = overfitting(folder, checkpoint={"every": 4, "keep": 99})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDTUNE_CACHE", str(folder / "cache"))
        assert goes(path) == 0
    return path


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, Path]:
    """Config, override and folder of a copy of that run."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(made.parent / "cache"))
    shutil.copytree(made.parent / "runs", tmp_path / "runs")
    return made, f"runs={tmp_path / 'runs'}", tmp_path / "runs" / "tiny"


def test_a_run_that_overfits(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    path, run = overfitting(tmp_path), tmp_path / "runs" / "tiny"
    assert goes(path) == 0
    out, err = capsys.readouterr()
    best, last = best_of(run), max(judged(run))
    assert 3 <= best < last < 60
    assert last == best + 9, "three evaluations later"
    warnings = re.findall(r"validation loss rises since step (\d+) .* at step (\d+)\) while training loss falls", err)
    assert warnings == [(str(best), str(best + 6))]
    assert f"training ends at step {last}: loss of validation was not better" in err
    check_final_is(run, best)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{s:08}" for s in (best, last)]
    comparison = json.loads((run / "comparison.json").read_text())
    assert (comparison["validation"]["base"], comparison["validation"]["tuned"]) == ("step-0", f"step-{best}")
    assert (comparison["test"]["base"], comparison["test"]["tuned"]) == ("step-0", "best")
    assert {"best", "step-0", "lead", f"step-{last}"} == comparison["test"]["variants"].keys()
    assert comparison["test"]["variants"]["best"]["loss"]["value"] != judged(run, "test")[last]
    table = out[out.index("split ") : out.index("\ndone in")]
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(rf"^step-{last} +test +exact_match ", table, re.M)
    assert main(["resume", "--run", str(run)]) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_more_patience_goes_on(copied: tuple[Path, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, own, run = copied
    last = max(judged(run))
    assert goes(path, own, "evaluation.patience=2") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert goes(path, own, "evaluation.patience=4") == 0
    assert max(judged(run)) == last + 3
    assert (run / f"final-step-{last}").is_dir()
    check_final_is(run, best_of(run))


@pytest.mark.parametrize("after", [4, 6])
def test_killed_after_the_best_and_resumed(copied: tuple[Path, str, Path], after: int) -> None:
    path, own, run = copied
    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    best, last = best_of(run), max(judged(run))
    shutil.rmtree(run / "final")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > best + after:
            shutil.rmtree(checkpoint)
    assert goes(path, own, "checkpoint.keep=1") == 0
    check_final_is(run, best)
    files = [folder / "final" / "model.safetensors" for folder in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for split in ("validation", "test"):
        assert judged(run, split) == judged(whole, split)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "parted_since" in line] == [best + 6]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{s:08}" for s in (best, last)]
    shutil.rmtree(run / "final")  # killed in between: the best is judged once
    before = (run / "metrics.jsonl").read_bytes()
    assert goes(path, own) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    check_final_is(run, best)


def test_a_best_checkpoint_that_is_damaged(copied: tuple[Path, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, own, run = copied
    losses = judged(run)
    del losses[0]
    first, second, *_ = sorted(losses, key=lambda step: losses[step])
    file = next((run / "checkpoints" / f"step-{first:08}").glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    shutil.rmtree(run / "final")
    if not (run / "checkpoints" / f"step-{second:08}").exists():
        second = max(losses)
    assert goes(path, own) == 0
    said = capsys.readouterr().err
    assert f"warning: step {first} is the best by loss, but the next best is taken" in said
    check_final_is(run, second)


@pytest.mark.parametrize("method", ["schedule_free", "adalora"])
def test_what_follows_from_more_than_the_weights(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Averages of weights, and which ranks are kept, are those of the best step, as `export` has them."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {
        "schedule_free": {"optimizer": {"name": "schedule_free", "lr": 0.05, "warmup": 0}},
        "adalora": {
            "tuning": {"method": "adalora", "rank": 1, "initial_rank": 4, "begin": 0.5, "end": 0.9, "interval": 2},
            "optimizer__lr": 0.3, "duration__steps": 24,
        },
    }[method]  # fmt: skip
    evaluation = {**OVERFITS["evaluation"], "patience": None if method == "adalora" else 3, "baseline": False}
    path, run = overfitting(tmp_path, evaluation=evaluation, **options), tmp_path / "runs" / "tiny"
    assert goes(path) == 0
    best = best_of(run)
    assert best < max(judged(run)), "or this shows nothing"
    saved = open_checkpoint(run / "checkpoints" / f"step-{best:08}")
    write_result_of(saved, load_config(path, []), run, tmp_path / "wanted")
    for wanted in (tmp_path / "wanted").glob("*.safetensors"):
        assert wanted.read_bytes() == (run / "final" / wanted.name).read_bytes()
    for name in ("adapter_config.json",) if method == "adalora" else ():
        assert json.loads((run / "final" / name).read_text()) == json.loads((tmp_path / "wanted" / name).read_text())


def test_two_ranks_agree(tmp_path: Path) -> None:
    kinds = ["fsdp2", "zero3"]
    paths = [overfitting(tmp_path / kind, strategy__kind=kind) for kind in kinds]
    variables = {"SHARDTUNE_CACHE": str(tmp_path / "cache")}
    code = run_group([MANY, *paths], 2, tmp_path / "log", variables, seconds=120)
    assert code == 0, (tmp_path / "log").read_text()
    for kind in kinds:
        run = tmp_path / kind / "runs" / "tiny"
        said = (run.parent / "tiny.log").read_text()
        best, last = best_of(run), max(judged(run))
        assert 3 <= best < last == best + 9, kind
        assert said.count("warning: validation loss rises") == said.count("training ends at step") == 1, said
        check_final_is(run, best)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{s:08}" for s in (best, last)]


def test_a_run_of_no_steps(copied: tuple[Path, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, own, run = copied
    assert goes(path, own, "name=none", "duration.steps=0", "evaluation.best=null", "evaluation.patience=null") == 0
    run = run.with_name("none")
    assert judged(run).keys() == judged(run, "test").keys() == {0}
    assert (run / "final" / "model.safetensors").exists()
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["test"]["tuned"] == "step-0"
    assert comparison["test"]["base"] is None
    assert "test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluation.best=rougel", "not among what is scored: .*rougeL.*did you mean rougeL"),
        ("evaluation={best: own, metrics: ['mine:own']}", "scored: loss, mine:own; did you mean mine:own"),
        ("evaluation.best=accuracy", "accuracy is not among what is scored: loss, rouge1"),
        ("evaluation.best=length", "length is not among"),
    ],
)
def test_an_unknown_best_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    path = tiny.tiny_config(tmp_path, evaluation={"metrics": ["rouge", "length"]})
    for good in ("loss", "rougeLsum"):
        load_config(path, [f"evaluation.best={good}"])
    with pytest.raises(ConfigError, match=problem):
        load_config(path, [override])


@pytest.mark.parametrize("key", ["best=loss", "patience=2"])
def test_without_validation_there_is_no_best(tmp_path: Path, key: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    path = tiny.tiny_config(tmp_path)
    with pytest.raises(ConfigError, match=f"evaluation.{key.split('=')[0]}: looks at validation"):
        load_config(path, ["data.validation=null", f"data.test={tmp_path / 'train.jsonl'}", f"evaluation.{key}"])
    assert goes(path, "data.validation=null", "data.splits=[1.0, 0.0, 0.0]", f"evaluation.{key}") == 2
