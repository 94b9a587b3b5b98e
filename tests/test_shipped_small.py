"""Shipped configs run as they are but for their size: a model of two layers, a few local rows, a few steps."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from torch import distributed

import plain
import tiny
from chats import TEMPLATES, make_tokenizer
from layouts import ARCHITECTURES
from shardtune.cli import train_as_rank
from shardtune.config_file import load_config
from skeletons import MODELS

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS, ROWS = 3, 6
T5 = ARCHITECTURES["t5"]
QWEN2 = {**tiny.ARCHITECTURES["llama"], "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LLAMA = tiny.ARCHITECTURES["llama"]
DISTILBERT = {**MODELS["distilbert"], "max_position_embeddings": 512}


class Shipped(NamedTuple):
    """A file, what stands in for its model, and what makes it small beyond what all are given."""

    file: str
    method: str
    model: dict[str, Any]
    fields: dict[str, str]
    """The fields of its data, and which of `tiny.rows` they hold; none: conversations, or rows of the task's own."""
    overrides: tuple[str, ...] = ()
    template: str = ""
    """The chat template of its tokenizer."""
    first: str = ""
    """The config whose adapter it goes on from."""
    steps: int = STEPS

    @property
    def path(self) -> Path:
        return CONFIGS / f"{self.file}.yaml"


BERT = {**MODELS["bert"], "max_position_embeddings": 512}
DIALOGUES = {"dialogue": "text", "summary": "summary"}
REVIEWS = {"text": "text", "label": "label"}
ON_A_CPU = ("optimizer.name=adamw_8bit",)  # pages are for GPUs
SHIPPED = [
    Shipped("flan-t5-large-dialogsum-prefix", "prefix", T5, DIALOGUES),
    Shipped("flan-t5-large-dialogsum-prompt", "prompt", T5, DIALOGUES),
    Shipped(
        "qwen2.5-1.5b-dolly-p-tuning", "p_tuning", QWEN2,
        {"instruction": "text", "context": "label", "response": "summary"},
    ),
    Shipped("flan-t5-base-dialogsum-adapter", "adapter", T5, DIALOGUES),
    Shipped("distilbert-imdb-lora", "lora", DISTILBERT, REVIEWS),
    Shipped("flan-t5-base-dialogsum", "full", T5, {**DIALOGUES, "topic": "label"}),
    Shipped("distilbert-sentiment-base", "full", DISTILBERT, REVIEWS),
    Shipped("distilbert-sentiment-lora", "lora", DISTILBERT, REVIEWS),
    Shipped("distilbert-sentiment-lora-from-imdb", "lora", DISTILBERT, REVIEWS, first="distilbert-imdb-lora"),
    Shipped("qwen2.5-1.5b-dialogsum-shots", "lora", QWEN2, DIALOGUES, ("evaluation.baseline=true",), steps=0),
    Shipped("bert-wikiann-ner", "full", BERT, {}, ("task.labels=tags",)),
    Shipped("bert-squad", "full", BERT, {}),
    Shipped("flan-t5-xxl-dialogsum-qlora", "qlora", T5, DIALOGUES, ON_A_CPU),
    Shipped("flan-t5-xl-cnn-dailymail-qlora", "qlora", T5, {"article": "text", "highlights": "summary"}, ON_A_CPU),
    *(
        Shipped(f"{name}-chat-qlora", "qlora", model, {}, ON_A_CPU, template)
        for name, model, template in (
            ("qwen2.5-3b", QWEN2, "qwen"),
            ("qwen3-8b", MODELS["qwen3"], "qwen"),
            ("llama-3.1-8b", LLAMA, "llama"),
            ("qwen3-14b", MODELS["qwen3"], "qwen"),
        )
    ),
]  # fmt: skip


def rows_of(shipped: Shipped, seed: int) -> list[dict[str, Any]]:
    """Both labels are there."""
    made = tiny.rows(ROWS, seed)
    made[0]["label"], made[1]["label"] = "pet", "no"
    kind = load_config(shipped.path, []).task.kind
    if kind in tiny.MADE:
        made[0]["text"] = "the cat runs"
        return tiny.MADE[kind](made)
    if shipped.fields:
        return [{field: row[key] for field, key in shipped.fields.items()} for row in made]
    turns = [(row["text"], row["summary"]) for row in made]
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.file)
def test_a_shipped_config_runs_small(shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.SystemRandom().randrange(2**31)
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    model = plain.make_model(tmp_path / "model", shipped.model, seed, vocabulary=704)
    if shipped.first:
        (first,) = (each for each in SHIPPED if each.file == shipped.first)
        before = run_small(first, tmp_path, model, seed)
        shipped = shipped._replace(overrides=(*shipped.overrides, f"tuning.from={before / 'final'}"))
    config = load_config(shipped.path, [])
    assert config.tuning.method == shipped.method
    run = run_small(shipped, tmp_path, model, seed)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, shipped.steps + 1))
    assert all(math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf for line in steps), f"seed {seed}"
    assert any(name in lines[-1] for name in config.evaluation.metrics or ()) or "rouge1" in lines[-1], lines[-1]
    assert len(plain.read_rows(run / "predictions" / f"step-{shipped.steps}-validation.jsonl")) == 2
    if not shipped.steps:
        judged = {line.get("of") for line in lines}
        assert {"shots-1", "shots-3"} <= judged, "the prompt's examples are what it is about"
        return
    (result,) = (run / "final").glob("*model.safetensors")  # the network behind virtual tokens lies beside it
    with safe_open(result, "pt") as tensors:
        assert any(bool(tensors.get_tensor(name).any()) for name in tensors.keys()), f"seed {seed}"  # noqa: SIM118


def run_small(shipped: Shipped, folder: Path, model: Path, seed: int) -> Path:
    """Its run's folder."""
    if shipped.template:
        make_tokenizer(TEMPLATES[shipped.template]).save_pretrained(model)
    data = tiny.write_rows(folder / f"{shipped.file}.jsonl", rows_of(shipped, seed))
    overrides = [
        f"runs={folder}", f"model.path={model}", f"data.train={data}", f"data.validation={data}", "data.test=null",
        f"batch.examples={ROWS}", "duration.epochs=null", f"duration.steps={shipped.steps}", "tracking.every=1",
        "evaluation.examples=2", "evaluation.max_new_tokens=4", "evaluation.baseline=false", *shipped.overrides,
    ]  # fmt: skip
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = train_as_rank(["--config", str(shipped.path), *overrides])
    finally:
        if distributed.is_initialized():  # of a run that failed
            distributed.destroy_process_group()
    assert code == 0, f"seed {seed}\n{said.getvalue()}"
    return folder / load_config(shipped.path, []).name


def test_every_method_asked_for_has_a_config() -> None:
    shipped = {(each.method, load_config(each.path, []).task.kind) for each in SHIPPED}
    wanted = {("prefix", "seq2seq"), ("prompt", "seq2seq"), ("p_tuning", "causal"), ("adapter", "seq2seq")}
    assert (
        wanted | {("lora", "classification"), ("full", "seq2seq"), ("qlora", "causal"), ("qlora", "seq2seq")} <= shipped
    )
    assert {("full", "classification"), ("full", "token_classification"), ("full", "question_answering")} <= shipped
