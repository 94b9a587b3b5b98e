"""What ours and the peers train on: the same texts, tokenizer and initial weights, written out once a benchmark."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which transformers imports, prints that it chose this

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, logging

from shardtune.data.docs import python_docs
from shardtune.model.tokenizer import train_tokenizer

logging.disable_progress_bar()

PIECES = 8000
MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS = 512, 64


class Workload(NamedTuple):
    """Files that both sides read."""

    pairs: Path
    """A .jsonl of documents and summaries: ragged real text."""
    model: Path
    """A folder with randomly initialized weights and the tokenizer, as transformers loads it."""
    examples: int


def seq2seq(folder: Path, every: int = 1, width: int = 256, layers: int = 4) -> Workload:
    """Documents and summaries, one of `every`, and a T5 of `layers` + `layers` layers."""
    pairs = [(pair.document, pair.summary) for pair in python_docs()[::every]]
    model = folder / "model"
    train_tokenizer((text for pair in pairs for text in pair), PIECES, "seq2seq", model)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=4 * width, num_heads=4, num_layers=layers,
            num_decoder_layers=layers, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(str(model))  # fmt: skip
    return Workload(_write(folder / "pairs.jsonl", pairs), model, len(pairs))


def causal(folder: Path, every: int = 3) -> Workload:
    """The same texts, one of `every`, as prompts and completions, and a Llama of 4 layers.

    Prompts are cut here, as a peer may cut prompt and completion together, and each side would train on other tokens.
    """
    pairs = [(pair.document, "\n" + pair.summary) for pair in python_docs()[::every]]
    model = folder / "model"
    train_tokenizer((text for pair in pairs for text in pair), PIECES, "causal", model)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    ).save_pretrained(str(model))  # fmt: skip
    offsets = tokenizer([source for source, _ in pairs], return_offsets_mapping=True, verbose=False)["offset_mapping"]
    # A few tokens below the limit: the cut end of a text may be tokenized anew into more of them.
    last = MAX_SOURCE_TOKENS - 4
    cut = [
        (source if len(spans) <= last else source[: spans[last - 1][1]], target)
        for (source, target), spans in zip(pairs, offsets, strict=True)
    ]
    return Workload(_write(folder / "pairs.jsonl", cut), model, len(cut))


def _write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for source, target in pairs:
            file.write(json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n")
    return path
