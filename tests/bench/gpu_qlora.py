"""A QLoRA step of an 8B-shaped model with random weights on one GPU, activations recomputed: one JSON line.

Beside a plain loop of transformers, peft and bitsandbytes on the same rows, each in a process of its own. Peak memory
is what the allocator handed out. Give --layers and --tokens to try it on a smaller machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from _sides import ROOT, WARM_UP, run, workplace
from _workload import PIECES
from transformers import LlamaConfig

from shardtune.data.docs import python_docs
from shardtune.model.tokenizer import load_tokenizer, train_tokenizer
from shardtune.run_folder import version

LIMIT = 12e9
"""Bytes of the card that a step of 2,048 tokens must fit."""
LIBRARIES = ["torch", "transformers", "peft", "bitsandbytes"]
SHAPE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step: one row")
    parser.add_argument("--steps", type=int, default=10, help="timed ones")
    parser.add_argument("--optimizer", default="paged_adamw_8bit", help="of our side")
    given = parser.parse_args()
    with workplace() as folder:
        rows = write_model_and_rows(folder, given.layers, given.tokens, given.steps + WARM_UP)
        variables = {**os.environ, "SHARDTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        ours = train_ours(folder, given.tokens, given.steps + WARM_UP, given.optimizer, variables)
        settings = {"model": str(folder / "model"), "rows": str(rows), "tokens": given.tokens, "rank": 16}
        script = [sys.executable, str(Path(__file__).with_name("_plain_qlora_peer.py")), json.dumps(settings)]
        done = subprocess.run(script, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        plain = json.loads(done.stdout.splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "benchmark": "gpu_qlora", "device": device, "layers": given.layers, "tokens_per_step": given.tokens,
        "ours": ours, "transformers_peft_bitsandbytes": plain,
        "ratio": ours["tokens_per_second"] / plain["tokens_per_second"],
        "target_peak_bytes": LIMIT, "met": ours["peak_bytes"] <= LIMIT,
        "versions": {name: version(name) for name in LIBRARIES}, "command": " ".join(sys.argv),
    }  # fmt: skip
    print(json.dumps(result))


def write_model_and_rows(folder: Path, layers: int, tokens: int, steps: int) -> Path:
    """The architecture with a tokenizer, and one text a step, each longer than a row."""
    texts = [pair.document for pair in python_docs()]
    train_tokenizer(texts, PIECES, "causal", folder / "model")
    tokenizer: Any = load_tokenizer(str(folder / "model"), "right", False)
    LlamaConfig(
        num_hidden_layers=layers, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, **SHAPE,
    ).save_pretrained(str(folder / "model"))  # fmt: skip
    ids = tokenizer("\n".join(texts), verbose=False)["input_ids"]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for step in range(steps):  # a few tokens more than a row holds: both sides cut
            part = ids[step * 2 * tokens : (step + 1) * 2 * tokens]
            file.write(json.dumps({"text": tokenizer.decode(part)}) + "\n")
    return path


def train_ours(folder: Path, tokens: int, steps: int, optimizer: str, variables: dict[str, str]) -> dict[str, float]:
    """The run that a user starts."""
    config = {
        "name": "ours", "runs": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "weights": "random", "recompute": "full"},
        "task": {"kind": "causal", "text": "text", "max_source_tokens": tokens},
        "data": {"train": str(folder / "rows.jsonl"), "shuffle": False, "splits": [1.0, 0.0, 0.0]},
        "batch": {"examples": 1, "micro_examples": 1},
        "tuning": {"method": "qlora"},
        "optimizer": {"name": optimizer},
        "duration": {"steps": steps},
        "evaluation": {"baseline": False},
        "tracking": {"tensorboard": False, "every": 1},
    }  # fmt: skip
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    run([sys.executable, "launch/train.py", "--config", str(path)], variables)
    text = (folder / "runs" / "ours" / "metrics.jsonl").read_text(encoding="utf-8")
    timed = [json.loads(line) for line in text.splitlines()][WARM_UP:]
    seconds = sum(line["step_seconds"] for line in timed)
    return {
        "tokens_per_second": tokens * len(timed) / seconds,
        "peak_bytes": max(line["peak_memory_bytes"] for line in timed),
        "last_loss": timed[-1]["loss"],
    }


if __name__ == "__main__":
    main()
