"""Weights & Biases, by its own settings."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardtune.errors import ConfigError
from shardtune.tracking.run_id import remember, remembered
from shardtune.tracking.tracker import Histogram


class WandbTracker:
    """A W&B run; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and its settings files say where.

    Its files are in `<folder>/wandb`, also those of an offline run, which `wandb sync` sends later. Every point has the
    run's step as `step`, and curves are drawn over it: W&B's own count of steps only rises, and would refuse points
    of steps that are done once more after a resume, or that come late. It sends from a process of its own.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        """`folder`: the run's. `goes_on`: the W&B run that was begun in it is gone on with."""
        self._folder = folder
        self._id = remembered(folder, "wandb") if goes_on else None
        self._run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        """Begins or goes on. Never asks at a terminal. Raises ConfigError where nobody is logged in, and the errors of
        W&B where it cannot be reached."""
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        mode = wandb.setup(settings).settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                "tracking.wandb: no W&B account is known here; `wandb login` or WANDB_API_KEY names one, "
                "WANDB_MODE=offline writes files that `wandb sync` sends later"
            )
        run_id = self._id or secrets.token_hex(4)
        self._run = wandb.init(
            id=run_id, name=config.get("name"), dir=str(self._folder), config=config, settings=settings,
            resume=None if self._id is None else "allow", allow_val_change=True,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")
        remember(self._folder, "wandb", run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        self._run.log({"step": step, **values})

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds a table with a row for each text."""
        import wandb

        if texts:
            rows: list[Any] = [[index, text] for index, text in enumerate(texts)]
            self._run.log({"step": step, name: wandb.Table(columns=["example", "text"], data=rows)})

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Adds each histogram, between the outermost intervals that hold something."""
        import wandb

        points = {}
        for name, histogram in values.items():
            (filled,) = histogram.counts.nonzero()
            if len(filled):
                first, last = filled[0], filled[-1] + 1
                pair = histogram.counts[first:last], histogram.edges[first : last + 1]
                points[name] = wandb.Histogram(np_histogram=pair)
        self._run.log({"step": step, **points})

    def close(self, final: Mapping[str, float] | None) -> None:
        """Waits until all is sent; a run that did not come to its end is marked as such."""
        if self._run is not None:
            self._run.summary.update(dict(final or {}))
            self._run.finish(exit_code=1 if final is None else 0)
