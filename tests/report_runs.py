"""Folders of runs, written as the program writes them, with chosen scores."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "the", "committee", "approved", "a", "new", "plan", "for", "railway", "stations", "after", "long", "talks", "about",
    "cost", "and", "noise", "while", "residents", "of", "nearby", "towns", "asked", "more", "trains", "night",
]  # fmt: skip


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_run(folder: Path, name: str = "news", steps: int = 300, gain: float = 0.13, seed: int = 0) -> Path:
    """A finished summary run: everything there. Returns its folder."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    config: dict[str, Any] = {
        "name": name, "runs": str(folder.parent), "seed": seed,
        "model": {"path": "google/flan-t5-base", "weights": "pretrained", "dtype": "bfloat16"},
        "task": {"kind": "seq2seq", "source": "document", "target": "summary", "max_source_tokens": 512},
        "data": {"train": "data/news.jsonl", "validation": None, "test": None, "batching": "packed"},
        "batch": {"examples": 64},
        "tuning": {"method": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "optimizer": {"name": "adamw", "lr": 1e-4 * (1 + seed), "schedule": "cosine", "warmup": 0.03},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(
        folder / "environment.json",
        {
            "command_line": ["/opt/venv/bin/shardtune", "train", "--config", "configs/news.yaml", f"seed={seed}"],
            "directory": "/home/someone/news", "ranks": 4, "strategy": "fsdp2", "devices": ["NVIDIA H100"] * 4,
            "python": "3.11.9", "platform": "Linux-6.1", "versions": {"shardtune": "0.1.0", "torch": "2.11.0"},
            "git_commit": "0123456789abcdef0123456789abcdef01234567", "seconds": 1234.5,
            "fused": {"lora": 96, "cross_entropy": 1, "norm": 62, "rope": "T5 has no rotary positions"},
        },
    )  # fmt: skip
    write_lines(folder / "metrics.jsonl", list(metrics(steps, gain, rng)))
    write_json(folder / "comparison.json", {s: comparison(s, steps, gain, rng) for s in ("validation", "test")})
    write_json(folder / "data.json", data())
    for split in ("validation", "test"):
        for variant in ("step-0", f"step-{steps}"):
            lines = predictions(variant, random.Random(f"{split}"), random.Random(f"{split}{variant}"))
            write_lines(folder / "predictions" / f"{variant}-{split}.jsonl", lines)
    (folder / "final").mkdir()
    return folder


def metrics(steps: int, gain: float, rng: random.Random) -> Any:
    """Lines of metrics.jsonl."""

    def judged(step: int, split: str) -> dict[str, Any]:
        done = 1 - math.exp(-3 * step / max(steps, 1))
        rouge = 0.21 + gain * done + rng.gauss(0, 0.003)
        loss = 3.1 - 1.2 * done + 0.3 * (step / max(steps, 1)) ** 3
        scores = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "rouge1": rouge + 0.08,
            "rouge2": rouge - 0.1,
            "rougeL": rouge,
        }
        return {"step": step, "split": split, **scores, "examples_per_second": 31.0}

    for split in ("validation", "test"):
        yield judged(0, split)
        yield {"step": 0, "split": split, "of": "lead", "rouge1": 0.3, "rouge2": 0.12, "rougeL": 0.24}
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        yield {
            "step": step, "epoch": step / 100, "loss": 3.2 - 1.6 * done + rng.gauss(0, 0.06),
            "lr": 1e-4 * min(step / 10, math.cos(step / steps * math.pi / 2)),
            "grad_norm": math.exp(rng.gauss(0.2, 0.5)), "energy_joules": 1400.0 * step,
            "examples": 64 * step, "tokens": 21_000 * step, "target_tokens": 2_100 * step, "padding_share": 0.02,
            "step_seconds": 0.84, "data_seconds": 0.002, "tokens_per_second": 25_000 + rng.gauss(0, 400),
            "peak_memory_bytes": 41_000_000_000,
        }  # fmt: skip
        if step % max(1, steps // 10) == 0:
            line = judged(step, "validation")
            line["train_loss"] = 3.2 - 1.6 * done
            if step == steps:
                line["parted_since"] = steps // 2
            yield line
    yield judged(steps, "test")


def comparison(split: str, steps: int, gain: float, rng: random.Random) -> dict[str, Any]:
    """A split of comparison.json."""
    tuned = f"step-{steps}"
    levels = {"step-0": 0.21, "shots-3": 0.24, "lead": 0.236, tuned: 0.21 + gain}

    def scores(level: float) -> dict[str, Any]:
        values = {
            "rouge1": level + 0.08,
            "rouge2": level - 0.1,
            "rougeL": level,
            "rougeLsum": level,
            "bleu": 60 * level,
        }
        return {name: {"value": v, "low": v * 0.94, "high": v * 1.06} for name, v in values.items()}

    def test(difference: float) -> dict[str, Any]:
        half = 0.02 if difference < 1 else 1.2
        p = 0.0004 if abs(difference) > half else 0.62
        return {"difference": difference, "low": difference - half, "high": difference + half, "p": p}

    names = list(scores(0.1))
    wins = 150 if gain > 0.02 else 70 if gain > -0.02 else 20
    ties = 15
    sign = 1 if gain > 0.02 else -1
    positions = rng.sample(range(200), 24)
    gains = sorted((rng.uniform(0.1, 0.6) for _ in range(12)), reverse=True)
    return {
        "examples": 200, "metric": "rougeL", "base": "step-0", "tuned": tuned, "step": steps,
        "lower_is_better": ["loss", "perplexity"],
        "variants": {name: scores(level) for name, level in levels.items()},
        "tests": {name: test(60 * gain if name == "bleu" else gain) for name in names},
        "wins": wins, "losses": 200 - wins - ties, "ties": ties,
        "differences": [{"position": p, "difference": d} for p, d in zip(positions, gains, strict=False)]
        + [{"position": p, "difference": -d} for p, d in zip(positions[12:], gains, strict=False)],
        "slices": [
            {
                "by": "length", "value": value, "examples": 50,
                "base": {"rougeL": 0.2}, "tuned": {"rougeL": 0.2 + sign * part},
            }
            for value, part in (("12–120", 0.12), ("121–300", 0.14), ("301–512", -0.02))
        ],
    }  # fmt: skip


def data() -> dict[str, Any]:
    """data.json."""

    def lengths(mean: int, most: int) -> dict[str, Any]:
        bars = [
            [low, low + most // 20 - 1, round(400 * math.exp(-(((low - mean) / (most / 4)) ** 2)))]
            for low in range(1, most, most // 20)
        ]
        return {"mean": float(mean), "median": float(mean), "p95": 0.9 * most, "max": most, "histogram": bars}

    def split(examples: int) -> dict[str, Any]:
        return {
            "examples": examples, "sources": {"data/news.jsonl": examples}, "source_tokens": lengths(240, 512),
            "target_tokens": lengths(30, 64), "truncated": {"source": examples // 8, "target": 3},
            "labels": {"politics": examples // 2, "sport": examples // 3, "weather": examples // 6}, "duplicates": 4,
        }  # fmt: skip

    return {
        "train": split(8000), "validation": split(1000), "test": split(1000),
        "overlap": {"train/validation": 3, "train/test": 0, "validation/test": 0}, "dropped": {"empty target": 17},
    }  # fmt: skip


def predictions(variant: str, rng: random.Random, own: random.Random) -> Any:
    """Lines of a predictions file."""
    for number in range(200):
        reference = rng.choices(WORDS, k=rng.randint(5, 14))
        source = " ".join(reference + rng.choices(WORDS, k=rng.randint(10, 220)))
        kept = 0.3 if variant == "step-0" else 0.75
        prediction = " ".join(word if own.random() < kept else own.choice(WORDS) for word in reference)
        yield {"source": f"{number}. {source}", "reference": " ".join(reference), "prediction": prediction}
