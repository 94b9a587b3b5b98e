"""Whole runs with Triton's kernels, in the interpreter, beside runs without: the same losses under every strategy.

SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import run_many
import tiny
from launching import command, run

pytestmark = pytest.mark.timeout(900)
LONG = os.environ.get("SHARDTUNE_TEST_ALL") == "1"
STEPS = {
    "single": {"lora": 20, "qlora": 5} if LONG else {"lora": 8, "qlora": 2},
    **{kind: {"lora": 2, "qlora": 2} for kind in ("ddp", "fsdp2", "zero3")},
}
"""Alone, in the long form, as long as the losses of a small model need to be far from where they began."""
# Rows of whole blocks of 64 for weights in four bits; smooth activations, as rounding decides near a kink.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": {
        **tiny.ARCHITECTURES["t5"], "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 1,
        "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "llama": {
        **tiny.ARCHITECTURES["llama"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    },
}  # fmt: skip
TASKS = {"t5": "seq2seq", "llama": "causal"}
TUNINGS = {
    "lora": {"method": "lora", "rank": 3, "alpha": 6, "dropout": 0.0},
    "qlora": {"method": "qlora", "rank": 3, "alpha": 6, "dropout": 0.0},
}
CASES = [(model, tuning, kind) for model in ARCHITECTURES for tuning in TUNINGS for kind in STEPS]
FUSED = {
    "t5": {"lora", "norm", "mlp", "attention", "cross_entropy"},
    "llama": {"lora", "norm", "mlp", "rope", "cross_entropy"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, and for each model and method a run without fused operations."""
    made = tmp_path_factory.mktemp("fused")
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print("seed", seed)

    def config(model: str, tuning: str, kind: str, fused: str) -> Path:
        architecture = made / model
        architecture.mkdir(exist_ok=True)
        (architecture / "config.json").write_text(json.dumps(ARCHITECTURES[model]))
        packed = (len(model) + len(tuning) + len(kind)) % 2 == 0  # some of them padded, some packed
        return run_many.config(
            made, f"{model}-{tuning}-{kind}-{fused}", architecture, TASKS[model], seed=seed,
            task__max_source_tokens=12, task__max_target_tokens=5,
            model__weights="random", model__tokenizer="train:400", data__validation=None, data__splits=[1.0, 0.0, 0.0],
            data__batching="packed" if packed else "padded", batch={"examples": 4, "micro_examples": 2},
            tuning=TUNINGS[tuning], strategy__kind=kind, duration__steps=STEPS[kind][tuning], kernels__fused=fused,
            checkpoint={"every": 1000}, optimizer__lr=3e-3, optimizer__eps=1e-4, optimizer__schedule="constant",
        )  # fmt: skip

    off = [config(model, tuning, "single", "off") for model in ARCHITECTURES for tuning in TUNINGS]
    run_many.train(made, off, 1)
    for ranks in (1, 2):
        fused = [config(*case, "auto") for case in CASES if (case[2] == "single") == (ranks == 1)]
        run_many.train(made, fused, ranks, TRITON_INTERPRET="1")
    return made


@pytest.mark.parametrize(("model", "tuning", "kind"), CASES)
def test_fused_runs_have_the_same_losses(folder: Path, model: str, tuning: str, kind: str) -> None:
    plain, _ = run_many.metrics(folder / "runs" / f"{model}-{tuning}-single-off")
    fused, _ = run_many.metrics(folder / "runs" / f"{model}-{tuning}-{kind}-auto")
    assert len(fused) == STEPS[kind][tuning]
    for one, other in zip(plain, fused, strict=False):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), (one["step"], plain[0], fused[0])
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("model", "tuning"), [(model, tuning) for model in ARCHITECTURES for tuning in TUNINGS])
def test_auto_fuses_all_that_fits_and_tells(folder: Path, model: str, tuning: str) -> None:
    said = json.loads((folder / "runs" / f"{model}-{tuning}-single-auto" / "environment.json").read_text())["fused"]
    assert {name for name, count in said.items() if isinstance(count, int)} >= FUSED[model]
    assert all(isinstance(reason, int) or len(reason) > 5 for reason in said.values())
    plain = json.loads((folder / "runs" / f"{model}-{tuning}-single-off" / "environment.json").read_text())["fused"]
    assert set(plain.values()) == {"kernels.fused: off"}


def test_names_can_be_listed_and_are_said(tmp_path: Path) -> None:
    path = tiny.tiny_config(tmp_path, "llama", tuning={"method": "lora"}, kernels__fused=["norm"], duration__steps=1)
    done = run(command("python", 1, "--config", path), tmp_path / "cache")
    assert done.code == 0, done.said
    assert "fused: norm in 5 (not lora, " in done.out + done.err, done.said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("kernels.fused=[lora,norms]", "did you mean norm"),
        ("model.attention=fused", "model.attention: fused is for models with T5's relative positions"),
    ],
)
def test_what_cannot_be_fused_is_refused(tmp_path: Path, wrong: str, said: str) -> None:
    path = tiny.tiny_config(tmp_path, "llama", tuning={"method": "lora"})
    done = run(command("python", 1, "--config", path, wrong), tmp_path / "cache")
    assert done.code == 2, done.said
    assert said in done.out + done.err, done.said
