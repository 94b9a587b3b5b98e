"""Encoder-decoders: read the source, write the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shardtune.documents import make_documents, read
from shardtune.head_loss import summed_loss
from shardtune.protocols import IGNORED, Batch, Encoded, Generation, Text, Tokens
from shardtune.task.tokens import generate, joined, mask, pad, sum_of_cross_entropies, tokenize


class Seq2Seq:
    """Implements the Task protocol; the target is predicted from the decoder's start token on, end token included."""

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        max_target_tokens: int,
        decoder_start_token_id: int,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._limits = max_source_tokens, max_target_tokens
        self._start = decoder_start_token_id

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Source and target each as the tokenizer writes them, targets always with their end token."""
        end = self._tokenizer.eos_token_id
        sources = tokenize(self._tokenizer, [text.source for text in texts], self._limits[0])
        encoded = []
        # A target is always cut on the right, whichever side sources are cut on: it is written from the left.
        side, self._tokenizer.truncation_side = self._tokenizer.truncation_side, "right"
        targets = tokenize(self._tokenizer, [text.target for text in texts], self._limits[1], as_target=True)
        self._tokenizer.truncation_side = side
        for (source, source_cut), (target, target_cut) in zip(sources, targets, strict=True):
            if target[-1:] != [end]:
                target_cut = target_cut or len(target) >= self._limits[1]
                target = [*target[: self._limits[1] - 1], end]
            encoded.append(Encoded(source, target, source_cut, target_cut))
        return encoded

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Sources [b, s], targets [b, t], and as decoder input the targets shifted right [b, t]; right-padded."""
        sources, targets = [e.source for e in examples], [e.target for e in examples]
        shifted = [np.concatenate(([self._start], target[:-1])) for target in targets]
        source_tokens, target_tokens = (sum(len(row) for row in rows) for rows in (sources, targets))
        documents, attention = None, {}
        if packed:
            input_ids, decoder_input_ids, labels = joined(sources), joined(shifted), joined(targets)
            documents = make_documents(*(np.array([len(row) for row in rows]) for rows in (sources, targets)))
        else:
            pad_id = self._tokenizer.pad_token_id
            input_ids, decoder_input_ids, labels = pad(sources, pad_id), pad(shifted, pad_id), pad(targets, IGNORED)
            attention = {"attention_mask": mask(sources)}
        return Batch(
            inputs={"input_ids": input_ids, **attention, "decoder_input_ids": decoder_input_ids},
            labels=labels,
            tokens=source_tokens + target_tokens,
            targets=target_tokens,
            slots=input_ids.numel() + labels.numel(),
            documents=documents,
        )

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross entropy of the target tokens."""
        read(batch.documents)
        return summed_loss(model, batch.inputs, batch.labels, sum_of_cross_entropies)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """Generated texts, without special tokens."""
        sources = [e.source for e in examples]
        pad_id, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        written = generate(model, pad(sources, pad_id), mask(sources), how, pad_id, end)  # pyright: ignore
        return [text.strip() for text in self._tokenizer.batch_decode(written, skip_special_tokens=True)]
