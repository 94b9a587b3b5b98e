"""Runs that differ in their layout only, and the plain loops they are compared with."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import plain
import tiny
from forked import MANY, run_group

ALL = "SHARDTUNE_TEST_ALL" in os.environ
STEPS = 20
SHARDED = ["fsdp2", "zero1", "zero2", "zero3"]
TWO_RANKS = ["ddp", *SHARDED]
EXAMPLES = {"t5": 49, "llama": 53}
"""A last step of one example leaves a rank without any; one of five does not divide into micro-batches."""
# A smooth activation: near the kink of a relu, rounding decides a whole gradient.
T5_CONFIG = {**tiny.ARCHITECTURES["t5"], "feed_forward_proj": "gated-gelu", "initializer_factor": 0.6}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **tiny.ARCHITECTURES,
    "t5": {**T5_CONFIG, "tie_word_embeddings": True},
    "t5-untied": {**T5_CONFIG, "tie_word_embeddings": False},
    "t5-loud": {**T5_CONFIG, "tie_word_embeddings": False, "initializer_factor": 3.0},  # writes a text for each source
    # Matrices large enough for 8-bit states of bitsandbytes, and layers that divide into blocks of 256 only by luck.
    "llama-wide": {**tiny.ARCHITECTURES["llama"], "hidden_size": 72, "intermediate_size": 120},
    "llama-tied": {**tiny.ARCHITECTURES["llama"], "tie_word_embeddings": True},
}
LONGEST = 1000
"""Seconds that a process group may take."""
CLIPPED = 0.2
"""Well below the gradient norms of these models."""


class Run(NamedTuple):
    """A group's runs differ in their layout only; its first one has a single process."""

    group: str
    model: str
    strategy: str
    ranks: int
    accumulation: int
    options: dict[str, Any]
    """Keys of the config beside those that all runs here share, dots written as two underscores."""

    @property
    def batching(self) -> str:
        return self.options.get("data__batching", "padded")

    @property
    def name(self) -> str:
        return f"{self.group}-{self.strategy}-{self.ranks}-{self.accumulation}-{self.batching}"

    @property
    def task(self) -> str:
        return plain.task_of(ARCHITECTURES[self.model.removesuffix("-bf16")]["model_type"])

    @property
    def examples(self) -> int:
        return EXAMPLES.get(self.model.split("-")[0], 49)

    @property
    def makes_adapter(self) -> bool:
        return "lora" in self.group

    def option(self, key: str, default: Any) -> Any:
        return self.options.get(key, default)


def layouts(group: str, model: str, ranks: tuple[int, ...] = (2,), **options: Any) -> list[Run]:
    """A group on one process and under every strategy, with two micro-batches."""
    sharded = [Run(group, model, kind, count, 2, options) for kind in TWO_RANKS for count in ranks]
    return [Run(group, model, "single", 1, 2, options), *sharded]


def matrix(model: str, batchings: list[str], **options: Any) -> list[Run]:
    """Every strategy on one and two ranks with 1, 2 and 8 micro-batches.

    The suite runs a sample: a strategy on one rank with one of these numbers, on two ranks with two of them. What is
    left out of T5's are not those that are left out of Llama's.
    """
    shift = model == "llama"
    chosen = [
        (kind, ranks, at)
        for at in range(3)
        for index, kind in enumerate(["single", *TWO_RANKS])
        for ranks in ((1,) if kind == "single" else (1, 2))
        if ALL or kind == "single" or ((index + at + shift) % 3 == 0) == (ranks == 1)
    ]
    return [
        Run(model, model, kind, ranks, (1, 2, 8)[at], {**options, "data__batching": batchings[at]})
        for kind, ranks, at in chosen
    ]


