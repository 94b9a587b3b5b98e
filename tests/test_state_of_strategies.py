"""What strategies keep in checkpoints, and how they go on from it.

All cases run before the first test, in one process group for each number of ranks, all groups at the same time. With
SHARDTUNE_TEST_ALL set they are all that there are, else a sample. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

import tiny
from forked import run_group
from saved_pieces import SavedPieces
from shardtune.optim.adamw import ScheduleFree, averaged_values
from shardtune.strategy.gradients import averaged

pytestmark = pytest.mark.timeout(900)

ALL = "SHARDTUNE_TEST_ALL" in os.environ
SCRIPT = Path(__file__).parent / "ranks" / "go_on.py"
SAVED, END = 3, 5
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": {**tiny.ARCHITECTURES["t5"], "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu"},
    # Matrices large enough for the 8-bit states of bitsandbytes.
    "llama": {**tiny.ARCHITECTURES["llama"], "hidden_size": 72, "intermediate_size": 120, "attention_dropout": 0.1},
    # More than one of the buckets in which ddp sums gradients.
    "llama-large": {
        **tiny.ARCHITECTURES["llama"], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
    },
}  # fmt: skip
ROWWISE, WHOLE = ["adamw", "lion", "schedule_free"], ["adamw_8bit", "lion_8bit", "adafactor", "muon"]
ZERO = ["zero1", "zero2", "zero3"]


class Resumed(NamedTuple):
    """A run of END steps, and one that begins with what the first had saved after SAVED steps."""

    ranks: int
    kind: str
    model: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.ranks, self.kind, self.model, *self.options.values())))


def resumed(ranks: int, kind: str, model: str, **options: Any) -> Resumed:
    return Resumed(ranks, kind, model, options)


SAMPLE = [
    resumed(3, "ddp", "llama-large"),
    resumed(3, "fsdp2", "llama-large"),
    resumed(1, "single", "t5"),
    resumed(1, "single", "llama", optimizer="adamw_8bit"),
    resumed(1, "single", "llama", optimizer="schedule_free", method="lora"),
    resumed(2, "ddp", "t5", optimizer="adafactor"),
    resumed(2, "ddp", "llama", method="lora", dtype="bfloat16"),
    resumed(2, "fsdp2", "t5", dtype="bfloat16"),
    resumed(2, "fsdp2", "llama", optimizer="lion_8bit"),
    resumed(2, "fsdp2", "llama", optimizer="muon", offload="cpu"),
    resumed(2, "fsdp2", "t5", optimizer="schedule_free", method="lora"),
    resumed(2, "zero1", "llama", dtype="bfloat16"),
    resumed(2, "zero2", "t5", optimizer="lion"),
    resumed(2, "zero2", "t5", method="lora", dtype="bfloat16", offload="cpu"),
    resumed(2, "zero3", "t5"),
    resumed(2, "zero3", "llama", method="lora", dtype="bfloat16"),
    resumed(2, "zero3", "llama", offload="cpu"),
]
REST = [
    *(
        resumed(ranks, kind, model, optimizer=optimizer, method=method, dtype=dtype, offload=offload)
        for ranks in (1, 2)
        for kind in ("single", "ddp", "fsdp2", *ZERO)
        for offload in ("none", "cpu")
        for optimizer in [*ROWWISE, *WHOLE]
        for model, method in (("t5", "full"), ("llama", "full"), ("t5", "lora"), ("llama", "lora"))
        for dtype in ("float32", "bfloat16")
        if not (kind == "single" and ranks > 1)
        and not (offload == "cpu" and kind not in ("fsdp2", "zero2", "zero3"))
        and not (kind in ZERO and optimizer not in ("adamw", "lion"))
    ),
    *(resumed(3, kind, "llama-large", optimizer="adamw") for kind in ("ddp", *ZERO)),
    *(resumed(3, "ddp", "t5", optimizer=optimizer) for optimizer in WHOLE),
    *(resumed(2, "zero3", "llama", split=False, dtype=dtype) for dtype in ("float32", "bfloat16")),
]
RESUMED = [*SAMPLE, *REST] if ALL else SAMPLE

CHAINS = {
    "adamw": [("ddp", 2), ("single", 1), ("zero2", 3)],
    "adamw-sharded": [("zero3", 2), ("fsdp2", 1), ("single", 1), ("zero1", 3)],
    "lion": [("zero1", 2), ("fsdp2", 3), ("ddp", 3)],
    "adafactor": [("fsdp2", 2), ("single", 1), ("ddp", 3)],
    "schedule_free": [("fsdp2", 2), ("single", 1), ("fsdp2", 3)],
}
"""Each is one run whose steps are done by these strategies in turn, two by each."""


def cases_of(run: Resumed, folder: Path) -> list[dict[str, Any]]:
    shared = {"model": str(folder / run.model), "kind": run.kind, **run.options}
    on = {"begin": SAVED, "start": str(folder / f"{run.name}-{SAVED}")}
    return [
        {**shared, "name": run.name, "end": END, "save_at": SAVED, "evaluate_at": SAVED},
        {**shared, "name": f"{run.name}-on", "end": END, **on},
    ]


def links_of(chain: str, folder: Path) -> list[tuple[int, dict[str, Any]]]:
    links, shared = [], {"model": str(folder / "t5"), "optimizer": chain.partition("-")[0], "dropout": False}
    for index, (kind, ranks) in enumerate(CHAINS[chain]):
        link = {"name": f"{chain}-{index}", "kind": kind, "begin": 2 * index, "end": 2 * index + 2, **shared}
        before = {"start": str(folder / f"{chain}-{index - 1}"), "after": f"{chain}-{index - 1}"} if index else {}
        links.append((ranks, {**link, **before}))
    return [*links, (1, {"name": f"{chain}-alone", "kind": "single", "end": 2 * len(links), **shared})]


class Done:
    """What the cases left."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        for name, architecture in ARCHITECTURES.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(architecture))
        by_ranks: dict[int, list[dict[str, Any]]] = {2: [], 1: [], 3: []}  # chains, in the end, go through them so
        for run in RESUMED:
            by_ranks[run.ranks] += cases_of(run, folder)
        for chain in CHAINS:
            for ranks, link in links_of(chain, folder):
                by_ranks[ranks].append(link)
        self.log = ""
        with ThreadPoolExecutor(len(by_ranks)) as pool:
            list(pool.map(self._launch, by_ranks, by_ranks.values()))

    def _launch(self, ranks: int, cases: list[dict[str, Any]]) -> None:
        listed, log = self.folder / f"{ranks}-ranks.json", self.folder / f"{ranks}-ranks.log"
        listed.write_text(json.dumps([{**case, "seed": self.seed} for case in cases]))
        if run_group([SCRIPT, self.folder, listed], ranks, log, seconds=3000):
            self.log += f"{ranks} ranks:\n{log.read_text()}"[-5000:]

    def losses(self, name: str) -> list[tuple[float, float]]:
        return [(loss, norm) for loss, norm in self._left(name)["losses"]]

    def trained(self, name: str) -> dict[str, float]:
        return self._left(name)["trained"]

    def pieces(self, name: str) -> SavedPieces:
        return SavedPieces(self.folder / name)

    def _left(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        assert path.exists(), f"{name} did not finish; seed {self.seed}\n{self.log}"
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**20))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Done(tmp_path_factory.mktemp("state"), seed)
    torch.set_num_threads(threads)


