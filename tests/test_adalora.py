"""adalora: PEFT's schedule, scores and choices, whatever part of a parameter a rank has.

The runs happen before the first test that needs them, in two process groups. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator
from torch import Tensor

from peft_runs import LR, STEPS, Run, Runs, threads_of_one
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.protocols import Shard
from shardtune.strategy.parameters import materialize
from shardtune.tuning.adalora import Adalora
from shardtune.tuning.orthogonality import Orthogonal
from shardtune.tuning.rank_allocation import Allocator, Schedule, Update
from shardtune.world import World
from skeletons import TASKS, filled, logits, saved, skeleton_of
from tiny import tiny_config

pytestmark = [
    pytest.mark.timeout(900),
    # PEFT looks for the keys that it writes itself as if they were LoRA's, and warns before it uses them.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    # A layer may lose all of its ranks; PEFT loads that, and warns.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
]
SEED = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
TUNING = {"method": "adalora", "rank": 3, "initial_rank": 5, "interval": 2, "begin": 0.2, "end": 0.8}
BEGIN, END = 1, 5
"""Of STEPS steps: round(0.2 x 6) and round(0.8 x 6)."""


def method(orthogonality: float = 0.5) -> Adalora:
    return Adalora("causal", 3, 5, 32.0, 0.0, "all-linear", 0.2, 0.8, 2, (0.85, 0.85), orthogonality)


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def test_schedule() -> None:
    """The budgets of PEFT's allocator, at the steps at which it makes a choice."""
    rng = random.Random(SEED)
    for _ in range(200):
        total_steps = rng.randint(1, 60)
        end = rng.randint(1, total_steps)
        schedule = Schedule(rng.randint(0, end - 1), end, rng.randint(1, 7))
        total = rng.randint(1, 50)
        target = rng.randint(1, total)
        theirs: Any = object.__new__(RankAllocator)
        theirs.init_bgt, theirs.target_bgt = total, target
        theirs.peft_config = SimpleNamespace(
            tinit=schedule.begin, tfinal=total_steps - end, total_step=total_steps, deltaT=schedule.interval
        )
        for step in range(1, end + 1):
            budget, due = theirs.budget_schedule(step)
            wanted = total - budget if due or step == end else None
            assert schedule.removed(step, total, target) == wanted, f"{schedule} at {step}; seed {SEED}"
        assert schedule.removed(end + 1, total, target) is None