LORA_OPTIONS = {
    "tuning": {"method": "lora", "rank": 1, "alpha": 4},
    "optimizer__lr": 1e-2,
    "model__recompute": "full",  # of which the plain loop knows nothing
    "data__batching": "packed",
    "batch": {"examples": 16, "micro_tokens": 60},
}
T5 = matrix("t5", ["padded", "packed", "grouped"], optimizer__max_grad_norm=CLIPPED)
LLAMA = matrix("llama", ["grouped", "padded", "packed"], optimizer__max_grad_norm=None)
SHUFFLED = layouts("shuffled", "t5", data__shuffle=True, optimizer__max_grad_norm=CLIPPED)
LORA = layouts("lora", "llama", **LORA_OPTIONS)
LORA_T5 = [
    Run("lora-t5", "t5", kind, ranks, 2, {"tuning": {"method": "lora", "rank": 3, "alpha": 6}, "optimizer__lr": 1e-2})
    for kind, ranks in (("single", 1), ("fsdp2", 2), ("zero2", 2))
]
FROZEN = layouts("frozen", "t5", tuning={"method": "freeze", "layers": 1, "embeddings": True})
OTHERS = [
    Run(
        model,
        model,
        kind,
        ranks,
        2,
        # The keys' biases have gradients of pure noise.
        {"optimizer__eps": 1e-4, "data__batching": "packed" if kind == "fsdp2" and model != "bert" else "padded"},
    )
    for model in ("t5-untied", "llama-tied", "bart", "gpt2", "bert")
    for kind, ranks in (("single", 1), ("fsdp2", 2), ("zero3", 2))
]
UNTRAINED_ADAPTERS = [
    Run(f"{group}-begin", model, "single", 1, 2, {**runs[0].options, "duration__steps": 0})
    for group, model, runs in (("lora", "llama", LORA), ("lora-t5", "t5", LORA_T5))
]
DRAWN = [
    *layouts("drawn", "t5", (1, 2), duration__steps=0, model__weights="random"),
    *layouts("drawn-gpt2", "gpt2", duration__steps=0, model__weights="random"),
]
KEPT = [
    *layouts("kept", "t5-loud", duration__steps=0),
    *layouts("kept-in-bf16", "t5", (1, 2), duration__steps=0, model__dtype="bfloat16"),
    *layouts("kept-bf16", "t5-bf16", duration__steps=0, model__dtype="bfloat16"),
    *layouts("kept-llama", "llama-tied", duration__steps=0, model__dtype="bfloat16"),
]
ROUNDED = [
    *layouts("t5-rounded", "t5", model__dtype="bfloat16", optimizer__max_grad_norm=CLIPPED, data__batching="packed"),
    *layouts("llama-rounded", "llama", model__dtype="bfloat16", optimizer__max_grad_norm=None),
]
TRAINED = [*T5, *LLAMA, *SHUFFLED, *LORA, *LORA_T5, *FROZEN, *OTHERS]
RUNS = [*TRAINED, *UNTRAINED_ADAPTERS, *DRAWN, *KEPT, *ROUNDED]
SINGLE = {run.group: run for run in reversed(RUNS) if run.strategy == "single"}


