"""A label, some labels or a number for each text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shardtune.errors import DataError
from shardtune.examples import IGNORED, Batch, Encoded, Text, Tokens
from shardtune.kinds import kind
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.task.section import Parts, PromptedSection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from shardtune.ragged import LayOut

Problem = Literal["single_label", "multi_label", "regression"]
PROBLEM_TYPES: Any = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls them."""


class Config(PromptedSection):
    """A classification head over the text; the labels are those of the training data."""

    kind: Literal["classification"]
    """What the model learns to do."""
    text: str | None = None
    """Field with the text to classify."""
    label: str
    """Field with the label: a string, an integer or a boolean; of multi_label a list of them; of regression a
    number."""
    problem: Problem = "single_label"
    """single_label: one of several classes; multi_label: any number of them, none included; regression: a number."""

    head: ClassVar[str] = "classification"
    packs: ClassVar[bool] = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """One field."""
        return ("text",)

    @property
    def fields(self) -> Fields:
        """Text and label."""
        labels_of = {"single_label": one_label, "multi_label": several_labels}.get(self.problem)
        read_target = {"multi_label": read_labels, "regression": read_number}.get(self.problem)
        return Fields(self.text, self.prompt, self.label, labels_of=labels_of, read_target=read_target)

    @property
    def scores(self) -> tuple[str, ...]:
        """By the problem; the loss of one label is that of a word, so it has a perplexity."""
        return {
            "single_label": ("accuracy", "macro_f1", "micro_f1", "matthews", "perplexity"),
            "multi_label": ("accuracy", "macro_f1", "micro_f1"),
            "regression": ("mse", "pearson"),
        }[self.problem]

    @property
    def usual_scores(self) -> list[str]:
        """By the problem."""
        return {
            "single_label": ["accuracy", "macro_f1"],
            "multi_label": ["micro_f1", "macro_f1", "accuracy"],
            "regression": ["mse", "pearson"],
        }[self.problem]

    @property
    def least_labels(self) -> int:
        """Whether a single one holds is worth to be told, too."""
        return 1 if self.problem == "multi_label" else 2

    def fit(self, architecture: PreTrainedConfig, labels: Sequence[str]) -> None:
        """One output is for a number."""
        super().fit(architecture, labels)
        if self.problem == "regression":
            architecture.num_labels = 1
        # What others who load the result compute their loss by.
        architecture.problem_type = PROBLEM_TYPES[self.problem]

    def make(self, parts: Parts) -> Classification:
        """The task itself."""
        return Classification(parts.tokenizer, self.max_source_tokens, parts.labels, self.problem, parts.lay_out)


def one_label(target: str) -> list[str]:
    """The target is a label."""
    return [target]


def several_labels(target: str) -> list[str]:
    """The target is a JSON list of labels."""
    return json.loads(target)


def read_labels(value: Any, place: str) -> str:
    """A JSON list of the labels in a row's list, sorted, each once. Raises DataError where it is none."""
    if not isinstance(value, list):
        raise DataError(f"{place}: {kind(value)}, not a list of labels, which task.problem: multi_label needs")
    found = set()
    for number, label in enumerate(value, 1):
        if not isinstance(label, str | int) or not str(label).strip():
            raise DataError(f"{place}: label {number}: {kind(label)}, not a string, an integer or a boolean")
        found.add(str(label).lower() if isinstance(label, bool) else str(label))
    return json.dumps(sorted(found), ensure_ascii=False)


def read_number(value: Any, place: str) -> str:
    """A number, as Python writes it. Raises DataError where it is none."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place}: {kind(value)}, not a number, which task.problem: regression needs")
    return repr(number)


class Classification:
    """Implements the Task protocol; a target is the index of its label in `labels`, the indices of those that hold
    (multi_label), or the bits of a float32 (regression)."""

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        labels: Sequence[str],
        problem: Problem = "single_label",
        lay_out: LayOut | None = None,
    ) -> None:
        """`lay_out`: pads batches on the device that computes them; None: the host does."""
        self._tokenizer: Any = tokenizer
        self._limit = max_source_tokens
        self._lay_out = lay_out
        self._problem = problem
        self._labels = list(labels)
        self._index = {label: index for index, label in enumerate(self._labels)}

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """The text with the tokenizer's special tokens, and what stands for its labels or its number."""
        from shardtune.task.tokens import tokenize

        sources = tokenize(self._tokenizer, [text.source for text in texts], self._limit)
        return [Encoded(ids, self._target(text), cut, False) for text, (ids, cut) in zip(texts, sources, strict=True)]

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Right-padded texts [b, s], and class indices [b], or float32 values [b, c] and [b]; never packed."""
        import numpy as np
        import torch

        from shardtune.task.tokens import PADDED, laid_out, stream

        assert not packed
        source = stream([e.source for e in examples], self._tokenizer.pad_token_id, False, PADDED)
        targets = [np.asarray(e.target, dtype=np.int32) for e in examples]
        if self._problem == "single_label":
            labels = torch.tensor([int(target[0]) if len(target) else IGNORED for target in targets])
        elif self._problem == "regression":
            numbers = [target.view(np.float32) if len(target) else [np.nan] for target in targets]
            labels = torch.from_numpy(np.concatenate(numbers).astype(np.float32, copy=False))
        else:
            labels = torch.zeros(len(examples), len(self._labels))
            for row, target in zip(labels, targets, strict=True):
                row[torch.from_numpy(target).long()] = 1.0
        batch = Batch(
            inputs={},
            labels=labels,
            tokens=len(source.tokens),
            targets=len(examples),
            slots=source.slots,
        )
        return laid_out(batch, [source], self._lay_out)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cross entropy of each label; of several the mean of their binary ones; the squared error."""
        from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

        logits = model(**batch.inputs).logits.float()
        if self._problem == "single_label":
            return cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="none")
        wanted = ~batch.labels.isnan()
        values = batch.labels.where(wanted, 0.0)
        if self._problem == "regression":
            return mse_loss(logits.squeeze(-1), values, reduction="none") * wanted
        return (binary_cross_entropy_with_logits(logits, values, reduction="none") * wanted).mean(-1)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the texts."""
        return self.losses(model, batch).sum()

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """The most probable label of each text; a JSON list of those that are more probable than not; the number."""
        batch = self.collate(examples).to(next(model.parameters()).device)
        logits = model(**batch.inputs).logits.float()
        if self._problem == "regression":
            return [repr(round(value, 6)) for value in logits.squeeze(-1).tolist()]
        if self._problem == "single_label":
            return [self._labels[index] for index in logits.argmax(-1).tolist()]
        held = [
            [label for label, holds in zip(self._labels, row, strict=True) if holds] for row in (logits > 0).tolist()
        ]
        return [json.dumps(labels, ensure_ascii=False) for labels in held]

    def targets(self, example: Tokens) -> int:
        """One."""
        return 1

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """As they are."""
        return list(predictions)

    def references(self, text: Text) -> list[str]:
        """The label, a JSON list of them, or the number."""
        return [text.target]

    def _target(self, text: Text) -> list[int]:
        import numpy as np

        if not text.target:  # nobody knows it
            return []
        if self._problem == "regression":
            return np.array([float(text.target)], dtype=np.float32).view(np.int32).tolist()
        labels = one_label(text.target) if self._problem == "single_label" else several_labels(text.target)
        for label in labels:
            if label not in self._index:
                known = ", ".join(self._labels[:10])
                raise DataError(f"{text.place}: label {label!r} is not in the training data; known are {known}")
        return [self._index[label] for label in labels]
