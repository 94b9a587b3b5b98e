"""The result of any step: what `final/` would hold if the run had ended at a checkpoint. One process, on the CPU."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardtune.assemble.loading import fit_to
from shardtune.assemble.parts import saved_labels
from shardtune.assemble.prepared import Prepared
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.saving import saved_weights
from shardtune.assemble.tuned import tuned_model
from shardtune.checkpoint.finding import reasons_against
from shardtune.checkpoint.names import step_of
from shardtune.checkpoint.reading import Checkpoint, open_checkpoint
from shardtune.config import Config
from shardtune.errors import CheckpointError
from shardtune.model.skeleton import load_architecture
from shardtune.model.tokenizer import load_tokenizer
from shardtune.optim.adamw import averaged_values
from shardtune.optimizer_config import ScheduleFreeConfig
from shardtune.protocols import VALUE, Piece, Saved, Shard
from shardtune.result import write_result
from shardtune.run_folder import TOKENIZER
from shardtune.strategy.parameters import trained_parameters
from shardtune.task.section import Parts
from shardtune.world import World

log = logging.getLogger("shardtune")


class AsSaved:
    """The part of the Strategy protocol that a result is written by: values come from a checkpoint."""

    def __init__(self, saved: Checkpoint, model: nn.Module, beta1: float | None) -> None:
        """`beta1`: of an optimizer that trains at another point than it evaluates at; None of others."""
        self._saved = saved
        self._beta1 = beta1
        self._shapes = {name: parameter.shape for name, parameter in trained_parameters(model)}

    def full_trained(self) -> Iterator[tuple[str, Tensor]]:
        """One at a time."""
        for name, shape in self._shapes.items():
            value = self._saved.read(name, VALUE, 0, shape.numel()).float()
            if self._beta1 is not None and "z" in self._saved.whats(name):
                value = averaged_values(value, self._saved.read(name, "z", 0, shape.numel()).float(), self._beta1)
            yield name, value.view(shape)

    def shards(self) -> Iterator[Shard]:
        """All of each."""
        for name, value in self.full_trained():
            yield Shard(name, 0, value.view(-1), None)

    def pieces(self) -> Iterator[Piece]:
        """Nothing is saved again."""
        return iter(())

    def restore(self, saved: Saved) -> None:
        """There is no optimizer."""


def write_result_of(saved: Checkpoint, config: Config, run: Path, folder: Path) -> list[str]:
    """Writes the model or adapter that `saved`, a checkpoint of `run`, holds, as a Hugging Face folder.

    Returns lines to say. Raises what `write_result` raises, CheckpointError where model and checkpoint do not fit.
    """
    world = World(0, 1, 0, torch.device("cpu"))
    with quiet_libraries():
        prepared = _prepared(config, run / TOKENIZER)
        tuned = tuned_model(config, world, prepared, saved)
        saved_weights(saved, tuned.model, tuned.weights)  # whether all is there
        beta1 = config.optimizer.betas[0] if isinstance(config.optimizer, ScheduleFreeConfig) else None
        strategy: Any = AsSaved(saved, tuned.model, beta1)
        steps = saved.state["schedule"]["steps"] or 0
        tuned.tuning.in_training(prepared.task, strategy, steps, world)[1].restore(saved)
        return write_result(
            folder, tuned.model, strategy, tuned.weights, prepared.tokenizer, prepared.labels,
            tuned.skeleton.stored_dtype, tuned.tuning, tuned.shapes, False, world,
        )  # fmt: skip


@contextmanager
def as_result(config: Config, path: Path, beside: Path) -> Iterator[tuple[Path, str]]:
    """A result's folder and what to call it: `path` itself, final, or one made of the checkpoint there, step-<N>, next
    to `beside`, and gone afterwards.

    Raises CheckpointError where it is a checkpoint that is damaged.
    """
    step = step_of(path)
    if step is None:
        yield path, "final"
        return
    reasons = reasons_against(path)
    if reasons:
        raise CheckpointError("\n".join(reasons))
    folder = beside.absolute().with_name(f".{beside.name}.{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for note in write_result_of(open_checkpoint(path), config, path.absolute().parent.parent, folder):
            log.warning(note)
        yield folder, f"step-{step}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepared(config: Config, folder: Path) -> Prepared:
    """What a run knows before its weights are loaded, but for the examples, by the tokenizer that it had."""
    settings = config.model
    architecture = load_architecture(settings.path, config.task.head, settings.trust_remote_code)
    tokenizer = load_tokenizer(str(folder), config.task.truncation_side, settings.trust_remote_code)
    labels = saved_labels(folder)
    fit_to(architecture, config, tokenizer, labels)
    task = config.task.make(Parts(tokenizer, architecture, settings.path, labels))
    return Prepared(architecture, tokenizer, task, labels, {}, [], None)