class Done:
    """The runs' folders, and what a plain loop makes of the same examples."""

    def __init__(self, folder: Path, seed: int, runs: Sequence[Run] | None = None) -> None:
        self.folder = folder
        self.seed = seed
        self.logs: dict[int, str] = {}
        self._plain: dict[str, tuple[list[plain.Step], torch.nn.Module]] = {}
        for count in {*EXAMPLES.values()}:
            tiny.write_rows(folder / f"{count}.jsonl", tiny.rows(count, seed + count))
        tiny.write_rows(folder / "validation.jsonl", tiny.rows(9, seed + 1))
        for name in dict.fromkeys(run.model for run in (runs or RUNS)):
            dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
            plain.make_model(self.model(name), ARCHITECTURES[name.removesuffix("-bf16")], seed, dtype)

    def model(self, name: str) -> Path:
        """The folder that a run begins from."""
        return self.folder / "models" / name

    def rows(self, run: Run) -> list[plain.Row]:
        return plain.read_rows(self.folder / f"{run.examples}.jsonl")

    def judged(self) -> list[plain.Row]:
        """The examples of an evaluation: an odd number, and not all of the file."""
        return plain.read_rows(self.folder / "validation.jsonl")[:7]

    def config(self, run: Run) -> Path:
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if run.task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        options: dict[str, Any] = {
            "name": run.name,
            "runs": str(self.folder / "runs"),
            "seed": self.seed % 1000,
            "model__path": str(self.model(run.model)),
            "model__weights": "pretrained",
            "model__tokenizer": None,
            "task": {**tiny.TASKS[run.task], **limits},
            "data__train": str(self.folder / f"{run.examples}.jsonl"),
            "data__validation": str(self.folder / "validation.jsonl"),
            "data__shuffle": False,
            "batch": {"examples": 16, "micro_examples": 16 // run.ranks // run.accumulation},
            "optimizer__lr": 3e-3,
            "optimizer__warmup": 3,
            "optimizer__weight_decay": 0.1,
            "duration__steps": STEPS,
            "strategy__kind": run.strategy,
            "evaluation__examples": 7,
            **run.options,
        }
        return tiny.tiny_config(self.folder / "configs" / run.name, "t5", **options)

    def path(self, run: Run) -> Path:
        """The run's folder. Fails the test where the run did not come to its end."""
        folder = self.folder / "runs" / run.name
        if not (folder / "final").is_dir():
            pytest.fail(f"{run.name} did not finish; seed {self.seed}\n{self.logs[run.ranks][-6000:]}")
        return folder

    def metrics(self, run: Run) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """The lines of the steps, and the last evaluation."""
        lines = [json.loads(line) for line in (self.path(run) / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "grad_norm" in line], [line for line in lines if "split" in line][-1]

    def predictions(self, run: Run) -> list[dict[str, str]]:
        steps = run.option("duration__steps", STEPS)
        return plain.read_rows(self.path(run) / "predictions" / f"step-{steps}-validation.jsonl")

    def final(self, run: Run) -> dict[str, Tensor]:
        file = "adapter_model.safetensors" if run.makes_adapter else "model.safetensors"
        return load_file(self.path(run) / "final" / file)

    def load(self, run: Run) -> torch.nn.Module:
        """The result, as transformers or peft loads it; nothing may be missing or left over."""
        folder = str(self.path(run) / "final")
        if run.makes_adapter:
            base = plain.AUTO[run.task].from_pretrained(self.model(run.model))
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
        model, info = plain.AUTO[run.task].from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        return model

    def plain_loop(self, run: Run) -> tuple[list[plain.Step], torch.nn.Module]:
        """The steps of a plain loop over the run's examples in file order, and the model after it."""
        key = run.group
        if key not in self._plain:
            tokenizer = plain.load_tokenizer(self.model(run.model))
            rows = self.rows(run)
            epoch = [plain.batch_of(tokenizer, run.task, rows[at : at + 16]) for at in range(0, len(rows), 16)]
            batches = (epoch * STEPS)[:STEPS]
            if run.makes_adapter:
                model = self.load(next(begin for begin in UNTRAINED_ADAPTERS if begin.group == f"{run.group}-begin"))
            else:
                model = plain.AUTO[run.task].from_pretrained(self.model(run.model))
            if run.group == "frozen":
                for name, parameter in model.named_parameters():
                    frozen = ("shared.", "encoder.block.0.", "decoder.block.0.")
                    parameter.requires_grad_(not name.startswith(frozen))
            lr, eps = run.option("optimizer__lr", 3e-3), run.option("optimizer__eps", 1e-8)
            clip = run.option("optimizer__max_grad_norm", 1.0)
            self._plain[key] = plain.train(model, run.task, batches, lr, 0.1, eps, 3, clip), model
        return self._plain[key]


def launch(done: Done, runs: Sequence[Run], ranks: int) -> None:
    """Trains those of the runs that have so many ranks, one after the other in one process group."""
    configs = [str(done.config(run)) for run in runs if run.ranks == ranks]
    log = done.folder / f"{ranks}-ranks.log"
    run_group([MANY, *configs], ranks, log, {"SHARDTUNE_CACHE": str(done.folder / f"cache-{ranks}")}, LONGEST)
    done.logs[ranks] = log.read_text()


def launch_all(done: Done, runs: Sequence[Run]) -> None:
    """The runs of one rank and those of two, at the same time."""
    threads = [threading.Thread(target=launch, args=(done, runs, ranks)) for ranks in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
