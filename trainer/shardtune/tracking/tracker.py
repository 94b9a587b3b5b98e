"""What a tracker is: somewhere that shows curves, texts and histograms while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Histogram(NamedTuple):
    """How many values lie in each of some intervals, and what they add up to."""

    edges: NDArray[np.float64]
    """[k + 1], rising: interval i is from edge i to below edge i + 1. All are finite."""
    counts: NDArray[np.float64]
    """[k]: whole numbers."""
    sum: float
    squares: float
    """The sum of the values' squares."""


class Tracker(Protocol):
    """Four calls for every tracker, and a fifth, `histograms`, that only runs with `tracking.histograms` make.

    All are made by one process, in the order of the steps; after a resume, from the checkpoint's step on again.
    """

    def start(self, config: dict[str, Any]) -> None:
        """Begins the run, or goes on with it; `config` is the resolved config, as plain values."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve; names look like train/loss and validation/rougeL."""
        ...

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds sample texts, which may be Markdown; a position shows the same example at each step."""
        ...

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Adds a histogram to each series; names look like gradients/encoder.block.0.…"""
        ...

    def close(self, final: Mapping[str, float] | None) -> None:
        """Writes out what is left. `final`: the last scores of the run, by the names of their curves, empty where it
        had none; None where it did not come to its end."""
        ...


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """The values of a config by their dotted keys; lists as JSON, and those that are null left out."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (str, bool, int, float)):
            yield prefix + key, value
        elif value is not None:
            yield prefix + key, json.dumps(value, ensure_ascii=False)