def assert_same(got: dict[tuple[str, str], Tensor], wanted: dict[tuple[str, str], Tensor], seed: int) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), f"{key} differs; seed {seed}"


@pytest.mark.parametrize("run", RESUMED, ids=lambda run: run.name)
def test_a_run_goes_on_bit_for_bit(done: Done, run: Resumed) -> None:
    before, after = done.losses(run.name), done.losses(f"{run.name}-on")
    assert after == before[SAVED:], f"seed {done.seed}"
    assert after[0] != after[1]
    assert_same(done.pieces(f"{run.name}-on").tensors, done.pieces(run.name).tensors, done.seed)
    assert done.trained(f"{run.name}-on") == done.trained(run.name), f"seed {done.seed}"
    at_first = done.pieces(f"{run.name}-{SAVED}").tensors
    assert {what for _, what in at_first} > {""}, "there is nothing of the optimizer"
    assert any(not torch.equal(at_first[key], tensor) for key, tensor in done.pieces(run.name).tensors.items())


@pytest.mark.parametrize("chain", CHAINS)
def test_strategies_take_turns(done: Done, chain: str) -> None:
    alone, links = done.losses(f"{chain}-alone"), len(CHAINS[chain])
    together = [step for index in range(links) for step in done.losses(f"{chain}-{index}")]
    assert len(together) == 2 * links
    # Where the momentum of an element is noise, rounding decides which way Lion moves it.
    far = 100 if chain.startswith("lion") else 1
    for (loss, norm), (wanted, wanted_norm) in zip(together, alone, strict=True):
        assert loss == pytest.approx(wanted, rel=far * 1e-6), f"seed {done.seed}"
        assert norm == pytest.approx(wanted_norm, rel=far * 1e-5), f"seed {done.seed}"
    got, wanted = done.pieces(f"{chain}-{links - 1}").tensors, done.pieces(f"{chain}-alone").tensors
    assert got.keys() == wanted.keys()
    assert {key: (t.shape, t.dtype) for key, t in got.items()} == {key: (t.shape, t.dtype) for key, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in got.items() if key[1] in ("step", "group.k"))


def test_ranks_have_equal_shares(done: Done) -> None:
    for run in RESUMED:
        sizes = done.pieces(run.name).bytes
        assert len(sizes) == run.ranks
        if run.kind == "fsdp2" and run.options.get("optimizer") in WHOLE:
            continue  # ranks own the states of whole parameters: of a model so small not of equally many bytes
        assert max(sizes) <= 1.1 * min(sizes), f"{run.name}: {sizes}; seed {done.seed}"


@pytest.mark.parametrize("beta1", [0.8, 0.9, 0.95])
def test_the_average_of_schedule_free_training_is_that_of_its_authors(beta1: float) -> None:
    parameter = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(3)))
    optimizer = AdamWScheduleFree([parameter], lr=0.1, betas=(beta1, 0.99))
    optimizer.train()
    for _ in range(4):
        parameter.grad = parameter.detach().sin()
        optimizer.step()
    found = averaged_values(parameter.detach(), optimizer.state[parameter]["z"], beta1)
    optimizer.eval()
    assert not torch.equal(found, optimizer.state[parameter]["z"])
    assert torch.equal(found, parameter.detach())


def test_evaluating_leaves_no_trace_in_schedule_free_training() -> None:
    parameter = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(4)))
    optimizer = ScheduleFree(0.1, 0.0)([("weight", parameter)])
    for _ in range(3):
        parameter.grad = parameter.detach().cos()
        optimizer.step()
    before = parameter.detach().clone()
    with averaged(optimizer):
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["train_mode"]
