"""A label for each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shardtune.errors import DataError
from shardtune.protocols import Batch, Encoded, Generation, Text, Tokens
from shardtune.ragged import LayOut
from shardtune.task.tokens import PADDED, laid_out, stream, sum_of_cross_entropies, tokenize


class Classification:
    """Implements the Task protocol; a target is the index of its label in `labels`."""

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        labels: Sequence[str],
        lay_out: LayOut | None = None,
    ) -> None:
        """`lay_out`: pads batches on the device that computes them; None: the host does."""
        self._tokenizer: Any = tokenizer
        self._limit = max_source_tokens
        self._lay_out = lay_out
        self._labels = list(labels)
        self._index = {label: index for index, label in enumerate(self._labels)}

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """The text with the tokenizer's special tokens, and the label's index."""
        for text in texts:
            if text.target not in self._index:
                known = ", ".join(self._labels[:10])
                raise DataError(f"{text.place}: label {text.target!r} is not in the training data; known are {known}")
        sources = tokenize(self._tokenizer, [text.source for text in texts], self._limit)
        return [
            Encoded(ids, [self._index[text.target]], cut, False)
            for text, (ids, cut) in zip(texts, sources, strict=True)
        ]

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Right-padded texts [b, s] and class indices [b]; never packed."""
        assert not packed
        source = stream([e.source for e in examples], self._tokenizer.pad_token_id, False, PADDED)
        batch = Batch(
            inputs={},
            labels=torch.tensor([int(e.target[0]) for e in examples]),
            tokens=len(source.tokens),
            targets=len(examples),
            slots=source.slots,
        )
        return laid_out(batch, [source], self._lay_out)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross entropy of the labels."""
        return sum_of_cross_entropies(model(**batch.inputs).logits, batch.labels)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """The most probable label of each text."""
        batch = self.collate(examples).to(next(model.parameters()).device)
        best = model(**batch.inputs).logits.argmax(-1)
        return [self._labels[index] for index in best.tolist()]
