"""Tokens and the characters that they stand for, cut to length: for tasks whose answer is a place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from shardtune.errors import ConfigError


class Places(NamedTuple):
    """The tokens [s] of one text, or of a text and what stands before it, with the tokenizer's special tokens."""

    ids: NDArray[np.int32]
    part: NDArray[np.int8]
    """0: of the text; 1: of what stands before it; -1: special."""
    start: NDArray[np.int64]
    """The first character of the text that a token stands for, white space before it left out."""
    stop: NDArray[np.int64]
    """The one after the last."""

    def take(self, kept: NDArray[np.int64]) -> Places:
        """These tokens alone."""
        return Places(self.ids[kept], self.part[kept], self.start[kept], self.stop[kept])


def places(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], before: Sequence[str] | None = None
) -> list[Places]:
    """All tokens of each text. Raises ConfigError where the tokenizer does not tell what they stand for."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.tokenizer: {type(tokenizer).__name__} does not tell which characters its tokens stand for, which "
            "this task needs; take a model with a tokenizer.json"
        )
    given = [list(texts)] if before is None else [list(before), list(texts)]
    some: Any = tokenizer
    encoded = some(*given, truncation=False, padding=False, verbose=False, return_offsets_mapping=True).encodings
    return [_places(encoding, text, len(given) - 1) for encoding, text in zip(encoded, texts, strict=True)]


def _places(encoding: Any, text: str, last: int) -> Places:
    part = np.array([-1 if number is None else last - number for number in encoding.sequence_ids], dtype=np.int8)
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    start, stop = spans[:, 0].copy(), spans[:, 1]
    # Of some tokenizers a token begins with the space before a word.
    for place in np.flatnonzero((part == 0) & (start < stop)):
        while start[place] < stop[place] and text[start[place]].isspace():
            start[place] += 1
    return Places(np.array(encoding.ids, dtype=np.int32), part, start, stop)


def kept(given: Places, limit: int, side: str, words: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Which tokens are left of more than `limit`, ascending: the text is cut at the end called `side`, and what stands
    before it only where that takes more than half of the row. Special tokens stay.

    `words` [s]: by which the text is cut; the beginning of one that is longer than the row is left.
    """
    count = len(given.ids)
    if count <= limit:
        return np.arange(count)
    special, before, text = (np.flatnonzero(given.part == part) for part in (-1, 1, 0))
    room = max(limit - len(special), 0)
    before = before[: max(room - len(text), room // 2)]
    room -= len(before)
    left = text[:room] if side == "right" else text[len(text) - room :]
    if words is not None and 0 < len(left) < len(text):
        out = text[room] if side == "right" else text[len(text) - room - 1]
        whole = left[words[left] != words[out]]
        left = whole if len(whole) else text[words[text] == words[out]][:room]
    return np.sort(np.concatenate([special, before, left]))
