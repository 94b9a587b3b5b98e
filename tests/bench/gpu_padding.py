"""From a list of ragged rows on the host to what a model reads on the GPU, padded and packed: one JSON line.

Ours copies the flat stream once and lays it out with one launch. Beside it what is usual: rows padded (or joined) by
numpy on the host and every tensor copied; and torch.nn.utils.rnn.pad_sequence. `whole` is from the list on;
`to_device` leaves out what the host makes ready in pinned memory, as a loader does ahead of time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED, FILL = -100, 3
Row = NDArray[np.int32]


class Side(NamedTuple):
    """`ready` on the host, then `to_device`: ids, labels and mask, or packed: ids, labels and positions."""

    ready: Callable[[list[Row]], Any]
    to_device: Callable[[Any], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="to try it out on a CPU, in Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a row; the median has an eighth")
    given = parser.parse_args()
    if given.small:
        os.environ["TRITON_INTERPRET"] = "1"
        given.rounds, given.longest = 2, 48
    elif not torch.cuda.is_available():
        raise SystemExit("gpu_padding: no GPU; --small tries it out on a CPU")
    device = torch.device("cpu" if given.small else "cuda")
    cases = []
    for rows in (3, 64) if given.small else (64, 256, 1024, 4096):
        ragged = random_rows(rows, given.longest)
        for packed in (False, True):
            sides = sides_for(device, packed)
            check(sides, ragged)
            times = in_turn(sides, ragged, device, given.rounds)
            cases.append({
                "rows": rows, "tokens": sum(map(len, ragged)), "width": max(map(len, ragged)),
                "layout": "packed" if packed else "padded", "microseconds": times,
                "ratio": {
                    peer: {part: round(times[peer][part] / times["ours"][part], 3) for part in times[peer]}
                    for peer in times if peer != "ours"
                },
            })  # fmt: skip
    print(json.dumps({
        "benchmark": "gpu_padding", "device": "CPU (interpreter)" if given.small else torch.cuda.get_device_name(),
        "rounds": given.rounds, "cases": cases, "target": None, "met": None,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in ("torch", "triton")}},
        "command": " ".join(sys.argv),
    }))  # fmt: skip


def random_rows(rows: int, longest: int) -> list[Row]:
    """Lengths as of real text: lognormal, with a long tail that is cut."""
    rng = np.random.default_rng(rows)
    lengths = np.clip(rng.lognormal(np.log(longest / 8), 0.8, rows).astype(int), 1, longest)
    return [rng.integers(0, 32_000, length).astype(np.int32) for length in lengths]


def sides_for(device: torch.device, packed: bool) -> dict[str, Side]:
    """Ours and the peers that have such a layout."""
    import shardtune_kernels

    def pinned(x: Tensor) -> Tensor:
        return x.pin_memory() if device.type == "cuda" else x

    def copied(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(device, non_blocking=True) for x in tensors)

    def flat(rows: list[Row]) -> tuple[Tensor, int, int]:
        lengths = [len(row) for row in rows]
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        return pinned(torch.from_numpy(np.concatenate([*rows, offsets]))), len(rows) + 1, max(lengths)

    def lay_out(ready: tuple[Tensor, int, int]) -> tuple[Tensor, ...]:
        held, ends, width = ready
        tokens, offsets = held.to(device, non_blocking=True).split([len(held) - ends, ends])
        if packed:
            laid = shardtune_kernels.pack(tokens, offsets)
            return laid.input_ids, laid.labels, laid.positions
        laid = shardtune_kernels.pad(tokens, offsets, width, fill=FILL)
        return laid.input_ids, laid.labels, laid.attention_mask

    def padded_by_numpy(rows: list[Row]) -> tuple[Tensor, ...]:
        shape = len(rows), max(map(len, rows))
        ids, labels, mask = np.full(shape, FILL), np.full(shape, IGNORED), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)], labels[index, : len(row) - 1] = row, 1, row[1:]
        return tuple(pinned(torch.from_numpy(x)) for x in (ids, labels, mask))

    def packed_by_numpy(rows: list[Row]) -> tuple[Tensor, ...]:
        labels = [np.append(row[1:], IGNORED) for row in rows]
        parts = rows, labels, [np.arange(len(row)) for row in rows]
        return tuple(pinned(torch.from_numpy(np.concatenate(part).astype(np.int64))[None]) for part in parts)

    def padded_by_torch(rows: list[Row]) -> tuple[Tensor, ...]:
        tensors = [torch.from_numpy(row).long() for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=FILL)
        labels = pad_sequence([x[1:] for x in tensors], batch_first=True, padding_value=IGNORED)
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
        mask = pad_sequence([torch.ones_like(x) for x in tensors], batch_first=True)
        return pinned(ids), pinned(labels), pinned(mask)

    sides = {"ours": Side(flat, lay_out), "numpy": Side(packed_by_numpy if packed else padded_by_numpy, copied)}
    return sides if packed else {**sides, "pad_sequence": Side(padded_by_torch, copied)}


def check(sides: dict[str, Side], rows: list[Row]) -> None:
    """All sides make the same, and ours does of int64 tokens, too."""
    import shardtune_kernels

    made = {name: side.to_device(side.ready(rows)) for name, side in sides.items()}
    for name, tensors in made.items():
        assert all(map(torch.equal, tensors, made["ours"])), name
    device = made["ours"][0].device
    tokens = torch.from_numpy(np.concatenate(rows)).to(device)
    offsets = torch.tensor(np.cumsum([0, *map(len, rows)]), device=device)
    short = shardtune_kernels.pack(tokens, offsets.int())
    assert all(map(torch.equal, short, shardtune_kernels.pack(tokens.long(), offsets)))


def in_turn(sides: dict[str, Side], rows: list[Row], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each side's microseconds, A B C A B C …; the first round does not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent: dict[str, dict[str, list[float]]] = {name: {"whole": [], "to_device": []} for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            wait()
            begun = time.perf_counter()
            ready = side.ready(rows)
            middle = time.perf_counter()
            side.to_device(ready)
            wait()
            end = time.perf_counter()
            spent[name]["whole"].append(end - begun)
            spent[name]["to_device"].append(end - middle)
    return {
        name: {part: round(1e6 * statistics.median(values[1:]), 1) for part, values in parts.items()}
        for name, parts in spent.items()
    }


if __name__ == "__main__":
    main()
