"""What tuning methods keep in checkpoints, and that a run which goes on from one is bit for bit the same."""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn

import plain
import run_many
import tiny
from forked import TESTS, run_group
from kept import Kept
from layouts import ARCHITECTURES
from shardtune.model.quantized import quantize_layers
from shardtune.protocols import VALUE, Piece, Saved, Shard, Tuning, Weights
from shardtune.quantization import Quantization
from shardtune.tuning import pissa, rank_allocation
from shardtune.tuning.adalora import Adalora
from shardtune.tuning.eva import Eva
from shardtune.tuning.initial_values import adapted_layers
from shardtune.tuning.loftq import Loftq
from shardtune.tuning.pissa import Pissa
from shardtune.tuning.rank_allocation import Allocating, Allocator, Schedule, Update
from shardtune.tuning_config import TuningConfig
from shardtune.world import World
from skeletons import TASKS, saved, skeleton_of

SEED = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
ALONE = World(0, 1, 0, torch.device("cpu"))


def world(rank: int, ranks: int) -> World:
    return World(rank, ranks, rank, torch.device("cpu"))


def applied(folder: Path, name: str, tuning: Tuning, recalled: Saved | None = None) -> tuple[Any, Weights]:
    """A tuned model on the meta device, and its initial values."""
    skeleton = skeleton_of(folder, TASKS[name])
    if recalled is not None:
        tuning.recall(recalled)
    if tuning.quantization is not None:
        quantize_layers(skeleton.model, TASKS[name], skeleton.recorder, tuning.quantization, torch.float32, name)
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    return model, tuning.initial(model, skeleton.weights(model, 0, torch.float32, tuning.trained_dtype), ALONE)


def values(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    return {name: weights.read(name, 0, parameter.numel()) for name, parameter in model.named_parameters()}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def decompose(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decomposed anew")

    monkeypatch.setattr(torch.linalg, "svd", decompose)
    monkeypatch.setattr(torch, "svd_lowrank", decompose)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize(("dtype", "iterations"), [(torch.float32, 4), (torch.bfloat16, None)])
def test_pissa_goes_on_with_the_factors_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, iterations: int | None
) -> None:
    """Whatever decomposition would find: here there is none."""
    saved(tmp_path, name)
    make = lambda: Pissa(TASKS[name], 3, 6.0, "all-linear", dtype, iterations)  # noqa: E731
    first, ranks = make(), random.Random(SEED).randint(1, 5)
    model, weights = applied(tmp_path, name, first)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    checkpoint = Kept(
        (piece for r in range(ranks) for piece in first.pieces(world(r, ranks))), tuning=first.remembered()
    )
    assert checkpoint.elements() == sum(p.numel() for p in trained.values())
    before = values(model, weights)
    forbid(monkeypatch)
    second = make()
    again, those = applied(tmp_path, name, second, checkpoint)
    after = values(again, those)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), f"{key}, {ranks} ranks, seed {SEED}"
    learned = {n: torch.randn(p.shape) for n, p in trained.items()}
    results = [method.result(of, learned, weights).tensors for method, of in ((first, model), (second, again))]
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    third = Kept(piece for r in range(2) for piece in second.pieces(world(r, 2)))  # and its own checkpoints have them
    for layer in adapted_layers(model):
        assert third.whats(layer.up) == {pissa.BEGAN: (layer.outs, 3)}
        assert torch.equal(third.read(layer.up, pissa.BEGAN, 0, 9), checkpoint.read(layer.up, pissa.BEGAN, 0, 9))


def test_loftq_decomposes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    forbid(monkeypatch)
    make = lambda: Loftq("causal", 4, 8.0, 0.0, "all-linear", quantization=Quantization("nf4"))  # noqa: E731
    with pytest.raises(AssertionError, match="decomposed anew"):
        applied(tmp_path, "llama", make())
    applied(tmp_path, "llama", make(), Kept([]))


