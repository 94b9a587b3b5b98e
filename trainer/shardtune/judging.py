"""When a run is judged, and what follows for its training: the best step, the end, a warning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardtune.best import Best
from shardtune.evaluation import SPEEDS, Contender, Evaluator, Judged, Prediction, Split
from shardtune.overfitting import PARTED, TRAINING, Noise, Parted, Watch
from shardtune.progress import Progress
from shardtune.records import Records
from shardtune.state import TrainingState

SHOWN_PREDICTIONS = 5
"""How many predictions of a split go to the trackers as text."""
WATCHED = "validation"
"""The split that decides which step is the best, and when training has gone on for too long."""
BEST = "best"
"""What the model of the best step is called, where it is judged after later steps."""
NO_SCORES = ("step", "split", "of", *SPEEDS, TRAINING, PARTED)
"""Of an evaluation line."""


class Judge:
    """Every rank makes the same calls and knows the same scores; the first one writes and speaks."""

    def __init__(
        self,
        evaluator: Evaluator,
        splits: Sequence[Split],
        records: Records,
        progress: Progress,
        state: TrainingState,
        total_steps: int | None,
        every: int,
        best: Best | None = None,
        keeps: bool = False,
        kept: Callable[[int], bool] = lambda step: True,
        noise: Noise = lambda first, second: None,
    ) -> None:
        """`total_steps`: None where that is not known before; `every`: steps between evaluations of validation.

        `best`: is told the scores of validation; `keeps`: whether the model of the best step is kept; `kept`: whether
        that of an earlier step can still be had.
        `noise`: as the first rank knows it.
        """
        self._evaluator = evaluator
        self._splits = splits
        self._records = records
        self._progress = progress
        self._state = state
        self._total_steps = total_steps
        self._every = every
        self.best = best
        self._keeps = keeps
        self._watch = Watch(noise)
        self._said_enough = False
        self.history: dict[str, list[tuple[int, dict[str, float]]]] = {split.name: [] for split in splits}
        """Of the model as it was at each step; the same on every rank."""
        self.contended: dict[str, dict[str, tuple[int, dict[str, float]]]] = {split.name: {} for split in splits}
        """By their names, the step at which others were judged, and their scores."""
        for line in records.evaluations:
            if line["split"] in self.history:
                scores = {key: value for key, value in line.items() if key not in NO_SCORES}
                self._know(line["split"], line["step"], scores, line.get("of"))
                if line["split"] == WATCHED and "of" not in line:
                    self._watch.recall(line)
                    if best is not None and line["step"] > 0:
                        best.add(line["step"], scores.get(best.score), kept(line["step"]))

    def before_training(self, contenders: Sequence[Contender] = ()) -> bool:
        """Judges what tuning is compared with; returns what `after_training` does."""
        if not self._evaluate(self._splits):
            return False
        return all(self._contend(contender) for contender in contenders)

    def where_due(self) -> None:
        """On the way: after a step, and where a run begins whose evaluation of that step was cut off."""
        step = self._state.step
        if step > 0 and step % self._every == 0 and step != self._total_steps:
            self._evaluate([split for split in self._splits if split.name == WATCHED])

    def after_training(self) -> bool:
        """Judges all splits. False: a rank was told to stop meanwhile, so that not all of them were judged."""
        return self._evaluate(self._splits)

    def of_best(self) -> bool:
        """Judges the model of the best step, now that it is here, on the splits that it was not judged on. Returns what
        `after_training` does."""
        contender = Contender(BEST, lambda split, advance: self._evaluator.run(BEST, split, advance))
        return self._contend(contender, [split for split in self._splits if split.name != WATCHED])

    def is_best(self) -> bool:
        """Whether the present step is the best so far, and so to be kept."""
        return self._keeps and self.best is not None and self.best.step == self._state.step

    def best_until(self, step: int) -> int | None:
        """The best step to keep of those up to one."""
        ranked = self.best.ranked(step) if self._keeps and self.best is not None else []
        return ranked[0] if ranked else None

    def is_enough(self) -> bool:
        """Whether there is no hope for a better step; says so, once."""
        best = self.best
        if best is None or not best.hopeless:
            return False
        if not self._said_enough:
            value = "" if best.value is None else f" than {best.value:.4f} at step {best.step:,}"
            self._progress.say(
                f"training ends at step {self._state.step:,}: {best.score} of validation was not better{value} in "
                f"{best.patience} evaluations (evaluation.patience)"
            )
        self._said_enough = True
        return True

    def _evaluate(self, splits: Sequence[Split]) -> bool:
        """Judges the splits at the present step, unless that was done."""
        step = self._state.step
        for split in splits:
            history = self.history[split.name]
            if history and history[-1][0] == step:
                continue
            judged = self._judged(split, lambda split, advance: self._evaluator.run(f"step-{step}", split, advance))
            if judged is None:
                return False
            beside, found = self._follow(judged.scores) if split.name == WATCHED else ({}, None)
            self._write(split, judged, f"at step {step}", None, beside)
            if found is not None:
                self._progress.say(f"warning: {found}")
        return True

    def _contend(self, contender: Contender, splits: Sequence[Split] | None = None) -> bool:
        """The same of something else."""
        for split in self._splits if splits is None else splits:
            done = self.contended[split.name].get(contender.name)
            if done is not None and done[0] == self._state.step:
                continue
            judged = self._judged(split, contender.judge)
            if judged is None:
                return False
            self._write(split, judged, f"by {contender.name}", contender.name, {})
        return True

    def _judged(self, split: Split, judge: Callable[[Split, Callable[[int], None]], Judged | None]) -> Judged | None:
        with self._progress.evaluating(split.name, split.examples) as advance:
            judged = judge(split, advance)
        if judged is None:
            self._progress.say(f"{split.name} at step {self._state.step} left out: the run was told to stop")
        return judged

    def _write(self, split: Split, judged: Judged, when: str, of: str | None, beside: dict[str, float]) -> None:
        step = self._state.step
        self._know(split.name, step, judged.scores, of)
        for note in judged.notes:
            self._progress.say(note)
        shown = [_as_text(prediction) for prediction in judged.predictions[:SHOWN_PREDICTIONS]]
        self._records.evaluation(step, split.name, judged.scores | judged.speeds | beside, of=of, shown=shown)
        figures = "  ".join(f"{key} {value:.4f}" for key, value in judged.scores.items())
        self._progress.say(f"{split.name} {when}  {figures}")

    def _know(self, split: str, step: int, scores: dict[str, float], of: str | None) -> None:
        if of is None:
            self.history[split].append((step, scores))
        else:
            self.contended[split][of] = step, scores

    def _follow(self, scores: dict[str, float]) -> tuple[dict[str, float], Parted | None]:
        """What an evaluation of validation means for the rest of training: what its line is to say beside, and a
        warning."""
        state, beside = self._state, dict[str, float]()
        training = state.recent_loss / state.recent_steps if state.recent_steps else None
        state.recent_loss, state.recent_steps = 0.0, 0
        if training is not None:
            beside[TRAINING] = training
        if self.best is not None and state.step > 0:
            self.best.add(state.step, scores.get(self.best.score))
        found = self._watch.judged(state.step, scores["loss"], training) if "loss" in scores else None
        if found is not None:
            beside[PARTED] = found.lowest.step
        return beside, found


def _as_text(prediction: Prediction) -> str:
    return f"**prediction** {prediction.prediction}\n\n**reference** {prediction.reference}\n\n{prediction.source}"
