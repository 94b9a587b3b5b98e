"""Which of several ways to compute the same is fastest on this device at this size: measured once, then remembered.

On a GPU, `choose` times each way when a size is first met, and keeps the answers in memory and in a JSON file,
`$SHARDTUNE_CACHE/shardtune_kernels/calibration-….json` (else under XDG_CACHE_HOME or ~/.cache), one for each kind of
device and version of torch and Triton. Nothing is measured on a CPU or in Triton's interpreter, while torch.compile
traces or a CUDA graph is captured, or after `disable()` or with SHARDTUNE_CALIBRATE=0 in the environment: the first
way is then the answer, unless (capturing) another is known. `report()` says what was chosen.

Ways may differ in the last bit, so that a run gives the same numbers again only while the answers stay; keep the file,
or switch calibration off.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from shardtune_kernels._launch import INTERPRETED, power_of_two

Way = Callable[[], object]
Answers = dict[str, dict[str, str]]
"""Of each op: dtype and size -> name of a way."""
WARM_UP, REPETITIONS = 2, 7
_known: dict[str, Answers] = {}
"""By kind of device."""
_enabled = os.environ.get("SHARDTUNE_CALIBRATE", "1") != "0"


def choose(op: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, ways: Mapping[str, Way]) -> str:
    """The name of the fastest of `ways`, each of which may be run many times, and must do the whole work each time.

    Answers are kept by op, dtype and size; of a size the first number, the rows, is rounded up to a power of two, so
    that ragged batches do not measure at each step.
    """
    first = next(iter(ways))
    if len(ways) == 1 or torch.compiler.is_compiling() or not _enabled or INTERPRETED or device.type != "cuda":
        return first
    kind = _kind(device)
    if kind not in _known:
        _known[kind] = _read(path(kind))
    key = _key((power_of_two(size[0], 1), *size[1:]), dtype)
    known = _known[kind].get(op, {}).get(key)
    if known is not None and known in ways:
        return known
    if _capturing():
        return first
    seconds = timed(list(ways.values()), device)
    if min(seconds) == math.inf:
        return first
    answer = list(ways)[seconds.index(min(seconds))]
    _known[kind].setdefault(op, {})[key] = answer
    _write(path(kind), _known[kind])
    return answer


def report() -> Answers:
    """What was chosen, of each op: dtype and size (rows rounded up) -> name of the way."""
    merged: Answers = {}
    for answers in _known.values():
        for op, of_op in answers.items():
            merged.setdefault(op, {}).update(of_op)
    return merged


def disable() -> None:
    """From now on each op takes its first way: nothing is measured, nor read from what was."""
    global _enabled
    _enabled = False


def enable() -> None:
    """Takes `disable` back."""
    global _enabled
    _enabled = True


def path(kind: str) -> Path:
    """The file of answers for a kind of device."""
    base = os.environ.get("SHARDTUNE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^\w.+]+", "_", f"{kind}-{torch.__version__}-{triton.__version__}")
    return Path(base) / "shardtune_kernels" / f"calibration-{name}.json"


def timed(ways: Sequence[Way], device: torch.device) -> list[float]:
    """Median seconds of each way, taken in turn; infinite where memory of any kind does not suffice.

    Before each, more memory is written than the device caches hold, as layers between the calls of a model do; that
    also keeps the device busy until the host has launched what is timed.
    """
    times: list[list[float]] = [[] for _ in ways]
    with torch.cuda.device(device):
        try:
            wiped = torch.empty(2 * max(torch.cuda.get_device_properties(device).L2_cache_size, 1 << 24),
                                dtype=torch.uint8, device=device)  # fmt: skip
        except torch.OutOfMemoryError:
            return [math.inf for _ in ways]
        for turn in range(WARM_UP + REPETITIONS):
            for way, found in zip(ways, times, strict=True):
                if math.inf in found:
                    continue
                wiped.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                try:
                    start.record()
                    way()
                    end.record()
                except (torch.OutOfMemoryError, OutOfResources):
                    found.append(math.inf)
                    continue
                end.synchronize()
                if turn >= WARM_UP:
                    found.append(start.elapsed_time(end) / 1000)
    return [math.inf if math.inf in found else statistics.median(found) for found in times]


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


@cache
def _key(size: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {' x '.join(map(str, size))}"


@cache
def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _read(file: Path) -> Answers:
    """Nothing where there is no file, or another process's half-written or somebody's damaged one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        op: {key: way for key, way in of_op.items() if isinstance(way, str)}
        for op, of_op in found.items() if isinstance(of_op, dict)
    }  # fmt: skip


def _write(file: Path, answers: Answers) -> None:
    """Adds to what other processes have written, and puts the whole in place at once; a reader sees one or the other.
    Where nothing can be written, the answers last as long as the process."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            with suppress(OSError):  # a file system without locks: an answer may be lost, and is measured again
                fcntl.flock(lock, fcntl.LOCK_EX)
            whole = _read(file)
            for op, of_op in answers.items():
                whole.setdefault(op, {}).update(of_op)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    json.dump(whole, stream, indent=1, sort_keys=True)
                os.replace(temporary, file)
            except OSError:
                Path(temporary).unlink(missing_ok=True)
