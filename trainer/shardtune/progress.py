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
    """The steps of a run, on `stream`: a bar if it is a terminal, otherwise a line now and then.

    Where the number of steps is not known the run has a limit of seconds, and the bar is of time.
    """

    def __init__(
        self,
        total_steps: int | None,
        first_step: int,
        enabled: bool,
        every: int,
        stream: TextIO | None = None,
        limit: float | None = None,
    ) -> None:
        """`first_step`: steps done before, in an earlier part of the run. `enabled`: False on all ranks but
        one. `every`: steps between two plain lines; the first and the last step always have one. `stream`:
        standard error by default. `limit`: seconds of the whole run, if `total_steps` is None. The time per step is
        counted from here on."""
        self._total = total_steps
        self._limit = limit
        self._first = first_step
        self._enabled = enabled
        self._every = every
        self._stream = sys.stderr if stream is None else stream
        self._terminal = enabled and _can_show_bars(self._stream)
        self._begun = time.monotonic()
        self._evaluating_seconds = 0.0
        self._bar: tqdm | None = None
        self._unsaid: str | None = None
        """The line of the last step, if it has not been said."""
        if self._terminal:
            shown = "{n_fmt}/{total_fmt}" if total_steps is not None else "{desc}"
            self._bar = tqdm(
                total=limit if total_steps is None else total_steps,
                initial=0 if total_steps is None else first_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=f"{{percentage:3.0f}}%|{{bar}}| {shown}{{postfix}}",
            )

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float, seconds: float = 0.0) -> None:
        """Shows that `step` steps are done, with figures of the last one; `seconds`: since the run's first one began,
        where these are what ends it."""
        if not self._enabled:
            return
        speed, left = f"{tokens_per_second:,.0f} tokens/s", f"{duration(self.seconds_left(step, seconds))} left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}, {left}", refresh=False)
            self._bar.set_description_str(f"step {step}", refresh=False)
            self._bar.update((step if self._limit is None else min(seconds, self._limit)) - self._bar.n)
        elif not self._terminal:
            number = f"{step}/{self._total}" if self._total is not None else str(step)
            self._unsaid = f"step {number}  loss {loss:.4f}  lr {lr:.3g}  {speed}  {left}"
            if step in (self._first + 1, self._total) or step % self._every == 0:
                self.say_last()

    def say_last(self) -> None:
        """The plain line of the last step, unless it is there: for the end of a run whose end was not known."""
        if self._unsaid is not None:
            self.say(self._unsaid)
            self._unsaid = None

    def seconds_left(self, step: int, seconds: float = 0.0) -> float:
        """Seconds for the steps after `step` at the mean speed so far, evaluations not counted; or until the limit,
        `seconds` after the run's first step began."""
        if self._limit is not None:
            return max(self._limit - seconds, 0.0)
        spent = time.monotonic() - self._begun - self._evaluating_seconds
        return spent / max(step - self._first, 1) * max((self._total or 0) - step, 0)

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
