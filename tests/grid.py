"""The grid of layouts, for a T5 and a Llama of two layers: every run of it is the same run.

    python tests/grid.py            {1, 2, 3 ranks} x {1, 3, 12 micro-batches, one for each example}
                                    x {padded, grouped, packed} x {ddp, fsdp2, zero1, zero2, zero3}, 10 steps
    python tests/grid.py --sample   a part of it, spread over all of these

A step has 12 examples, which do not always divide; the last one of an epoch has a single one, so that ranks get none.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import plain
import tiny
from forked import MANY, run_group
from layouts import ARCHITECTURES
from shardtune.assemble import layouts

ROWS = 49
PROGRAM = str(Path(sys.executable).parent / "shardtune")
WHOLE = "--ranks 1,2,3 --strategies ddp,fsdp2,zero1,zero2,zero3 --micro-batches 1,3,12,each"
SAMPLES = {
    "t5": ["--ranks 1,3 --strategies ddp,fsdp2 --micro-batches 3",
           "--ranks 2 --strategies zero1,zero3 --micro-batches 1 --batchings packed"],
    "llama": ["--ranks 1,2 --strategies fsdp2,zero2 --micro-batches 3 --batchings grouped,packed"],
}  # fmt: skip


def config_of(folder: Path, model: str, seed: int, **options: Any) -> Path:
    """A config over ragged texts, and the model it begins from."""
    plain.make_model(folder / "model", ARCHITECTURES[model], seed, torch.float32)
    task = plain.task_of(ARCHITECTURES[model]["model_type"])
    limits = {"max_source_tokens": plain.SOURCE_LIMIT, "max_target_tokens": plain.TARGET_LIMIT}
    data = tiny.write_rows(folder / "rows.jsonl", tiny.rows(ROWS, seed))
    options = {
        "model__path": str(folder / "model"),
        "model__weights": "pretrained",
        "model__tokenizer": None,
        "task": {**tiny.TASKS[task], **limits},
        "data": {"train": str(data), "splits": [1.0, 0.0, 0.0]},
        "optimizer__lr": 3e-3,
        **options,
    }
    return tiny.tiny_config(folder, model.split("-")[0], **options)


def verify(config: Path, options: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`shardtune verify-layout`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [PROGRAM, "verify-layout", "--config", str(config), *options.split()]
    return subprocess.run(command, env=environment, text=True, check=False, **settings)


@contextmanager
def forked_ranks(folder: Path) -> Iterator[None]:
    """Within it, the ranks of layouts that this process verifies are forked, see forked.py; as processes started with
    `shardtune verify-layout` they would import everything for seconds."""

    def spawn(command: Sequence[str], ranks: int, *_: Any) -> int:
        log = folder / f"{ranks}-ranks.log"
        assert command[:3] == [sys.executable, "-m", "shardtune.assemble.many"]
        code = run_group([MANY, *command[3:]], ranks, log)
        print(log.read_text(encoding="utf-8"), file=sys.stderr)
        return code

    with mock.patch.object(layouts, "spawn", spawn):
        yield


def main() -> int:
    failed = 0
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    for model, samples in SAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(Path(folder), model, seed)
            for options in samples if "--sample" in sys.argv else [WHOLE]:
                print(f"{model}, seed {seed}: {options}", flush=True)
                failed |= verify(config, options).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
