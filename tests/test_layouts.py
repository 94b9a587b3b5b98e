"""The same run on any layout: strategies, ranks, micro-batches and batching decide only how a step is computed.

All runs happen before the first test, in two process groups: one of one rank, one of two.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plain
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.timeout(1200)  # the runs count towards the first test

STEPS = 20
SHARDED = ["fsdp2", "zero1", "zero2", "zero3"]
TWO_RANKS = ["ddp", *SHARDED]
EXAMPLES = {"t5": 49, "llama": 53}
"""A last step of one example leaves a rank without any; one of five does not divide into micro-batches."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **tiny.ARCHITECTURES,
    "t5-untied": {**tiny.ARCHITECTURES["t5"], "tie_word_embeddings": False},
    "llama-tied": {**tiny.ARCHITECTURES["llama"], "tie_word_embeddings": True},
}
CLIPPED = 1.0
"""Well below the gradient norms of these models."""


class Run(NamedTuple):
    """A group's runs differ in their layout only."""

    group: str
    model: str
    strategy: str
    ranks: int
    accumulation: int = 2
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        batching = self.options.get("data__batching", "padded")
        return f"{self.group}-{self.strategy}-{self.ranks}ranks-{self.accumulation}micro-{batching}"


def layouts(group: str, model: str, ranks: tuple[int, ...] = (2,), **options: Any) -> list[Run]:
    """The group on one process and under every strategy, with two micro-batches."""
    runs = [Run(group, model, "single", 1, options=options)]
    return runs + [Run(group, model, kind, count, options=options) for kind in TWO_RANKS for count in ranks]


def matrix(model: str, batchings: list[str], **options: Any) -> list[Run]:
    """Every strategy on one and two ranks with 1, 2 and 8 micro-batches."""
    kinds = [("single", 1), *((kind, ranks) for kind in TWO_RANKS for ranks in (1, 2))]
    return [
        Run(model, model, kind, ranks, accumulation, {**options, "data__batching": batching})
        for accumulation, batching in zip((1, 2, 8), batchings, strict=True)
        for kind, ranks in kinds
    ]


MATRIX = [
    *matrix("t5", ["padded", "grouped", "padded"], optimizer__max_grad_norm=CLIPPED),
    *matrix("llama", ["grouped", "padded", "grouped"], optimizer__max_grad_norm=None),
]
SHUFFLED = layouts("shuffled", "t5", data__shuffle=True)
LORA = layouts("lora", "llama", tuning={"method": "lora", "rank": 1, "alpha": 4})
LORA_T5 = [run for run in layouts("lora-t5", "t5", tuning={"method": "lora", "rank": 3}) if run.strategy != "zero1"]
FROZEN = layouts("frozen", "t5", tuning={"method": "freeze", "layers": 1, "embeddings": True})
OTHERS = [
    Run(model, model, kind, ranks, options={"optimizer__eps": 1e-4})  # the keys' biases have gradients of pure noise
    for model in ("t5-untied", "llama-tied", "bart", "gpt2", "bert")
    for kind, ranks in (("single", 1), ("fsdp2", 2), ("zero3", 2))
]
UNTRAINED = [
    *layouts("drawn", "t5", (1, 2), duration__steps=0, model__weights="random"),
    *layouts("drawn-gpt2", "gpt2", duration__steps=0, model__weights="random"),
    *layouts("kept", "t5", duration__steps=0),
    *layouts("kept-in-bf16", "t5", (1, 2), duration__steps=0, model__dtype="bfloat16"),
    *layouts("kept-bf16", "t5-bf16", duration__steps=0, model__dtype="bfloat16"),
    *layouts("kept-llama", "llama-tied", duration__steps=0, model__dtype="bfloat16"),
]
ROUNDED = [
    *layouts("t5-in-bf16", "t5", model__dtype="bfloat16"),
    *layouts("llama-in-bf16", "llama", model__dtype="bfloat16"),
]
RUNS = [*MATRIX, *SHUFFLED, *LORA, *LORA_T5, *FROZEN, *OTHERS, *UNTRAINED, *ROUNDED]
FULL = [*MATRIX, *SHUFFLED, *FROZEN, *OTHERS]


