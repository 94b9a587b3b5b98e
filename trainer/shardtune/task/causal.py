"""Decoders: continue the source with the target, or learn a whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shardtune.documents import make_documents, read
from shardtune.head_loss import summed_loss
from shardtune.protocols import IGNORED, Batch, Encoded, Generation, Text, Tokens
from shardtune.task.tokens import generate, joined, learned, mask, pad, sum_of_cross_entropies, tokenize


class Causal:
    """Implements the Task protocol.

    Source and target are joined with no end token between them; the loss is on the target and its end token. Of a
    whole text (`whole_text`) only the first token, which nothing predicts, is source.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        max_target_tokens: int,
        whole_text: bool,
        keeps_logits: bool = True,
    ) -> None:
        """`keeps_logits`: the model can leave out positions that predict nothing (`logits_to_keep`)."""
        self._tokenizer: Any = tokenizer
        self._limits = max_source_tokens, max_target_tokens
        self._whole_text = whole_text
        self._keeps_logits = keeps_logits
        self._ends = self._tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.scores_texts = not whole_text

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Begin token (where the tokenizer has one), source, target, end token."""
        if not texts:
            return []
        end = self._tokenizer.eos_token_id
        begin = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else end
        sources = []
        # Where the tokenizer ends a source with the end token, that is taken off again, so one more is allowed.
        for ids, cut in tokenize(self._tokenizer, [text.source for text in texts], self._limits[0] + self._ends):
            if ids[-1:] == [end] and (self._ends or self._whole_text):
                ids = ids[:-1]
            sources.append((ids or [begin], cut))
        if self._whole_text:
            limit = self._limits[0] - 1
            return [
                Encoded(ids[:1], [*ids[1 : limit + 1], end][: max(limit, 1)], cut or len(ids) > limit, False)
                for ids, cut in sources
            ]
        encoded = []
        targets = self._tokenizer(
            [text.target for text in texts], add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        for (source, source_cut), target in zip(sources, targets, strict=True):
            limit = self._limits[1] - 1
            encoded.append(Encoded(source, [*target[:limit], end], source_cut, len(target) > limit))
        return encoded

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Rows [b, s] of source and target, padded on the right.

        Labels are the tokens that the columns `logits_to_keep` are to predict, the next ones: the columns from the
        first target's on, or, packed, just those that predict a target.
        """
        targets = [learned(e.target) for e in examples]
        rows = [np.concatenate((e.source, ids)) for e, (ids, _) in zip(examples, targets, strict=True)]
        labels = [
            np.concatenate((np.full(len(e.source), IGNORED), own))
            for e, (_, own) in zip(examples, targets, strict=True)
        ]
        inputs, documents = {}, None
        if packed:
            lengths = np.array([len(row) for row in rows])
            documents = make_documents(lengths)
            inputs["input_ids"], all_labels = joined(rows), joined(labels)
            inputs["position_ids"] = documents.source.positions.unsqueeze(0)
            predicted = (all_labels[0] != IGNORED).nonzero()[:, 0]
        else:
            inputs["input_ids"], all_labels = pad(rows, self._tokenizer.pad_token_id), pad(labels, IGNORED)
            inputs["attention_mask"] = mask(rows)
            predicted = torch.arange(min(len(e.source) for e in examples), all_labels.shape[1])
        inputs["logits_to_keep"] = predicted - 1
        return Batch(
            inputs=inputs,
            labels=all_labels[:, predicted],
            tokens=sum(len(row) for row in rows),
            targets=int((all_labels != IGNORED).sum()),
            slots=all_labels.numel(),
            documents=documents,
        )

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross entropy of the target tokens, each predicted at the position before it."""
        read(batch.documents)
        if self._keeps_logits:
            return summed_loss(model, batch.inputs, batch.labels, sum_of_cross_entropies)
        inputs = dict(batch.inputs)
        kept = inputs.pop("logits_to_keep")
        return sum_of_cross_entropies(model(**inputs, use_cache=False).logits[:, kept], batch.labels)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """Generated continuations, without special tokens; sources are padded on the left."""
        sources = [e.source for e in examples]
        pad_id, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        prompt = pad(sources, pad_id, left=True)
        written = generate(model, prompt, mask(sources, left=True), how, pad_id, end)  # pyright: ignore
        new = written[:, prompt.shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]
