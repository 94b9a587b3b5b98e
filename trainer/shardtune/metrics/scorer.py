"""All scores of a run's metrics, from sums over examples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardtune.metrics import names as known
from shardtune.metrics.own import check_own

if TYPE_CHECKING:
    from shardtune.metrics.summed import SummedMetric

Floats = NDArray[np.float64]
LOSS_COLUMNS = 2
HIGHEST_LOSS = 700.0
"""exp of more is beyond float64."""
OF_LABELS = ("macro_f1", "micro_f1", "matthews")


class _Group(NamedTuple):
    """Metrics with the same statistics."""

    metrics: list[SummedMetric]
    columns: slice


class Scorer:
    """Turns predictions into statistics, one float64 row of K columns for each example, and sums of rows into scores.

    A score depends on nothing but the sum of rows and their number. So rows may be made in parts and added up on the
    way, and `counts @ statistics` is all that a bootstrap needs. Columns 0 and 1 are the example's loss and its number
    of targets; the others belong to the metrics, those with the same statistics sharing them.
    """

    def __init__(self, metrics: Sequence[str], labels: Sequence[str] = ()) -> None:
        """`metrics`: names of `evaluation.metrics`. `labels`: the class labels, which fix the columns; macro_f1,
        micro_f1 and matthews need them. Making a scorer is cheap: `evaluate` is imported when it is first used.

        Raises ValueError for an unknown name and for absent labels, ConfigError for a metric of your own that is not
        there or does not work.
        """
        self.names = known.score_names(metrics)
        """Of all scores: "loss", then those of the metrics in their order."""
        self._wanted = list(dict.fromkeys(metrics))
        self._labels = tuple(labels)
        need = [name for name in self._wanted if name in OF_LABELS]
        if need and not self._labels:
            raise ValueError(f"{', '.join(need)} cannot be computed without the class labels")
        check_own(self._wanted)

    def lower_is_better(self, name: str) -> bool:
        """Whether a smaller value of the score is the better one."""
        return known.lower_is_better(name)

    def has_direction(self, name: str) -> bool:
        """Whether one value of the score can be better than another."""
        return known.has_direction(name)

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], losses: Floats | None = None
    ) -> Floats:
        """float64 [n, K], a row for each example.

        `references`: the right predictions of each example. `losses`: float64 [n, 2], the loss of each and its targets;
        None: there is no loss. Without metrics of predictions, those are not read and may be empty.

        Raises ValueError where numbers differ, ConfigError where a metric of your own fails.
        """
        from shardtune.metrics.summed import as_lists

        examples = len(predictions) if losses is None or self._groups else len(losses)
        lengths = {examples, *([len(predictions), len(references)] if self._groups else ())}
        lengths |= set() if losses is None else {len(losses)}
        if len(lengths) > 1:
            numbers = f"{len(predictions)} predictions, {len(references)} references"
            raise ValueError(numbers + ("" if losses is None else f", {len(losses)} losses"))
        parts = [np.zeros((examples, LOSS_COLUMNS)) if losses is None else np.asarray(losses, np.float64)]
        lists = as_lists(references)
        parts += [group.metrics[0].statistics(predictions, lists) for group in self._groups]
        return np.concatenate(parts, axis=1)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """The scores by name, each [...], from sums [..., K] of rows and the numbers of rows [...].

        loss and perplexity are left out where no sum has a target; where only some have none, those are NaN. Without
        rows, where counts is 0, scores mean nothing.
        """
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        found = self._losses(sums)
        for metrics, part in self._parts(sums):
            for metric in metrics:
                found |= metric.values(part, counts)
        return {name: found[name] for name in self.names if name in found}

    def scores(self, statistics: Floats) -> dict[str, float]:
        """The scores of all rows together; none without rows."""
        if not len(statistics):
            return {}
        values = self.values(statistics.sum(0), np.float64(len(statistics)))  # pyright: ignore[reportArgumentType]
        return {name: float(value) for name, value in values.items()}

    def each(self, name: str, statistics: Floats) -> Floats:
        """Of every example, [n], how good its prediction is by the score called `name`, in the score's own direction:
        the score of that example alone. One example has no matthews and no pearson: there it is 1 for a right label,
        and minus the squared difference. Raises KeyError where there is no such score.
        """
        found: Mapping[str, Floats] = self._losses(statistics)
        for metrics, part in self._parts(statistics):
            for metric in metrics:
                found = {**found, **metric.each(part)}
        return found[name]

    def _losses(self, sums: Floats) -> dict[str, Floats]:
        loss, targets = sums[..., 0], sums[..., 1]
        if not np.any(targets):
            return {}
        mean = np.divide(loss, targets, out=np.full(np.shape(loss), np.nan), where=targets != 0)
        return {known.LOSS: mean, "perplexity": np.exp(np.minimum(mean, HIGHEST_LOSS))}

    def _parts(self, sums: Floats) -> Iterator[tuple[list[SummedMetric], Floats]]:
        """Each group's metrics, with its columns."""
        expected = self._groups[-1].columns.stop if self._groups else LOSS_COLUMNS
        if sums.shape[-1] != expected:
            raise ValueError(f"{sums.shape[-1]} columns of statistics, not {expected}")
        for group in self._groups:
            yield group.metrics, sums[..., group.columns]

    @cached_property
    def _groups(self) -> list[_Group]:
        """The metrics of predictions, those with the same statistics together."""
        together: dict[str, list[SummedMetric]] = {}
        # A metric makes a folder even when it keeps its data in memory, by default under the user's home.
        with tempfile.TemporaryDirectory(prefix="shardtune-metrics-") as folder:
            for name in self._wanted:
                if name != "perplexity":
                    metric = self._made(name, {"keep_in_memory": True, "cache_dir": folder, "seed": 0})
                    together.setdefault(metric.statistics_of or name, []).append(metric)
        groups, start = [], LOSS_COLUMNS
        for metrics in together.values():
            columns = metrics[0].columns
            groups.append(_Group(metrics, slice(start, start + columns)))
            start += columns
        return groups

    def _made(self, name: str, settings: dict[str, Any]) -> SummedMetric:
        from shardtune.metrics import labels, regression, tags, texts
        from shardtune.metrics.owned import OwnMetric

        if ":" in name:
            return OwnMetric(name, **settings)
        if name in OF_LABELS:
            classes = {"macro_f1": labels.MacroF1, "micro_f1": labels.MicroF1, "matthews": labels.Matthews}
            return classes[name](self._labels, **settings)
        return {
            "rouge": texts.Rouge,
            "bleu": texts.Bleu,
            "chrf": texts.Chrf,
            "exact_match": texts.ExactMatch,
            "squad_em": texts.SquadEm,
            "token_f1": texts.TokenF1,
            "length": texts.Length,
            "accuracy": labels.Accuracy,
            "entity_f1": tags.EntityF1,
            "token_accuracy": tags.TokenAccuracy,
            "mse": regression.Mse,
            "pearson": regression.Pearson,
        }[name](**settings)