def test_eva_has_the_ranks_that_were_found(tmp_path: Path) -> None:
    saved(tmp_path, "t5")
    make = lambda: Eva("seq2seq", 3, 6.0, 0.0, "all-linear")  # noqa: E731
    first, rng = make(), random.Random(SEED)
    names = [
        layer.name.removeprefix("base_model.model.") for layer in adapted_layers(applied(tmp_path, "t5", make())[0])
    ]
    first.begin_with({name: torch.randn(rng.randint(0, 6), 32) for name in names if not name.endswith(".wo")})
    model, _ = applied(tmp_path, "t5", first)
    second = make()
    again, _ = applied(tmp_path, "t5", second, Kept([], tuning=first.remembered()))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert [(one.name, one.rank, one.scale) for one in adapted_layers(model)] == [
        (one.name, one.rank, one.scale) for one in adapted_layers(again)
    ], f"seed {SEED}"
    assert (second.notes(), second.remembered()) == (first.notes(), first.remembered())


# ---------------------------------------------------------------------------------------------- adalora

RANK, UPDATES = 4, {f"layers.{i}.%s.default": Update(3 + i, 7 - i) for i in range(3)}
SHAPES = {
    name % factor: shape
    for name, update in UPDATES.items()
    for factor, shape in (("lora_A", (RANK, update.d_in)), ("lora_B", (update.d_out, RANK)), ("lora_E", (RANK, 1)))
}
SCHEDULE = Schedule(1, 9, 2)
LAST = 11


