"""Models with a new head: the same under every strategy, as transformers loads and computes them, and by command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

import plain
import run_many
import tiny
from layouts import ALL
from shardtune.cli import main
from shardtune.examples import Text, Tokens
from shardtune.model.tokenizer import load_tokenizer, train_tokenizer
from shardtune.protocols import Generation
from shardtune.task.classification import Classification
from skeletons import CLASSES, MODELS
from small_tokenizers import wordpiece
from tiny import TASKS

STRATEGIES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero3": 2}
LORA = {"method": "lora", "rank": 4, "alpha": 8}
QA_LIMIT, STEPS = 30, 3
DROPOUT = ("dropout", "attention_dropout", "classifier_dropout", "qa_dropout")
"""Of the models that have it by default."""


def with_labels(made: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Any of the animals of each text, and a number."""
    animals = ("cat", "dog", "bird")
    return [
        {**row, "label": [animal for animal in animals if animal in row["text"]], "length": len(row["text"]) / 100}
        for row in made
    ]


class Kind(NamedTuple):
    task: dict[str, Any]
    make: Callable[[list[dict[str, str]]], list[dict[str, Any]]]

    @property
    def auto(self) -> Any:
        return CLASSES[self.task["kind"]]


KINDS = {
    "tokens": Kind({**TASKS["token_classification"], "max_source_tokens": 100}, tiny.tagged),
    "questions": Kind({**TASKS["question_answering"], "max_source_tokens": QA_LIMIT}, tiny.questions),
    "labels": Kind({**TASKS["classification"], "problem": "multi_label"}, with_labels),
    "numbers": Kind({**TASKS["classification"], "problem": "regression", "label": "length"}, with_labels),
}


class Case(NamedTuple):
    kind: str
    model: str
    method: str
    strategy: str

    @property
    def name(self) -> str:
        return "-".join(self)

    @property
    def alone(self) -> Case:
        return self._replace(strategy="single")


