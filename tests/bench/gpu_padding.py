"""From a list of ragged rows on the host to what a model reads on the GPU, padded and packed: one JSON line.

Ours copies the flat stream once and lays it out with one launch. Beside it what is usual: rows padded (or joined) by
numpy on the host and every tensor copied; and torch.nn.utils.rnn.pad_sequence. `whole` is from the list on;
`to_device` leaves out what the host makes ready in pinned memory, as a loader does ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from _gpu_line import Benchmark, Sides
from _gpu_timing import DEVICE, ON_GPU, Work
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import shardtune_kernels

IGNORED, FILL = -100, 3
Row = NDArray[np.int32]


class Side(NamedTuple):
    """`ready` on the host, then `to_device`: ids, labels and mask, or packed: ids, labels and positions."""

    ready: Callable[[list[Row]], Any]
    to_device: Callable[[Any], tuple[Tensor, ...]]

    def whole(self, rows: list[Row]) -> Work:
        return lambda: self.to_device(self.ready(rows))

    def rest(self, rows: list[Row]) -> Work:
        ready = self.ready(rows)
        return lambda: self.to_device(ready)


def main() -> None:
    bench = Benchmark(None, __doc__, rounds=50)
    cases = []
    for rows in (3, 32) if bench.small else (64, 256, 1024, 4096):
        ragged = random_rows(rows, 48 if bench.small else 2048)
        for packed in (False, True):
            sides = sides_for(packed)
            bench.correct({"int32": {"largest_error": 0.0, "ok": same(sides, ragged)}})
            for part, work in (("whole", Side.whole), ("to_device", Side.rest)):
                makers = {name: partial(work, side, ragged) for name, side in sides.items()}
                cases.append(bench.case(
                    Sides(makers), hosts_clock=True, what=part, layout="packed" if packed else "padded", rows=rows,
                    tokens=sum(map(len, ragged)), width=max(map(len, ragged)),
                ))  # fmt: skip
    bench.report(cases)


def random_rows(rows: int, longest: int) -> list[Row]:
    """Lengths as of real text: lognormal, the median an eighth of the longest, with a long tail that is cut."""
    rng = np.random.default_rng(rows)
    lengths = np.clip(rng.lognormal(np.log(longest / 8), 0.8, rows).astype(int), 1, longest)
    return [rng.integers(0, 32_000, length).astype(np.int32) for length in lengths]


def sides_for(packed: bool) -> dict[str, Side]:
    """Ours and the peers that have such a layout."""

    def pinned(x: Tensor) -> Tensor:
        return x.pin_memory() if ON_GPU else x

    def copied(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(DEVICE, non_blocking=True) for x in tensors)

    def flat(rows: list[Row]) -> tuple[Tensor, int, int]:
        lengths = [len(row) for row in rows]
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        return pinned(torch.from_numpy(np.concatenate([*rows, offsets]))), len(rows) + 1, max(lengths)

    def lay_out(ready: tuple[Tensor, int, int]) -> tuple[Tensor, ...]:
        held, ends, width = ready
        tokens, offsets = held.to(DEVICE, non_blocking=True).split([len(held) - ends, ends])
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


def same(sides: dict[str, Side], rows: list[Row]) -> bool:
    """Whether all sides make the same, and ours does of int64 tokens, too."""
    made = {name: side.to_device(side.ready(rows)) for name, side in sides.items()}
    tokens = torch.from_numpy(np.concatenate(rows)).to(DEVICE)
    offsets = torch.tensor(np.cumsum([0, *map(len, rows)]), device=DEVICE)
    of_int32, of_int64 = shardtune_kernels.pack(tokens, offsets.int()), shardtune_kernels.pack(tokens.long(), offsets)
    equal = [torch.equal(*pair) for tensors in made.values() for pair in zip(tensors, made["ours"], strict=True)]
    return all(equal) and all(map(torch.equal, of_int32, of_int64))


if __name__ == "__main__":
    main()