class Ranges:
    """A strategy that has a range of each parameter, its own for every rank, and takes steps of gradient descent."""

    def __init__(self, rank: int, ranks: int, read: Callable[[str, int, int], Tensor]) -> None:
        self.step_number = 0
        self.begin = {n: math.prod(shape) * rank // ranks for n, shape in SHAPES.items()}
        end = {n: math.prod(shape) * (rank + 1) // ranks for n, shape in SHAPES.items()}
        self.values = {n: read(n, start, end[n]) for n, start in self.begin.items() if end[n] > start}

    def shards(self) -> list[Shard]:
        found = []
        for name, value in self.values.items():
            seed = f"{SEED} {self.step_number} {name}"
            generator = torch.Generator().manual_seed(random.Random(seed).randrange(2**31))
            gradient = torch.randn(math.prod(SHAPES[name]), generator=generator)
            found.append(Shard(name, self.begin[name], value, gradient[self.begin[name] :][: len(value)]))
        return found

    def step(self, lr: float, scale: float) -> None:
        for shard in self.shards():
            shard.value.sub_(lr * scale * (shard.gradient if shard.gradient is not None else 0))
        self.step_number += 1

    def overwrite(self, name: str, value: Tensor) -> None:
        if name in self.values:
            self.values[name].copy_(value.flatten()[self.begin[name] :][: len(self.values[name])])

    def pieces(self) -> list[Piece]:
        return [Piece(name, VALUE, SHAPES[name], self.begin[name], value) for name, value in self.values.items()]

    def restore(self, saved: Saved) -> None:
        self.step_number = saved.step


def allocated(ranks: int, begin: Saved | None, steps: int) -> tuple[Kept, dict[str, list[bool]]]:
    """What a checkpoint of these ranks holds after step number `steps`, and what is kept, as the settings say it."""
    barrier, brought = threading.Barrier(ranks), [[0.0]] * ranks
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    told: list[dict[str, list[bool]]] = [{} for _ in range(ranks)]

    def rank_of(rank: int) -> None:
        def summed(values: list[float]) -> list[float]:
            brought[rank] = values
            barrier.wait()
            total = [sum(column) for column in zip(*brought, strict=True)]
            barrier.wait()
            return total

        def read(name: str, start: int, stop: int) -> Tensor:
            if begin is not None:
                return begin.read(name, VALUE, start, stop)
            return torch.randn(math.prod(SHAPES[name]), generator=torch.Generator().manual_seed(sum(name.encode())))[
                start:stop
            ]

        place: Any = SimpleNamespace(rank=rank, size=ranks, is_first=rank == 0, sum=summed)
        allocator = Allocator(UPDATES, RANK, 2, SCHEDULE, (0.7, 0.9), place)
        strategy: Any = Allocating(Ranges(rank, ranks, read), allocator, told[rank].update)  # pyright: ignore[reportArgumentType]
        if begin is not None:
            strategy.restore(begin)
        for _ in range(begin.step if begin is not None else 0, steps):
            strategy.step(0.1, 0.5)
        pieces[rank] = list(strategy.pieces())

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(rank_of, range(ranks), timeout=60))
    assert all(one == told[0] for one in told)
    return Kept((piece for some in pieces for piece in some), step=steps), told[0]


def test_adalora_goes_on_with_what_it_knows_of_triplets() -> None:
    """Stopped anywhere, and gone on with by any number of ranks: the same parameters, averages and choices."""
    rng = random.Random(SEED)
    whole, kept = allocated(rng.randint(1, 4), None, LAST)
    assert sum(map(sum, kept.values())) == 2 * len(UPDATES)
    for stopped in range(1, LAST):
        before, after = rng.randint(1, 4), rng.randint(1, 4)
        about = f"step {stopped}, {before} and {after} ranks, seed {SEED}"
        half, _ = allocated(before, None, stopped)
        assert (rank_allocation.MEAN in half.whats("layers.0.lora_A.default")) == (stopped < SCHEDULE.end), about
        rest, choice = allocated(after, half, LAST)
        assert choice == kept, about
        for name in SHAPES:
            assert whole.whats(name) == rest.whats(name), about
            for what, shape in whole.whats(name).items():
                count = math.prod(shape)
                assert torch.equal(whole.read(name, what, 0, count), rest.read(name, what, 0, count)), f"{name} {about}"


def test_adalora_keeps_the_schedule_that_it_began_with(tmp_path: Path) -> None:
    """More steps do not move it."""
    skeleton = skeleton_of(saved(tmp_path, "llama"), "causal")
    method = Adalora("causal", 3, 5, 32.0, 0.0, "all-linear", 0.2, 0.8, 2, (0.85, 0.85), 0.0)
    method.recall(Kept([], tuning={"steps": 10}))
    with skeleton.recorder:
        model: Any = method.apply(skeleton.model)
    nothing: Any = None
    for steps in (10, 30):
        method.in_training(nothing, nothing, steps, ALONE)
        settings = model.peft_config["default"]
        assert (settings.total_step, settings.tinit, settings.tfinal) == (10, 2, 2)
    assert method.remembered() == {"steps": 10}


# ------------------------------------------------------------------------------------------------ whole runs

STEPS, SAVED = 6, 3
METHODS = {
    name: section
    for section in get_args(get_args(TuningConfig)[0])
    for name in get_args(section.model_fields["method"].annotation)
}
MODELS = {"bitfit": "bart", "lora+": "bert", "eva": "llama", "prefix": "llama", "loha": "llama", "qdora": "llama"}
"""Where it is not T5."""
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 5, "rank": 3, "begin": 0.2, "end": 0.8, "interval": 2},  # chooses before and after
    "eva": {"examples": 8}, "vera": {"rank": 16}, "freeze": {"layers": 1}, "p_tuning": {"encoder": "lstm"},
    "prefix": {"projection": True}, "pissa": {"iterations": 4},
}  # fmt: skip
ALL = "SHARDTUNE_TEST_ALL" in os.environ
SHARDED = {
    "fsdp2": ["full", "lora", "qlora", "pissa", "eva", "adalora", "loftq", "prefix", "multitask_prompt", "adapter"],
    "zero3": ["full", "adalora"],
}
"""Methods that differ in what they keep; SHARDTUNE_TEST_ALL adds the others."""


