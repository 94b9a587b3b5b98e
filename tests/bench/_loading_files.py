"""A model of random values, twice on the disk: as a folder of transformers, and as a checkpoint of two ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

RANKS = 2
LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
VOCABULARY = 32_000
LARGEST_FILE = 1 << 30


def values_of(index: int, shape: tuple[int, ...]) -> Tensor:
    """Of the model's parameter number `index`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(index))


def config_of(bytes_wanted: float) -> LlamaConfig:
    """A Llama with so many layers that its float32 parameters have about `bytes_wanted`."""
    hidden, inner = LAYER["hidden_size"], LAYER["intermediate_size"]
    layer = 4 * (4 * hidden**2 + 3 * hidden * inner)
    layers = max(1, round((bytes_wanted - 4 * 2 * VOCABULARY * hidden) / layer))
    return LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=False, **LAYER)


def tiny_config() -> LlamaConfig:
    """To warm up with."""
    return LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip


def write(folder: Path, config: LlamaConfig) -> tuple[dict[str, str], int]:
    """Both, on the disk; the settings that name them, and the bytes of the parameters."""
    model, checkpoints = folder / "model", folder / "checkpoints"
    model.mkdir(parents=True)
    with torch.device("meta"):
        shapes = [(n, tuple(p.shape)) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(str(model))
    _write_model(model, shapes)
    _write_checkpoint(checkpoints / "step-00000001", shapes)
    for file in _files(folder):  # what is not on the disk stays in the page cache
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    total = 4 * sum(torch.Size(shape).numel() for _, shape in shapes)
    return {"model": str(model), "checkpoints": str(checkpoints)}, total


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for file in _files(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _write_model(folder: Path, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for index, (name, shape) in enumerate(shapes):
        held[name] = values_of(index, shape)
        if index + 1 == len(shapes) or sum(value.nbytes for value in held.values()) > LARGEST_FILE:
            file = f"model-{index:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(held, file)
            held.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _write_checkpoint(folder: Path, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    """As ranks write it that have split every parameter along its first dimension."""
    folder.mkdir(parents=True)
    for rank in range(RANKS):
        held: dict[str, Tensor] = {}
        pieces: dict[str, Any] = {}
        for index, (name, shape) in enumerate(shapes):
            parts = values_of(index, shape).chunk(RANKS)
            if rank < len(parts):
                held[name] = parts[rank].reshape(-1).clone()
                pieces[name] = [sum(part.numel() for part in parts[:rank]), list(shape)]
        file = folder / f"rank-{rank:05}-of-{RANKS:05}.safetensors"
        save_file(held, file, metadata={"pieces": json.dumps(pieces)})
    (folder / "state.json").write_text(json.dumps({"step": 1, "ranks": RANKS, "tuning": {}}))
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        files[file.name] = {"size": file.stat().st_size, "sha256": digest}
    manifest = json.dumps({"format": 1, "step": 1, "files": files})
    (folder / "manifest.json").write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    (folder / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
