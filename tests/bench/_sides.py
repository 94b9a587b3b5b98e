"""Ours and the peers on the same work: each a process of its own, in turn, each step with its real tokens."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
"""Sees what is in .venv, and the peers that are not needed to run shardtune; `make bench` makes it."""
WARM_UP = 1
"""Steps left out at the start of each side's run; the peers' processes know it too."""


class Speed(NamedTuple):
    """One side's run, its warm-up left out."""

    tokens_per_second: float
    """Source and target tokens that are not padding."""
    padding_share: float
    """Of the computed positions."""
    step_seconds: float


class Options(argparse.Namespace):
    """The command line of a benchmark."""

    steps: dict[str, int]
    """Timed optimizer steps of each side in a round."""
    rounds: int
    threads: int
    batching: str

    def batch(self, examples: int, micro_tokens: int) -> dict[str, int]:
        """Section `batch` of our config: packed rows hold tokens, the other layouts a number of examples."""
        if self.batching == "packed":
            return {"examples": examples, "micro_tokens": micro_tokens}
        return {"examples": examples, "micro_examples": 16}


def options(description: str, steps: Mapping[str, int], rounds: int, batching: str = "packed") -> Options:
    """The command line, and the defaults of `make bench`; `steps`: how many of each side are timed in a round."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="to try it out: one short round, which says little")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each side runs, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, over all ranks")
    parser.add_argument("--batching", default=batching, help="data.batching of our side")
    given = parser.parse_args(namespace=Options())
    given.steps = {name: 1 if given.quick else count for name, count in steps.items()}
    if given.quick:
        given.rounds = 1
    return given


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for everything that a benchmark writes."""
    with tempfile.TemporaryDirectory(prefix="shardtune-bench-") as folder:
        yield Path(folder)


def environment(folder: Path, threads: int) -> dict[str, str]:
    """Variables of both sides: threads of each process, caches of their own, no GPU and no network."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "SHARDTUNE_CACHE": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONWARNINGS": "ignore",
    }


def torchrun(ranks: int, python: Path | str = sys.executable) -> list[str]:
    """The beginning of a command: one process, or `ranks` of them."""
    if ranks == 1:
        return [str(python)]
    return [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def run(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Runs one side to its end; what it printed is shown only where it failed."""
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"bench: {' '.join(command)[:200]} ended with exit code {done.returncode}")


def config(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """A config file as a user writes it, without evaluation and curves, in float32."""
    path = folder / f"{name}.yaml"
    whole: dict[str, Any] = {
        "name": name,
        "runs": str(folder / "runs"),
        "optimizer": {"lr": 1e-4},
        "evaluation": {"baseline": False},
        "tracking": {"tensorboard": False, "every": 1},
        **sections,
    }
    whole["model"] = {"dtype": "float32", **whole["model"]}
    whole["data"] = {"splits": [1.0, 0.0, 0.0], **whole["data"]}
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def train_ours(path: Path, variables: Mapping[str, str], ranks: int = 1) -> Speed:
    """Runs a config as the README says, and reads metrics.jsonl."""
    command = [*torchrun(ranks), "launch/train.py", "--config", str(path), "checkpoint.resume=never"]
    run(command, variables)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = (Path(settings["runs"]) / settings["name"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps, before = [], 0
    for line in map(json.loads, lines):
        tokens = line["tokens"] - before
        slots = tokens / (1 - line["padding_share"])
        steps.append({"tokens": tokens, "slots": slots, "seconds": line["step_seconds"]})
        before = line["tokens"]
    return _speed([steps])


def train_peer(script: str, settings: Mapping[str, Any], variables: Mapping[str, str], ranks: int = 1) -> Speed:
    """Runs a peer's script beside this file, which writes the steps of each rank."""
    python = PEERS_PYTHON if script == "_trl_peer.py" else sys.executable
    run([*torchrun(ranks, python), str(Path(__file__).with_name(script)), json.dumps(settings)], variables)
    return _speed([json.loads(Path(f"{settings['out']}.{rank}").read_text("utf-8")) for rank in range(ranks)])


def _speed(ranks: list[list[dict[str, float]]]) -> Speed:
    """Tokens are summed over ranks, which take their steps together."""
    timed = [steps[WARM_UP:] for steps in ranks]
    tokens, slots = (sum(step[key] for steps in timed for step in steps) for key in ("tokens", "slots"))
    seconds = max(sum(step["seconds"] for step in steps) for steps in timed)
    return Speed(tokens / seconds, 1 - tokens / slots, seconds / len(timed[0]))


def in_turn(sides: Mapping[str, Callable[[], Speed]], rounds: int) -> dict[str, list[Speed]]:
    """Runs all sides `rounds` times: A B C A B C ..."""
    found: dict[str, list[Speed]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
            speed = found[name][-1]
            print(
                f"bench: round {number + 1} of {rounds}, {name}: {speed.tokens_per_second:,.0f} tokens/s, "
                f"{speed.padding_share:.1%} padding, {speed.step_seconds:.2f} s a step",
                file=sys.stderr,
            )
    return found


def report(
    benchmark: str,
    found: Mapping[str, list[Speed]],
    targets: Mapping[str, float],
    packages: Sequence[str],
    **more: object,
) -> None:
    """Prints the JSON line; a ratio is the median over rounds of ours over the peer, of the same round."""
    missing: list[Speed] = []
    sides = {name: found.get(name, missing) for name in ["ours", *targets]}
    ours = [speed.tokens_per_second for speed in found["ours"]]
    ratios = {
        name: [mine / theirs.tokens_per_second for mine, theirs in zip(ours, sides[name], strict=False)]
        for name in targets
    }
    line = {
        "benchmark": benchmark,
        "unit": "tokens/s without padding",
        "rounds": len(ours),
        "tokens_per_second": {name: _median([s.tokens_per_second for s in runs], 0) for name, runs in sides.items()},
        "padding_share": {name: _median([s.padding_share for s in runs], 4) for name, runs in sides.items()},
        "step_seconds": {name: _median([s.step_seconds for s in runs], 3) for name, runs in sides.items()},
        "ratio": {name: _median(values, 3) for name, values in ratios.items()},
        "targets": dict(targets),
        **more,
        "versions": versions(packages),
    }
    print(json.dumps(line))


def _median(values: Sequence[float], digits: int) -> float | None:
    """None of a peer that is not installed."""
    return round(statistics.median(values), digits or None) if values else None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of Python and of packages in the peers' environment, or in this one where there is none."""
    python = str(PEERS_PYTHON) if PEERS_PYTHON.exists() else sys.executable
    code = "import sys, json; from importlib import metadata as m; d = {p.name: p.version for p in m.distributions()}; "
    code += "print(json.dumps([d.get(name) for name in sys.argv[1:]]))"
    found = json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, check=True).stdout)
    return {
        "python": sys.version.split()[0],
        "shardtune": metadata.version("shardtune"),
        **dict(zip(packages, found, strict=True)),
    }
