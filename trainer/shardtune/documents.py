"""Where the examples of a packed micro-batch lie: one row holds them all, one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Documents:
    """Lengths of the examples of a packed row, in order."""

    source: tuple[int, ...]
    """Of the sources in [1, s]; of decoders, of source and target together."""
    target: tuple[int, ...] | None = None
    """Of the targets in [1, t]; None where there is one row only."""

    def to(self, device: torch.device) -> Documents:
        """The same documents, for a forward pass on `device`."""
        return self
