"""What a run says of its training while it goes: the lines of metrics.jsonl and the progress bar."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch

from shardtune.loop import StepReport
from shardtune.progress import Progress
from shardtune.records import Records
from shardtune.state import TrainingState


class Reporter:
    """Writes on the first rank and is silent on the others."""

    def __init__(
        self,
        records: Records,
        progress: Progress,
        device: torch.device,
        state: TrainingState,
        total_steps: int | None,
        examples_of: Callable[[int], int | None],
        every: int,
    ) -> None:
        """`total_steps`: None where that is not known before. `examples_of`: how many examples an epoch visits, by its
        number, or None where that is not known before. `every`: steps between training lines."""
        self._records = records
        self._progress = progress
        self._device = device
        self._state = state
        self._total_steps = total_steps
        self._examples_of = examples_of
        self._every = every
        self._since: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        """Logs where that is due."""
        state = self._state
        self._since.append(report)
        tokens_per_second = sum(r.tokens for r in self._since) / sum(r.seconds for r in self._since)
        if state.step in (1, self._total_steps) or state.step % self._every == 0:
            self._log()
        # The state's seconds are those at which the step began.
        ended = state.seconds + report.seconds
        self._progress.step(state.step, report.loss, report.lr, tokens_per_second, ended)

    def after_training(self) -> None:
        """Logs the last step, where that was not known for the last."""
        if self._since:
            self._log()
        self._progress.say_last()

    def _log(self) -> None:
        """A line of the last step, with the means of the steps since the line before."""
        since, self._since = self._since, []
        state, report, seconds = self._state, since[-1], sum(r.seconds for r in since)
        figures = {
            "epoch": round(state.epochs(self._examples_of(state.epoch)), 6),
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "examples": state.examples,
            "tokens": state.tokens,
            "target_tokens": state.target_tokens,
            "examples_digest": state.digest,
            "padding_share": report.padding_share,
            "step_seconds": seconds / len(since),
            "data_seconds": sum(r.data_seconds for r in since) / len(since),
            "tokens_per_second": sum(r.tokens for r in since) / seconds,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }
        self._records.training(state.step, figures)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated on the device; on a CPU the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
