"""What the section `task` of a config has in every kind of task, and what it says of its task to the program."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from shardtune.row_fields import Fields
from shardtune.section import Positive, Section

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from shardtune.protocols import Task
    from shardtune.ragged import LayOut


WRITTEN = ("rouge", "bleu", "chrf", "exact_match", "token_f1", "length", "perplexity")
"""Metrics of written texts."""


class Parts(NamedTuple):
    """What a task is made of, beside its own keys."""

    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    """Of the model, with the labels of the task."""
    path: str
    """Of the model, for messages."""
    labels: Sequence[str]
    """The class labels of the training data, sorted; empty where targets name none."""
    lay_out: LayOut | None = None
    """Pads and packs batches on the device that computes them; None: the host does."""


class TaskSection(Section):
    """Keys that every task has."""

    kind: Any
    """What the model learns to do."""
    max_source_tokens: Positive = 512
    """Longest input, in tokens, special tokens included; longer ones are cut and keep their end token. Of `messages`
    the whole conversation, every turn: turns that go beyond it are left out."""
    truncation_side: Literal["right", "left"] = "right"
    """Which end of a long input is cut off; of `messages` the last turns, or the oldest after the system message."""

    head: ClassVar[str]
    """What the model ends in, of `heads.HEADS`."""
    packs: ClassVar[bool] = True
    """Whether examples can share a row, so that `data.batching: packed` works."""

    @property
    @abstractmethod
    def fields(self) -> Fields:
        """Which fields of a row make an example."""

    @property
    def asked(self) -> Fields:
        """The same of a row that has no target: the model is to find it."""
        return dataclasses.replace(self.fields, target=None)

    def source_of(self, text: str) -> str:
        """What the model is to read where a user gives one text on the command line. Raises ConfigError where that
        cannot be all."""
        return text

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...]:
        """The metrics that fit what the task predicts."""

    @property
    @abstractmethod
    def usual_scores(self) -> list[str]:
        """The metrics where none are named."""

    @property
    def least_labels(self) -> int:
        """How many labels the training data must have, where targets name any."""
        return 2

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """What an example's lengths, of source (0) and target (1), make of it: for each row of the model that it takes,
        those that stand in it one after the other."""
        return ((0,),)

    @property
    def longest_rows(self) -> tuple[int, ...]:
        """Tokens of each of these rows, at most."""
        return (self.max_source_tokens,)

    def fit(self, architecture: PreTrainedConfig, labels: Sequence[str]) -> None:
        """Gives the model's config what the task needs of it: an output for each label, by their names."""
        if self.fields.labels_of is not None:
            architecture.num_labels = len(labels)
            architecture.id2label = dict(enumerate(labels))
            architecture.label2id = {label: index for index, label in enumerate(labels)}

    @property
    def writes_texts(self) -> bool:
        """Whether the model generates what it predicts, so that the options of `evaluation` for texts mean
        something."""
        return False

    def problems(self) -> Iterator[tuple[str, str]]:
        """Which valid values cannot go together: pairs of (key, what is wrong with it)."""
        yield from ()

    @abstractmethod
    def make(self, parts: Parts) -> Task:
        """The task itself."""


class PromptedSection(TaskSection):
    """Keys of tasks whose input is a text: that of a field, or made of several by a template."""

    prompt: str | None = None
    """Template over the fields of a row, such as "Summarize: {document}", in place of the input field."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The keys of which exactly one, or else `prompt`, is given."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """There is one input."""
        yield from super().problems()
        given = [key for key in [*self.inputs, "prompt"] if getattr(self, key) is not None]
        wanted = " or ".join(f"task.{key}" for key in [*self.inputs, "prompt"])
        if len(given) != 1:
            problem = "give one, not " + " and ".join(f"task.{key}" for key in given) if given else "none is given"
            yield f"task.{given[-1]}" if given else "task", f"the input comes from exactly one of {wanted}; {problem}"
