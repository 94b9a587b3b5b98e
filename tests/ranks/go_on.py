"""Trains small models in this process group, each from where an earlier one was saved: go_on.py FOLDER CASES.json.

CASES.json is a list of cases, see Case. A case's losses are in FOLDER/NAME.json; the pieces of all ranks after its last
step in FOLDER/NAME, and after step `save_at` in FOLDER/NAME-STEP. What a case begins with may be made by another
process group at the same time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from saved_pieces import SavedPieces, write
from shardtune.assemble.optimizers import make_optimizer_recipe
from shardtune.assemble.parts import make_strategy
from shardtune.assemble.quiet import quiet_libraries
from shardtune.exit_codes import guarded, leave
from shardtune.model.dropout import quicken_dropout
from shardtune.model.overlay import Overlay
from shardtune.model.skeleton import build_skeleton, load_architecture
from shardtune.optimizer_config import OptimizerConfig
from shardtune.protocols import Strategy, Weights
from shardtune.strategy import zero
from shardtune.tuning.full import Full
from shardtune.tuning.lora import Lora
from shardtune.world import World, join_world

WAITING = 250.0
"""Seconds."""
EXAMPLES, LENGTH = 6, 11
"""Of each step; they divide into two micro-batches on 1, 2 or 3 ranks, or into one."""


@dataclass
class Case:
    name: str
    model: str
    """A folder with a config.json; `t5…` is a sequence-to-sequence model."""
    kind: str
    optimizer: str = "adamw"
    method: str = "full"
    dtype: str = "float32"
    offload: str = "none"
    dropout: bool = True
    begin: int = 0
    """Steps done before."""
    end: int = 5
    start: str | None = None
    """The folder of pieces to begin with."""
    after: str | None = None
    """A case, maybe of another group, that has to be done before."""
    save_at: int | None = None
    evaluate_at: int | None = None
    """After this step the model is evaluated and every parameter gathered."""
    split: bool = True
    """Whether ZeRO-3 splits parameters of any size."""
    seed: int = 0


def wait_for(path: Path) -> None:
    end = time.monotonic() + WAITING
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} is not there after {WAITING:.0f} seconds")
        time.sleep(0.05)


def build(case: Case, world: World) -> Strategy:
    dtype = getattr(torch, case.dtype)
    task = "seq2seq" if Path(case.model).name.startswith("t5") else "causal"
    architecture = load_architecture(case.model, task, False)
    if not case.dropout:
        for key in ("dropout_rate", "attention_dropout"):
            setattr(architecture, key, 0.0)
    skeleton = build_skeleton(architecture, case.model, task, False, "auto", None, False)
    quicken_dropout(skeleton.model)
    tuning = Full() if case.method == "full" else Lora(task, 4, 8.0, 0.1 * case.dropout, "all-linear")
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    weights: Weights = skeleton.weights(model, case.seed, dtype, tuning.trained_dtype)
    saved = SavedPieces(Path(case.start)) if case.start is not None else None
    if saved is not None:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        weights = Overlay(weights, {name: saved.values(name) for name in trained})
    options: dict[str, Any] = {"name": case.optimizer, "weight_decay": 0.1}
    recipe = make_optimizer_recipe(TypeAdapter(OptimizerConfig).validate_python(options), model, tuning)
    strategy = make_strategy(case.kind, model, world, dtype, case.offload)
    strategy.prepare(model, weights, recipe)
    model.train()
    if saved is not None:
        assert saved.step == case.begin
        strategy.restore(saved)
    return strategy


def batch(case: Case, world: World, step: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of the step's examples."""
    generator = torch.Generator().manual_seed(case.seed * 1000 + step)
    ids = torch.randint(3, vocabulary, (EXAMPLES, LENGTH), generator=generator)
    share = ids.split(EXAMPLES // world.size)[world.rank]
    return [{"input_ids": part, "labels": part} for part in share.tensor_split(2) if len(part)]


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits.float()
    targets = EXAMPLES * LENGTH
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum") / targets


def run(case: Case, world: World, folder: Path) -> None:
    zero.KEPT_WHOLE = 0 if case.split else 100_000
    if case.after is not None:
        wait_for(folder / f"{case.after}.json")
    strategy = build(case, world)
    vocabulary = json.loads((Path(case.model) / "config.json").read_text())["vocab_size"]
    losses = []
    for step in range(case.begin, case.end):
        world.seed_everything(case.seed * 1000 + step)
        own = 0.0
        parts = batch(case, world, step, vocabulary)
        for index, inputs in enumerate(parts):
            with strategy.forward(last=index == len(parts) - 1):
                loss = loss_of(strategy.model, inputs)
            strategy.backward(loss)
            own += float(loss.detach())
        norm = strategy.grad_norm()
        rate = 1e-4 if case.optimizer.startswith("lion") else 1e-3  # each element moves by all of Lion's rate
        strategy.step(rate * (1 + step), min(1.0, 0.5 / norm))
        losses.append((*world.sum([own]), norm))
        if step + 1 == case.evaluate_at:
            with strategy.evaluating() as model:
                loss_of(model, parts[0])
            for _ in strategy.full_trained():
                pass
        if step + 1 == case.save_at:
            write(folder / f"{case.name}-{step + 1}", world.rank, step + 1, strategy.pieces())
    write(folder / case.name, world.rank, case.end, strategy.pieces())
    trained = {name: float(whole.double().sum()) for name, whole in strategy.full_trained() if whole is not None}
    world.sum([0.0])  # what a later case begins with is there
    if world.is_first:
        partial = folder / f"{case.name}.partial"
        partial.write_text(json.dumps({"losses": losses, "trained": trained}))
        partial.rename(folder / f"{case.name}.json")
    strategy.drop()


def main() -> int:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = join_world()
    with quiet_libraries():
        for case in cases:
            try:
                run(Case(**case), world, folder)
            except Exception as error:
                error.add_note(f"in {case}")
                raise
    world.close()
    return 0


if __name__ == "__main__":
    leave(guarded(main))
