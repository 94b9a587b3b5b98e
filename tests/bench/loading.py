"""Loading a model on two ranks that share it, beside from_pretrained on one of them and a broadcast: one JSON line.

Files are out of the page cache when a side begins. `ours` reads a checkpoint that is known to be whole, `ours_verified`
finds and verifies it first, which reads every byte once more, from the page cache where memory suffices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from _loading_files import RANKS, config_of, forget, tiny_config, write
from _sides import environment, run, torchrun, versions, workplace

SIDES = {
    "ours": {"side": "ours", "verify": False},
    "ours_verified": {"side": "ours", "verify": True},
    "peer": {"side": "peer"},
}
TARGETS = {"read": 1.0, "resident": 1.1, "ratio": 2.0}


def main() -> None:
    """Runs the sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the model in float32 (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, over all ranks")
    given = parser.parse_args()
    with workplace() as folder:
        variables = environment(folder, max(1, given.threads // RANKS))
        tiny, _ = write(folder / "tiny", tiny_config())
        large, size = write(folder / "large", config_of(given.gib * 2**30))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for number in range(given.rounds):
            for name, side in SIDES.items():
                forget(folder)
                settings = {**side, **large, "tiny": tiny, "out": str(folder / name)}
                script = Path(__file__).with_name("_loading_rank.py")
                run([*torchrun(RANKS), str(script), json.dumps(settings)], variables)
                found[name].append(_over_ranks(folder / name, size))
                print(f"bench: round {number + 1} of {given.rounds}, {name}: {found[name][-1]}", file=sys.stderr)
    line: dict[str, Any] = {
        "benchmark": "loading", "unit": "seconds; bytes and resident memory of all ranks, of the model's bytes",
        "model_bytes": size, "rounds": given.rounds, "ranks": RANKS,
        "threads_per_rank": int(variables["OMP_NUM_THREADS"]),
    }  # fmt: skip
    for key in ("seconds", "asked", "read", "resident"):
        line[key] = {name: round(statistics.median(r[key] for r in rounds), 3) for name, rounds in found.items()}
    seconds = {name: [taken["seconds"] for taken in rounds] for name, rounds in found.items()}
    line["ratio"] = {
        name: round(statistics.median(p / o for o, p in zip(seconds[name], seconds["peer"], strict=True)), 3)
        for name in ("ours", "ours_verified")
    }
    line |= {"targets": TARGETS, "versions": versions(["torch", "transformers", "safetensors"])}
    print(json.dumps(line))


def _over_ranks(out: Path, size: int) -> dict[str, float]:
    """The ranks' seconds, which they spend together, and what they took in all, of the model's bytes."""
    ranks = [json.loads(Path(f"{out}.{rank}").read_text("utf-8")) for rank in range(RANKS)]
    shares = {key: sum(rank[key] for rank in ranks) / size for key in ("asked", "read", "resident")}
    return {"seconds": max(rank["seconds"] for rank in ranks), **shares}


if __name__ == "__main__":
    main()
