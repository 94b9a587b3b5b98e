"""Timing of operations on a GPU, ours and peers' in turn; with `--small` the same code runs on a CPU, to try it out.

The clock is the GPU's own: an event before each call and one after. Between calls a buffer larger than the L2 cache is
written, so that each call reads its inputs from memory, and the CPU gets ahead of the GPU, so that a short operation
is not timed as the launches that precede it. `copy_bandwidth` is what a target in bytes counts with.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
import triton
from torch import Tensor

from shardtune_kernels._launch import INTERPRETED

ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLUSH_BYTES = 256 << 20
"""More than the L2 cache of any GPU today."""
Work = Callable[[], Any]


def in_turn(sides: Mapping[str, Work | None], rounds: int = 30, warm_up: int = 5) -> dict[str, float | None]:
    """Median milliseconds of each side, which run A B C A B C …; None of a side that is None: it is not installed."""
    found = {name: side for name, side in sides.items() if side is not None}
    for _ in range(warm_up):
        for side in found.values():
            side()
    clock = _gpu_clock if ON_GPU else _cpu_clock
    taken = clock(found, rounds)
    return {name: statistics.median(taken[name]) if name in taken else None for name in sides}


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


def _cpu_clock(sides: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            taken[name].append((time.perf_counter() - begun) * 1e3)
    return taken


def ratio(of: Mapping[str, float | None], peer: str, ours: str = "ours") -> float | None:
    """How many times as long as ours the peer takes; None of a peer that is not installed."""
    mine, theirs = of[ours], of.get(peer)
    return None if theirs is None or not mine else round(theirs / mine, 3)


def met(found: float | None, target: float, at_most: bool = False) -> bool | None:
    """Whether a ratio is at least (or at most) its target; None where nothing can be said: no peer, or no GPU."""
    if found is None or not ON_GPU:
        return None
    return found <= target if at_most else found >= target


def copy_bandwidth() -> float | None:
    """Bytes read and written a second by the copy of a large buffer; None without a GPU."""
    if not ON_GPU:
        return None
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = in_turn({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * source.numel() / (milliseconds or 1.0) * 1e3


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


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def header(benchmark: str, peers: Sequence[str] = ()) -> dict[str, Any]:
    """What every result begins with: on what it was measured, with which versions, by which command."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if ON_GPU:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "benchmark": benchmark,
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU (interpreter)" if INTERPRETED else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {**versions, **{name: installed(name) for name in peers}},
        "command": " ".join(["python", *sys.argv]),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line: `--small` tries everything out on little work, `--rounds` says how often each side runs."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--small", action="store_true", help="little work, to try it out, on a CPU too: says nothing")
    made.add_argument("--rounds", type=int, default=30, help="how often each side runs, in turn")
    return made


def report(line: Mapping[str, Any]) -> None:
    """Prints the result: one JSON line, numbers rounded to four digits."""
    print(json.dumps(_rounded(line)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, 2-norms."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))
