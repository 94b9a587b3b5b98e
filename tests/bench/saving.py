"""Saving from two ranks, beside the disk's own speed, torch's distributed checkpoints and torch.save: one JSON line.

`stop`: for how long training would stand still; `whole`: until all is on the disk. `write_ratio` is the time of plain
writes past the page cache, flushed, from both ranks at once, over ours from the end of the copy to the renamed folder.
Ours is also read back before it counts (`ours`), unless there is no time (`ours_hurried`); the peers do not do that.
"""

from __future__ import annotations

import argparse
import json
import statistics

from _sides import environment, run, torchrun, versions, workplace

RANKS = 2
TARGETS = {"write_ratio": 0.9, "stop_ratio": 1.2}
PEERS = ("dcp_sync", "dcp_async", "torch_save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4, help="over all ranks")
    parser.add_argument("--rounds", type=int, default=4, help="how often each side runs, in turn")
    given = parser.parse_args()
    with workplace() as folder:
        out = folder / "found.json"
        settings = json.dumps({"gib": given.gib, "rounds": given.rounds, "folder": str(folder), "out": str(out)})
        script = __file__.replace("saving.py", "_saving_ranks.py")
        run([*torchrun(RANKS), script, settings], environment(folder, 1))
        found = json.loads(out.read_text("utf-8"))
    sides: dict[str, list[dict[str, float]]] = found["sides"]
    rounds = range(given.rounds)

    def median(of: list[float]) -> float:
        return round(statistics.median(of), 3)

    disk, copy = ([sides[name][i]["whole"] for i in rounds] for name in ("disk", "copy"))
    wrote = [sides["ours_hurried"][i]["whole"] - sides["ours"][i]["stop"] for i in rounds]
    line = {
        "benchmark": "saving",
        "unit": "seconds, the slower of the ranks",
        "gib": given.gib,
        "rounds": given.rounds,
        "stop": {name: median([each["stop"] for each in sides[name]]) for name in ("ours", *PEERS)},
        "whole": {name: median([each["whole"] for each in sides[name]]) for name in sides},
        "first_stop": found["first_stop"],
        "write_ratio": median([plain / ours for plain, ours in zip(disk, wrote, strict=True)]),
        "stop_ratio": median([sides["ours"][i]["stop"] / copy[i] for i in rounds]),
        "targets": TARGETS,
        "ranks": RANKS,
        "versions": versions(["torch"]),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
