"""Which ranks of AdaLoRA's updates are kept (Zhang et al. 2023, arXiv:2303.10512, section 3.2), when no rank holds a
whole parameter.

Names: an update is B (E ∘ A), A [r, d_in], E [r, 1], B [d_out, r]; its k-th triplet is row k of A and of E, and column
k of B. The importance of an element w with gradient g is I = |w g|, smoothed over steps as Ī, and its uncertainty
U = |I - Ī|, smoothed as Ū; its score is Ī Ū. A triplet's score is that of its element of E plus the means of those of
its row of A and of its column of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardtune.protocols import Piece, Saved, Shard, Strategy
from shardtune.world import World

MEAN, UNCERTAINTY, KEPT = "adalora.mean", "adalora.uncertainty", "adalora.kept"
"""What a checkpoint calls Ī and Ū of a parameter, and which triplets of an update are kept (with its E)."""


class Schedule(NamedTuple):
    """When ranks fall: from step `begin` on by a cubic law, every `interval` steps, for the last time at step `end`."""

    begin: int
    end: int
    interval: int

    def removed(self, step: int, total: int, target: int) -> int | None:
        """How many of `total` triplets are to be removed after step number `step`, counted from 1, so that `target` are
        left in the end; None: the choice stays as it is."""
        if step == self.end:
            return total - target
        if not self.begin < step < self.end or step % self.interval:
            return None
        rest = 1 - (step - self.begin) / (self.end - self.begin)
        return total - int((total - target) * rest**3 + target)


class Update(NamedTuple):
    """Sizes of the layer that an update belongs to."""

    d_in: int
    d_out: int


class Allocator:
    """Chooses triplets by the parts that each rank has; all ranks choose the same ones."""

    def __init__(
        self,
        updates: Mapping[str, Update],
        rank: int,
        target: int,
        schedule: Schedule,
        betas: tuple[float, float],
        world: World,
    ) -> None:
        """`updates`: by the parameters' names with %s for lora_A, lora_B or lora_E; `rank`: triplets of each;
        `target`: their mean in the end."""
        self._updates = updates
        self._rank = rank
        self._target = target
        self._schedule = schedule
        self._betas = betas
        self._world = world
        self._smoothed: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, list[bool]] = {}
        """For each update which triplets are kept, as soon as some are not."""

    def watches(self, step: int) -> bool:
        """Whether the gradients of this step matter."""
        return step < self._schedule.end

    def observe(self, shard: Shard, gradient: Tensor) -> None:
        """Smooths the importance of a part of a parameter, given its value after the step and the step's gradient."""
        beta1, beta2 = self._betas
        importance = (shard.value * gradient).abs()
        zero = torch.zeros_like(importance)
        mean, uncertainty = self._smoothed.get(shard.name, (zero, zero))
        mean = beta1 * mean + (1 - beta1) * importance
        uncertainty = beta2 * uncertainty + (1 - beta2) * (importance - mean).abs()
        self._smoothed[shard.name] = mean, uncertainty

    def pieces(self, starts: Mapping[str, int]) -> Iterator[Piece]:
        """What the next choices depend on; `starts` as in `choose`."""
        for name, update in self._updates.items():
            shapes = {
                "lora_A": (self._rank, update.d_in),
                "lora_B": (update.d_out, self._rank),
                "lora_E": (self._rank, 1),
            }
            for factor, shape in shapes.items():
                smoothed = self._smoothed.get(of := name % factor)
                if smoothed is not None:
                    yield Piece(of, MEAN, shape, starts[of], smoothed[0])
                    yield Piece(of, UNCERTAINTY, shape, starts[of], smoothed[1])
            if self.kept and self._world.is_first:
                yield Piece(name % "lora_E", KEPT, (self._rank,), 0, torch.tensor(self.kept[name], dtype=torch.uint8))

    def restore(self, saved: Saved, shards: Iterable[Shard]) -> None:
        """Takes those of a checkpoint, for the parts that this rank has, in place of what was chosen since."""
        self._smoothed, self.kept = {}, {}
        for name, start, value, _ in shards:
            if MEAN in saved.whats(name):
                mean, uncertainty = (
                    saved.read(name, what, start, start + len(value)).to(value.device) for what in (MEAN, UNCERTAINTY)
                )
                self._smoothed[name] = mean, uncertainty
        if all(KEPT in saved.whats(name % "lora_E") for name in self._updates):
            self.kept = {
                name: saved.read(name % "lora_E", KEPT, 0, self._rank).bool().tolist() for name in self._updates
            }

    def choose(self, step: int, starts: Mapping[str, int]) -> None:
        """Chooses the triplets to keep after step number `step`, if that is due; `starts`: where this rank's part of
        each parameter begins."""
        updates, rank = len(self._updates), self._rank
        removed = self._schedule.removed(step, updates * rank, updates * self._target)
        if removed is None:
            return
        scores = self._summed(self._scores(starts))
        # Of equals the last of every update come first, so that none loses all of its triplets for being the first.
        order = scores.T.flip(0).flatten().sort(stable=True).indices[:removed]
        keep = torch.ones(updates, rank, dtype=torch.bool)
        keep[order % updates, rank - 1 - order // updates] = False
        self.kept = dict(zip(self._updates, keep.tolist(), strict=True))
        if step == self._schedule.end:
            self._smoothed.clear()

    def gathered(self, shards: Iterable[Shard]) -> dict[str, Tensor]:
        """The whole E of each update, [r, 1], float32 on the CPU, of which ranks have parts."""
        own = {shard.name: shard for shard in shards}
        values = torch.zeros(len(self._updates), self._rank, dtype=torch.float64)
        for row, name in zip(values, self._updates, strict=True):
            shard = own.get(name % "lora_E")
            if shard is not None:
                row[shard.start : shard.start + len(shard.value)] = shard.value.double().cpu()
        whole = self._summed(values).float()
        return {name: row.view(-1, 1) for name, row in zip(self._updates, whole, strict=True)}

    def _scores(self, starts: Mapping[str, int]) -> Tensor:
        """What this rank's parts bring to the score of each triplet of each update: [updates, r], float64."""
        scores = torch.zeros(len(self._updates), self._rank, dtype=torch.float64)
        for row, (name, update) in zip(scores, self._updates.items(), strict=True):
            for factor, width in (("lora_A", update.d_in), ("lora_B", update.d_out), ("lora_E", 1)):
                smoothed = self._smoothed.get(name % factor)
                if smoothed is None:
                    continue
                elements = (smoothed[0] * smoothed[1]).double().cpu()
                positions = torch.arange(len(elements)) + starts[name % factor]
                triplets = positions % self._rank if factor == "lora_B" else positions // width
                row.index_add_(0, triplets, elements / width)
        return scores

    def _summed(self, values: Tensor) -> Tensor:
        """Summed over the ranks, the same on each."""
        return torch.tensor(self._world.sum(values.flatten().tolist()), dtype=torch.float64).view(values.shape)


class Allocating:
    """Implements the Strategy protocol: the same strategy, whose step ends with removing triplets.

    As in PEFT, a triplet that was removed goes on being trained, and may come back, until the last choice; from then
    on its E is set to 0 after every step.
    """

    def __init__(
        self, strategy: Strategy, allocator: Allocator, chosen: Callable[[Mapping[str, list[bool]]], None]
    ) -> None:
        """`chosen` is called with what is kept after each choice."""
        self._strategy = strategy
        self._allocator = allocator
        self._chosen = chosen
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the strategy's own."""
        return getattr(self._strategy, name)

    def pieces(self) -> Iterator[Piece]:
        """The strategy's, and what the choices depend on."""
        yield from self._strategy.pieces()
        yield from self._allocator.pieces({shard.name: shard.start for shard in self._shards()})

    def restore(self, saved: Saved) -> None:
        """The strategy's, what the choices depend on, and the last choice."""
        self._strategy.restore(saved)
        self._done, before = saved.step, self._allocator.kept
        self._allocator.restore(saved, self._shards())
        if self._allocator.kept or before:
            self._chosen(self._allocator.kept)

    def step(self, lr: float, scale: float) -> None:
        """The strategy's step, then E of the triplets removed becomes 0."""
        allocator, self._done = self._allocator, self._done + 1
        before = allocator.kept
        gradients = {}
        if allocator.watches(self._done):
            gradients = {
                shard.name: shard.gradient.float() * scale for shard in self._shards() if shard.gradient is not None
            }
        self._strategy.step(lr, scale)
        shards = self._shards()
        for shard in shards:
            if shard.name in gradients:
                allocator.observe(shard, gradients[shard.name])
        allocator.choose(self._done, {shard.name: shard.start for shard in shards})
        if allocator.kept is not before:
            self._chosen(allocator.kept)
        if allocator.kept is not before or not allocator.watches(self._done):
            for name, whole in allocator.gathered(shards).items():
                whole[~torch.tensor(allocator.kept[name])] = 0.0
                self._strategy.overwrite(name % "lora_E", whole)

    def _shards(self) -> list[Shard]:
        """Those of the updates."""
        return [shard for shard in self._strategy.shards() if ".lora_" in shard.name]
