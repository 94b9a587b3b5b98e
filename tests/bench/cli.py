"""How long a user waits for help and for a config's mistakes: one JSON line with medians of warm runs, in seconds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9
TARGETS = {"help": 0.15, "wrong_config": 0.3}
PROGRAM = str(Path(sys.executable).parent / "shardtune")


def seconds(arguments: list[str], code: int) -> float:
    """The median over warm runs; byte code is cached, as it is for users."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    taken = []
    for _ in range(RUNS + 1):
        begun = time.perf_counter()
        done = subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=False)
        taken.append(time.perf_counter() - begun)
        assert done.returncode == code, done.stderr
    return statistics.median(taken[1:])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text("model: {path: t5-small}\ntask: {kind: seq2seq, source: a, target: b}\nlearning_rate: 1\n")
        figures = {
            "help": seconds(["--help"], 0),
            "wrong_config": seconds(["train", "--config", str(config)], 2),
        }
    print(json.dumps({"benchmark": "cli", "unit": "s", "runs": RUNS, **figures, "targets": TARGETS}))


if __name__ == "__main__":
    main()
