"""What a run says of its training while it goes: the lines of metrics.jsonl and the progress bar."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence

import torch

from shardtune.flops import Work
from shardtune.loop import StepReport
from shardtune.progress import Progress
from shardtune.rank_figures import RankFigures
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
        ranks: RankFigures | None = None,
        work: Work | None = None,
        peaks: Sequence[float | None] = (),
    ) -> None:
        """`total_steps`: None where that is not known before. `examples_of`: how many examples an epoch visits, by its
        number, or None where that is not known before. `every`: steps between training lines. `ranks`: what these tell
        of themselves. `work`: what the model takes. `peaks`: operations a second of each rank's device, None where they
        are not known; the first rank needs them."""
        self._records = records
        self._progress = progress
        self._device = device
        self._state = state
        self._total_steps = total_steps
        self._examples_of = examples_of
        self._every = every
        self._ranks = ranks
        self._work = work
        self._peak = sum(peak or 0.0 for peak in peaks) if None not in peaks else 0.0
        self._devices = len(peaks)
        self._counts = state.tokens, state.target_tokens, state.examples
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
            **self._utilization(seconds),
            **memory(self._device),
            **(self._ranks.since() if self._ranks is not None else {}),
        }
        self._records.training(state.step, figures)

    def _utilization(self, seconds: float) -> dict[str, float]:
        """Of the steps since the line before: tokens of each device, and the share of what the devices could compute
        that the model's work took, where that is known."""
        state, before = self._state, self._counts
        self._counts = state.tokens, state.target_tokens, state.examples
        tokens, targets, examples = (now - then for now, then in zip(self._counts, before, strict=True))
        figures: dict[str, float] = {}
        if self._devices:
            figures["tokens_per_second_per_device"] = tokens / seconds / self._devices
        if self._work is not None and self._peak:
            figures["mfu"] = self._work.flops(tokens, targets, examples) / seconds / self._peak
        return figures


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of tensors on the device, and those that the allocator holds for them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_bytes": torch.cuda.memory_allocated(device),
        "memory_reserved_bytes": torch.cuda.memory_reserved(device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated on the device; on a CPU the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
