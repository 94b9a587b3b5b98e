"""Decoders: continue the source with the target, or learn a whole text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shardtune.examples import Batch, Encoded, Text, Tokens
from shardtune.protocols import Generation, Task
from shardtune.row_fields import Fields
from shardtune.section import Positive
from shardtune.task.section import WRITTEN, Parts, PromptedSection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from shardtune.ragged import LayOut


class Config(PromptedSection):
    """A decoder continues the source with the target (loss on the target), a text (loss on all), or answers in
    conversations (loss on the assistant's turns)."""

    kind: Literal["causal"]
    """What the model learns to do."""
    source: str | None = None
    """Field with the text to continue."""
    target: str | None = None
    """Field with the continuation; the loss is on it and its end token."""
    text: str | None = None
    """Field with a whole text, instead of source and target; the loss is on all of it."""
    messages: str | None = None
    """Field with a conversation, instead of source and target: a list of messages with role and content (or ShareGPT's
    from and value). It is written with a chat template, and the loss is on the assistant's turns."""
    tools: str | None = None
    """Beside `messages`: field with the schemas of the tools that the assistant may call, a list or JSON of one."""
    template: str | None = None
    """Chat template of `messages`; null: the tokenizer's own; or chatml, llama3, plain, or a path ending in .jinja."""
    max_target_tokens: Positive = 128
    """Longest target, in tokens, its end token included (a `text`, and `messages`, are bounded by
    max_source_tokens)."""

    head: ClassVar[str] = "causal"

    @property
    def inputs(self) -> tuple[str, ...]:
        """A source, a whole text, or a conversation."""
        return ("source", "text", "messages")

    @property
    def fields(self) -> Fields:
        """One of the three."""
        return Fields(self.text or self.source, self.prompt, self.target, self.messages, self.tools)

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of texts; a whole text is not written, so it is compared with nothing."""
        return ("perplexity",) if self.text is not None else WRITTEN

    @property
    def usual_scores(self) -> list[str]:
        """Of a text there is nothing to compare."""
        return ["perplexity"] if self.text is not None else ["rouge"]

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Source and target are one row."""
        return ((0, 1),)

    @property
    def longest_rows(self) -> tuple[int, ...]:
        """A whole text and a conversation are limited as sources are."""
        both = self.target is not None
        return (self.max_source_tokens + self.max_target_tokens * both,)

    @property
    def writes_texts(self) -> bool:
        """Not where a whole text is learned."""
        return self.text is None

    def problems(self) -> Iterator[tuple[str, str]]:
        """What goes with which input."""
        yield from super().problems()
        if self.text is not None and self.target is not None:
            yield "task.target", "task.text already holds the whole text; leave task.target out"
        if self.messages is not None and self.target is not None:
            yield "task.target", "task.messages already holds the assistant's turns; leave task.target out"
        if self.text is None and self.messages is None and self.target is None:
            yield "task", "task.target is missing (or give task.text: the loss is then on all of it)"
        for key in ("tools", "template"):
            if self.messages is None and getattr(self, key) is not None:
                yield f"task.{key}", "only with task.messages"
        if self.messages is not None and self.max_source_tokens < 2:
            yield "task.max_source_tokens", "a conversation needs at least 2 tokens, one to read and one to learn"

    def make(self, parts: Parts) -> Task:
        """The task itself."""
        from shardtune.task.architecture import keeps_logits
        from shardtune.task.chat import Chat

        keeps = keeps_logits(parts.architecture)
        if self.messages is not None:
            return Chat(parts.tokenizer, self.max_source_tokens, keeps, parts.lay_out)
        limits = self.max_source_tokens, self.max_target_tokens
        return Causal(parts.tokenizer, *limits, self.text is not None, keeps, parts.lay_out)


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
        lay_out: LayOut | None = None,
    ) -> None:
        """`keeps_logits`: the model can leave out positions that predict nothing (`logits_to_keep`). `lay_out`: pads
        and packs batches on the device that computes them; None: the host does."""
        self._tokenizer: Any = tokenizer
        self._limits = max_source_tokens, max_target_tokens
        self._whole_text = whole_text
        self._keeps_logits = keeps_logits
        self._lay_out = lay_out
        self._ends = self._tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.scores_texts = not whole_text

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Begin token (where the tokenizer has one), source, target, end token."""
        from shardtune.task.tokens import tokenize

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
        import numpy as np
        import torch

        from shardtune.documents import make_documents
        from shardtune.task.tokens import NO_LABELS, PADDED, READ, laid_out, learned_places, stream

        rows, first = [np.concatenate((e.source, e.target)) for e in examples], [len(e.source) for e in examples]
        pad_id, width = self._tokenizer.pad_token_id, max(len(row) for row in rows)
        kept = slice(min(first) - 1, width - 1)
        if packed:
            given = stream(rows, pad_id, True, {**READ, "position_ids": "positions"}, first)
        else:
            given = stream(rows, pad_id, False, PADDED, first, labels=kept)
        places = torch.from_numpy(learned_places(given))
        batch = Batch(
            inputs={"logits_to_keep": places - 1 if packed else torch.arange(kept.start, kept.stop)},
            labels=given.tokens[places].long().unsqueeze(0) if packed else NO_LABELS,
            tokens=len(given.tokens),
            targets=len(places),
            slots=given.slots,
            documents=make_documents(np.diff(given.offsets.numpy())) if packed else None,
        )
        return laid_out(batch, [given], self._lay_out)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross entropy of the target tokens, each predicted at the position before it."""
        from shardtune.documents import read
        from shardtune.head_loss import summed_loss
        from shardtune.task.tokens import sum_of_cross_entropies

        read(batch.documents)
        if self._keeps_logits:
            return summed_loss(model, batch.inputs, batch.labels, sum_of_cross_entropies)
        inputs = dict(batch.inputs)
        kept = inputs.pop("logits_to_keep")
        return sum_of_cross_entropies(model(**inputs, use_cache=False).logits[:, kept], batch.labels)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same of each example."""
        from shardtune.documents import read
        from shardtune.head_loss import losses_by_row
        from shardtune.task.tokens import cross_entropies_by_row

        read(None)
        if self._keeps_logits:
            return losses_by_row(model, batch.inputs, batch.labels, cross_entropies_by_row)
        inputs = dict(batch.inputs)
        kept = inputs.pop("logits_to_keep")
        return cross_entropies_by_row(model(**inputs, use_cache=False).logits[:, kept], batch.labels)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """Generated continuations, without special tokens; sources are padded on the left."""
        from shardtune.task.generation import generate
        from shardtune.task.tokens import mask, pad

        sources = [e.source for e in examples]
        read = pad(sources, self._tokenizer.pad_token_id, left=True), mask(sources, left=True)
        return generate(model, *read, how, self._tokenizer, examples)  # pyright: ignore[reportArgumentType]

    def targets(self, example: Tokens) -> int:
        """The tokens that are learned."""
        return sum(int(token) >= 0 for token in example.target)

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """As they are."""
        return list(predictions)

    def references(self, text: Text) -> list[str]:
        """The continuation; of a whole text nothing is predicted."""
        return [text.target]
