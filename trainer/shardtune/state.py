"""What a run is at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Position and counts since the start of the run; advanced by the loop only, but for what an evaluation resets."""

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
    digest: int = 0
    """Of the examples of all steps, in order: the same for runs that were given the same examples."""
    seconds: float = 0.0
    """Since the first step began, evaluating and saving included, over all parts of the run."""
    recent_loss: float = 0.0
    """Sum of the losses of the steps since validation was last judged."""
    recent_steps: int = 0
    """How many these are."""

    def epochs(self, examples: int | None) -> float:
        """Passes over the training data, with the fraction of the one under way, which visits `examples`.

        None: that is not known; then it is taken to be as long as those before, and the first one has no fraction.
        """
        if examples is None:
            examples = (self.examples - self.cursor) // self.epoch if self.epoch else None
        return self.epoch + (min(self.cursor / examples, 1.0) if examples else 0.0)
