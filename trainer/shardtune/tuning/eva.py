"""EVA: adapters that begin as the principal directions of their inputs, with ranks where these explain most
(Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardtune.protocols import Saved, Weights
from shardtune.tuning.initial_values import InitialValues, adapted_layers
from shardtune.tuning.lora import Lora
from shardtune.tuning.targets import matching
from shardtune.world import World

ROWS = 1024
"""Inputs decomposed at once, at least."""
KEPT = 2
"""Directions kept from piece to piece for each one asked for: the weaker ones may yet turn out the stronger."""
THIN = 8
"""A randomized decomposition serves where the directions are fewer than this part of rows and columns."""


class Directions(NamedTuple):
    """Principal directions of a layer's inputs, the strongest first."""

    components: Tensor
    """[k, d_in], float32, orthonormal rows."""
    shares: list[float]
    """The share of the inputs' variance that each explains."""


class Eva(Lora):
    """Implements the Tuning protocol: A begins with the first principal directions of the layer's inputs, B as 0.

    Layers compete for ranks by the variance that their directions explain; alpha / r is the same for all. What the
    inputs are must be known before `apply`: see `watch` and `begin_with`, or `recall`.
    """

    def __init__(
        self,
        task: str,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        trained_dtype: torch.dtype = torch.float32,
        rho: float = 2.0,
        examples: int = 64,
    ) -> None:
        """`rank`: the mean over all layers; a layer has at most `rho` times as many. `examples`: how many the inputs
        are taken from."""
        super().__init__(task, rank, alpha, dropout, targets, trained_dtype)
        self.examples = examples
        self._most = round(rank * rho)
        self._begin: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}

    def watch(self, model: PreTrainedModel) -> InputDirections:
        """Collects the inputs of the layers that `targets` means in the bare base model."""
        return InputDirections(model, matching(model, self._task, self._targets), self._most)

    def ranks(self, found: Mapping[str, Directions]) -> dict[str, int]:
        """How many directions each layer gets of those found: `rank` for each layer on average, strongest first."""
        return distribute({name: directions.shares for name, directions in found.items()}, self._rank * len(found))

    def begin_with(self, components: Mapping[str, Tensor]) -> None:
        """Takes the directions [r, d_in] of each layer, which may be none. A layer that is not named begins as in
        LoRA."""
        self._begin = dict(components)
        self._ranks = {name: len(rows) for name, rows in components.items()}

    def remembered(self) -> dict[str, Any]:
        """The layers' ranks."""
        return {"ranks": self._ranks}

    def recall(self, saved: Saved) -> None:
        """Takes the ranks; what A began with is of no use any more."""
        self._ranks = saved.tuning["ranks"]

    def choose(self, model: PreTrainedModel) -> list[str]:
        """The layers of `targets` that have got a rank."""
        return [name for name in super().choose(model) if self._ranks.get(name, self._rank)]

    def options(self) -> dict[str, Any]:
        """The ranks that differ, and alphas that keep alpha / r."""
        differ = {name: rank for name, rank in self._ranks.items() if rank not in (0, self._rank)}
        alphas = {name: self._alpha * rank / self._rank for name, rank in differ.items()}
        return {"rank_pattern": differ, "alpha_pattern": alphas}

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """A's rows are the directions."""
        given = {}
        for layer in adapted_layers(model):
            name = layer.name.removeprefix("base_model.model.")
            if name in self._begin:
                given[layer.down] = self._begin[name]
        return InitialValues(weights, given)

    def notes(self) -> list[str]:
        """What was matched, and how the ranks differ."""
        given = [rank for rank in self._ranks.values() if rank]
        lines = [*super().notes(), f"ranks from {min(given)} to {max(given)} by what their inputs' directions explain"]
        if none := len(self._ranks) - len(given):
            lines.append(f"no adapter on {none:,} layers, whose inputs' directions explain less than those of others")
        return lines


def distribute(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares each name has; of equal ones the first name's come first."""
    order = {name: place for place, name in enumerate(shares)}
    all_shares = [
        (-share, number, order[name], name) for name, some in shares.items() for number, share in enumerate(some)
    ]
    ranks = dict.fromkeys(shares, 0)
    for *_, name in sorted(all_shares)[:budget]:
        ranks[name] += 1
    return ranks


class InputDirections:
    """Watches a model's forward passes, example by example, and finds the directions of its layers' inputs.

    Layers that are given the same tensor (queries, keys and values) are decomposed once.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], most: int) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._most = most
        self._same_as: dict[str, str] = {}
        self._analyses: dict[str, _Analysis] = {}
        self._held: dict[tuple[int, torch.Size, int], tuple[str, Tensor]] = {}

    @contextmanager
    def example(self) -> Iterator[None]:
        """Surrounds the forward pass of one example, alone: nothing of it is padding."""
        hooks = [
            module.register_forward_pre_hook(partial(self._see, name)) for name, module in self._modules.items()
            if self._same_as.get(name, name) == name
        ]  # fmt: skip
        try:
            yield
        finally:
            self._held.clear()
            for hook in hooks:
                hook.remove()

    def found(self) -> dict[str, Directions]:
        """Of every layer that had inputs."""
        done = {name: analysis.directions() for name, analysis in self._analyses.items()}
        return {name: done[self._same_as[name]] for name in self._modules if name in self._same_as}

    def _see(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].detach()
        if name not in self._same_as:
            # Held until the example is through, so that nothing else can come to lie at its address.
            key = value.data_ptr(), value.shape, value._version
            self._same_as[name] = self._held.setdefault(key, (name, value))[0]
        if self._same_as[name] == name:
            self._analyses.setdefault(name, _Analysis(self._most)).add(value.flatten(0, -2).float())


class _Analysis:
    """Principal components of rows that come in pieces, by PEFT's incremental analysis (Ross et al. 2008)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: list[Tensor] = []
        self._at_once = max(ROWS, KEPT * most)
        self._pca: Any = None

    def add(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        while sum(map(len, self._waiting)) >= 2 * self._at_once:
            rows = torch.cat(self._waiting)
            self._waiting = [rows[self._at_once :]]
            self._take(rows[: self._at_once])

    def directions(self) -> Directions:
        if self._waiting:
            self._take(torch.cat(self._waiting))
            self._waiting = []
        shares = self._pca.explained_variance_ratio_[: self._most]
        return Directions(self._pca.components_[: self._most].float().cpu(), shares.tolist())

    def _take(self, rows: Tensor) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        if self._pca is None:
            components = min(KEPT * self._most, *rows.shape)
            thin = THIN * components <= min(rows.shape)
            self._pca = IncrementalPCA(components, lowrank=thin, lowrank_seed=0)
        self._pca.partial_fit(rows)
