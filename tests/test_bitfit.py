"""BitFit trains the biases, all of them, and nothing else but a classifier's head."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plain
import run_many
import skeletons
from shardtune.errors import ConfigError
from shardtune.tuning.bitfit import Bitfit
from skeletons import TASKS, architecture, skeleton_of

QWEN2 = {**skeletons.LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
WITH_BIASES = ("bart", "gpt2", "bert", "roberta", "distilbert", "qwen2")
STEPS = 4


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skeletons.MODELS, "qwen2", QWEN2)
    monkeypatch.setitem(skeletons.TASKS, "qwen2", "causal")


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("name", WITH_BIASES)
def test_biases_are_trained(tmp_path: Path, name: str) -> None:
    skeleton = skeleton_of(architecture(tmp_path, name), TASKS[name], pretrained=False)
    tuning = Bitfit(TASKS[name])
    model: Any = tuning.apply(skeleton.model)
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {n for n in trained if TASKS[name] == "classification" and not n.startswith(f"{model.base_model_prefix}.")}
    assert trained - heads == {n for n, _ in model.named_parameters() if n.endswith(".bias")} - heads
    assert tuning.notes() == [f"{len(trained - heads)} biases"]
    if TASKS[name] == "classification":
        assert {n.partition(".")[0] for n in heads} >= {"classifier"}
        assert any(n.endswith("weight") for n in heads)
    assert not tuning.makes_adapter


@pytest.mark.parametrize("name", ["t5", "t5-untied", "llama", "mistral", "qwen3"])
def test_models_without_biases(tmp_path: Path, name: str) -> None:
    """T5's relative attention biases are embeddings by another name."""
    skeleton = skeleton_of(architecture(tmp_path, name), TASKS[name], pretrained=False)
    with pytest.raises(ConfigError, match=r"tuning.method: bitfit trains biases, and a .* model has none; bart, gpt2"):
        Bitfit(TASKS[name]).apply(skeleton.model)


@pytest.mark.parametrize("name", ["bart", "bert"])
def test_a_run(tmp_path: Path, name: str) -> None:
    """The run of a plain loop; transformers loads the result, of which only the biases are new."""
    seed = random.randrange(2**31)
    settings = skeletons.MODELS[name]
    task = plain.task_of(settings["model_type"])
    plain.make_model(tmp_path / name, settings, seed)
    options: dict[str, Any] = {
        "tuning": {"method": "bitfit"}, "duration__steps": STEPS, "data__shuffle": False, "optimizer__eps": 1e-4,
        "optimizer__weight_decay": 0.1,
    }  # fmt: skip
    run_many.train(tmp_path, [run_many.config(tmp_path, "run", tmp_path / name, task, **options)], 1)
    run = tmp_path / "runs" / "run"

    model = plain.AUTO[task].from_pretrained(tmp_path / name)
    for n, parameter in model.named_parameters():
        parameter.requires_grad_(n.endswith(".bias") or n.startswith("classifier."))
    tokenizer = plain.load_tokenizer(tmp_path / name)
    rows = plain.read_rows(tmp_path / "train.jsonl")
    batch = plain.batch_of(tokenizer, task, rows)
    steps = plain.train(model, task, [batch] * STEPS, 3e-2, 0.1, 1e-4, 0, 1.0)
    ours = run_many.metrics(run)[0]
    assert [step["loss"] for step in ours] == pytest.approx([step.loss for step in steps], rel=1e-5), seed
    assert ours[-1]["loss"] < ours[0]["loss"]

    before, after = load_file(tmp_path / name / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(n.endswith(".bias") or n.startswith("classifier.") for n in changed)

    tuned, info = plain.AUTO[task].from_pretrained(run / "final", output_loading_info=True)
    assert not any(info.values()), info
    written = plain.read_rows(run / "predictions" / f"step-{STEPS}-validation.jsonl")
    for row, line in zip(plain.read_rows(tmp_path / "validation.jsonl"), written, strict=True):
        assert line["prediction"] == plain.predict(tuned, tokenizer, task, row), seed
