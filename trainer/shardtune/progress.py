"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


class Progress:
    """The steps of a run, on `stream`: a bar if it is a terminal, otherwise a line now and then."""

    def __init__(
        self, total_steps: int, first_step: int, enabled: bool, every: int, stream: TextIO | None = None
    ) -> None:
        """`first_step`: steps done before, in an earlier part of the run. `enabled`: False on all ranks but
        one. `every`: steps between two plain lines; the first and the last step always have one. `stream`:
        standard error by default. The time per step is counted from here on."""
        self._total = total_steps
        self._first = first_step
        self._enabled = enabled
        self._every = every
        self._stream = sys.stderr if stream is None else stream
        self._terminal = enabled and _can_show_bars(self._stream)
        self._begun = time.monotonic()
        self._evaluating_seconds = 0.0
        self._bar: tqdm | None = None
        if self._terminal:
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done, with figures of the last one."""
        if not self._enabled:
            return
        speed, left = f"{tokens_per_second:,.0f} tokens/s", f"{duration(self.seconds_left(step))} left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}, {left}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif not self._terminal and (step in (self._first + 1, self._total) or step % self._every == 0):
            self.say(f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.3g}  {speed}  {left}")

    def seconds_left(self, step: int) -> float:
        """Seconds for the steps after `step` at the mean speed so far; evaluations are not counted."""
        spent = time.monotonic() - self._begun - self._evaluating_seconds
        return spent / max(step - self._first, 1) * max(self._total - step, 0)

    def say(self, text: str) -> None:
        """Prints `text` as lines of its own, above the bar."""
        if self._terminal:
            tqdm.write(text, file=self._stream)
        elif self._enabled:
            self._stream.write(text + "\n")
            self._stream.flush()

    @contextmanager
    def evaluating(self, split: str, total: int) -> Iterator[Callable[[int], None]]:
        """Surrounds an evaluation of `total` examples: gives a function to call with the number of examples
        just done. On a terminal a second bar shows them, and is gone afterwards."""
        begun = time.monotonic()
        bar: tqdm | None = None
        if self._terminal:
            bar = tqdm(
                total=total,
                desc=f"evaluating {split}",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            )

        def advance(examples: int) -> None:
            if bar is not None:
                bar.update(examples)

        try:
            yield advance
        finally:
            if bar is not None:
                bar.close()
            self._evaluating_seconds += time.monotonic() - begun

    def close(self) -> None:
        """Leaves the bar as it is and goes to the next line; `say` and `evaluating` still work."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _can_show_bars(stream: TextIO) -> bool:
    if not stream.isatty():
        return False
    try:
        # `script` and some containers give a terminal of no size, on which tqdm shows nothing at all.
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return True


def duration(seconds: float) -> str:
    """Minutes and seconds (2:31), from an hour on with hours (1:02:31)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
