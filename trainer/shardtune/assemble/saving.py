"""What a checkpoint says of a run beside its tensors, and what a run that goes on takes from it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from shardtune.assemble.prepared import Prepared
from shardtune.assemble.tuned import Tuned
from shardtune.checkpoint.names import FOLDER, folder_name
from shardtune.checkpoint.reading import Checkpoint
from shardtune.checkpoint.saver import Saver, Snapshot
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.errors import CheckpointError, NumbersError, ShardtuneError, StorageError
from shardtune.model.identity import identity_of
from shardtune.model.overlay import Overlay
from shardtune.protocols import VALUE, Piece, Strategy, Weights
from shardtune.randomness import random_pieces, restore_random
from shardtune.run_folder import LIBRARIES, version
from shardtune.state import TrainingState
from shardtune.strategy.parameters import trained_parameters
from shardtune.world import World

LATER = ("recent_loss", "recent_steps")
"""Of the state, what checkpoints did not have at first."""


class Identity(NamedTuple):
    """What a checkpoint's state has a meaning for, beside the config."""

    data: dict[str, Any] | None
    """Of the training examples; None of a stream."""
    base: str
    """Of the model that tuning began with."""


def identify(config: Config, prepared: Prepared, world: World) -> Identity:
    """That of this run. All ranks call it; the first one looks."""

    def look() -> list[Any]:
        table, corpus = prepared.tables.get("train"), prepared.corpus
        data = None
        if table is not None and corpus is not None:
            data = {"fingerprint": corpus.train_fingerprint, "examples": len(table)}
        return [data, identity_of(config.model.path, config.model.weights == "pretrained")]

    return Identity(*world.first_does("identity", look))


def snapshots(
    config: Config,
    world: World,
    state: TrainingState,
    strategy: Strategy,
    tuned: Tuned,
    kind: str,
    identity: Identity,
    total_steps: int | None,
    began_from: str | None,
) -> Callable[[], Snapshot]:
    """Gives a function that says what a checkpoint of this moment holds. `strategy`: as the loop has it; `kind`: its
    name."""
    resolved, text = config.model_dump(mode="json"), dump_config(config)
    versions = {name: version(name) for name in LIBRARIES}

    def pieces() -> Iterator[Piece]:
        own = random_pieces(world.rank, world.device)
        return chain(strategy.pieces(), tuned.tuning.pieces(world), own)

    def snapshot() -> Snapshot:
        about = {
            **dataclasses.asdict(state),
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "ranks": world.size,
            "strategy": kind,
            "schedule": {"name": config.optimizer.schedule, "steps": total_steps, "minutes": config.duration.minutes},
            "scaler": None,  # bfloat16 and float32 need none
            **identity._asdict(),
            "tuning": tuned.tuning.remembered(),
            "began_from": began_from,
            "versions": versions,
            "config": resolved,
        }
        return Snapshot(state.step, pieces(), about, text)

    return snapshot


def state_of(saved: Checkpoint) -> TrainingState:
    """Where the saved run was. Raises CheckpointError where that is not said."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingState)}
    fields = {name: type(default) for name, default in defaults.items()}
    found = {name: saved.state.get(name, defaults[name] if name in LATER else None) for name in fields}
    for name, kind in fields.items():
        if type(found[name]) is not kind:
            raise CheckpointError(f"{saved.folder}: its state.json has no usable {name}: {found[name]!r}")
    return TrainingState(**found)  # pyright: ignore[reportArgumentType]


def saved_weights(saved: Checkpoint, model: nn.Module, weights: Weights) -> Weights:
    """The same weights, those of trained parameters as they were saved; `model` is on the meta device.

    Raises CheckpointError where the checkpoint has others.
    """
    values = {}
    for name, parameter in trained_parameters(model):
        shape = saved.whats(name).get(VALUE)
        if shape != tuple(parameter.shape):
            has = "nothing" if shape is None else f"shape {list(shape)}"
            raise CheckpointError(
                f"{saved.folder}: has {has} for {name}, but this run trains it with shape {list(parameter.shape)}; was "
                "it saved by another model or method?"
            )
        values[name] = saved.value(name)
    return Overlay(weights, values)


def restore(saved: Checkpoint, strategy: Strategy, world: World, seed: int) -> None:
    """The optimizer's state and the random streams; on another number of ranks streams begin anew, in a way that
    follows from the step, and so does one that was not there, as that of a GPU."""
    strategy.restore(saved)
    world.seed_everything(seed, saved.step)
    if saved.ranks == world.size:
        restore_random(saved, world.rank, world.device)


def how_to_go_on(folder: Path, state: TrainingState, resume: str) -> str:
    """What to say of a run that ends at `state`, its last step saved; `resume`: its `checkpoint.resume`."""
    if state.step == 0:
        return f"{folder}: stopped before its first step; start it again"
    saved = f"step {state.step} is saved in {folder / FOLDER / folder_name(state.step)}"
    command = f"shardtune resume --run {folder}"
    if resume == "never":
        return f"{saved}; what goes on from there, as checkpoint.resume=never begins anew, is\n  {command}"
    return f"{saved}; the same command goes on from there, and so does\n  {command}"


@contextmanager
def kept_is_said(saver: Saver, world: World) -> Iterator[None]:
    """What an error leaves: a checkpoint that was on its way to the disk becomes whole, where nobody is missing for
    that; and where the numbers or the storage went wrong, what is kept is said."""
    try:
        yield
    except Exception as error:
        if world.size == 1 or isinstance(error, NumbersError):  # which all ranks find
            with suppress(ShardtuneError):
                saver.finish()
        if isinstance(error, StorageError) and saver.kept() not in str(error):
            raise StorageError(f"{error}\n{saver.mending()}") from error
        if isinstance(error, NumbersError):
            raise NumbersError(f"{error}\n{saver.kept()}") from error
        raise
