"""Short runs of adapter methods on small models, and what PEFT makes of their results."""

from __future__ import annotations

import json
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
from forked import run_group
from layouts import ARCHITECTURES

ROWS = 32
STEPS = 6
EPOCH = 2
"""Steps; the rows are not shuffled, so a step has the same examples as the one so many before it. A classifier sees all
rows in each: halves have other shares of the two classes, and what is learned of one can be unlearned on the other."""
LR = 1e-2
SPLIT = str(Path(__file__).parent / "ranks" / "split_everything.py")


class Run(NamedTuple):
    method: str
    model: str
    strategy: str
    label: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    """Keys of the config, dots written as two underscores."""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.method, self.model, self.strategy, self.label) if part)

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else 2

    @property
    def task(self) -> str:
        return plain.task_of(ARCHITECTURES[self.model]["model_type"])

    @property
    def epoch(self) -> int:
        """Steps."""
        return 1 if self.task == "classification" else EPOCH

    @property
    def lr(self) -> float:
        """Lower for a classifier: two classes can be near the least loss from the start, and large steps go past it."""
        return 3e-3 if self.task == "classification" else LR


class Runs:
    """Folders of runs, all from the same models and examples."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self._logs: dict[int, str] = {}
        self.rows = tiny.write_rows(folder / "rows.jsonl", tiny.rows(ROWS, seed))
        self.judged = tiny.write_rows(folder / "validation.jsonl", tiny.rows(5, seed + 1))

    def train(self, runs: Sequence[Run]) -> None:
        """Those of one rank and those of two at the same time, each in one process group."""
        for model in dict.fromkeys(run.model for run in runs):
            plain.make_model(self.folder / model, ARCHITECTURES[model], self.seed)
        threads = [threading.Thread(target=self._launch, args=(runs, ranks)) for ranks in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _launch(self, runs: Sequence[Run], ranks: int) -> None:
        configs = [str(self._config(run)) for run in runs if run.ranks == ranks]
        if configs:
            log = self.folder / f"{ranks}-ranks.log"
            run_group([SPLIT, *configs], ranks, log, {"SHARDTUNE_CACHE": str(self.folder / f"cache-{ranks}")})
            self._logs[ranks] = log.read_text()

    def _config(self, run: Run) -> Path:
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if run.task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        options: dict[str, Any] = {
            "name": run.name,
            "runs": str(self.folder / "runs"),
            "model__path": str(self.folder / run.model),
            "model__weights": "pretrained",
            "model__tokenizer": None,
            "task": {**tiny.TASKS[run.task], **limits},
            "data__train": str(self.rows),
            "data__validation": str(self.judged),
            "data__shuffle": False,
            "batch": {"examples": ROWS // run.epoch, "micro_examples": 5},
            "optimizer": {"lr": run.lr, "eps": 1e-4, "schedule": "constant", "warmup": 0},
            "duration__steps": STEPS,
            "strategy__kind": run.strategy,
            "tuning": {"method": run.method},
            **dict(run.options),
        }
        return tiny.tiny_config(self.folder / "configs" / run.name, "t5", **options)

    def path(self, run: Run) -> Path:
        """The run's folder. Fails the test where the run did not come to its end."""
        folder = self.folder / "runs" / run.name
        if not (folder / "final").is_dir():
            log = folder.with_suffix(".log")
            pytest.fail(f"{run.name} did not finish; seed {self.seed}\n{self._logs[run.ranks][-4000:]}\n"
                        f"{log.read_text()[-2000:] if log.exists() else ''}")  # fmt: skip
        return folder

    def lines(self, run: Run, key: str) -> list[dict[str, Any]]:
        """The lines of the metrics that have `key`."""
        lines = [json.loads(line) for line in (self.path(run) / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if key in line]

    def adapter(self, run: Run) -> dict[str, Tensor]:
        return load_file(self.path(run) / "final" / "adapter_model.safetensors")

    def load(self, run: Run, trainable: bool = False) -> Any:
        """The result on its base, as PEFT loads it; nothing may be missing or left over."""
        base = plain.AUTO[run.task].from_pretrained(self.folder / run.model)
        return PeftModel.from_pretrained(base, str(self.path(run) / "final"), is_trainable=trainable)

    def batches(self, run: Run) -> list[dict[str, Tensor]]:
        """The epoch's steps as a plain loop has them."""
        tokenizer, rows = plain.load_tokenizer(self.folder / run.model), plain.read_rows(self.rows)
        size = ROWS // run.epoch
        return [plain.batch_of(tokenizer, run.task, rows[at : at + size]) for at in range(0, ROWS, size)]

    def assert_learned(self, run: Run) -> None:
        """The loss of the last epoch is below that of the first."""
        losses = [line["loss"] for line in self.lines(run, "grad_norm")]
        least = 0.0 if run.model == "bert" else 0.01  # two classes leave little to learn in so few steps
        assert sum(losses[-run.epoch :]) < sum(losses[: run.epoch]) - least, f"{losses}; seed {self.seed}"

    def assert_same_adapter(self, run: Run, other: Run, limit: float) -> None:
        got, wanted = self.adapter(run), self.adapter(other)
        assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in wanted.items()}
        far = max(float((got[name] - wanted[name]).abs().max()) for name in wanted if wanted[name].numel())
        assert far <= limit, f"{run.name} differs from {other.name} by {far}; seed {self.seed}"

    def assert_loads(self, run: Run) -> None:
        """PEFT alone gets the run's last evaluation: its loss and every prediction."""
        model, tokenizer = self.load(run), plain.load_tokenizer(self.folder / run.model)
        rows = plain.read_rows(self.judged)
        # By the transformers model inside: around it, PEFT's AdaLoRA fails on labels where it is not trained.
        inner = model.base_model.model
        loss = plain.evaluation_loss(inner, run.task, plain.batch_of(tokenizer, run.task, rows))
        assert loss == pytest.approx(self.lines(run, "split")[-1]["loss"], rel=1e-5), f"seed {self.seed}"
        written = plain.read_rows(self.path(run) / "predictions" / f"step-{STEPS}-validation.jsonl")
        said = [plain.predict(model, tokenizer, run.task, row) for row in rows]
        assert [line["prediction"] for line in written] == said, f"seed {self.seed}"


def threads_of_one() -> int:
    """More threads only wait for each other on models this small; returns what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before