class Twice(NamedTuple):
    """A run that is done as a whole, and once more from its checkpoint on."""

    method: str
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.strategy}".replace("+", "-plus")

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else 2


TWICE = [
    *(Twice(method, "single") for method in METHODS),
    *(Twice(method, strategy) for strategy, some in SHARDED.items() for method in (METHODS if ALL else some)),
]


class Runs:
    """Folders of these runs; those of as many ranks are trained in one process group, both groups at the same time."""

    def __init__(self, folder: Path, wanted: Sequence[Twice]) -> None:
        self.folder = folder
        self._wanted = wanted
        self._said: dict[int, str] = {}
        for model in {MODELS.get(run.method, "t5") for run in wanted}:
            plain.make_model(folder / model, ARCHITECTURES[model], SEED)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._train, (1, 2)))

    def folders(self, run: Twice) -> tuple[Path, Path]:
        """Of the whole run, and of the one that goes on."""
        found = self.folder / "runs" / run.name, self.folder / "runs" / f"{run.name}-resumed"
        if not all((path / "final").is_dir() for path in found):
            log = found[0].with_suffix(".log")
            said = log.read_text(encoding="utf-8")[-3000:] if log.exists() else ""
            pytest.fail(f"{run.name} did not finish; seed {SEED}\n{said}\n{self._said[run.ranks][-3000:]}")
        return found

    def _train(self, ranks: int) -> None:
        runs = [run for run in self._wanted if run.ranks == ranks]
        if not runs:
            return
        script, log = TESTS / "ranks" / "train_twice.py", self.folder / f"{ranks}-ranks.log"
        variables = {"SHARDTUNE_CACHE": str(self.folder / f"cache-{ranks}")}
        run_group([script, *map(self._config, runs)], ranks, log, variables, 600)
        self._said[ranks] = log.read_text(encoding="utf-8")

    def _config(self, run: Twice) -> Path:
        model = MODELS.get(run.method, "t5")
        dropout = {"dropout": 0.2} if "dropout" in METHODS[run.method].model_fields and run.method != "pissa" else {}
        return run_many.config(
            self.folder, run.name, self.folder / model, plain.task_of(ARCHITECTURES[model]["model_type"]),
            seed=SEED % 1000, model__dropout=0.1, strategy__kind=run.strategy, duration__steps=STEPS,
            tuning={"method": run.method, **dropout, **OPTIONS.get(run.method, {})},
            batch={"examples": 8, "micro_examples": 2}, checkpoint={"every": SAVED, "keep": 9},
            evaluation={"examples": 3, "max_new_tokens": 2, "baseline": False, "every": 100},
        )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [p["run"] for p in parameters if isinstance(p.get("run"), Twice)]
    return Runs(tmp_path_factory.mktemp("twice"), [run for run in TWICE if run in selected])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", TWICE, ids=lambda run: run.name)
def test_going_on_is_bit_for_bit_the_same(runs: Runs, run: Twice) -> None:
    """Losses and gradient norms, the last checkpoint with optimizer and random streams, and the result."""
    whole, resumed = runs.folders(run)
    steps = [[tiny.lasting(line) for line in run_many.metrics(path)[0]] for path in (whole, resumed)]
    assert [line["step"] for line in steps[0]] == list(range(1, STEPS + 1))
    assert steps[1] == steps[0][SAVED:], f"seed {SEED}"
    judged = [[tiny.lasting(line) for line in run_many.metrics(path)[1]] for path in (whole, resumed)]
    assert judged[0] == judged[1]
    last = f"checkpoints/step-{STEPS:08}"
    for place, pattern in ((last, "*.safetensors"), ("final", "**/*"), ("predictions", "*")):
        files = [{str(f.relative_to(path)): f for f in (path / place).glob(pattern)} for path in (whole, resumed)]
        assert files[0].keys() == files[1].keys()
        assert files[0]
        for name, file in files[0].items():
            assert file.read_bytes() == files[1][name].read_bytes(), f"{name}, seed {SEED}"