@pytest.mark.parametrize("ranks", [1, 3])
def test_choices(ranks: int) -> None:
    """The same gradients give PEFT's masks, also where each rank has only a range of each parameter."""
    torch.manual_seed(SEED)
    sizes = {f"layers.{i}.%s.default": Update(3 + i, 7 - i) for i in range(4)}
    rank, target, schedule = 4, 2, Schedule(1, 9, 2)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for update in sizes.values():
        layer = torch.nn.Module()
        shapes = {"lora_A": (rank, update.d_in), "lora_B": (update.d_out, rank), "lora_E": (rank, 1)}
        for factor, shape in shapes.items():
            setattr(layer, factor, torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.randn(shape))}))
        model.layers.append(layer)
    settings = SimpleNamespace(
        beta1=0.7, beta2=0.9, target_r=target, tinit=1, tfinal=3, total_step=12, deltaT=2, init_r=rank
    )
    theirs = RankAllocator(model, settings, "default")
    assert theirs.target_bgt == target * len(sizes)
    # Scores are sums over ranks: each simulated rank's scores are taken first, then all get the sum.
    ours = [Allocator(sizes, rank, target, schedule, (0.7, 0.9), alone()) for _ in range(ranks)]
    chosen = 0
    for step in range(1, 10):
        pieces: list[dict[str, int]] = [{} for _ in range(ranks)]
        for name, parameter in model.named_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
            parameter.grad = torch.randn_like(parameter)
            cuts = [parameter.numel() * r // ranks for r in range(ranks + 1)]
            for r in range(ranks):
                part = slice(cuts[r], cuts[r + 1])
                if step < schedule.end and part.stop > part.start:
                    value = parameter.detach().flatten()[part].clone()
                    ours[r].observe(Shard(name, part.start, value, None), parameter.grad.flatten()[part].clone())
                pieces[r][name] = part.start
        brought = [allocator._scores(starts) for allocator, starts in zip(ours, pieces, strict=True)]
        summed = torch.stack(brought).sum(0)
        for allocator, starts in zip(ours, pieces, strict=True):
            allocator._world = SimpleNamespace(sum=lambda _, summed=summed: summed.flatten().tolist())  # pyright: ignore
            allocator.choose(step, starts)
        _, pattern = theirs.update_and_allocate(model, step, force_mask=step == schedule.end)
        assert all(allocator.kept == ours[0].kept for allocator in ours)
        if pattern:
            chosen += 1
            wanted = {name.replace("lora_E", "%s"): which for name, which in pattern.items()}
            assert ours[0].kept == wanted, f"step {step}, seed {SEED}"
    assert chosen == 5
    assert sum(map(sum, ours[0].kept.values())) == target * len(sizes)


def test_equal_scores_are_removed_from_all_updates() -> None:
    updates = {f"{i}.%s": Update(3, 3) for i in range(4)}
    allocator = Allocator(updates, 5, 3, Schedule(0, 1, 1), (0.85, 0.85), alone())
    allocator.choose(1, {})
    assert set(map(tuple, allocator.kept.values())) == {(True, True, True, False, False)}


# ------------------------------------------------------------------------------------------------ penalty


def trained_model(folder: Path, name: str = "llama") -> Any:
    skeleton = skeleton_of(saved(folder, name), TASKS[name])
    with skeleton.recorder:
        model: Any = method().apply(skeleton.model)
    materialize(model, skeleton.weights(model, SEED, torch.float32), torch.device("cpu"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_E." in parameter_name:
                parameter.normal_()
    return model.train()


class _Mean:
    """A task whose loss is a plain function of the logits."""

    def loss_sum(self, model: Any, batch: Any) -> Tensor:
        return model(input_ids=batch.ids, use_cache=False).logits.square().mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_penalty(tmp_path: Path, recompute: bool) -> None:
    """Its gradient is that of PEFT's formula times the share of the targets; the loss does not show it."""
    torch.manual_seed(SEED)
    model = trained_model(tmp_path)
    ids = torch.randint(2, 30, (2, 5))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain_loss = _Mean().loss_sum(model, SimpleNamespace(ids=ids))
    factors = [p if ".lora_A." in n else p.T for n, p in trained.items() if ".lora_E." not in n]
    assert len(factors) == 28
    penalty = sum(torch.norm(p @ p.T - torch.eye(5), p="fro") for p in factors) / len(factors)
    wanted = torch.autograd.grad(plain_loss + 0.3 * 7 * penalty, list(trained.values()))
    if recompute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the name is deprecated, and runs use it
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.adalora.SVDLinear)]
    task: Any = Orthogonal(_Mean(), layers, 0.3)  # pyright: ignore[reportArgumentType]
    loss = task.loss_sum(model, SimpleNamespace(ids=ids, targets=7))
    loss.backward()
    assert loss.item() == plain_loss.item()
    for (name, parameter), gradient in zip(trained.items(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    model.eval()
    evaluated = task.loss_sum(model, SimpleNamespace(ids=ids, targets=7))
    model.zero_grad()
    evaluated.backward()
    torch.testing.assert_close(evaluated, plain_loss)
    off = torch.autograd.grad(_Mean().loss_sum(model, SimpleNamespace(ids=ids)), list(trained.values()))
    for parameter, gradient in zip(trained.values(), off, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bert"])
def test_begins_as_the_model_itself(tmp_path: Path, name: str) -> None:
    folder, task = saved(tmp_path, name), TASKS[name]
    base = logits(filled(skeleton_of(folder, task)))
    skeleton = skeleton_of(folder, task)
    adalora = Adalora(task, 3, 5, 32.0, 0.0, "all-linear", 0.1, 0.7, 10, (0.85, 0.85), 0.5)
    with skeleton.recorder:
        model: Any = adalora.apply(skeleton.model)
    materialize(model, skeleton.weights(model, 0, torch.float32), torch.device("cpu"))
    assert torch.equal(logits(model), base)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_A." in parameter_name or ".lora_B." in parameter_name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.5)
        elif ".ranknum." in parameter_name:
            assert parameter.tolist() == [5.0]
            assert not parameter.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "initial_rank": 6}, "tuning.initial_rank: ranks fall, so it cannot be below tuning.rank"),
        ({"begin": 0.7, "end": 0.7}, "tuning.begin: 0.7 is not before tuning.end"),
        ({"beta1": 0.0}, "tuning.beta1: "),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config(tmp_path, tuning={"method": "adalora", **options}), [])


# --------------------------------------------------------------------------------------------------- runs


def run(model: str, strategy: str, label: str = "", **options: Any) -> Run:
    return Run("adalora", model, strategy, label, (("tuning", TUNING), *options.items()))


SINGLE = [run("t5", "single"), run("llama", "single"), run("gpt2", "single"), run("bert", "single")]
OTHERS = [
    run("t5", "ddp"), run("t5", "fsdp2"), run("llama", "fsdp2"), run("llama", "zero2"), run("llama", "zero3"),
    run("t5", "zero3"), run("llama", "single", "recompute", model__recompute="full"),
]  # fmt: skip
DEFAULTS = Run("adalora", "llama", "single", "defaults")
BEGUN = [run("llama", "single", "begun", duration__steps=0), run("t5", "single", "begun", duration__steps=0)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = threads_of_one()
    made = Runs(tmp_path_factory.mktemp("adalora"), SEED)
    made.train([*SINGLE, *OTHERS, DEFAULTS, *BEGUN])
    yield made
    torch.set_num_threads(threads)


def pattern_of(runs: Runs, of: Run) -> dict[str, list[bool]]:
    settings = json.loads((runs.path(of) / "final" / "adapter_config.json").read_text())
    return settings["rank_pattern"]


@pytest.mark.parametrize("of", [*SINGLE, DEFAULTS], ids=lambda of: of.name)
def test_learns_and_loads(runs: Runs, of: Run) -> None:
    runs.assert_learned(of)
    pattern = pattern_of(runs, of)
    mean = 8 if of is DEFAULTS else 3
    assert sum(map(sum, pattern.values())) == mean * len(pattern)
    runs.assert_loads(of)


@pytest.mark.parametrize("of", OTHERS, ids=lambda of: of.name)
def test_ranks_train_the_same_adapter(runs: Runs, of: Run) -> None:
    single = run(of.model, "single")
    assert pattern_of(runs, of) == pattern_of(runs, single), f"seed {SEED}"
    runs.assert_same_adapter(of, single, 1e-5)
    runs.assert_loads(of)


@pytest.mark.parametrize("begun", BEGUN, ids=lambda begun: begun.name)
def test_trains_as_peft_does(runs: Runs, begun: Run) -> None:
    """PEFT's own model, penalty and allocator in a plain loop, from the same beginning."""
    of = run(begun.model, "single")
    model = runs.load(begun, trainable=True).train()
    settings = model.peft_config["default"]
    settings.total_step, settings.tinit, settings.tfinal = STEPS, BEGIN, STEPS - END
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, eps=1e-4, weight_decay=0.0)
    batches, norms = runs.batches(of), []
    for step in range(1, STEPS + 1):
        model(**batches[(step - 1) % len(batches)]).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert [line["grad_norm"] for line in runs.lines(of, "grad_norm")] == pytest.approx(norms, rel=1e-4)
    wanted = {name.replace(".default", ""): which for name, which in settings.rank_pattern.items()}
    assert pattern_of(runs, of) == wanted, f"seed {SEED}"
    theirs, ours = peft.get_peft_model_state_dict(model), runs.adapter(of)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}; {SEED}")


def test_steps_are_written_to_the_settings(runs: Runs) -> None:
    settings = json.loads((runs.path(SINGLE[0]) / "final" / "adapter_config.json").read_text())
    assert (settings["total_step"], settings["tinit"], settings["tfinal"]) == (STEPS, BEGIN, STEPS - END)
