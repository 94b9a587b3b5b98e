"""Writes checkpoints with the libraries' own functions: safetensors for the tensors, hashlib for the manifest."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def random_tensors(rng: random.Random, parameters: int = 4) -> dict[str, Tensor]:
    """Of each parameter its value, two tensors of its shape, a number, and one of another shape, by their keys."""
    made = {}
    for index in range(parameters):
        name = f"layers.{index}.weight"
        shape = [rng.choice([0, 1, 1, 2, 3, 7, 13]) for _ in range(rng.randint(1, 3))]
        for what in ("", "#exp_avg", "#exp_avg_sq"):
            made[name + what] = random_tensor(shape, rng.choice(DTYPES))
        made[name + "#step"] = random_tensor([], rng.choice([torch.float32, torch.int64]))
        made[name + "#rows"] = random_tensor([rng.randint(1, 9)], torch.float32)
    return made


def random_tensor(shape: list[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, shape).to(dtype)


def split(tensors: Mapping[str, Tensor], ranks: int, rng: random.Random) -> list[dict[str, tuple[int, Tensor]]]:
    """What each rank writes, as (start, flat values): every tensor cut at random places, its parts dealt at random."""
    shares: list[dict[str, tuple[int, Tensor]]] = [{} for _ in range(ranks)]
    for key, tensor in tensors.items():
        total, cuts = tensor.numel(), rng.randint(0, ranks - 1)
        bounds = [0, *sorted(rng.randint(0, total) for _ in range(cuts)), total]
        owners = rng.sample(range(ranks), len(bounds) - 1)
        for owner, low, high in zip(owners, bounds, bounds[1:], strict=False):
            shares[owner][key] = (low, tensor.reshape(-1)[low:high].clone())
    return shares


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], ranks: int = 2, seed: int = 0, **state: object
) -> Path:
    """A whole checkpoint `folder`/step-…, of which it returns the path; `state`: more of state.json."""
    path = folder / f"step-{step:08}"
    path.mkdir(parents=True)
    for rank, share in enumerate(split(tensors, ranks, random.Random(seed))):
        pieces = {key: [start, list(tensors[key].shape)] for key, (start, _) in share.items()}
        save_file(
            {key: values for key, (_, values) in share.items()},
            path / f"rank-{rank:05}-of-{ranks:05}.safetensors",
            metadata={"pieces": json.dumps(pieces)},
        )
    (path / "state.json").write_text(json.dumps({"step": step, "ranks": ranks, "tuning": {}, **state}))
    (path / "config.yaml").write_text(f"name: step {step}\n")
    return seal(path)


def seal(path: Path) -> Path:
    """Writes the manifest of what is in a folder; of what a hostile hand has put there too."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(path.iterdir())
        if file.name not in ("manifest.json", "manifest.json.sha256")
    }
    return seal_with(path, json.dumps({"format": 1, "step": int(path.name.split("-")[1]), "files": files}))


def seal_with(path: Path, manifest: str) -> Path:
    """A manifest of any text, with its hash."""
    (path / "manifest.json").write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    (path / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
    return path


def flip_bit(file: Path, bit: int) -> None:
    """Of byte bit // 8."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def flips(path: Path, count: int, rng: random.Random) -> Iterator[tuple[Path, int]]:
    """So many bits of a checkpoint's files, every file in turn."""
    files = sorted(path.iterdir())
    for index in range(count):
        file = files[index % len(files)]
        yield file, rng.randrange(file.stat().st_size * 8)
