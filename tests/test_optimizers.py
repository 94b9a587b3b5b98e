"""Every optimizer is the library's own, and its runs are the same on any layout that it may have.

All runs happen before the first test, in two process groups: one of one rank, one of two. SHARDTUNE_TEST_SEED repeats a
failure.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from transformers.optimization import Adafactor

import plain
import tiny
from layouts import STEPS as MANY
from layouts import Done, Run, launch_all
from shardtune.assemble.optimizers import make_optimizer_recipe
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.layers import embedding_names, matrix_names
from shardtune.optimizer_config import Adamw8bitConfig, Lion8bitConfig, MuonConfig
from shardtune.tuning.full import Full

pytestmark = pytest.mark.timeout(600)

STEPS, WARMUP, DECAY = 6, 2, 0.1
assert STEPS < MANY
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"lr": 3e-3, "betas": [0.8, 0.95]},
    "lion": {"lr": 1e-3},
    "lion_8bit": {"lr": 1e-3, "betas": [0.8, 0.95]},
    "adafactor": {"lr": 3e-3, "clip_threshold": 0.7, "decay_rate": 0.7, "scale_parameter": True},
    "muon": {"lr": 3e-3, "momentum": 0.9, "iterations": 4},
    "schedule_free": {"lr": 3e-3, "schedule": "constant", "betas": [0.8, 0.95]},
}
LIMIT = {"muon": 3e-4, "adamw_8bit": 1e-4, "lion": 5e-5, "lion_8bit": 1e-4}
"""Relative differences of losses and norms where they may be larger than 1e-5: rounding in the seventh digit decides
about a rounding to 8 bits (torch's Muon orthogonalizes in bfloat16), or about a sign."""


def a_run(name: str, kind: str, ranks: int, model: str = "llama-wide", **options: Any) -> Run:
    optimizer = {"name": name, "schedule": "linear", "warmup": WARMUP, "weight_decay": DECAY, **OPTIONS[name]}
    shared = {"optimizer": optimizer, "optimizer__lr": optimizer["lr"], "optimizer__warmup": WARMUP}
    group = f"{name}-{model}" + "-lora" * ("tuning" in options)
    return Run(group, model, kind, ranks, 2, {**shared, "duration__steps": STEPS, **options})


ADALORA = {"method": "adalora", "rank": 2, "initial_rank": 4, "begin": 0.2, "end": 0.8, "interval": 1}
LORA = {"tuning": {"method": "lora", "rank": 3, "alpha": 6}}
WIDE = [a_run(name, "single", 1) for name in OPTIONS]
ON_TWO = [
    *(a_run(name, kind, 2) for name in OPTIONS for kind in ("ddp", "fsdp2")),
    a_run("lion", "zero2", 2),
    a_run("lion", "zero3", 2),
    a_run("muon", "fsdp2", 2, **LORA),
    a_run("adafactor", "fsdp2", 2, "t5", strategy__offload="cpu"),
    a_run("adafactor", "fsdp2", 2, tuning=ADALORA),
    a_run("schedule_free", "fsdp2", 2, "t5", model__dtype="bfloat16"),
]
OTHERS = [
    a_run("muon", "single", 1, **LORA),
    a_run("adafactor", "single", 1, "t5"),
    a_run("adafactor", "single", 1, tuning=ADALORA),
    a_run("schedule_free", "single", 1, "t5", model__dtype="bfloat16"),
]
RUNS = [*WIDE, *OTHERS, *ON_TWO]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Done(tmp_path_factory.mktemp("optimizers"), seed, RUNS)
    launch_all(made, RUNS)
    yield made
    torch.set_num_threads(threads)


def by_name(runs: list[Run]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", runs, ids=lambda run: f"{run.group}-{run.strategy}")


def farthest(got: list[float], wanted: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(got, wanted, strict=True))


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative norm of a tensor's difference."""
    assert got.keys() == wanted.keys()
    whole = [name for name, tensor in wanted.items() if tensor.numel()]  # a layer's rank may have fallen to 0
    return max(float((got[n].double() - wanted[n].double()).norm() / wanted[n].double().norm()) for n in whole)


# ----------------------------------------------------------------------------------------- layouts


@by_name(ON_TWO)
def test_two_ranks_train_as_one(done: Done, run: Run) -> None:
    single = next(other for other in [*WIDE, *OTHERS] if other.group == run.group)
    (got, judged), (wanted, single_judged) = done.metrics(run), done.metrics(single)
    limit = LIMIT.get(run.options["optimizer"]["name"], 1e-5)
    if run.option("model__dtype", "") == "bfloat16":
        limit = 0.05
    for key in ("loss", "grad_norm"):
        far = farthest([step[key] for step in got], [step[key] for step in wanted])
        assert far <= limit, f"{key} differs by {far}; seed {done.seed}"
    assert judged["loss"] == pytest.approx(single_judged["loss"], rel=limit), f"seed {done.seed}"
    far = distance(done.final(run), done.final(single))
    assert far <= 20 * limit, f"weights differ by {far}; seed {done.seed}"
    if run.options.get("tuning") != ADALORA:  # whose factors begin at zero: hardly anything in five steps
        assert got[4]["loss"] < got[0]["loss"], f"it does not learn the same examples; seed {done.seed}"


def test_ranks_update_whole_matrices_as_one_process_does(done: Done) -> None:
    sharded, copied = (done.final(a_run("adafactor", kind, 2)) for kind in ("fsdp2", "ddp"))
    assert distance(sharded, copied) <= 1e-6, f"seed {done.seed}"


# -------------------------------------------------------------------------------------- plain loops


def plain_optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    options, trained = OPTIONS[name], list(model.named_parameters())

    def groups(chosen: Callable[[str, Tensor], bool] = lambda name, p: True) -> list[dict[str, Any]]:
        own = [(n, p) for n, p in trained if chosen(n, p)]
        return [
            {"params": [p for _, p in own if (p.dim() < 2) == small], "weight_decay": 0.0 if small else DECAY}
            for small in (False, True)
            if any((p.dim() < 2) == small for _, p in own)
        ]

    lr = options["lr"]
    if name == "adafactor":
        return [
            Adafactor(groups(), lr=lr, relative_step=False, scale_parameter=True, clip_threshold=0.7, decay_rate=-0.7)
        ]
    if name == "schedule_free":
        optimizer = AdamWScheduleFree(groups(), lr=lr, betas=(0.8, 0.95))
        optimizer.train()
        return [optimizer]
    if name == "muon":
        hidden = re.compile(r"layers\.\d+\..*_proj\.weight$")
        matrices = groups(lambda n, p: hidden.search(n) is not None)
        others = groups(lambda n, p: hidden.search(n) is None)
        muon = torch.optim.Muon(matrices, lr=lr, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, lr=lr)]
    if name == "lion":
        return [bitsandbytes.optim.Lion(groups(), lr=lr, betas=(0.9, 0.99))]
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    kind = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "lion_8bit": bitsandbytes.optim.Lion8bit}[name]
    optimizer = kind(groups(), lr=lr, betas=(0.8, 0.95))
    manager.register_parameters(optimizer.param_groups)
    manager.override_config(model.get_parameter("model.embed_tokens.weight"), "optim_bits", 32)
    return [optimizer]


