"""Every way to start a run gives the same run, and leaves the same folder behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from launching import BIN, LAUNCHERS, Finished, command, run
from shardtune.cli import main
from shardtune.config_file import load_config
from tiny import rows, tiny_config

KINDS = ("auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
MODELS = ("t5", "llama", "bert")
TRAINING_KEYS = [
    "step", "epoch", "loss", "lr", "grad_norm", "examples", "tokens", "target_tokens", "examples_digest",
    "padding_share", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes",
]  # fmt: skip
METRICS = {
    "t5": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "llama": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "bert": {"accuracy", "macro_f1"},
}


class Case(NamedTuple):
    kind: str
    model: str
    launcher: str
    ranks: int


def possible() -> list[Case]:
    """The whole matrix: `python` starts one rank, `single` is one rank."""
    return [
        Case(kind, model, launcher, ranks)
        for kind in KINDS
        for model in MODELS
        for launcher in LAUNCHERS
        for ranks in (1, 2)
        if ranks == 1 or (launcher != "python" and kind != "single")
    ]


FAMILIES = (("single", "ddp", "auto"), ("fsdp2",), ("zero1", "zero2", "zero3"))
"""Strategies that set a process up alike: what a launcher could disturb."""


def sample() -> list[Case]:
    """A part of it: every strategy, and every launcher with every model, number of ranks and family of strategies."""
    cases = []
    for number, launcher in enumerate(LAUNCHERS):
        for index, family in enumerate(FAMILIES):
            kind = family[number % len(family)]
            ranks = 1 if launcher == "python" or kind == "single" else 2
            cases.append(Case(kind, MODELS[(number + index) % len(MODELS)], launcher, ranks))
    return cases


def test_the_sample_has_every_strategy_and_pairs_of_each_launcher() -> None:
    def pairs(cases: list[Case]) -> set[tuple[str, object]]:
        family = {kind: kinds for kinds in FAMILIES for kind in kinds}
        return {(case.launcher, value) for case in cases for value in (case.model, family[case.kind])}

    assert pairs(sample()) == pairs(possible())
    assert {case.kind for case in sample()} == set(KINDS)
    assert {case.launcher for case in sample() if case.ranks == 2} == {*LAUNCHERS} - {"python"}


class Run(NamedTuple):
    case: Case
    config: Path
    folder: Path
    finished: Finished


class Runs:
    """Each case once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.folder = folder
        self._done: dict[Case, Run] = {}

    def of(self, case: Case) -> Run:
        if case not in self._done:
            config = tiny_config(self.folder / case.model, case.model, duration__steps=3)
            name = "-".join(map(str, case))
            words = command(case.launcher, case.ranks, "--config", config, f"name={name}", f"strategy.kind={case.kind}")
            finished = run(words, self.cache)
            self._done[case] = Run(case, config, self.folder / case.model / "runs" / name, finished)
        return self._done[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("launchers"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


WHOLE = os.environ.get("SHARDTUNE_WHOLE_MATRIX") == "1"


@pytest.mark.parametrize("case", possible() if WHOLE else sample(), ids=lambda case: "-".join(map(str, case)))
def test_same_run(case: Case, runs: Runs) -> None:
    done = runs.of(case)
    assert done.finished.code == 0, done.finished.said
    assert done.finished.left == [], done.finished.said
    check_folder(done)

    plain = runs.of(Case("single", case.model, "python", 1))
    compared = list(zip(lines(done.folder), lines(plain.folder), strict=True))
    worst = max(difference(a[key], b[key]) for a, b in compared for key in ("loss", "grad_norm") if key in b)
    print(f"{worst:.1e}, {done.finished.seconds:.1f} s")
    # On as many ranks the same sums are formed; on others in another order.
    assert worst <= (1e-6 if case.ranks == 1 else 1e-5)
    for a, b in compared:
        counted = ["step", "epoch", "lr", "examples", "tokens", "target_tokens", "split", *METRICS[case.model]]
        assert {k: a.get(k) for k in counted} == {k: b.get(k) for k in counted}
    twins = [twin for twin in runs._done.values() if twin.case[:2] == case[:2] and twin.case.ranks == case.ranks]
    for twin in twins:
        for a, b in zip(lines(done.folder), lines(twin.folder), strict=True):
            assert difference(a["loss"], b["loss"]) <= 1e-6, (case, twin.case)


def check_folder(done: Run) -> None:
    case, folder = done.case, done.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "comparison.json", "config.yaml", "data.json", "environment.json", "final", "metrics.jsonl",
        "predictions", "report.html", "statistics", "tokenizer",
    ]  # fmt: skip

    overrides = [f"name={folder.name}", f"strategy.kind={case.kind}"]
    assert load_config(folder / "config.yaml", []) == load_config(done.config, overrides)

    environment = json.loads((folder / "environment.json").read_text())
    chosen = ("single" if case.ranks == 1 else "ddp") if case.kind == "auto" else case.kind
    assert (environment["ranks"], environment["strategy"]) == (case.ranks, chosen)
    assert len(environment["devices"]) == case.ranks
    assert isinstance(environment["fused"], dict)
    assert environment["versions"]["torch"].startswith("2.")
    assert {"python", "command_line", "git_commit"} <= set(environment)

    training = [line for line in lines(folder) if "split" not in line]
    assert [line["step"] for line in training] == [1, 2, 3]
    for line in training:
        by_rank = ["slowest_rank", "slowest_rank_share"] if case.ranks > 1 and line["step"] > 1 else []
        assert list(line) == [*TRAINING_KEYS, "tokens_per_second_per_device", *by_rank]
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
        assert line["step_seconds"] > 0
        assert line["peak_memory_bytes"] > 1e8
        assert 0 <= line["padding_share"] < 1
    judged = [line for line in lines(folder) if "split" in line]
    assert [(line["step"], line["split"]) for line in judged] == [(3, "validation")]
    speeds = {"examples_per_second"} | ({"generated_tokens_per_second"} if case.model != "bert" else set())
    beside = {key for key in judged[0] if key == "train_loss"} | speeds
    assert set(judged[0]) == {"step", "split", "loss"} | METRICS[case.model] | beside

    predictions = folder / "predictions" / "step-3-validation.jsonl"
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    given = rows(7, seed=2)[:5]
    target = "label" if case.model == "bert" else "summary"
    assert [(p["source"], p["reference"]) for p in written] == [(row["text"], row[target]) for row in given]
    assert all(isinstance(p["prediction"], str) for p in written)

    assert (folder / "final" / "model.safetensors").stat().st_size > 100_000
    assert (folder / "final" / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------- started again


def test_a_finished_run_started_again(runs: Runs) -> None:
    done = runs.of(Case("single", "t5", "python", 1))
    before = sorted((path, path.stat().st_mtime_ns) for path in done.folder.rglob("*"))
    overrides = (f"name={done.folder.name}", "strategy.kind=single")
    again = run(command("python", 1, "--config", done.config, *overrides), runs.cache, imports=True)
    assert again.code == 0, again.said
    assert "this run is finished" in again.out
    assert "it was trained with" not in again.out
    assert str(done.folder / "final") in again.out
    assert "torch" not in again.modules
    assert sorted((path, path.stat().st_mtime_ns) for path in done.folder.rglob("*")) == before

    two = run(command("torchrun", 2, "--config", done.config, f"name={done.folder.name}"), runs.cache)
    assert two.code == 0, two.said
    assert two.out.count("this run is finished") == 1
    assert "it was trained with strategy.kind: single, not " in two.out, "what has changed since is told"


def test_never_sets_the_old_folder_aside(runs: Runs) -> None:
    config = tiny_config(runs.folder / "again", duration__steps=1, evaluation__examples=1)
    words = command("shardtune", 1, "--config", config, "checkpoint.resume=never")
    folder = runs.folder / "again" / "runs" / "tiny"
    assert run(words, runs.cache).code == 0
    (folder / "note").write_text("of the first run")
    again = run(words, runs.cache)
    assert again.code == 0, again.said
    assert f"what was there is now in {folder}.old-1" in again.err
    old = folder.with_name("tiny.old-1")
    assert (old / "note").exists()
    assert (old / "final").is_dir()
    assert not (folder / "note").exists()
    assert (folder / "final").is_dir()
    assert [line["loss"] for line in lines(old)] == [line["loss"] for line in lines(folder)]


# ----------------------------------------------------------------------------------- what to do with a result


@pytest.fixture(scope="module")
def results(runs: Runs) -> dict[str, Run]:
    """A tuned model and two adapters: how a result is used does not depend on how it was made."""
    made = {"t5": runs.of(Case("single", "t5", "python", 1))}
    for model in ("llama", "bert"):
        config = tiny_config(
            runs.folder / f"{model}-lora", model, tuning={"method": "lora", "rank": 4}, duration__steps=3,
            data__test=str(runs.folder / f"{model}-lora" / "validation.jsonl"),
        )  # fmt: skip
        finished = run(command("python", 1, "--config", config), runs.cache)
        assert finished.code == 0, finished.said
        case = Case("single", model, "python", 1)
        made[model] = Run(case, config, runs.folder / f"{model}-lora" / "runs" / "tiny", finished)
    return made


class Shardtune:
    """The command `shardtune` in this process, where torch is imported already."""

    def __init__(self, runs: Runs, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        patch.setenv("SHARDTUNE_CACHE", str(runs.cache))
        self._captured = captured

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._captured.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._captured.readouterr()
        assert code in (0, 2), err
        return code, out, err


@pytest.fixture
def shardtune(runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shardtune:
    return Shardtune(runs, monkeypatch, capsys)


@pytest.mark.parametrize("model", MODELS)
def test_generate(model: str, results: dict[str, Run], shardtune: Shardtune, tmp_path: Path) -> None:
    folder = results[model].folder
    predicted = (folder / "predictions" / "step-3-validation.jsonl").read_text().splitlines()
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows(7, seed=2)[:5]))
    code, out, err = shardtune("generate", "--run", folder, "--input", given)
    assert code == 0, err
    written = [json.loads(line) for line in out.splitlines()]
    expected = [json.loads(line) for line in predicted]
    assert written == [{"source": p["source"], "prediction": p["prediction"]} for p in expected]


def test_generate_by_itself(results: dict[str, Run], runs: Runs, shardtune: Shardtune, tmp_path: Path) -> None:
    folder = results["t5"].folder
    first = json.loads((folder / "predictions" / "step-3-validation.jsonl").read_text().splitlines()[0])
    done = run([str(BIN / "shardtune"), "generate", "--run", str(folder), first["source"]], runs.cache)
    assert (done.code, done.out, done.err) == (0, first["prediction"] + "\n", ""), done.said
    long = run([str(BIN / "shardtune"), "generate", "--run", str(folder), "word " * 500], runs.cache)
    assert (long.code, long.err) == (0, "text 1 of 1 was cut to task.max_source_tokens (48) tokens"), long.said
    assert shardtune("generate", "--run", folder)[0] == 2
    assert "both are given" in shardtune("generate", "--run", folder, "text", "--input", "file.jsonl")[2]
    assert shardtune("generate", "--run", tmp_path, "text")[0] == 2


@pytest.mark.parametrize("model", MODELS)
def test_evaluate(model: str, results: dict[str, Run], shardtune: Shardtune) -> None:
    done = results[model]
    split = "validation" if model == "t5" else "test"
    overrides = [f"name={done.folder.name}", "strategy.kind=single"]
    code, out, err = shardtune("evaluate", "--config", done.config, *overrides, "--split", split)
    assert code == 0, err
    shown = {words[1]: float(words[2]) for line in out.splitlines() if (words := line.split())[:1] == [split]}
    expected = next(line for line in lines(done.folder) if line.get("split") == split)
    assert shown == {key: pytest.approx(expected[key], abs=1e-4) for key in ("loss", *METRICS[model])}
    for _, key, _, low, _, high in (words for line in out.splitlines() if (words := line.split())[:1] == [split]):
        assert float(low) <= shown[key] <= float(high), "the interval is around it"
    assert (done.folder / "predictions" / f"final-{split}.jsonl").exists()


@pytest.mark.parametrize(("config_of", "result_of"), [("bert", "t5"), ("t5", "bert")])
def test_evaluate_a_result_of_another_task(
    config_of: str, result_of: str, results: dict[str, Run], shardtune: Shardtune
) -> None:
    folder = results[result_of].folder / "final"
    code, _, err = shardtune("evaluate", "--config", results[config_of].config, "--checkpoint", folder)
    assert code == 2
    assert f"{folder}" in err


def test_export_of_a_model(results: dict[str, Run], shardtune: Shardtune, tmp_path: Path) -> None:
    folder = results["t5"].folder
    code, _, err = shardtune("export", "--run", folder, "--out", tmp_path / "out")
    assert code == 0, err
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    first = json.loads((folder / "predictions" / "step-3-validation.jsonl").read_text().splitlines()[0])
    written = model.generate(**tokenizer(first["source"], return_tensors="pt"), max_new_tokens=6)
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip() == first["prediction"]

    assert shardtune("export", "--run", folder, "--out", tmp_path / "out")[0] == 2  # it is there already
    code, _, err = shardtune("export", "--run", folder, "--out", tmp_path / "merged", "--merge")
    assert code == 2
    assert "no adapter to merge" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_export_of_an_adapter(model: str, results: dict[str, Run], shardtune: Shardtune, tmp_path: Path) -> None:
    folder = results[model].folder
    code, _, err = shardtune("export", "--run", folder, "--out", tmp_path / "plain")
    assert code == 0, err
    assert (tmp_path / "plain" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "plain" / "model.safetensors").exists()

    code, _, err = shardtune("export", "--run", folder, "--out", tmp_path / "merged", "--merge")
    assert code == 0, err
    assert not (tmp_path / "merged" / "adapter_model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    written = (folder / "predictions" / "step-3-validation.jsonl").read_text().splitlines()
    first = json.loads(written[0])
    if model == "llama":
        causal = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        ids = tokenizer(first["source"], return_tensors="pt", return_token_type_ids=False)
        new = causal.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == first["prediction"]
    else:
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        for line in map(json.loads, written):
            ids = tokenizer(line["source"], return_tensors="pt", return_token_type_ids=False)
            label = int(classifier(**ids).logits.argmax())
            assert classifier.config.id2label[label] == line["prediction"]
