"""MLflow, by its own settings."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardtune.tracking.run_id import remember, remembered
from shardtune.tracking.tracker import Histogram, leaves

POINTS_AT_ONCE = 1000
PARAMETERS_AT_ONCE = 100
"""As many as MLflow takes in one request."""
LONGEST_PARAMETER = 6000
"""Characters of a parameter's value that MLflow keeps."""


class MlflowTracker:
    """An MLflow run; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables say where.

    Texts and histograms, for which MLflow has no series, are files among the run's artifacts. Each call waits for the
    service, and all are made by one thread, which MLflow knows the run under way by: see `Sending`.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        """`folder`: the run's. `goes_on`: the MLflow run that was begun in it is gone on with."""
        self._folder = folder
        self._id = remembered(folder, "mlflow") if goes_on else None
        self._client: Any = None

    def start(self, config: dict[str, Any]) -> None:
        """Begins or goes on. The config's values are the run's parameters, which MLflow lets nobody change: where they
        are others after a resume, config.json among the artifacts has them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SQLAlchemy, about MLflow's use of it
            import mlflow
            from mlflow.entities import Param

            for name in ("mlflow", "alembic"):  # they tell of every table that they make
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = mlflow.MlflowClient()
            run = mlflow.start_run(self._id, run_name=None if self._id is not None else config.get("name"))
        self._id = run.info.run_id
        remember(self._folder, "mlflow", self._id)
        there = run.data.params
        parameters = [
            Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in leaves(config) if key not in there
        ]  # fmt: skip
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        self._client.log_dict(self._id, config, "config.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in values.items()]
        for start in range(0, len(points), POINTS_AT_ONCE):
            self._client.log_batch(self._id, metrics=points[start : start + POINTS_AT_ONCE])

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Writes a Markdown file of all of them."""
        if texts:
            whole = "\n\n".join(f"## {index}\n\n{text}" for index, text in enumerate(texts))
            self._client.log_text(self._id, whole + "\n", f"{name}/step-{step}.md")

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Writes a JSON file: of each histogram the edges and counts of the intervals that hold something."""
        found: dict[str, Any] = {}
        for name, histogram in values.items():
            (filled,) = histogram.counts.nonzero()
            low, high, counts = histogram.edges[filled], histogram.edges[filled + 1], histogram.counts[filled]
            found[name] = {"low": low.tolist(), "high": high.tolist(), "counts": counts.tolist()}
        self._client.log_text(self._id, json.dumps(found), f"histograms/step-{step}.json")

    def close(self, final: Mapping[str, float] | None) -> None:
        """Says how the run ended: MLflow's state of one that did not come to its end is KILLED, until it goes on. The
        last point of a curve is what MLflow compares runs by, so the final scores need no call of their own."""
        import mlflow

        mlflow.end_run("KILLED" if final is None else "FINISHED")
