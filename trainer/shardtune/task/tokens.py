"""Token ids from texts, cut to length, and padded tensors from token ids; shared by the tasks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shardtune import documents
from shardtune.protocols import IGNORED, Generation


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


def joined(rows: Sequence[NDArray[np.int32]]) -> Tensor:
    """int64 [1, sum of lengths]: one row of them all."""
    return torch.from_numpy(np.concatenate(rows).astype(np.int64)).unsqueeze(0)


def sum_of_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The float32 sum over labels that are not IGNORED; logits [..., v], labels [...]."""
    return cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def all_ends(ends: int | list[int], more: Sequence[int]) -> int | list[int]:
    """End tokens as a generation config holds them, each once."""
    return [*dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *more])] if more else ends


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    how: Generation,
    pad_id: int,
    eos_id: int,
    more_ends: Sequence[int] = (),
) -> Tensor:
    """Greedy or beam search with the model's own generation settings (such as forced tokens), never sampling.

    `more_ends`: tokens that end a text beside the model's own end tokens, or `eos_id` where it names none. int64
    [b, generated length]; for decoders the prompt is included.
    """
    documents.read(None)
    settings = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    ends = all_ends(settings.eos_token_id or eos_id, more_ends)
    settings.update(
        max_new_tokens=how.max_new_tokens, max_length=None, num_beams=how.beams, do_sample=False, temperature=None,
        top_k=None, top_p=None, use_cache=True, pad_token_id=pad_id, eos_token_id=ends,
    )  # fmt: skip
    device = next(model.parameters()).device
    return model.generate(  # pyright: ignore[reportCallIssue, reportReturnType]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        synced_gpus=how.in_step,
    )
