"""What each rank tells of itself with every step: how long it computed by itself, and what its device has used.

It goes with the sums that ranks make anyhow when a step begins, so it costs no exchange of its own; the times of a GPU
are those of events in its stream, which are over when they are read, so it waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardtune.energy import EnergyMeter
from shardtune.world import World


class RankFigures:
    """Implements the Telling protocol of the loop."""

    def __init__(self, world: World, in_step: bool, joules: float = 0.0) -> None:
        """`in_step`: forward passes need all ranks, so their time is not a rank's own. `joules`: used by earlier parts
        of the run."""
        self._world = world
        self._times_forward = world.size > 1 and not in_step
        self._meter = EnergyMeter(world.device)
        self._joules_before = joules
        self._joules: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0
        self._forward = 0.0
        self._told = -1
        self._sums = [0.0] * world.size

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Surrounds the forward pass of a micro-batch."""
        if not self._times_forward:
            yield
        elif self._world.device.type == "cuda":
            if self._used == len(self._events):
                self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            begin, end = self._events[self._used]
            self._used += 1
            begin.record()
            yield
            end.record()
        else:
            begun = time.perf_counter()
            yield
            self._forward += time.perf_counter() - begun

    def own(self, waited: float) -> list[float]:
        """To be summed over ranks when a step begins. `waited`: seconds for its data; added to them are those of the
        forward passes of the step before."""
        forward = self._forward + sum(begin.elapsed_time(end) for begin, end in self._events[: self._used]) / 1000
        self._forward, self._used = 0.0, 0
        mine = [0.0] * self._world.size
        mine[self._world.rank] = waited + forward
        joules = self._meter.joules()
        return [*mine, float(joules is not None), joules or 0.0]

    def told(self, sums: list[float]) -> None:
        """Takes the sums. The first step's are left out: there was no forward pass before."""
        *times, telling, joules = sums
        self._joules = self._joules_before + joules if telling == self._world.size else None
        self._told += 1
        if self._told:
            self._sums = [total + seconds for total, seconds in zip(self._sums, times, strict=True)]

    def since(self) -> dict[str, float]:
        """Of the steps since this was asked before: the rank that computed longest by itself, and by which share of the
        ranks' mean that was longer; and the joules of all devices since the run's first step, where all tell them."""
        figures: dict[str, float] = {}
        mean = sum(self._sums) / len(self._sums)
        if self._world.size > 1 and mean > 0:
            longest = max(self._sums)
            figures["slowest_rank"] = self._sums.index(longest)
            figures["slowest_rank_share"] = longest / mean - 1
        self._sums = [0.0] * self._world.size
        if self._joules is not None:
            figures["energy_joules"] = self._joules
        return figures
