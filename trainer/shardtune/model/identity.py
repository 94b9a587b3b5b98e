"""Whether two folders hold the same model, told without reading all of them."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from transformers.utils.hub import cached_file

from shardtune.errors import ConfigError
from shardtune.model.safetensors_files import open_files
from shardtune.model.skeleton import weights_folder
from shardtune.model.weights import find_files

SAMPLE = 1024
"""Elements in the middle of each tensor that are looked at."""


def identity_of(path: str, pretrained: bool) -> str:
    """SHA-256, in hex, of a model's `config.json` and, if `pretrained`, of each tensor of its files: name, dtype, shape
    and a sample from its middle.

    The same for copies in other folders and in other shards. Weights that were trained further differ; a change of a
    few rows of a tensor may not be noticed. Raises ConfigError where there is no such model, or a file is damaged.
    """
    digest = hashlib.sha256()
    if not pretrained:
        digest.update(_architecture(path).read_bytes())
        return digest.hexdigest()
    folder = weights_folder(path)
    digest.update((folder / "config.json").read_bytes())
    for name, entry in sorted(open_files(find_files(folder)).items()):
        digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode())
        elements = math.prod(entry.shape)
        start = max(0, (elements - SAMPLE) // 2)
        sample = entry.read(start, min(start + SAMPLE, elements))
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _architecture(path: str) -> Path:
    try:
        return Path(str(cached_file(path, "config.json")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path}: {str(error).strip().splitlines()[0]}") from None