def plain_loop(done: Done, run: Run) -> tuple[list[float], list[float], nn.Module, float]:
    """Losses and gradient norms of one process with whole steps, the model in the end, and its loss on validation."""
    name = run.options["optimizer"]["name"]
    model = transformers.AutoModelForCausalLM.from_pretrained(done.model(run.model))
    model.train()
    tokenizer, rows = plain.load_tokenizer(done.model(run.model)), done.rows(run)
    epoch = [plain.batch_of(tokenizer, run.task, rows[at : at + 16]) for at in range(0, len(rows), 16)]
    optimizers = plain_optimizers(name, model)
    losses, norms = [], []
    for step, batch in enumerate((epoch * STEPS)[:STEPS]):
        loss = model(**batch).loss
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        falling = (STEPS - step) / (STEPS - WARMUP) if name != "schedule_free" else 1.0
        rate = OPTIONS[name]["lr"] * (step / WARMUP if step < WARMUP else falling)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm)
    if name == "schedule_free":
        optimizers[0].eval()  # type: ignore[attr-defined]
    judged = plain.evaluation_loss(model, run.task, plain.batch_of(tokenizer, run.task, done.judged()))
    return losses, norms, model, judged


@by_name(WIDE)
def test_a_run_is_that_of_a_plain_loop_with_the_librarys_class(done: Done, run: Run) -> None:
    steps, judged = done.metrics(run)
    losses, norms, model, plain_judged = plain_loop(done, run)
    limit = LIMIT.get(run.options["optimizer"]["name"], 1e-5)
    assert farthest([step["loss"] for step in steps], losses) <= limit, f"seed {done.seed}"
    assert farthest([step["grad_norm"] for step in steps], norms) <= limit, f"seed {done.seed}"
    assert judged["loss"] == pytest.approx(plain_judged, rel=limit), f"seed {done.seed}"
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    got = done.final(run)
    far = distance(got, {name: state[name] for name in got})
    assert far <= 20 * limit, f"weights differ by {far}; seed {done.seed}"


