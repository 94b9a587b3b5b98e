"""Evaluation: the same predictions and scores on any number of ranks, and those of others' code called directly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

import plain
import run_many
import tiny
from layouts import ARCHITECTURES
from shardtune.evaluation import SPEEDS
from shardtune.evaluation.evaluator import in_batches

pytestmark = pytest.mark.timeout(1200)
ALL = "SHARDTUNE_TEST_ALL" in os.environ
EXAMPLES = 301 if ALL else 41
AT_ONCE = 4
NEW_TOKENS = 6
MODELS = {"t5": "t5-loud", "llama": "llama", "bert": "bert"}
SEED = 20251122


class Layout(NamedTuple):
    strategy: str
    ranks: int
    offload: str = "none"

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.ranks}-{self.offload}"


SINGLE = Layout("single", 1)
SOME = {("ddp", 2), ("fsdp2", 3), ("zero3", 3)}
LAYOUTS = [
    SINGLE,
    *(Layout(kind, ranks) for kind in ("ddp", "fsdp2", "zero3") for ranks in (1, 2, 3) if ALL or (kind, ranks) in SOME),
    # What rests outside of the device is gathered layer by layer.
    *(Layout(kind, 3, "cpu") for kind in ("fsdp2", "zero3") if ALL or kind == "fsdp2"),
]
CASES = (
    [("t5", 1), ("t5", 3), ("llama", 1), ("llama", 2), ("bert", 1)] if ALL else [("t5", 3), ("llama", 1), ("bert", 1)]
)


def options(folder: Path, model: str, beams: int, layout: Layout) -> dict[str, Any]:
    metrics = ["accuracy", "macro_f1"] if model == "bert" else ["rouge", "bleu", "chrf", "perplexity"]
    return {
        "strategy": {"kind": layout.strategy, "offload": layout.offload},
        "data__train": str(folder / "train.jsonl"),
        "data__validation": str(folder / "validation.jsonl"),
        "evaluation": {
            "examples": EXAMPLES, "metrics": metrics, "max_new_tokens": NEW_TOKENS, "beams": beams, "baseline": False,
        },
        "batch": {"examples": 12, "micro_examples": AT_ONCE},
        "duration__steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    for name, architecture in MODELS.items():
        plain.make_model(folder / name, ARCHITECTURES[architecture], SEED)
    find_both_labels(folder / "bert", tiny.rows(EXAMPLES, SEED + 1))
    tiny.write_rows(folder / "train.jsonl", tiny.rows(12, SEED))
    configs: dict[int, list[Path]] = {1: [], 2: [], 3: []}
    for layout in LAYOUTS:
        for model, beams in CASES:
            if model == "bert" and layout.offload != "none":
                continue
            given = options(folder, model, beams, layout)
            name, task = f"{model}-{beams}-{layout.name}", plain.task_of(model)
            configs[layout.ranks].append(run_many.config(folder, name, folder / model, task, **given))
    tiny.write_rows(folder / "validation.jsonl", tiny.rows(EXAMPLES, SEED + 1))
    for ranks, files in configs.items():
        if files:
            run_many.train(folder, files, ranks)
    return folder


def find_both_labels(folder: Path, rows: list[dict[str, str]]) -> None:
    """Moves the line between them to the middle of what the model makes of these texts."""
    model, tokenizer = plain.AUTO["classification"].from_pretrained(folder), plain.load_tokenizer(folder)
    with torch.no_grad():
        logits = model(**plain.batch_of(tokenizer, "classification", rows)).logits
        model.classifier.bias[1] += (logits[:, 0] - logits[:, 1]).median()
    model.save_pretrained(folder)


def result(done: Path, model: str, beams: int, layout: Layout) -> tuple[list[dict[str, str]], dict[str, Any], bytes]:
    """Predictions, scores, and the file of statistics."""
    run = done / "runs" / f"{model}-{beams}-{layout.name}"
    (line,) = run_many.metrics(run)[1]
    assert line["examples_per_second"] > 0
    assert ("generated_tokens_per_second" in line) == (model != "bert")
    scores = {key: value for key, value in line.items() if key not in SPEEDS}
    predictions = plain.read_rows(run / "predictions" / "step-0-validation.jsonl")
    assert sorted(path.name for path in run.glob("*s/step-0-*")) == ["step-0-validation.jsonl", "step-0-validation.npy"]
    return predictions, scores, (run / "statistics" / "step-0-validation.npy").read_bytes()


def differ(model: str, beams: int) -> Iterator[Layout]:
    return (layout for layout in LAYOUTS if layout != SINGLE and (model != "bert" or layout.offload == "none"))


@pytest.mark.parametrize(("model", "beams"), CASES)
def test_the_same_on_any_layout(done: Path, model: str, beams: int) -> None:
    """To the last bit, though the examples do not divide."""
    predictions, scores, statistics = result(done, model, beams, SINGLE)
    assert len(predictions) == EXAMPLES
    assert len({line["prediction"] for line in predictions}) > (1 if model == "bert" else 3)
    for layout in differ(model, beams):
        found = result(done, model, beams, layout)
        assert found[0] == predictions, layout
        assert found[1] == scores, layout
        assert found[2] == statistics, layout


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("model", "beams"), [case for case in CASES if case[0] != "bert"])
def test_texts_are_those_of_transformers(done: Path, model: str, beams: int, alone: bool) -> None:
    """`model.generate`, called directly: in the same batches, and for each example by itself."""
    task = plain.task_of(model)
    network: Any = plain.AUTO[task].from_pretrained(done / model).eval()
    tokenizer = plain.load_tokenizer(done / model)
    rows = plain.read_rows(done / "validation.jsonl")
    sources = [tokenizer(row["text"], truncation=True, max_length=plain.SOURCE_LIMIT)["input_ids"] for row in rows]
    targets = [len(row["summary"].split()) for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (-len(sources[n]), -min(targets[n] + 1, plain.TARGET_LIMIT)))
    size = 1 if alone else AT_ONCE
    wanted: dict[int, str] = {}
    for start in range(0, len(order), size):
        some = order[start : start + size]
        batch = tokenizer.pad(
            {"input_ids": [sources[n] for n in some]}, return_tensors="pt",
            padding_side="right" if task == "seq2seq" else "left",
        )  # fmt: skip
        with torch.no_grad():
            written = network.generate(**batch, max_new_tokens=NEW_TOKENS, num_beams=beams, do_sample=False)
        new = written if task == "seq2seq" else written[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        wanted |= {n: text.strip() for n, text in zip(some, texts, strict=True)}
    predictions, _, _ = result(done, model, beams, SINGLE)
    assert [line["prediction"] for line in predictions] == [wanted[n] for n in range(len(rows))]
    assert [(line["source"], line["reference"]) for line in predictions] == [(r["text"], r["summary"]) for r in rows]


@pytest.mark.parametrize(("model", "beams"), CASES)
def test_scores_are_those_of_their_libraries(done: Path, model: str, beams: int) -> None:
    lines, scores, _ = result(done, model, beams, SINGLE)
    texts, right = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    wanted = {"step": 0, "split": "validation", "loss": loss(done, model)}
    if model == "bert":
        wanted |= {"accuracy": accuracy_score(right, texts), "macro_f1": f1_score(right, texts, average="macro")}
    else:
        names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
        rouge = [RougeScorer(names).score(*pair) for pair in zip(right, texts, strict=True)]
        wanted |= {name: np.mean([one[name].fmeasure for one in rouge]) for name in names}
        wanted |= {
            "bleu": sacrebleu.corpus_bleu(texts, [right]).score,
            "chrf": sacrebleu.corpus_chrf(texts, [right]).score,
            "perplexity": np.exp(wanted["loss"]),
        }
    assert scores == {
        # A perplexity is as exact as the loss that it is a power of.
        key: pytest.approx(value, rel=1e-6 * (1 + wanted["loss"])) if isinstance(value, float) else value
        for key, value in wanted.items()
    }
    path = done / "runs" / f"{model}-{beams}-{SINGLE.name}" / "statistics" / "step-0-validation.npy"
    rows = np.load(path, allow_pickle=False)
    assert rows.shape[0] == EXAMPLES
    assert rows[:, 0].sum() / rows[:, 1].sum() == pytest.approx(wanted["loss"], rel=1e-6)


def loss(done: Path, model: str) -> float:
    """By transformers, of all examples at once."""
    task = plain.task_of(model)
    network = plain.AUTO[task].from_pretrained(done / model)
    rows = plain.read_rows(done / "validation.jsonl")
    return plain.evaluation_loss(network, task, plain.batch_of(plain.load_tokenizer(done / model), task, rows))


def test_fewer_examples_than_ranks_and_evaluations_on_the_way(done: Path) -> None:
    """One example on three ranks; and training does not notice that it was interrupted."""
    files = []
    for layout in (Layout("zero3", 3), Layout("fsdp2", 3), Layout("zero3", 3, "cpu")):
        for every in (1, 500):
            given = options(done, "t5", 1, layout) | {"duration__steps": 3, "optimizer__lr": 1e-2}
            given["evaluation"] = {**given["evaluation"], "examples": 1, "every": every, "baseline": every == 1}
            name = f"few-{every}-{layout.name}"
            files.append(run_many.config(done, name, done / "t5", "seq2seq", **given))
    # run_many.config writes data of its own beside it.
    tiny.write_rows(done / "validation.jsonl", tiny.rows(EXAMPLES, SEED + 1))
    run_many.train(done, files, 3)
    for interrupted, alone in zip(files[::2], files[1::2], strict=True):
        often, often_judged = run_many.metrics(done / "runs" / interrupted.parent.name)
        once, once_judged = run_many.metrics(done / "runs" / alone.parent.name)
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in often] == [line[key] for line in once], interrupted
        own = [line for line in often_judged if "of" not in line]
        assert [line["step"] for line in own] == [0, 1, 2, 3]
        assert own[-1]["loss"] == once_judged[-1]["loss"]
        log = (done / "runs" / f"{interrupted.parent.name}.log").read_text(encoding="utf-8")
        assert log.count("evaluation: parameters are gathered") == 1
        assert ("layer by layer" in log) == ("cpu" in interrupted.parent.name)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_batches_have_each_example_once_longest_first(count: int) -> None:
    rng = np.random.default_rng(count)
    lengths = rng.integers(1, 4, (count, 2))
    batches = in_batches(lengths, 3)
    order = [int(position) for batch in batches for position in batch]
    assert sorted(order) == list(range(count))
    keys = [tuple(lengths[position]) for position in order]
    assert keys == sorted(keys, reverse=True)
    assert [len(batch) for batch in batches] == [3] * (count // 3) + ([count % 3] if count % 3 else [])


def test_statistics_files_need_no_pickle_and_stand_alone(done: Path) -> None:
    files = list((done / "runs").glob("*/statistics/*"))
    assert files
    assert all(path.suffix == ".npy" for path in files)
    assert not list((done / "runs").glob("*/*/*.part"))
    for path in (done / "runs").glob("*/predictions/*"):
        assert all(row.keys() == {"source", "reference", "prediction"} for row in plain.read_rows(path))
