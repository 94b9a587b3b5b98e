"""The one JSON line of a benchmark for a GPU: correctness first, then cases, each with its peers and targets.

A peer that is not installed, or raises, has no time, and `absent` says why. What is `met` is null where nothing can be
said: without a GPU, in small form, or without the peer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from _gpu_timing import DEVICE, ON_GPU, Work, in_turn
from torch import Tensor

from shardtune_kernels._launch import INTERPRETED

sys.path.append(str(Path(__file__).parents[1] / "ops"))
import comparing

SAYS_SOMETHING = ON_GPU and "--small" not in sys.argv
"""Whether a target can be met at all."""
Op = Callable[..., Any]


class Absent(Exception):
    """A peer that cannot run here; says why."""


class Target(NamedTuple):
    """What was found, and what it should be at least, or at most."""

    found: float | None
    bound: float
    at_most: bool = False

    def line(self) -> dict[str, Any]:
        met = None
        if self.found is not None and SAYS_SOMETHING:
            met = self.found <= self.bound if self.at_most else self.found >= self.bound
        return {"found": self.found, "at_most" if self.at_most else "at_least": self.bound, "met": met}


class Check(NamedTuple):
    """An op and its reference, which take `draw()`, tensors in float64, by name; see `comparing.agree`."""

    name: str
    op: Op
    truth: Op
    draw: Callable[[], Mapping[str, Tensor | None]]
    dtypes: Mapping[str, torch.dtype] | None = None
    trained: Mapping[str, bool] | None = None
    only: Sequence[torch.dtype] = comparing.DTYPES


class Benchmark:
    """The command line, and the line that is printed."""

    def __init__(self, number: str | None, doc: str | None, peers: Sequence[str] = (), rounds: int = 30) -> None:
        parser = argparse.ArgumentParser(description=doc)
        parser.add_argument("--small", action="store_true", help="little work, to try it out, on a CPU too: no result")
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each side runs, in turn")
        given = parser.parse_args()
        self.small: bool = given.small
        if not (self.small or ON_GPU):
            raise SystemExit(f"{Path(sys.argv[0]).name}: there is no GPU here; --small tries it out on a CPU")
        self.rounds: int = 1 if self.small else given.rounds
        self.warm_up = 0 if self.small else 5
        self._line = header(Path(sys.argv[0]).stem, number, peers, self.small)
        self._correctness: dict[str, dict[str, Any]] = {}
        torch.manual_seed(0)

    def collect(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes `{dtype: {"largest_error", "ok"}}` beside what was found before."""
        for dtype, of in found.items():
            before = self._correctness.get(dtype, of)
            worse = of if not of["largest_error"] <= before["largest_error"] else before
            self._correctness[dtype] = {**worse, "ok": before["ok"] and of["ok"]}

    def correct(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """As `collect`; ends the run where one is not ok."""
        self.collect(found)
        if not all(of["ok"] for of in found.values()):
            self.report([])

    def case(
        self,
        sides: Sides,
        faster: Mapping[str, float] | None = None,
        targets: Callable[[Mapping[str, float]], Mapping[str, Target]] | None = None,
        hosts_clock: bool = not ON_GPU,
        **said: Any,
    ) -> dict[str, Any]:
        """Times all sides. `faster`: how many times as long as ours a peer should take at least; `targets`: others, of
        the milliseconds by name."""
        times = in_turn(sides.work, self.rounds, self.warm_up, hosts_clock)
        return case_of(times, sides.absent, faster, targets(times) if targets else None, **said)

    def report(self, cases: Sequence[Mapping[str, Any]], **more: Any) -> None:
        """Prints the line; ends the process with 1 where something is not correct."""
        correct = all(of["ok"] for of in self._correctness.values())
        self._line |= {"rounds": self.rounds, "correctness": self._correctness, **more, "cases": cases}
        self._line["met"] = all_met(case["met"] for case in cases) if correct else False
        print(json.dumps(_rounded(self._line)))
        if not correct:
            raise SystemExit(1)


class Sides:
    """What runs in turn, "ours" among it; of each peer that cannot run here, the reason."""

    def __init__(self, makers: Mapping[str, Callable[[], Work]]) -> None:
        self.work: dict[str, Work] = {}
        self.absent: dict[str, str] = {}
        for name, make in makers.items():
            try:
                work = make()
                work()
            except Exception as problem:
                if name == "ours":
                    raise
                self.absent[name] = reason(problem)
            else:
                self.work[name] = work

    def each(self, count: Callable[[Work], Any]) -> dict[str, Any]:
        """Something counted of every side; None of those that are absent."""
        return {**{name: count(work) for name, work in self.work.items()}, **dict.fromkeys(self.absent)}


def case_of(
    times: Mapping[str, float | None],
    absent: Mapping[str, str],
    faster: Mapping[str, float] | None = None,
    targets: Mapping[str, Target] | None = None,
    **said: Any,
) -> dict[str, Any]:
    """One case of the line, of milliseconds by side."""
    ours = times["ours"]
    peers = {name: times.get(name) for name in [*times, *absent] if name != "ours"}
    ratios = {name: taken / ours if taken and ours else None for name, taken in peers.items()}
    wanted = {name: Target(ratios.get(name), bound) for name, bound in (faster or {}).items()} | dict(targets or {})
    lines = {name: target.line() for name, target in wanted.items()}
    return {
        **said, "ours_ms": ours, "peers_ms": peers, "absent": dict(absent), "ratio": ratios, "target": lines,
        "met": False if SAYS_SOMETHING and "ours" in absent else all_met(line["met"] for line in lines.values()),
    }  # fmt: skip


def all_met(found: Iterable[bool | None]) -> bool | None:
    """False if one is, None if of one nothing can be said, or there is none."""
    listed = list(found)
    if False in listed:
        return False
    return None if None in listed or not listed else True


def errors(checks: Iterable[Check], draws: int = 1) -> dict[str, dict[str, Any]]:
    """The largest error of each dtype, and whether all are as small as they should be, `comparing.limit`: root mean
    squares over `draws` of each output and gradient, as that of one number, such as a loss, is luck."""
    found: dict[str, dict[str, Any]] = {}
    for check in checks:
        for dtype in check.only:
            of = found.setdefault(str(dtype).removeprefix("torch."), {"largest_error": 0.0, "ok": True, "where": ""})
            squares: dict[str, list[float]] = {}
            for _ in range(draws):
                tensors = check.draw()
                one = comparing.errors(check.op, check.truth, tensors, dtype, check.name, check.dtypes, check.trained)
                for name, (off, plain) in one.items():
                    sums = squares.setdefault(name, [0.0, 0.0])
                    sums[0] += off**2 / draws
                    sums[1] += (plain or 0.0) ** 2 / draws
            for name, (own, plain) in squares.items():
                off, allowed = own**0.5, comparing.limit(plain**0.5 if dtype.itemsize < 4 else None)
                if not off <= allowed:  # nor is NaN
                    of["ok"] = False
                    print(f"{check.name}, {name} in {dtype}: off by {off:.3g}, not {allowed:.3g}", file=sys.stderr)
                if not off <= of["largest_error"]:
                    of |= {"largest_error": off, "where": f"{check.name}: {name}"}
    return found


def peer(package: str, module: str, name: str) -> Any:
    """Something of a peer whose kernels need a GPU; raises Absent where that is not to be had."""
    if installed(package) is None:
        raise Absent("is not installed")
    if not ON_GPU:
        raise Absent("its kernels need a GPU")
    return getattr(importlib.import_module(module), name)


def reason(problem: Exception) -> str:
    """Why a peer is absent, in one short line."""
    said = " ".join(str(problem).split())
    return (said if isinstance(problem, Absent) else f"{type(problem).__name__}: {said}")[:300]


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def header(benchmark: str, number: str | None, peers: Sequence[str], small: bool) -> dict[str, Any]:
    """What every line begins with: what is measured, on what, with which versions, by which command."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if ON_GPU:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "benchmark": benchmark,
        "number": number,
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU (interpreter)" if INTERPRETED else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {**versions, **{name: installed(name) for name in ("shardtune", *peers)}},
        "command": " ".join(["python", *sys.argv]),
        "small": small,
    }


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = False) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(trained)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