def test_schedule_free_judges_and_keeps_the_average(done: Done) -> None:
    """The weights that it trains are others."""
    run = a_run("schedule_free", "fsdp2", 2)
    folder = done.path(run) / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loss = plain.evaluation_loss(model, run.task, plain.batch_of(plain.load_tokenizer(folder), run.task, done.judged()))
    assert done.metrics(run)[1]["loss"] == pytest.approx(loss, rel=1e-5), f"seed {done.seed}"


# --------------------------------------------------------------------------- what is made of the config


class OneLinear(nn.Module):
    """The names of a model with layers, embeddings and an output layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(64, 64), "bias": nn.Embedding(32, 4)})])
        self.head = nn.Linear(64, 256)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_which_parameters_are_embeddings_and_which_hidden_matrices(tied: bool) -> None:
    model = OneLinear(tied)
    assert embedding_names(model) == {"embed.weight", "layers.0.bias.weight"}
    assert matrix_names(model) == {"layers.0.linear.weight"}


def test_muon_leaves_the_rest_to_adamw() -> None:
    model = OneLinear(False)
    recipe = make_optimizer_recipe(MuonConfig(name="muon", weight_decay=0.1), model, Full())
    optimizer = recipe(model.named_parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    by_momentum = {
        names[id(p)]: ("momentum" in group, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert by_momentum == {
        "embed.weight": (False, 0.1),
        "layers.0.linear.weight": (True, 0.1),
        "layers.0.linear.bias": (False, 0.0),
        "layers.0.bias.weight": (False, 0.1),
        "head.weight": (False, 0.1),
        "head.bias": (False, 0.0),
    }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert all(not torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert {names[id(p)] for p in optimizer.state} == set(before)


@pytest.mark.parametrize("config", [Adamw8bitConfig(name="adamw_8bit"), Lion8bitConfig(name="lion_8bit")])
def test_embeddings_and_small_tensors_have_states_of_32_bits(config: Any) -> None:
    model = OneLinear(False)
    optimizer = make_optimizer_recipe(config, model, Full())(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    dtypes = {name: optimizer.state[parameter]["state1"].dtype for name, parameter in model.named_parameters()}
    eight = {name for name, dtype in dtypes.items() if dtype == torch.uint8}
    assert eight == {"layers.0.linear.weight", "head.weight"}, dtypes


def problems(folder: Path, *overrides: str, **options: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(tiny.tiny_config(folder, **options), list(overrides))
    return str(error.value)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "schedule_free"])
def test_zero_refuses_what_it_would_train_otherwise(tmp_path: Path, name: str, kind: str) -> None:
    said = problems(tmp_path, optimizer={"name": name}, strategy={"kind": kind})
    assert f"optimizer.name: {name} does not go with {kind}: " in said
    assert said.endswith("Use strategy.kind: fsdp2 or ddp")


def test_an_optimizer_has_its_own_options_only(tmp_path: Path) -> None:
    assert "optimizer.betas: unknown key" in problems(tmp_path, optimizer={"name": "adafactor", "betas": [0.9, 0.9]})
    assert "optimizer.momentum: unknown key" in problems(tmp_path, optimizer={"momentum": 0.9})
    said = problems(tmp_path, optimizer={"name": "schedule_free", "schedule": "cosine"})
    assert "optimizer.schedule: 'cosine' is not one of constant" in said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("lion_32bit", "lion"),
        ("schedule_free_adamw", "schedule_free"),
        ("adamuon", "muon"),
    ],
)
def test_names_of_other_tools_are_understood(tmp_path: Path, theirs: str, ours: str) -> None:
    assert f"did you mean {ours}?" in problems(tmp_path, optimizer={"name": theirs})


@pytest.mark.parametrize("name", [*OPTIONS, "adamw", "paged_adamw", "paged_adamw_8bit"])
def test_a_name_alone_is_valid(tmp_path: Path, name: str) -> None:
    assert load_config(tiny.tiny_config(tmp_path, optimizer={"name": name}), []).optimizer.name == name


def test_another_name_on_the_command_line_keeps_what_both_have(tmp_path: Path) -> None:
    file = tiny.tiny_config(tmp_path, optimizer={"lr": 7e-3, "betas": [0.8, 0.9], "schedule": "linear"})
    assert load_config(file, []).optimizer.name == "adamw"
    changed = load_config(file, ["optimizer.name=adafactor"]).optimizer
    assert (changed.name, changed.lr, changed.schedule) == ("adafactor", 7e-3, "linear")
    assert not hasattr(changed, "betas")
    assert load_config(file, ["optimizer.name=lion"]).optimizer.betas == [0.8, 0.9]
    said = problems(tmp_path, "optimizer.name=adafactor", "optimizer.eps=1e-6")
    assert "command line optimizer.eps: unknown key" in said
