"""QLoRA under every strategy: the same run everywhere, and the one that transformers, peft and bitsandbytes make."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import plain
import tiny
from forked import MANY, run_group
from launching import BIN, run

ALL = "SHARDTUNE_TEST_ALL" in os.environ
"""The suite runs a sample: all strategies with Llama on two ranks, and others where they differ most."""
STEPS = 6
STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
WIDE: dict[str, dict[str, Any]] = {
    "llama": {**tiny.ARCHITECTURES["llama"], "hidden_size": 64, "intermediate_size": 96},
    "t5": {**tiny.ARCHITECTURES["t5"], "d_model": 64, "feed_forward_proj": "gated-gelu", "initializer_factor": 0.6},
    "bart": {**tiny.ARCHITECTURES["bart"], "d_model": 64},
    "bert": {**tiny.ARCHITECTURES["bert"], "hidden_size": 64},
}
METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"method": "qlora", "rank": 4},
    "fp4": {"method": "qlora", "rank": 4, "quantization": "fp4", "double_quant": False, "targets": "attention"},
    "int8": {"method": "qlora", "rank": 4, "quantization": "int8"},
    "bf16": {"method": "qlora", "rank": 4},
}


class Run(NamedTuple):
    model: str
    method: str
    strategy: str
    ranks: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def single(self) -> Run:
        return self._replace(strategy="single", ranks=1)


def spread(model: str, method: str, on_two: list[str], on_one: list[str]) -> list[Run]:
    kinds = [("single", 1), *((kind, 2) for kind in on_two), *((kind, 1) for kind in on_one)]
    return [Run(model, method, kind, ranks) for kind, ranks in kinds]


RUNS = [
    *spread("llama", "nf4", STRATEGIES, STRATEGIES if ALL else ["fsdp2", "zero3"]),
    *spread("t5", "nf4", STRATEGIES if ALL else ["ddp", "fsdp2", "zero3"], ["fsdp2", "zero3"] if ALL else []),
    *spread("bart", "nf4", ["fsdp2", "zero3"], []),
    *spread("bert", "nf4", ["fsdp2"], []),
    *spread("llama", "fp4", ["fsdp2", "zero3"], []),
    *spread("t5", "int8", ["fsdp2", "zero3"], []),
    *spread("llama", "bf16", ["ddp", "fsdp2", "zero2", "zero3"] if ALL else ["fsdp2", "zero2", "zero3"], []),
    *spread("t5", "bf16", ["fsdp2", "zero3"] if ALL else ["zero3"], []),
]
SINGLE = [run for run in RUNS if run.strategy == "single" and run.method != "bf16"]
OTHERS = [run for run in RUNS if run.strategy != "single"]


class Done:
    """The runs' folders, and the same steps by a plain loop."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.said: dict[int, str] = {}
        for name, architecture in WIDE.items():
            plain.make_model(folder / name, architecture, seed)
        tiny.write_rows(folder / "train.jsonl", tiny.rows(37, seed))
        tiny.write_rows(folder / "validation.jsonl", tiny.rows(6, seed + 1))

    def config(self, which: Run, name: str, **options: Any) -> Path:
        task = plain.task_of(WIDE[which.model]["model_type"])
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        settings: dict[str, Any] = {
            "name": name,
            "runs": str(self.folder / "runs"),
            "seed": self.seed % 1000,
            "model__path": str(self.folder / which.model),
            "model__weights": "pretrained",
            "model__tokenizer": None,
            "task": {**tiny.TASKS[task], **limits},
            "data__train": str(self.folder / "train.jsonl"),
            "data__validation": str(self.folder / "validation.jsonl"),
            "data__shuffle": False,
            "batch": {"examples": 10, "micro_examples": 3},
            "optimizer__lr": 1e-2,
            "optimizer__warmup": 2,
            "duration__steps": STEPS,
            "strategy__kind": which.strategy,
            "evaluation__examples": 6,
            "model__dtype": "bfloat16" if which.method == "bf16" else "float32",
            "tuning": METHODS[which.method],
            **options,
        }
        return tiny.tiny_config(self.folder / "configs" / name, "t5", **settings)

    def train(self, ranks: int) -> None:
        configs = [self.config(which, which.name) for which in RUNS if which.ranks == ranks]
        if ranks == 1:
            configs += [self.config(which, f"{which.name}-begin", duration__steps=0) for which in SINGLE]
        log = self.folder / f"{ranks}-ranks.log"
        run_group([MANY, *configs], ranks, log, {"SHARDTUNE_CACHE": str(self.folder / f"cache-{ranks}")})
        self.said[ranks] = log.read_text()

    def path(self, which: Run) -> Path:
        folder = self.folder / "runs" / which.name
        if not (folder / "final").is_dir():
            pytest.fail(f"{which.name} did not finish; seed {self.seed}\n{self.said[which.ranks][-6000:]}")
        return folder

    def steps(self, which: Run) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.path(which) / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "grad_norm" in line]

    def quantized(self, which: Run) -> Any:
        """The base model as transformers loads it."""
        method = METHODS[which.method]
        kind = method.get("quantization", "nf4")
        task = plain.task_of(WIDE[which.model]["model_type"])
        wanted = BitsAndBytesConfig(
            load_in_4bit=kind != "int8", load_in_8bit=kind == "int8", bnb_4bit_quant_type=kind.replace("int8", "nf4"),
            bnb_4bit_use_double_quant=method.get("double_quant", True), bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["classifier"] if task == "classification" else None,
        )  # fmt: skip
        model = plain.AUTO[task].from_pretrained(
            self.folder / which.model, quantization_config=wanted, dtype=torch.float32, device_map="cpu"
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks weights, less exactly, in eval mode
                module.support_avx512bf16_for_cpu = False
        return model


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = Done(tmp_path_factory.mktemp("qlora"), random.randrange(2**31))
    threads = [threading.Thread(target=made.train, args=(ranks,)) for ranks in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", OTHERS, ids=lambda which: which.name)
def test_same_run_as_on_one_process(done: Done, which: Run) -> None:
    mine, first = done.steps(which), done.steps(which.single)
    assert len(mine) == STEPS
    if which.method == "bf16":  # strategies round in other places
        for ours, theirs in zip(mine, first, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03), (done.seed, ours["step"])
        return
    for ours, theirs in zip(mine, first, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), (done.seed, ours["step"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), (done.seed, ours["step"])
    ours, theirs = (
        load_file(done.path(each) / "final" / "adapter_model.safetensors") for each in (which, which.single)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= 1e-4 * max(1, theirs[name].abs().max()), (done.seed, name)


@pytest.mark.parametrize("which", SINGLE, ids=lambda which: which.name)
def test_same_run_as_a_plain_loop(done: Done, which: Run) -> None:
    """With a base that transformers quantizes, peft's adapter and bitsandbytes' layers."""
    task = plain.task_of(WIDE[which.model]["model_type"])
    tokenizer = plain.load_tokenizer(done.folder / which.model)
    rows = plain.read_rows(done.folder / "train.jsonl")
    epoch = [plain.batch_of(tokenizer, task, rows[at : at + 10]) for at in range(0, len(rows), 10)]
    begin = done.folder / "runs" / f"{which.name}-begin" / "final"
    assert begin.is_dir(), done.said[1][-6000:]
    model = PeftModel.from_pretrained(done.quantized(which), str(begin), is_trainable=True)
    steps = plain.train(model, task, (epoch * STEPS)[:STEPS], 1e-2, 0.0, 1e-8, 2, 1.0)
    for ours, theirs in zip(done.steps(which), steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs.loss, rel=1e-3), (done.seed, ours["step"])
        assert ours["grad_norm"] == pytest.approx(theirs.grad_norm, rel=1e-3), (done.seed, ours["step"])
    losses = [step["loss"] for step in done.steps(which)]
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("which", SINGLE, ids=lambda which: which.name)
def test_predictions_without_us(done: Done, which: Run) -> None:
    """What the run wrote is what transformers and peft write with its adapter."""
    task = plain.task_of(WIDE[which.model]["model_type"])
    tokenizer = plain.load_tokenizer(done.folder / which.model)
    model = PeftModel.from_pretrained(done.quantized(which), str(done.path(which) / "final"))
    written = plain.read_rows(done.path(which) / "predictions" / f"step-{STEPS}-validation.jsonl")
    assert written
    for row, line in zip(plain.read_rows(done.folder / "validation.jsonl"), written, strict=True):
        assert line["prediction"] == plain.predict(model, tokenizer, task, row), (done.seed, line)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_stored_bytes(done: Done, kind: str) -> None:
    """Sharded strategies split the 4-bit weights; every rank has all the scales, and says so."""
    which = Run("llama", "nf4", kind, 2)
    mine, first = (json.loads((done.path(run) / "environment.json").read_text()) for run in (which, which.single))
    (whole,) = first["stored_bytes"]
    assert len(mine["stored_bytes"]) == 2
    matrices = [64 * 64, 64 * 32, 64 * 32, 64 * 64, 3 * 64 * 96]  # of each of two layers
    assert whole["quantized"] == 2 * sum(matrices) / 2
    assert whole["scales"] == 2 * sum(matrices) / 64
    for held in mine["stored_bytes"]:
        assert held["quantized"] == whole["quantized"] / (1 if kind == "ddp" else 2)
        assert held["scales"] == whole["scales"]
        assert held["nested_scales"] == whole["nested_scales"] > 0
    said = (done.folder / "runs" / f"{which.name}.log").read_text()
    assert "quantized MB" in said
    assert f"{mine['stored_bytes'][0]['quantized'] / 1e6:.4f}" in said


def test_evaluate_and_generate_on_a_quantized_base(done: Done) -> None:
    """The commands load the base as it was while training."""
    which = RUNS[0]
    shardtune, config = str(BIN / "shardtune"), str(done.path(which) / "config.yaml")
    said = run([shardtune, "evaluate", "--config", config, "--split", "validation"], done.folder / "cache-1")
    assert said.code == 0, said.said
    folder = done.path(which) / "predictions"
    ours = plain.read_rows(folder / "final-validation.jsonl")
    assert ours == plain.read_rows(folder / f"step-{STEPS}-validation.jsonl")
    text = ours[0]["source"]
    said = run([shardtune, "generate", "--run", str(done.path(which)), text], done.folder / "cache-1")
    assert said.code == 0, said.said
    assert said.out.strip() == ours[0]["prediction"]
