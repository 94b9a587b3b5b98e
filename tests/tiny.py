"""Runs that take seconds: models of a few layers with random weights, and data made from a seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "bird", "runs", "sleeps",
    "sings", "over", "under", "near", "the", "a", "one", "two",
]  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 400, "d_model": 32,
        "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": True,
    },
    "bart": {
        "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 400, "d_model": 32,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0, "max_position_embeddings": 128,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 400, "n_embd": 32, "n_layer": 2,
        "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "bert": {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 400, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip

TASKS: dict[str, dict[str, Any]] = {
    "seq2seq": {
        "kind": "seq2seq", "source": "text", "target": "summary", "max_source_tokens": 48, "max_target_tokens": 16,
    },
    "causal": {
        "kind": "causal", "source": "text", "target": "summary", "max_source_tokens": 48, "max_target_tokens": 16,
    },
    "classification": {"kind": "classification", "text": "text", "label": "label", "max_source_tokens": 48},
    "token_classification": {"kind": "token_classification", "labels": "tags", "max_source_tokens": 24},
    "question_answering": {"kind": "question_answering", "max_source_tokens": 24},
}  # fmt: skip


MEASURED = ("_seconds", "_per_second", "_bytes", "slowest_rank", "mfu", "energy_joules")
"""Parts of the names of figures that differ between runs that are the same."""


def lasting(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what was measured."""
    return {key: value for key, value in line.items() if not any(part in key for part in MEASURED)}


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Ragged texts with a summary (their longest words) and a label."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 30))
        longest = sorted(set(words), key=lambda word: (-len(word), word))[: rng.randint(1, 5)]
        made.append({"text": " ".join(words), "summary": " ".join(longest), "label": "pet" if "cat" in words else "no"})
    return made


def tagged(made: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same texts as words: animals are named, and what they do belongs to the name."""
    animals, deeds = ("cat", "dog", "bird"), ("runs", "sleeps", "sings")

    def tag(words: list[str], place: int) -> str:
        if words[place] in animals:
            return "B-PET"
        return "I-PET" if place and words[place] in deeds and words[place - 1] in animals else "O"

    texts = [row["text"].split() for row in made]
    return [{"tokens": words, "tags": [tag(words, place) for place in range(len(words))]} for words in texts]


def questions(made: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Which animal comes first in the text, and what comes after it; in texts without animals nothing does."""
    rows = []
    for row in made:
        found = re.search(r"\b(?:cat|dog|bird)\b(?: \w+)?", row["text"])
        answers = {"text": [found[0]], "answer_start": [found.start()]} if found else {"text": [], "answer_start": []}
        rows.append({"question": "the first one", "context": row["text"], "answers": answers})
    return rows


MADE: dict[str, Callable[[list[dict[str, str]]], list[dict[str, Any]]]] = {
    "token_classification": tagged,
    "question_answering": questions,
}
"""What the rows of a task are made of."""


def write_rows(path: Path, made: Sequence[Mapping[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def tiny_config(folder: Path, model: str = "t5", **overrides: Any) -> Path:
    """Writes config, model folder and data to `folder`; `overrides` replace keys, dots written as two underscores.

    Returns the config's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = folder / model
    architecture.mkdir(exist_ok=True)
    (architecture / "config.json").write_text(json.dumps(ARCHITECTURES[model]))
    usual = {"t5": "seq2seq", "bart": "seq2seq", "bert": "classification"}.get(model, "causal")
    task = overrides.get("task", TASKS[usual])
    make = MADE.get(task["kind"], list)
    config: dict[str, Any] = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "model": {"path": str(architecture), "weights": "random", "tokenizer": "train:400", "dtype": "float32"},
        "task": dict(task),
        "data": {
            "train": str(write_rows(folder / "train.jsonl", make(rows(60, seed=1)))),
            "validation": str(write_rows(folder / "validation.jsonl", make(rows(7, seed=2)))),
        },
        "batch": {"examples": 12, "micro_examples": 4},
        "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 0},
        "duration": {"steps": 4},
        "evaluation": {"examples": 5, "max_new_tokens": 6, "baseline": False},
        "tracking": {"tensorboard": False, "every": 1},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
