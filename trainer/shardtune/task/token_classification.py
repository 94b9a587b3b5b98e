"""A label for each word: names, places, parts of speech."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shardtune.errors import DataError
from shardtune.examples import IGNORED, Batch, Encoded, Text, Tokens
from shardtune.kinds import check_text, kind
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.task.section import Parts, TaskSection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from shardtune.ragged import LayOut
    from shardtune.task.places import Places

OUTSIDE = "O"
"""The label of a word that is part of nothing; also what is predicted where the model did not read a word."""


class Config(TaskSection):
    """A head over each word's first token names the word's label; the labels are those of the training data."""

    kind: Literal["token_classification"]
    """What the model learns to do."""
    tokens: str = "tokens"
    """Field with the words, a list of strings; of a long list the last words are cut off, and count as O."""
    labels: str = "ner_tags"
    """Field with a label for each word: strings such as B-PER, or integers; those of a dataset that has names for them
    become the names."""

    head: ClassVar[str] = "token_classification"
    packs: ClassVar[bool] = False

    @property
    def fields(self) -> Fields:
        """Words and labels."""
        return Fields(None, None, None, parts=(self.tokens, self.labels), read=read_labelled, labels_of=json.loads)

    @property
    def asked(self) -> Fields:
        """Words."""
        return Fields(None, None, None, parts=(self.tokens,), read=read_alone)

    def source_of(self, text: str) -> str:
        """White space stands between words."""
        return json.dumps(text.split(), ensure_ascii=False)

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of lists of labels."""
        return ("entity_f1", "token_accuracy", "perplexity")

    @property
    def usual_scores(self) -> list[str]:
        """Of entities, and of words."""
        return ["entity_f1", "token_accuracy"]

    def make(self, parts: Parts) -> TokenClassification:
        """The task itself."""
        return TokenClassification(parts.tokenizer, self.max_source_tokens, parts.labels, parts.lay_out)


def read_labelled(values: Sequence[Any], at: Sequence[str]) -> tuple[str, str] | str:
    """JSON lists of a row's words and of their labels, or why the row is left out. Raises DataError."""
    (words, labels), (words_at, labels_at) = values, at
    source = read_words(words, words_at)
    if not isinstance(labels, list):
        raise DataError(f"{labels_at}: {kind(labels)}, not a list of labels")
    if len(labels) != len(words):
        raise DataError(f"{labels_at}: {len(labels)} labels for the {len(words)} words of {words_at}")
    for number, label in enumerate(labels, 1):
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise DataError(f"{labels_at}: label {number}: {kind(label)}, not the name or the number of a label")
    target = json.dumps([str(label) for label in labels], ensure_ascii=False)
    return (source, target) if any(word.strip() for word in words) else "empty source"


def read_alone(values: Sequence[Any], at: Sequence[str]) -> tuple[str, str] | str:
    """As `read_labelled`, of a row whose labels are not known."""
    source = read_words(values[0], at[0])
    return (source, "") if any(word.strip() for word in values[0]) else "empty source"


def read_words(words: Any, at: str) -> str:
    """A JSON list of a row's words. Raises DataError."""
    if not isinstance(words, list):
        raise DataError(f"{at}: {kind(words)}, not a list of words")
    for number, word in enumerate(words, 1):
        if not isinstance(word, str):
            raise DataError(f"{at}: word {number}: {kind(word)}, not a string")
        check_text(word, f"{at}: word {number}")
    return json.dumps(words, ensure_ascii=False)


class TokenClassification:
    """Implements the Task protocol.

    A source is a JSON list of words, a target one of labels. In `Tokens`, the source's tokens but the first of each
    word are `~id`, and the target is the index of the label of each word that is read.
    """

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
        """The words with single spaces between them, and the tokenizer's special tokens."""
        import numpy as np

        encoded = []
        for text, (found, words, cut) in zip(texts, self._read(texts), strict=True):
            source = np.where(words < 0, ~found.ids, found.ids)
            labels = json.loads(text.target) if text.target else None
            target = [] if labels is None else [self._number(labels[word], text) for word in words[words >= 0]]
            encoded.append(Encoded(source.tolist(), target, cut, False))
        return encoded

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Right-padded texts [b, s], and at each word's first token the index of its label [b, s]; never packed."""
        import numpy as np

        from shardtune.task.tokens import PADDED, laid_out, pad, stream

        assert not packed
        source = stream([e.source for e in examples], self._tokenizer.pad_token_id, False, PADDED)
        labels = [np.full(len(e.source), IGNORED, dtype=np.int32) for e in examples]
        for row, example in zip(labels, examples, strict=True):
            if len(example.target):  # else it is not known
                row[np.asarray(example.source) >= 0] = example.target
        batch = Batch(
            inputs={},
            labels=pad(labels, IGNORED),
            tokens=len(source.tokens),
            targets=sum(map(self.targets, examples)),
            slots=source.slots,
        )
        return laid_out(batch, [source], self._lay_out)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the cross entropies of each text's words."""
        from torch.nn.functional import cross_entropy

        logits = model(**batch.inputs).logits.float()  # [b, s, c]
        found = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
        return found.view(batch.labels.shape).sum(-1)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the texts."""
        return self.losses(model, batch).sum()

    def targets(self, example: Tokens) -> int:
        """Each word that is read."""
        return len(example.target)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """A JSON list of the most probable label of each word that is read."""
        batch = self.collate(examples).to(next(model.parameters()).device)
        best = model(**batch.inputs).logits.argmax(-1).cpu().numpy()  # [b, s]
        rows = [row[: len(e.source)][e.source >= 0] for row, e in zip(best, examples, strict=True)]
        return [json.dumps([self._labels[index] for index in row], ensure_ascii=False) for row in rows]

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """A label for each word of the text: those that the model did not read have "O"."""
        written = []
        for text, prediction, (_, words, _) in zip(texts, predictions, self._read(texts), strict=True):
            labels = [OUTSIDE] * len(json.loads(text.source))
            for word, label in zip(words[words >= 0], json.loads(prediction), strict=True):
                labels[word] = label
            written.append(json.dumps(labels, ensure_ascii=False))
        return written

    def references(self, text: Text) -> list[str]:
        """The labels."""
        return [text.target]

    def _read(self, texts: Sequence[Text]) -> list[tuple[Places, NDArray[np.int64], bool]]:
        """Of each text the tokens that are read, which word each is the first of (-1: of none), and whether any are
        left out."""
        import numpy as np

        from shardtune.task.places import kept, places

        rows = [json.loads(text.source) for text in texts]
        read = []
        for words, found in zip(rows, places(self._tokenizer, [" ".join(row) for row in rows]), strict=True):
            begins = np.cumsum([0, *(len(word) + 1 for word in words)])
            of = np.where(found.part == 0, np.searchsorted(begins, found.start, side="right") - 1, -1)
            left = kept(found, self._limit, self._tokenizer.truncation_side, of)
            _, first = np.unique(of, return_index=True)
            firsts = np.full_like(of, -1)
            firsts[first] = of[first]
            read.append((found.take(left), firsts[left], len(left) < len(of)))
        return read

    def _number(self, label: str, text: Text) -> int:
        if label not in self._index:
            known = ", ".join(self._labels[:10])
            raise DataError(f"{text.place}: label {label!r} is not in the training data; known are {known}")
        return self._index[label]