def by_name(runs: list[Run]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", runs, ids=lambda run: run.name)


class Done:
    """The runs' folders."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.logs: dict[int, str] = {}
        self._plain: dict[str, tuple[list[plain.Step], torch.nn.Module]] = {}

    def model(self, name: str) -> Path:
        """The folder that a run begins from; made when first asked for."""
        folder = self.folder / "models" / name
        if not folder.exists():
            dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
            plain.make_model(folder, ARCHITECTURES[name.removesuffix("-bf16")], self.seed, dtype)
        return folder

    def config(self, run: Run) -> Path:
        task = plain.task_of(ARCHITECTURES[run.model.removesuffix("-bf16")]["model_type"])
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        options: dict[str, Any] = {
            "name": run.name,
            "runs": str(self.folder / "runs"),
            "seed": self.seed % 1000,
            "model__path": str(self.model(run.model)),
            "model__weights": "pretrained",
            "model__tokenizer": None,
            "task": {**tiny.TASKS[task], **limits},
            "data__train": str(self.folder / f"{examples(run)}.jsonl"),
            "data__validation": str(self.folder / "validation.jsonl"),
            "data__shuffle": False,
            "batch": {"examples": 16, "micro_examples": 16 // run.ranks // run.accumulation},
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

    def final(self, run: Run, file: str = "model.safetensors") -> dict[str, Tensor]:
        return load_file(self.path(run) / "final" / file)

    def plain_loop(self, run: Run) -> tuple[list[plain.Step], torch.nn.Module]:
        """What a plain loop makes of the run's examples, and the model after it."""
        options = run.options
        key = f"{run.model} {options.get('optimizer__max_grad_norm')} {options.get('optimizer__eps')}"
        if key not in self._plain:
            folder = self.model(run.model)
            task = plain.task_of(ARCHITECTURES[run.model]["model_type"])
            model = plain.AUTO[task].from_pretrained(folder)
            tokenizer = plain.load_tokenizer(folder)
            rows, batches = plain.read_rows(self.folder / f"{examples(run)}.jsonl"), []
            while len(batches) < STEPS:
                batches += [
                    (task, plain.batch_of(tokenizer, task, rows[start : start + 16])) for start in range(0, len(rows), 16)
                ]
            clip = options.get("optimizer__max_grad_norm", 1.0)
            eps = options.get("optimizer__eps", 1e-8)
            self._plain[key] = plain.train(model, batches[:STEPS], 1e-3, 0.1, eps, 3, clip), model
        return self._plain[key]


def examples(run: Run) -> int:
    return EXAMPLES.get(run.model.split("-")[0], 49)


def launch(done: Done, ranks: int) -> None:
    """Trains the runs of so many ranks, one after the other."""
    configs = [str(done.config(run)) for run in RUNS if run.ranks == ranks]
    script = str(Path(__file__).parent / "ranks" / "train_many.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    variables = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SHARDTUNE_CACHE": str(done.folder / f"cache-{ranks}"),
        "OMP_NUM_THREADS": "1",
    }
    log = done.folder / f"{ranks}-ranks.log"
    with log.open("w") as out:
        command = [sys.executable, *(torchrun if ranks > 1 else []), script, *configs]
        subprocess.run(command, env={**os.environ, **variables}, stdout=out, stderr=out, timeout=1000)
    done.logs[ranks] = log.read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"seed {seed}")
    done = Done(tmp_path_factory.mktemp("layouts"), seed)
    for count in {*EXAMPLES.values()}:
        tiny.write_rows(done.folder / f"{count}.jsonl", tiny.rows(count, seed + count))
    tiny.write_rows(done.folder / "validation.jsonl", tiny.rows(9, seed + 1))
    for run in RUNS:
        done.model(run.model)
    threads = [threading.Thread(target=launch, args=(done, ranks)) for ranks in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield done
