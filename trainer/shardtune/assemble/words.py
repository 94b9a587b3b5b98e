"""What a run says of itself at its start and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shardtune.assemble.prepared import Prepared
from shardtune.assemble.steps import describe_sources
from shardtune.assemble.tuned import Tuned
from shardtune.checkpoint.reading import Checkpoint
from shardtune.config import Config
from shardtune.fused.plan import describe
from shardtune.world import World


def facts(config: Config, world: World, prepared: Prepared, tuned: Tuned, kind: str) -> str:
    """A few lines at the start: what is trained on what, and what was left out."""
    total = sum(getattr(p, "unpacked_shape", p.shape).numel() for p in tuned.model.parameters())
    trained = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    counts = ", ".join(f"{len(table):,} {name}" for name, table in prepared.tables.items() if len(table))
    batch = config.batch
    steps = f"{batch.examples:,} examples a step" if batch.examples else f"at most {batch.tokens:,} tokens a step"
    weights = "random weights" if config.model.weights == "random" else config.model.path
    lines = [
        f"{config.name}: {type(tuned.skeleton.model).__name__} ({weights}), {config.task.kind}, "
        f"{config.tuning.method}: {trained:,} of {total:,} parameters trained",
        *(f"  {note}" for note in tuned.notes),
        f"{kind} on {world.size} rank{'s' * (world.size > 1)} ({device_name(world.device)}), {config.model.dtype}, "
        + (f"offload: {config.strategy.offload}, " if config.strategy.offload != "none" else "")
        + f"{config.optimizer.name}; {steps}",
        describe(tuned.fused),
        f"examples: {counts or 'a stream'}" + (f"; {len(prepared.labels):,} labels" if prepared.labels else ""),
        *describe_sources(config, prepared.tables.get("train"), prepared.train_counts),
    ]
    if not any(len(table) for name, table in prepared.tables.items() if name != "train"):
        lines.append("no validation or test examples, so nothing is evaluated")
    for name, table in prepared.tables.items():
        cut = [f"{n:,} {what}" for n, what in ((table.source_cut, "sources"), (table.target_cut, "targets")) if n]
        if cut:
            lines.append(f"cut to length in {name}: {' and '.join(cut)} of {len(table):,}")
    dropped = prepared.corpus.dropped if prepared.corpus is not None else {}
    if dropped:
        lines.append(f"left out or noted: {counted(dropped)}")
    if tuned.skeleton.new_parameters:
        lines.append(f"new, not in the pretrained weights: {', '.join(tuned.skeleton.new_parameters)}")
    return "\n".join(lines)


def goes_on_from(saved: Checkpoint, changes: Sequence[str]) -> str:
    """Where a run goes on that was begun before, and what it does otherwise from there on."""
    ranks = f"{saved.ranks} rank{'s' * (saved.ranks > 1)} under {saved.state.get('strategy')}"
    origin = f"step {saved.step} of {saved.folder}, saved on {ranks}"
    return "\n".join([f"goes on from {origin}", *(f"  {change}" for change in changes)])


def counted(reasons: Mapping[str, int]) -> str:
    """How often each reason occurred."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def last_words(folder: Path, config: Config, results: str, without_report: str | None, seconds: float) -> str:
    """The scores, where the result is, and what can be done with it; `without_report`: why there is no report."""
    lines = ["", results, ""] if results else [""]
    lines += [
        f"done in {seconds / 60:.1f} minutes; the result is in {folder / 'final'}",
        f"  try it:       shardtune generate --run {folder} TEXT",
        f"  its report:   {folder / 'report.html'}" if without_report is None else f"warning: {without_report}",
        f"  see it:       tensorboard --logdir {folder / 'tensorboard'}",
        *([f"  read it:      {folder / 'predictions'}"] if results else []),
        f"  take it:      shardtune export --run {folder} --out DIR",
    ]
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """As people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
