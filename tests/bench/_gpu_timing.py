"""Timing on a GPU, ours and peers' in turn; without one the same code runs on a CPU, to try it out.

The clock is the GPU's own: an event before each call and one after. Between calls a buffer larger than the L2 cache is
written, so that each call reads its inputs from memory, and the CPU gets ahead of the GPU, so that a short operation
is not timed as the launches that precede it. Work of the host and the GPU together is timed by the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardtune_kernels._launch import INTERPRETED

ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLUSH_BYTES = 256 << 20
"""More than the L2 cache of any GPU today."""
Work = Callable[[], Any]


def in_turn(
    sides: Mapping[str, Work], rounds: int = 30, warm_up: int = 5, hosts_clock: bool = not ON_GPU
) -> dict[str, float]:
    """Median milliseconds of each side, which run A B C A B C …"""
    for _ in range(warm_up):
        for side in sides.values():
            side()
    taken = (_hosts_clock if hosts_clock else _gpu_clock)(sides, rounds)
    return {name: statistics.median(times) for name, times in taken.items()}


def _gpu_clock(sides: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=DEVICE)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(1_000_000)  # cycles: longer than the CPU needs to launch what is timed
            begin.record()
            side()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def _hosts_clock(sides: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            _wait()
            begun = time.perf_counter()
            side()
            _wait()
            taken[name].append((time.perf_counter() - begun) * 1e3)
    return taken


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def copy_bandwidth() -> float | None:
    """Bytes read and written a second by the copy of a large buffer; None without a GPU."""
    if not ON_GPU:
        return None
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / in_turn({"copy": lambda: target.copy_(source)}, rounds=10)["copy"] * 1e3


def peak_bytes(work: Work) -> int | None:
    """What the allocator handed out at most during one call, beyond what was there before; None without a GPU."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
