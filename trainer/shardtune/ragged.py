"""Rows of different lengths on their way to a model: a flat stream, laid out where it is computed on.

A micro-batch's tokens go to a device as they are, without padding, all in one copy; what the model reads is made there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # so that reading and checking data does not wait for torch
    import torch
    from torch import Tensor


class Stream(NamedTuple):
    """Rows of tokens, one after the other, and what a batch takes of them once they are laid out."""

    tokens: Tensor
    """int32 [n]; `~id`, so negative, is read but not learned."""
    offsets: Tensor
    """int32 [b + 1]: where each row begins, and n."""
    learned_from: Tensor
    """int32 [b]: of each row, the first token that may be learned."""
    width: int | None
    """Of the padded rows, at least the longest one's; None: packed, all in one row without padding."""
    fill: int
    """What is read on padding, which is on the right."""
    start: int | None
    """What a decoder beside an encoder reads first: its inputs are shifted. None: labels are."""
    names: Mapping[str, str]
    """Arguments of the model's forward, and which field of `Rows` each one is."""
    labels: slice | None
    """Which columns of the labels are the batch's; None: it has others."""

    @property
    def slots(self) -> int:
        """Positions, padding included."""
        return len(self.tokens) if self.width is None else len(self.learned_from) * self.width


class Rows(Protocol):
    """A stream that is laid out, all int64: [b, width], or packed [1, n]."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor:
        """At each position what it is to predict: the next token, or, where the inputs are shifted, the one they were
        shifted from; IGNORED where that is not learned."""
        ...

    @property
    def attention_mask(self) -> Tensor:
        """1 where there is a token, 0 where there is padding."""
        ...

    @property
    def positions(self) -> Tensor:
        """Of each token in its own row."""
        ...


LayOut = Callable[[Stream], Rows]
"""Lays a stream out on the device that its tensors are on."""


@dataclass(frozen=True)
class Ragged:
    """The streams of one micro-batch."""

    streams: Sequence[Stream]
    flat: Tensor
    """int32: their tensors, one after the other."""
    lay_out: LayOut

    @classmethod
    def of(cls, streams: Sequence[Stream], lay_out: LayOut) -> Ragged:
        """These streams, whose tensors are on the host."""
        import torch

        return cls(streams, torch.cat([part for stream in streams for part in stream[:3]]), lay_out)

    def pin(self) -> Ragged:
        """The same in memory from which a GPU copies while it computes."""
        return replace(self, flat=self.flat.pin_memory())

    def blank(self) -> Ragged:
        """The same with nothing to learn."""
        return self.of([s._replace(learned_from=s.offsets.diff()) for s in self.streams], self.lay_out)

    def laid_out(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
        """Arguments of the model's forward, and the labels if they are of these streams: one copy to `device`, and
        `lay_out` once a stream."""
        sizes = [len(part) for stream in self.streams for part in stream[:3]]
        parts = iter(self.flat.to(device, non_blocking=True).split(sizes))
        inputs, labels = {}, None
        for stream in self.streams:
            rows = self.lay_out(stream._replace(tokens=next(parts), offsets=next(parts), learned_from=next(parts)))
            inputs |= {name: getattr(rows, field) for name, field in stream.names.items()}
            if stream.labels is not None:
                labels = rows.labels[:, stream.labels]
        return inputs, labels
