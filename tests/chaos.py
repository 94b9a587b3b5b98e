"""Kills, damages and starves runs, starts them again, and compares them with runs that nothing happened to.

    python tests/chaos.py [--seed N] [--r1 KILLS] [--r2 KILLS] [--r3 CHAINS] [--r4 FLIPS] [--r5 FILES] [--r6 RUNS]

R1: kill -9 at random moments of a run on two ranks with dropout. R2: the same in the middle of saving. R3: told to stop
at random moments, and gone on with on other ranks under another strategy. R4: a flipped bit, R5: a truncated, missing
or swapped file of a checkpoint. R6: a full disk. Prints its seed first and one JSON line with all counts at the end;
the exit code is 1 where a single one did not come out as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import tiny
from warm import Ranks, Warm

STEPS = 24
EVERY = 3
"""Steps between two checkpoints."""
LAYOUTS = [
    [("ddp", 2), ("single", 1), ("ddp", 4)],
    [("zero3", 2), ("fsdp2", 2), ("single", 1), ("zero1", 2)],
]


class Case(NamedTuple):
    strategy: str
    method: str
    ranks: int = 2

    def __str__(self) -> str:
        return f"{self.strategy}-{self.method}-{self.ranks}"


CASES = [Case(strategy, method) for strategy in ("ddp", "fsdp2", "zero2", "zero3") for method in ("lora", "full")]


@dataclass
class Whole:
    """A run that nothing happened to."""

    folder: Path
    seconds: float


@dataclass
class Outcome:
    """How often something was done, and how often all came out as it should."""

    done: int = 0
    good: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def count(self, good: bool, kind: str, what: str) -> None:
        self.done += 1
        self.good += good
        self.kinds[kind] += 1
        if not good:
            self.wrong.append(what)
            print(f"WRONG {what}", file=sys.stderr, flush=True)

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"done": self.done, "good": self.good, "kinds": dict(self.kinds)}
        return found | ({"worst": self.worst} if self.worst else {}) | ({"wrong": self.wrong} if self.wrong else {})


class Chaos:
    """Everything that is done to runs, in a folder of its own."""

    def __init__(self, folder: Path, seed: int, warm: Warm) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.folder = folder
        self._warm = warm
        self._number = 0
        self._turn = self.rng.randrange(len(CASES))
        self._whole: dict[tuple[Case, bool], Whole] = {}
        self.configs = {
            (method, dropout): self._config(method, dropout) for method in ("lora", "full") for dropout in (True, False)
        }

    def _config(self, method: str, dropout: bool) -> Path:
        return tiny.tiny_config(
            self.folder / f"{method}-{dropout}", "t5",
            model__dropout=0.1 if dropout else 0.0,
            data__train=str(tiny.write_rows(self.folder / "train.jsonl", tiny.rows(100, seed=1))),
            data__validation=None,
            data__splits=[1.0, 0.0, 0.0],
            batch={"examples": 8, "micro_examples": 3},
            tuning={"method": method},
            duration__steps=STEPS,
            checkpoint={"every": EVERY, "keep": 3},
        )  # fmt: skip

    def start(self, case: Case, name: str, dropout: bool = True, runs: Path | None = None) -> Ranks:
        """Starts or goes on with the run `name`, as anyone would: with the same command."""
        runs = runs or self.folder / "runs"
        runs.mkdir(exist_ok=True)
        config = self.configs[case.method, dropout]
        arguments = ["--config", config, f"name={name}", f"runs={runs}", f"strategy.kind={case.strategy}"]
        return self._warm.start(arguments, case.ranks, self.folder / f"{name}.log")

    def new_name(self, what: str) -> str:
        self._number += 1
        return f"{what}-{self._number}"

    def whole(self, case: Case, dropout: bool = True) -> Whole:
        """The run that nothing happened to, and how long it took."""
        if (case, dropout) not in self._whole:
            name = f"whole-{case}-{dropout}"
            begun = time.monotonic()
            ranks = self.start(case, name, dropout)
            codes = ranks.wait()
            assert codes == [0] * case.ranks, f"{name}: {codes}\n{ranks.said()[-6000:]}"
            self._whole[case, dropout] = Whole(self.folder / "runs" / name, time.monotonic() - begun)
        return self._whole[case, dropout]

    # ------------------------------------------------------------------------------------------------ R1, R2

    def kills(self, count: int, kill: Callable[[Case, Ranks, Path], bool], in_a_run: int = 3) -> Outcome:
        """Runs that are killed by `kill` up to so many times each, then left alone; what ends before is not counted.

        A kill is good if the run comes to its end by itself after it, with the losses, weights, optimizer and examples
        of the one that nothing happened to.
        """
        outcome = Outcome()
        turn = self._turn
        while outcome.done < count:
            case = CASES[turn % len(CASES)]
            turn += 1
            whole, name = self.whole(case), self.new_name(f"kill-{case}")
            run = self.folder / "runs" / name
            killed = 0
            while killed < min(in_a_run, count - outcome.done):
                ranks = self.start(case, name)
                hit = kill(case, ranks, run)
                codes = ranks.wait()
                if not hit or all(code == 0 for code in codes):
                    break
                killed += 1
            ranks = self.start(case, name)
            codes = ranks.wait()
            problem = f"exit codes {codes}" if any(codes) else difference(whole.folder, run)
            for _ in range(killed):
                said = ranks.said()[-1500:] if any(codes) else ""
                outcome.count(not problem, str(case), f"{name}: {problem}\n{said}")
            if not problem:
                shutil.rmtree(run)
        return outcome

    def at_random(self, case: Case, ranks: Ranks, run: Path) -> bool:
        """Kills all ranks, or one of them, at a random moment of the time that a run takes."""
        time.sleep(self.rng.uniform(0, self.whole(case).seconds))
        ranks.kill(None if self.rng.random() < 0.5 else [self.rng.randrange(case.ranks)])
        return True

    def while_saving(self, case: Case, ranks: Ranks, run: Path) -> bool:
        """Kills all ranks within moments after one of the checkpoints was begun."""
        end = time.monotonic() + 60
        for _ in range(self.rng.randrange(1, STEPS // EVERY)):
            if not _appears(run / "checkpoints", end) or not _vanishes(run / "checkpoints", end):
                return False
        if not _appears(run / "checkpoints", end):
            return False
        time.sleep(self.rng.uniform(0, 0.03))
        ranks.kill()
        return True

    # ---------------------------------------------------------------------------------------------------- R3

    def reshards(self, count: int) -> Outcome:
        """Runs that are told to stop at random moments and gone on with in another layout, without dropout."""
        outcome = Outcome()
        for number in range(count):
            layouts, method = LAYOUTS[number % len(LAYOUTS)], ("lora", "full")[number // len(LAYOUTS) % 2]
            whole = self.whole(Case("single", method, 1), dropout=False)
            name = self.new_name(f"reshard-{method}")
            run = self.folder / "runs" / name
            stops = sorted(self.rng.sample(range(2, STEPS - 8), len(layouts) - 1))
            problem, said = "", ""
            for (strategy, ranks_count), stop in zip(layouts, [*stops, None], strict=True):
                begun_at = len(steps(run)) if run.exists() else 0
                ranks = self.start(Case(strategy, method, ranks_count), name, dropout=False)
                if stop is not None:
                    _reaches(run / "metrics.jsonl", max(stop, begun_at + 1))
                    ranks.kill(number=self.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
                codes = ranks.wait()
                if codes != [75 if stop is not None else 0] * ranks_count:
                    problem, said = f"{strategy} on {ranks_count} ranks: exit codes {codes}", ranks.said()[-1500:]
                    break
            if not problem:
                far = largest_difference(whole.folder, run)
                outcome.worst = max(outcome.worst, far)
                problem = "" if far <= 1e-6 else f"losses differ by {far:.1e}"
            outcome.count(not problem, " -> ".join(f"{s} {r}" for s, r in layouts), f"{name}: {problem}\n{said}")
        return outcome

    # ------------------------------------------------------------------------------------------------ R4, R5

    def damages(self, count: int, damage: Callable[[Path], str]) -> Outcome:
        """Checkpoints that are damaged, one after the other, and whether that is noticed; now and then by a run that
        goes on, which must take the older one and end as if nothing had happened."""
        outcome = Outcome()
        for number in range(count):
            case = CASES[number % len(CASES)]
            whole = self.whole(case)
            if number % max(count // 4, 1) == 0:
                name = self.new_name(f"damaged-{case}")
                run = self.folder / "runs" / name
                _copy_before_its_end(whole.folder, run)
                newest = max(run.glob("checkpoints/step-*"))
                kind = damage(newest)
                ranks = self.start(case, name)
                codes = ranks.wait()
                problem = f"exit codes {codes}" if any(codes) else difference(whole.folder, run)
                if not problem and not list(run.glob("checkpoints/step-*.damaged")):
                    problem = "the damaged one was not set aside"
                if not problem and newest.name not in ranks.said():
                    problem = "the damaged one was not named"
                outcome.count(not problem, f"run: {kind}", f"{name}, {kind}: {problem}\n{ranks.said()[-1500:]}")
                shutil.rmtree(run)
                continue
            copy = self.folder / "damaged"
            shutil.copytree(max(whole.folder.glob("checkpoints/step-*")), copy / "step-00000024")
            kind = damage(copy / "step-00000024")
            outcome.count(verify(copy / "step-00000024") == 4, kind, f"{kind} was not noticed")
            shutil.rmtree(copy)
        return outcome

    def flip(self, folder: Path) -> str:
        """Any bit of any file, each byte as likely as any other; a small file is taken as often as a large one."""
        file = self.rng.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        bit = self.rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return file.suffix

    def spoil(self, folder: Path) -> str:
        """Truncates a file, takes it away, or swaps it with another of this or of an older checkpoint."""
        files = sorted(folder.iterdir())
        file, kind = self.rng.choice(files), self.rng.choice(["truncated", "missing", "swapped"])
        if kind == "truncated":
            os.truncate(file, self.rng.randrange(file.stat().st_size))
        elif kind == "missing":
            file.unlink()
        else:
            other = self.rng.choice([path for path in files if path != file])
            between = folder / "between"
            file.rename(between), other.rename(file), between.rename(other)
        return kind

    # ---------------------------------------------------------------------------------------------------- R6

    def full_disks(self, count: int) -> Outcome:
        """Runs on a disk that has room for some checkpoints only, and gone on with when there is more."""
        outcome = Outcome()
        for number in range(count):
            case = CASES[number % len(CASES)]
            whole = self.whole(case)
            one = sum(file.stat().st_size for file in max(whole.folder.glob("checkpoints/step-*")).iterdir())
            name = self.new_name(f"full-{case}")
            room = int(one * self.rng.uniform(1.2, 3.2)) + 400_000
            with small_disk(self.folder / name, room) as disk:
                ranks = self.start(case, name, runs=disk)
                codes = ranks.wait()
                kept = sorted((disk / name / "checkpoints").glob("step-*"))
                problem = "" if 7 in codes and 0 not in codes else f"exit codes {codes} with {room:,} bytes"
                said = ranks.said()[-1500:]
                named = "No space left" in said or "bytes are needed" in said
                if not problem and not (named and (not kept or f"{kept[-1]} is kept" in said)):
                    problem = "the cause, or what was kept, was not named"
                if not problem and any(verify(folder) for folder in kept):
                    problem = "what was kept is not whole"
                subprocess.run(["mount", "-o", f"remount,size={20 * one + 40_000_000}", str(disk)], check=True)
                again = self.start(case, name, runs=disk)
                codes = again.wait()
                if not problem:
                    problem = f"then exit codes {codes}" if any(codes) else difference(whole.folder, disk / name)
                outcome.count(not problem, f"{len(kept)} kept", f"{name}: {problem}\n{said}\n{again.said()[-1500:]}")
        return outcome


def difference(whole: Path, run: Path) -> str:
    """How a run differs from one that nothing happened to, to the last bit; empty where it does not."""
    for ours, theirs in zip(steps(run), steps(whole), strict=False):
        if ours != theirs:
            return f"step {theirs['step']}: {ours}, not {theirs}"
    if len(steps(run)) != len(steps(whole)):
        return f"{len(steps(run))} steps, not {len(steps(whole))}"
    for pattern in ("final/*.safetensors", "checkpoints/step-*/*.safetensors"):
        mine, wanted = ({p.relative_to(f): p for p in sorted(f.glob(pattern))} for f in (run, whole))
        newest = max(mine, default=None)
        if newest is None or newest not in wanted:
            return f"{pattern}: {sorted(map(str, mine))}, not {sorted(map(str, wanted))}"
        for path in [p for p in wanted if p.parent == newest.parent]:
            have, want = load_file(mine[path]), load_file(wanted[path])
            if have.keys() != want.keys():
                return f"{path}: other tensors: {sorted(have.keys() ^ want.keys())[:4]}"
            for name, tensor in want.items():
                if not torch.equal(have[name].view(torch.uint8), tensor.view(torch.uint8)):
                    return f"{path}: {name} differs"
    return ""


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of the steps, but for times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tiny.lasting(line) for line in lines if "grad_norm" in line]


def largest_difference(whole: Path, run: Path) -> float:
    """Of the losses, relative; infinite where other examples were seen, or other steps done."""
    pairs = list(zip(steps(run), steps(whole), strict=False))
    if len(pairs) != STEPS or len(steps(run)) != STEPS:
        return float("inf")
    if any(a["examples_digest"] != b["examples_digest"] or a["step"] != b["step"] for a, b in pairs):
        return float("inf")
    return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)


def verify(folder: Path) -> int:
    """The exit code of `shardtune verify`, called in this process."""
    from shardtune.cli import main

    out = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
        try:
            return main(["verify", "--checkpoint", str(folder)])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(out[0], 1), os.dup2(out[1], 2)
            os.close(out[0]), os.close(out[1])


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes. Needs the right to mount one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def _copy_before_its_end(whole: Path, run: Path) -> None:
    """The run as it was before its last steps: with its checkpoints but the last, and without a result."""
    shutil.copytree(whole, run, ignore=lambda folder, names: {"final"} & set(names))
    shutil.rmtree(max(run.glob("checkpoints/step-*")))


def _partial(folder: Path) -> bool:
    return folder.is_dir() and any(name.startswith(".step-") for name in os.listdir(folder))


def _appears(folder: Path, end: float) -> bool:
    while not _partial(folder):
        if time.monotonic() > end or (folder.parent / "final").exists():
            return False
    return True


def _vanishes(folder: Path, end: float) -> bool:
    while _partial(folder):
        if time.monotonic() > end:
            return False
    return True


def _reaches(metrics: Path, step: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    for name, count in (("r1", 200), ("r2", 200), ("r3", 20), ("r4", 1000), ("r5", 100), ("r6", 50)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"default: {count}")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    found: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory(prefix="shardtune-chaos-") as name, Warm(Path(name) / "cache") as warm:
        chaos = Chaos(Path(name), options.seed, warm)
        for group, work in (
            ("r1", lambda: chaos.kills(options.r1, chaos.at_random)),
            ("r2", lambda: chaos.kills(options.r2, chaos.while_saving)),
            ("r3", lambda: chaos.reshards(options.r3)),
            ("r4", lambda: chaos.damages(options.r4, chaos.flip)),
            ("r5", lambda: chaos.damages(options.r5, chaos.spoil)),
            ("r6", lambda: chaos.full_disks(options.r6)),
        ):
            if getattr(options, group):
                begun = time.monotonic()
                outcome = work()
                found[group.upper()] = outcome.summary()
                print(f"{group.upper()} {outcome.good}/{outcome.done}, {time.monotonic() - begun:.0f} s", flush=True)
    print(json.dumps(found))
    return int(any(value["good"] < value["done"] for value in found.values() if isinstance(value, dict)))


if __name__ == "__main__":
    sys.exit(main())
