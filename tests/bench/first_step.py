"""From starting a process to the end of its first optimizer step, beside a plain script with Seq2SeqTrainer: one JSON
line with medians in seconds.

The same for both sides: the first step has ended when a file says so, and the file's time of change tells when. Cold:
nothing is tokenized yet; warm: each side's own cache of tokens is there. Python's byte code and the operating system's
cache of files are warm in both.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from _sides import config, environment, options, run, versions, workplace
from _workload import seq2seq

PAIRS_ONE_OF = 10
"""Which makes about 2000 pairs."""
EXAMPLES = 32
LIMITS = {"max_source_tokens": 256, "max_target_tokens": 32}
TARGETS = {"warm": 0.7}


def main() -> None:
    given = options(__doc__ or "", {}, rounds=5, batching="grouped")
    with workplace() as folder:
        work = seq2seq(folder, PAIRS_ONE_OF, width=128, layers=2)
        ours = config(
            folder, "ours",
            model={"path": str(work.model)},
            task={"kind": "seq2seq", "source": "source", "target": "target", **LIMITS},
            data={"train": str(work.pairs), "batching": given.batching},
            batch={"examples": EXAMPLES, "micro_examples": EXAMPLES},
            duration={"steps": 1},
        )  # fmt: skip
        settings = {
            "model": str(work.model), "pairs": str(work.pairs), "out": str(folder / "peer"), "examples": EXAMPLES,
            **LIMITS,
        }  # fmt: skip
        peer = str(Path(__file__).with_name("_first_step_peer.py"))
        commands = {
            "ours": (
                [sys.executable, "launch/train.py", "--config", str(ours), "checkpoint.resume=never"],
                folder / "runs" / "ours" / "metrics.jsonl",
            ),
            "trainer": ([sys.executable, peer, json.dumps(settings)], folder / "peer"),
        }
        found: dict[str, dict[str, list[float]]] = {
            state: {name: [] for name in commands} for state in ("cold", "warm")
        }
        for number in range(given.rounds + 1):  # the first one warms up byte code
            caches = folder / f"caches-{number}"
            caches.mkdir()
            variables = environment(caches, given.threads)
            for state, taken in found.items():
                for name, (command, said) in commands.items():
                    seconds = _until(said, functools.partial(run, command, variables))
                    if number:
                        taken[name].append(seconds)
                        print(
                            f"bench: round {number} of {given.rounds}, {state}, {name}: {seconds:.2f} s",
                            file=sys.stderr,
                        )
    line = {
        "benchmark": "first_step",
        "unit": "s",
        "rounds": given.rounds,
        "pairs": work.examples,
        **{
            state: {name: round(statistics.median(s), 3) for name, s in taken.items()} for state, taken in found.items()
        },
        "ratio": {state: round(_ratio(taken), 3) for state, taken in found.items()},
        "targets": TARGETS,
        "threads": given.threads,
        "versions": versions(["torch", "transformers", "datasets"]),
    }
    print(json.dumps(line))


def _until(said: Path, run_to_end: Callable[[], None]) -> float:
    """Seconds from the start of the process until the file `said` was last written."""
    begun = time.time()
    run_to_end()
    return said.stat().st_mtime - begun


def _ratio(taken: Mapping[str, Sequence[float]]) -> float:
    """The median over rounds of ours over the peer: below 1 is faster."""
    return statistics.median(ours / theirs for ours, theirs in zip(taken["ours"], taken["trainer"], strict=True))


if __name__ == "__main__":
    main()
