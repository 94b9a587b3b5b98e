"""When a run is judged, and what comes of it: its evaluations, and the table of before and after."""

from __future__ import annotations

from collections.abc import Sequence

from shardtune.evaluation import SPEEDS, Contender, Evaluator, Prediction, Split
from shardtune.progress import Progress
from shardtune.records import Records
from shardtune.state import TrainingState
from shardtune.text_table import table

SHOWN_PREDICTIONS = 5
"""How many predictions of a split go to the trackers as text."""


class Judge:
    """Every rank makes the same calls; the first one writes and speaks."""

    def __init__(
        self,
        evaluator: Evaluator,
        splits: Sequence[Split],
        records: Records,
        progress: Progress,
        state: TrainingState,
        total_steps: int | None,
        every: int,
    ) -> None:
        """`total_steps`: None where that is not known before; `every`: steps between evaluations of validation."""
        self._evaluator = evaluator
        self._splits = splits
        self._records = records
        self._progress = progress
        self._state = state
        self._total_steps = total_steps
        self._every = every
        self._history: dict[str, list[tuple[int, dict[str, float]]]] = {split.name: [] for split in splits}
        """Of the model as it was at each step; the same on every rank."""
        for line in records.evaluations:
            if line["split"] in self._history and "of" not in line:
                scores = {key: value for key, value in line.items() if key not in ("step", "split", *SPEEDS)}
                self._history[line["split"]].append((line["step"], scores))

    def before_training(self, contenders: Sequence[Contender] = ()) -> bool:
        """Judges what tuning is compared with; returns what `after_training` does."""
        return self._evaluate(self._splits) and all(self._contend(contender) for contender in contenders)

    def _contend(self, contender: Contender) -> bool:
        for split in self._splits:
            with self._progress.evaluating(split.name, split.examples) as advance:
                judged = contender.judge(split, advance)
            if judged is None:
                return False
            for note in judged.notes:
                self._progress.say(note)
            shown = [_as_text(prediction) for prediction in judged.predictions[:SHOWN_PREDICTIONS]]
            figures = judged.scores | judged.speeds
            self._records.evaluation(self._state.step, split.name, figures, contender.name, shown)
            scores = "  ".join(f"{key} {value:.4f}" for key, value in judged.scores.items())
            self._progress.say(f"{split.name} by {contender.name}  {scores}")
        return True

    def where_due(self) -> None:
        """On the way: after a step, and where a run begins whose evaluation of that step was cut off."""
        step = self._state.step
        if step > 0 and step % self._every == 0 and step != self._total_steps:
            self._evaluate([split for split in self._splits if split.name == "validation"])

    def after_training(self) -> bool:
        """Judges all splits. False: a rank was told to stop meanwhile, so that not all of them were judged."""
        return self._evaluate(self._splits)

    def before_and_after(self) -> str:
        """A table of the first and the last evaluation of every split."""
        rows = []
        for name, history in self._history.items():
            if not history:
                continue
            first, last = history[0], history[-1]
            before = first[1] if first[0] == 0 and len(history) > 1 else {}
            for key, value in last[1].items():
                rows.append([name, key, f"{before[key]:.4f}" if key in before else "-", f"{value:.4f}"])
        return table(rows, ["split", "metric", "before", "after"]) if rows else ""

    def _evaluate(self, splits: Sequence[Split]) -> bool:
        """Judges the splits at the present step, unless that was done."""
        step = self._state.step
        for split in splits:
            history = self._history[split.name]
            if history and history[-1][0] == step:
                continue
            with self._progress.evaluating(split.name, split.examples) as advance:
                judged = self._evaluator.run(f"step-{step}", split, advance)
            if judged is None:
                self._progress.say(f"{split.name} at step {step} left out: the run was told to stop")
                return False
            history.append((step, judged.scores))
            shown = [_as_text(prediction) for prediction in judged.predictions[:SHOWN_PREDICTIONS]]
            for note in judged.notes:
                self._progress.say(note)
            self._records.evaluation(step, split.name, judged.scores | judged.speeds, shown=shown)
            figures = "  ".join(f"{key} {value:.4f}" for key, value in judged.scores.items())
            self._progress.say(f"{split.name} at step {step}  {figures}")
        return True


def _as_text(prediction: Prediction) -> str:
    return f"**prediction** {prediction.prediction}\n\n**reference** {prediction.reference}\n\n{prediction.source}"
