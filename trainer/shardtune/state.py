"""What a run is at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Position and counts since the start of the run; advanced by the loop only."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Passes over the training data begun and finished."""
    cursor: int = 0
    """Examples of the current epoch already used."""
    examples: int = 0
    tokens: int = 0
    """Source and target tokens that are not padding."""
    target_tokens: int = 0

    def epochs(self, examples_per_epoch: int) -> float:
        """Passes over the training data, with the fraction of the one under way."""
        return self.epoch + self.cursor / examples_per_epoch
