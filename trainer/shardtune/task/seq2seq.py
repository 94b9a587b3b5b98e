"""Encoder-decoders: read the source, write the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shardtune.examples import Batch, Encoded, Text, Tokens
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.section import Positive
from shardtune.task.section import WRITTEN, Parts, PromptedSection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from shardtune.ragged import LayOut


class Config(PromptedSection):
    """An encoder-decoder reads the source and writes the target."""

    kind: Literal["seq2seq"]
    """What the model learns to do."""
    source: str | None = None
    """Field with the input text; dots reach inside: translation.de, answers.text.0."""
    target: str
    """Field with the text to write."""
    max_target_tokens: Positive = 128
    """Longest target, in tokens, its end token included."""

    head: ClassVar[str] = "seq2seq"

    @property
    def inputs(self) -> tuple[str, ...]:
        """One field."""
        return ("source",)

    @property
    def fields(self) -> Fields:
        """Source and target."""
        return Fields(input=self.source, prompt=self.prompt, target=self.target)

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of texts."""
        return WRITTEN

    @property
    def usual_scores(self) -> list[str]:
        """Those of summaries."""
        return ["rouge"]

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """One in the encoder, one in the decoder."""
        return ((0,), (1,))

    @property
    def longest_rows(self) -> tuple[int, ...]:
        """As limited."""
        return (self.max_source_tokens, self.max_target_tokens)

    @property
    def writes_texts(self) -> bool:
        """The target."""
        return True

    def make(self, parts: Parts) -> Seq2Seq:
        """The task itself."""
        from shardtune.task.architecture import decoder_start

        start = decoder_start(parts.architecture, parts.path)
        return Seq2Seq(parts.tokenizer, self.max_source_tokens, self.max_target_tokens, start, parts.lay_out)


class Seq2Seq:
    """Implements the Task protocol; the target is predicted from the decoder's start token on, end token included."""

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        max_target_tokens: int,
        decoder_start_token_id: int,
        lay_out: LayOut | None = None,
    ) -> None:
        """`lay_out`: pads and packs batches on the device that computes them; None: the host does."""
        self._tokenizer: Any = tokenizer
        self._limits = max_source_tokens, max_target_tokens
        self._start = decoder_start_token_id
        self._lay_out = lay_out

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Source and target each as the tokenizer writes them, targets always with their end token."""
        from shardtune.task.tokens import tokenize

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
        import numpy as np

        from shardtune.documents import make_documents
        from shardtune.task.tokens import NO_LABELS, PADDED, READ, laid_out, stream

        pad_id = self._tokenizer.pad_token_id
        source = stream([e.source for e in examples], pad_id, packed, READ if packed else PADDED)
        target = stream(
            [e.target for e in examples], pad_id, packed, {"decoder_input_ids": "input_ids"},
            start=self._start, labels=slice(None),
        )  # fmt: skip
        batch = Batch(
            inputs={},
            labels=NO_LABELS,
            tokens=len(source.tokens) + len(target.tokens),
            targets=len(target.tokens),
            slots=source.slots + target.slots,
            documents=make_documents(*(np.diff(part.offsets.numpy()) for part in (source, target))) if packed else None,
        )
        return laid_out(batch, [source, target], self._lay_out)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross entropy of the target tokens."""
        from shardtune.documents import read
        from shardtune.head_loss import summed_loss
        from shardtune.task.tokens import sum_of_cross_entropies

        read(batch.documents)
        return summed_loss(model, batch.inputs, batch.labels, sum_of_cross_entropies)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same of each example."""
        from shardtune.documents import read
        from shardtune.head_loss import losses_by_row
        from shardtune.task.tokens import cross_entropies_by_row

        read(None)
        return losses_by_row(model, batch.inputs, batch.labels, cross_entropies_by_row)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """Generated texts, without special tokens."""
        from shardtune.task.generation import generate
        from shardtune.task.tokens import mask, pad

        sources = [e.source for e in examples]
        read = pad(sources, self._tokenizer.pad_token_id), mask(sources)
        return generate(model, *read, how, self._tokenizer, examples)  # pyright: ignore[reportArgumentType]

    def targets(self, example: Tokens) -> int:
        """All tokens of the text, its end token included."""
        return len(example.target)

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """As they are."""
        return list(predictions)

    def references(self, text: Text) -> list[str]:
        """The text to write."""
        return [text.target]
