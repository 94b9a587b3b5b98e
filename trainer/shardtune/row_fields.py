"""Which fields of a row make an example: what a task says to those who read the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fields:
    """Which fields of a row make an example.

    Names may reach inside with dots: translation.de, answers.text.0; a field whose name itself holds the dots
    comes first.
    """

    input: str | None
    """The field with the source; None where `prompt` makes it."""
    prompt: str | None
    """Template over the fields, such as "Summarize: {document}"; {{ and }} are braces. None: see `input`."""
    target: str | None
    """The field with the target or the label; None where the source holds all."""
    messages: str | None = None
    """The field with a conversation, in place of all the others."""
    tools: str | None = None
    """Beside `messages`, the field with the schemas of the tools; None: there are no tools."""
    parts: tuple[str, ...] = ()
    """Fields that are read as they are, whatever their type, in place of all the others; `read` makes texts of them."""
    beside: tuple[str, ...] = ()
    """Fields whose values are kept beside each example, see `Text.beside`."""
    read: Callable[[Sequence[Any], Sequence[str]], tuple[str, str] | str] | None = field(default=None, compare=False)
    """From the values of `parts` and their places (FILE:LINE field `name`) to source and target; or the reason why the
    row is left out. Raises DataError naming the place of a value that cannot be used."""
    read_target: Callable[[Any, str], str] | None = field(default=None, compare=False)
    """From the target's value and its place to a text, where it is not read as one. Raises DataError naming the
    place."""
    labels_of: Callable[[str], Sequence[str]] | None = field(default=None, compare=False)
    """The class labels that a target names, of which those in the training data are all there are; None: targets are no
    labels."""

    @property
    def key(self) -> list[object]:
        """What examples depend on, for caches."""
        readers = [None if read is None else read.__qualname__ for read in (self.read, self.read_target)]
        return [
            self.input, self.prompt, self.target, self.messages, self.tools, self.parts, self.beside, *readers,
            self.labels_of is not None,
        ]  # fmt: skip