STRATEGIES_OF = {
    ("tokens", "bert", "full"): ("single", "fsdp2", "zero3"),
    ("questions", "bert", "full"): ("single", "ddp", "zero3"),
    ("tokens", "llama", "lora"): ("single", "zero3"),
    ("questions", "llama", "lora"): ("single", "fsdp2"),
    ("tokens", "distilbert", "prompt"): ("single",),
    ("questions", "distilbert", "prompt"): ("single", "ddp"),
    ("labels", "bert", "full"): ("single", "zero3"),
    ("numbers", "bert", "full"): ("single", "fsdp2"),
}
"""A sample; all of them where ALL."""
CASES = [Case(*of, kind) for of, sample in STRATEGIES_OF.items() for kind in (STRATEGIES if ALL else sample)]
ALONE = [case for case in CASES if case.strategy == "single"]
TUNINGS = {"full": {"method": "full"}, "lora": LORA, "prompt": {"method": "prompt", "virtual_tokens": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each on a base model without a head."""
    folder = tmp_path_factory.mktemp("heads")
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    for name in ("bert", "llama", "distilbert"):
        path = folder / name
        texts = [row["text"] for row in tiny.rows(40, seed)]
        train_tokenizer([*texts, "the first one"], 300, "token_classification", path)
        settings = {**MODELS[name], "vocab_size": 300, **dict.fromkeys(DROPOUT, 0.0)}
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings, pad_token_id=0)
        transformers.AutoModel.from_config(config).save_pretrained(path)
    configs: dict[int, list[Path]] = {}
    for case in CASES:
        kind = KINDS[case.kind]
        data = [
            str(tiny.write_rows(folder / f"{case.kind}-{split}.jsonl", kind.make(tiny.rows(count, seed + number))))
            for number, (split, count) in enumerate((("train", 13), ("validation", 7)))
        ]
        path = tiny.tiny_config(
            folder / "configs" / case.name, name=case.name, runs=str(folder / "runs"), task=kind.task,
            model__path=str(folder / case.model), model__weights="pretrained", model__tokenizer=None,
            data={"train": data[0], "validation": data[1]}, tuning=TUNINGS[case.method],
            strategy={"kind": case.strategy}, duration={"steps": STEPS}, optimizer__lr=1e-2,
            evaluation={"examples": 7, "max_new_tokens": 6, "baseline": False, "metrics": []},
        )  # fmt: skip
        configs.setdefault(STRATEGIES[case.strategy], []).append(path)
    for ranks, paths in configs.items():
        run_many.train(folder, paths, ranks)
    return folder


def lines_of(folder: Path, case: Case) -> list[dict[str, Any]]:
    return plain.read_rows(folder / "runs" / case.name / "metrics.jsonl")  # pyright: ignore[reportReturnType]


def predictions_of(folder: Path, case: Case) -> list[dict[str, str]]:
    return plain.read_rows(folder / "runs" / case.name / "predictions" / f"step-{STEPS}-validation.jsonl")


def reloaded(folder: Path, case: Case) -> tuple[Any, Any]:
    """Result and tokenizer, without this package."""
    final = folder / "runs" / case.name / "final"
    auto = KINDS[case.kind].auto
    if case.method == "full":
        model = auto.from_pretrained(final)
    else:
        labels = json.loads((final / "labels.json").read_text()) if (final / "labels.json").exists() else ["0", "1"]
        base = auto.from_pretrained(folder / case.model, num_labels=len(labels))
        model = PeftModel.from_pretrained(base, str(final))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(final)


@pytest.mark.parametrize("case", [case for case in CASES if case.strategy != "single"], ids=lambda case: case.name)
def test_strategies_agree(folder: Path, case: Case) -> None:
    found, wanted = lines_of(folder, case), lines_of(folder, case.alone)
    assert len(found) == len(wanted) == STEPS + 1
    for ours, alone in zip(found, wanted, strict=True):
        for key in ("loss", "grad_norm", "target_tokens", "tokens"):
            if key in alone:
                assert ours[key] == pytest.approx(alone[key], rel=2e-5), (key, ours["step"])
    assert [line["source"] for line in predictions_of(folder, case)] == [
        line["source"] for line in predictions_of(folder, case.alone)
    ]
    if case.kind != "numbers":
        assert predictions_of(folder, case) == predictions_of(folder, case.alone)


def loss_of_transformers(kind: str, model: Any, tokenizer: Any, rows: list[Any], labels: list[str]) -> float:
    """The mean over all targets, each row alone, with the tokenizer's own places."""
    total, count = 0.0, 0
    for row in rows:
        more: dict[str, Any] = {}
        if kind == "questions":
            options = {"truncation": "only_second", "max_length": QA_LIMIT}
            inputs = tokenizer(row["question"], row["context"], **options, return_tensors="pt")
            texts, starts = row["answers"].values()
            bounds = [starts[0], starts[0] + len(texts[0]) - 1] if texts else None
            places = [inputs.char_to_token(0, place, 1) for place in bounds] if bounds else [0, 0]
            if None in places:
                continue
            more = {"start_positions": torch.tensor(places[:1]), "end_positions": torch.tensor(places[1:])}
            targets = 1
        elif kind == "tokens":
            text = " ".join(row["tokens"])
            inputs, at = tokenizer(text, return_tensors="pt"), 0
            wanted = torch.full_like(inputs["input_ids"], -100)
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                # A word inside the text begins with the space before it, with which it may or may not be one token.
                wanted[0, inputs.char_to_token(0, max(at - 1, 0))] = labels.index(tag)
                at += len(word) + 1
            more, targets = {"labels": wanted}, len(row["tokens"])
        else:
            inputs = tokenizer(row["text"], truncation=True, max_length=48, return_tensors="pt")
            held = [float(label in row["label"]) for label in labels]
            more = {"labels": torch.tensor([held if kind == "labels" else row["length"]])}
            targets = 1
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            total += model(**inputs, **more).loss.item() * targets
        count += targets
    return total / count


# Of PEFT's own forward with virtual tokens the outputs are further on than the tokens.
@pytest.mark.parametrize("case", [case for case in ALONE if case.method != "prompt"], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Some weights of")
def test_results_load_in_transformers_and_have_the_loss_that_was_logged(folder: Path, case: Case) -> None:
    model, tokenizer = reloaded(folder, case)
    rows: list[Any] = plain.read_rows(folder / f"{case.kind}-validation.jsonl")
    saved = folder / "runs" / case.name / "final" / "labels.json"
    labels = json.loads(saved.read_text()) if saved.exists() else []
    logged = lines_of(folder, case)[-1]["loss"]
    assert loss_of_transformers(case.kind, model, tokenizer, rows, labels) == pytest.approx(logged, rel=2e-5)
    if case.kind in ("labels", "numbers"):
        wanted = {"labels": "multi_label_classification", "numbers": "regression"}[case.kind]
        assert model.config.problem_type == wanted
        assert model.config.num_labels == len(labels or ["one"])


@pytest.mark.parametrize("kind", ["tokens", "questions"])
@pytest.mark.parametrize("method", ["bert-full", "llama-lora"])
def test_commands(folder: Path, tmp_path: Path, kind: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` finds what the run found, `generate` answers rows without labels, `export` gives the same model."""
    model_name, _, tuning = method.partition("-")
    case = Case(kind, model_name, tuning, "single")
    config, run = folder / "configs" / case.name / "config.yaml", folder / "runs" / case.name
    logged = lines_of(folder, case)[-1]["loss"]
    assert main(["evaluate", "--config", str(config), "--split", "validation"]) == 0
    assert f"loss    {logged:.4f}" in capsys.readouterr().out
    rows: list[Any] = plain.read_rows(folder / f"{kind}-validation.jsonl")
    asked = [{key: row[key] for key in row if key not in ("tags", "answers")} for row in rows]
    assert main(["generate", "--run", str(run), "--input", str(tiny.write_rows(tmp_path / "asked.jsonl", asked))]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = reloaded(folder, case)
    assert len(told) == len(rows)
    for row, line in zip(asked, told, strict=True):
        if kind == "tokens":
            labels = json.loads(line["prediction"])
            assert len(labels) == len(row["tokens"])
            inputs = tokenizer(" ".join(row["tokens"]), return_tensors="pt")
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            names = json.loads((run / "final" / "labels.json").read_text())
            starts = [max(len(" ".join([*row["tokens"][:place], ""])) - 1, 0) for place in range(len(labels))]
            assert labels == [names[int(logits[0, inputs.char_to_token(0, start)].argmax())] for start in starts]
        else:
            assert line["source"] == f"{row['question']}\n\n{row['context']}"
            assert line["prediction"] in row["context"]
    one = json.dumps(asked[0]) if kind == "questions" else " ".join(asked[0]["tokens"])
    assert main(["generate", "--run", str(run), one]) == 0
    assert capsys.readouterr().out.strip("\n") == told[0]["prediction"]
    out = tmp_path / "out"
    merge = ["--merge"] if case.method == "lora" else []
    assert main(["export", "--run", str(run), "--out", str(out), *merge]) == 0, capsys.readouterr().err
    exported = KINDS[kind].auto.from_pretrained(out).eval()
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    with torch.no_grad():
        for one, other in zip(model(**inputs).to_tuple(), exported(**inputs).to_tuple(), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert load_tokenizer(str(out), "right", False).get_vocab() == tokenizer.get_vocab()


# ---------------------------------------------------------------------------------------- several labels, numbers

PROBLEMS = {"multi_label": ["cat", "dog"], "regression": []}


def classified(problem: Any, target: str) -> tuple[Classification, Tokens]:
    task = Classification(wordpiece(), 20, PROBLEMS[problem], problem)
    (encoded,) = task.encode([Text("f:1", "the cat runs", target)])
    return task, Tokens(np.array(encoded.source, np.int32), np.array(encoded.target, np.int32))


class Says(torch.nn.Module):
    """A model with these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **inputs: Tensor) -> Any:
        return SequenceClassifierOutput(logits=self.logits)  # pyright: ignore


@pytest.mark.parametrize("value", [-100.0, 0.0, 3.25, -7e5])
def test_any_number_is_learned(value: float) -> None:
    """Also the one that stands for no label elsewhere."""
    task, example = classified("regression", repr(value))
    batch = task.collate([example, example])
    assert batch.labels.tolist() == [value, value]
    model = Says(torch.tensor([[value + 2], [value]]))
    assert task.losses(model, batch).tolist() == [4.0, 0.0]
    assert task.losses(model, batch.blank()).tolist() == [0.0, 0.0]
    assert float(task.predict(model, [example, example], Generation(1))[1]) == value


@pytest.mark.parametrize(("target", "held"), [("[]", [0, 0]), ('["dog"]', [0, 1]), ('["cat", "dog"]', [1, 1])])
def test_any_number_of_labels_holds(target: str, held: list[float]) -> None:
    task, example = classified("multi_label", target)
    batch = task.collate([example])
    assert batch.labels.tolist() == [held]
    model = Says(torch.tensor([[0.3, -0.7]]))
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        model.logits[0], torch.tensor(held, dtype=torch.float)
    )
    assert task.losses(model, batch).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert task.losses(model, batch.blank()).tolist() == [0.0]
    assert task.predict(model, [example], Generation(1)) == ['["cat"]']


@pytest.mark.parametrize(
    ("problem", "label", "said"),
    [
        ("multi_label", "cat", "a string, not a list of labels, which task.problem: multi_label needs"),
        ("multi_label", ["cat", None], "label 2: null, not a string, an integer or a boolean"),
        ("regression", "five", "a string, not a number, which task.problem: regression needs"),
        ("regression", True, "a boolean, not a number"),
    ],
)
def test_a_wrong_label_ends_the_run_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str, label: Any, said: str
) -> None:
    config = tiny.tiny_config(tmp_path, "bert", task={**TASKS["classification"], "problem": problem})
    tiny.write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": 3 if problem == "regression" else ["cat"]}])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "b", "label": label}) + "\n")
    assert main(["train", "--config", str(config)]) == 3
    assert f"{tmp_path / 'train.jsonl'}:2 field `label`: {said}" in capsys.readouterr().err
