"""Token ids from texts, cut to length, and padded tensors from token ids; shared by the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from shardtune.examples import IGNORED, Batch
from shardtune.ragged import LayOut, Ragged, Stream

NO_LABELS = torch.empty(0, dtype=torch.int64)
"""Of a batch whose labels are made of its streams."""
READ = {"input_ids": "input_ids"}
PADDED = {**READ, "attention_mask": "attention_mask"}


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int, as_target: bool = False
) -> list[tuple[list[int], bool]]:
    """Ids of each text with the tokenizer's special tokens, at most `limit`, and whether it was cut.

    Special tokens survive the cut; which end is cut is the tokenizer's `truncation_side`.
    """
    if not texts:
        return []

    def ids_of(some: Sequence[str], **options: Any) -> list[list[int]]:
        texts_given = {"text_target" if as_target else "text": list(some)}
        return tokenizer(**texts_given, **options, verbose=False, return_attention_mask=False)["input_ids"]  # pyright: ignore

    # Without truncation first: only so is it known which texts are too long.
    ids = ids_of(texts, truncation=False)
    long = [index for index, row in enumerate(ids) if len(row) > limit]
    if long:
        for index, row in zip(long, ids_of([texts[i] for i in long], truncation=True, max_length=limit), strict=True):
            ids[index] = row
    too_long = set(long)
    return [(list(row), index in too_long) for index, row in enumerate(ids)]


def pad(rows: Sequence[NDArray[np.int32] | Sequence[int]], value: int, left: bool = False) -> Tensor:
    """int64 [b, longest], `value` where a row has ended (or, if `left`, not begun)."""
    longest = max(len(row) for row in rows)
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, longest - len(row) if left else 0 :][: len(row)] = row
    return torch.from_numpy(out)


def mask(rows: Sequence[NDArray[np.int32] | Sequence[int]], left: bool = False) -> Tensor:
    """int64 [b, longest]: 1 where there is a token, 0 where there is padding."""
    return pad([np.ones(len(row), dtype=np.int32) for row in rows], 0, left)


def learned(target: NDArray[np.int32] | Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids and labels, both [t], of a target in which `~id` is a token that is read but not learned."""
    given = np.asarray(target, dtype=np.int32)
    return np.where(given < 0, ~given, given), np.where(given < 0, np.int32(IGNORED), given)


def stream(
    rows: Sequence[NDArray[np.int32]],
    fill: int,
    packed: bool,
    names: Mapping[str, str],
    learned_from: Sequence[int] | None = None,
    start: int | None = None,
    labels: slice | None = None,
) -> Stream:
    """These rows, to be padded to the longest of them or packed."""
    lengths = [len(row) for row in rows]
    return Stream(
        tokens=torch.from_numpy(np.concatenate(rows).astype(np.int32, copy=False)),
        offsets=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        learned_from=torch.tensor([0] * len(rows) if learned_from is None else learned_from, dtype=torch.int32),
        width=None if packed else max(lengths),
        fill=fill,
        start=start,
        names=names,
        labels=labels,
    )


def learned_places(given: Stream) -> NDArray[np.int64]:
    """Where in the stream the tokens are that are learned."""
    tokens, offsets, first = (part.numpy() for part in given[:3])
    lengths = np.diff(offsets)
    return np.flatnonzero((tokens >= 0) & (np.arange(len(tokens)) >= np.repeat(offsets[:-1] + first, lengths)))


class HostRows(NamedTuple):
    """Implements `ragged.Rows`."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    positions: Tensor


def lay_out_on_host(given: Stream) -> HostRows:
    """What a kernel makes on a GPU, made by numpy."""
    tokens, offsets = given.tokens.numpy(), given.offsets.numpy()
    lengths = np.diff(offsets)
    positions = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    read = np.where(tokens < 0, ~tokens, tokens)
    targets = np.full(len(tokens), IGNORED)
    places = learned_places(given)
    if given.start is None:
        places = places[positions[places] > 0]  # nothing predicts the first token of a row
        targets[places - 1] = tokens[places]
    else:
        targets[places] = tokens[places]
        read = np.where(positions == 0, given.start, np.roll(read, 1))
    flat, fills = (read, targets, np.ones_like(tokens), positions), (given.fill, IGNORED, 0, 0)
    if given.width is None:
        return HostRows(*(torch.from_numpy(part.astype(np.int64)).unsqueeze(0) for part in flat))
    inside = np.arange(given.width) < lengths[:, None]
    padded = [np.full(inside.shape, fill, np.int64) for fill in fills]
    for part, values in zip(padded, flat, strict=True):
        part[inside] = values
    return HostRows(*map(torch.from_numpy, padded))


def laid_out(batch: Batch, streams: Sequence[Stream], lay_out: LayOut | None) -> Batch:
    """The batch with what its streams become: on the device that it goes to, by `lay_out`; now, where that is None."""
    if lay_out is not None:
        return replace(batch, ragged=Ragged.of(streams, lay_out))
    done = replace(batch, ragged=Ragged.of(streams, lay_out_on_host)).to(torch.device("cpu"))
    return replace(done, labels=done.labels.contiguous())


def sum_of_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The float32 sum over labels that are not IGNORED; logits [..., v], labels [...]."""
    return cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def cross_entropies_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of each row, float32 [b]; logits [b, t, v], labels [b, t]. One row after the other: a copy of all logits
    in float32 is what takes most memory."""
    return torch.stack([sum_of_cross_entropies(row, wanted) for row, wanted in zip(logits, labels, strict=True)])
