"""How long packing a million examples for 8 ranks takes, beside other packers: one JSON line, medians in seconds.

All pack the same lengths into rows of 4096 tokens. Ours also spreads the rows evenly over the ranks; it runs in one
process. TRL's best-fit decreasing is called on one table of all examples, which spares it the writing of a data set;
its tokens are single bytes, so that copying them costs little. Axolotl's multipack sampler gets a process for each
core, and is compiled beforehand. A peer that is not installed is null; `make bench` installs them in .venv-bench.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardtune.data.batching.packed import Packed
from shardtune.examples import Budget

RANKS = 8
TOKENS = 4096
STEP = (128, 2)
"""Examples and ranks of a usual optimizer step."""
TARGETS = {"shardtune": 0.3, "step": 0.001, "fill": 0.995, "squares": 1.02}
PEERS_PYTHON = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"


def draw(examples: int) -> NDArray[np.int64]:
    """Source and target lengths, [n, 2]; their sums are lognormal, the longest as long as a row."""
    sums = np.clip(np.exp(np.random.default_rng(0).normal(6, 1, examples)), 1, TOKENS).astype(np.int64)
    sources = sums * 4 // 5
    return np.stack([sources, sums - sources], 1)


def trl_packer(sums: NDArray[np.int64]) -> Callable[[], int]:
    """Packs with TRL; gives the number of rows."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], np.cumsum(sums)])
    assert offsets[-1] < 2**31
    tokens = pyarrow.array(np.zeros(offsets[-1], np.int8))
    table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(pyarrow.array(offsets, "int32"), tokens)})
    return lambda: _pack_bfd(table, TOKENS).num_rows


def axolotl_packer(sums: NDArray[np.int64]) -> Callable[[], int]:
    """Packs with Axolotl's multipack; gives the number of rows."""
    from axolotl.utils.samplers.multipack import MultipackBatchSampler

    def pack(lengths: NDArray[np.int64]) -> int:
        sampler = MultipackBatchSampler(
            range(len(lengths)),
            batch_size=1,
            batch_max_len=TOKENS,
            lengths=lengths,
            bin_size=TOKENS,
            drop_last=False,
            num_processes=len(os.sched_getaffinity(0)),
        )
        return len(sampler.generate_batches())

    # Compiled here, so that the processes it forks find it compiled: so few examples take only one.
    MultipackBatchSampler(range(100), 1, TOKENS, sums[:100], TOKENS, drop_last=False).generate_batches()
    return lambda: pack(sums)


PEERS = {"trl": trl_packer, "axolotl": axolotl_packer}


def _rounded(figure: float | None, digits: int) -> float | None:
    return None if figure is None else round(figure, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="how often each packs, in turn")
    options = parser.parse_args()

    lengths = draw(options.examples)
    sums = lengths.sum(1)
    work: dict[str, Callable[[], Any]] = {"shardtune": lambda: Packed().layout(lengths, RANKS, Budget(None, TOKENS))}
    versions: dict[str, str | None] = dict.fromkeys(PEERS)
    for name, packer in PEERS.items():
        if importlib.util.find_spec(name) is None:
            print(f"packing: {name} is not installed; its figures are left out", file=sys.stderr)
            continue
        work[name] = packer(sums)
        versions[name] = version(name)
    taken: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, pack in work.items():
            begun = time.perf_counter()
            result = pack()
            taken[name].append(time.perf_counter() - begun)
            results[name] = result  # only now: letting go of the last one takes time, too
    medians = {name: statistics.median(times) for name, times in taken.items()}

    layout = results.pop("shardtune")
    squares = [int((sums[np.concatenate(rank)] ** 2).sum()) for rank in layout]
    # Of a peer's rows as many are counted as give each rank as many: one may wait with an empty row.
    rounds = {"shardtune": len(layout[0]), **{name: -(-rows // RANKS) for name, rows in results.items()}}
    fill = {name: int(sums.sum()) / (found * RANKS * TOKENS) for name, found in rounds.items()}

    step = draw(STEP[0])
    times = timeit.repeat(lambda: Packed().layout(step, STEP[1], Budget(None, TOKENS)), number=1, repeat=200)
    sides = ("shardtune", *PEERS)
    figures = {
        "benchmark": "packing",
        "unit": "s",
        "examples": options.examples,
        "ranks": RANKS,
        "tokens": TOKENS,
        "rounds": options.rounds,
        **{name: _rounded(medians.get(name), 4) for name in sides},
        "ratio": {name: _rounded(medians.get(name, 0) / medians["shardtune"] or None, 1) for name in PEERS},
        "fill": {name: _rounded(fill.get(name), 5) for name in sides},
        "squares": round(max(squares) * RANKS / sum(squares), 6),
        "step": round(statistics.median(times), 6),
        "processes": {"shardtune": 1, "trl": 1, "axolotl": len(os.sched_getaffinity(0))},
        "targets": TARGETS,
        "versions": versions,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    absent = any(importlib.util.find_spec(name) is None for name in PEERS)
    if absent and PEERS_PYTHON.exists() and Path(sys.prefix) != PEERS_PYTHON.parents[1]:
        os.execv(PEERS_PYTHON, [str(PEERS_PYTHON), *sys.argv])  # it sees all that is installed here, and the peers
    main()
