"""Muon (Jordan et al. 2024) for the matrices inside a model's layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardtune.optim.adamw import can_be_fused
from shardtune.optim.recipe import Recipe


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of torch's Muon over `matrices` and torch's AdamW over `others`, which are groups of parameters.

    All groups are in `param_groups`, all states in `state`.
    """

    def __init__(
        self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, **muon))
        if others:
            self._parts.append(torch.optim.AdamW(others, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters."""
        for part in self._parts:
            part.step(closure)


@dataclass(frozen=True)
class Muon(Recipe):
    """torch's Muon, its updates scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982)."""

    is_matrix: Callable[[str], bool] = bool
    """Whether the parameter of this name is a matrix inside a layer."""
    momentum: float = 0.95
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    elementwise = False

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ValueError without parameters."""
        named = list(named_parameters)
        matrices = [(name, parameter) for name, parameter in named if self.is_matrix(name)]
        others = [(name, parameter) for name, parameter in named if not self.is_matrix(name)]
        muon = {
            "lr": self.lr, "momentum": self.momentum, "ns_steps": self.iterations, "adjust_lr_fn": "match_rms_adamw",
        }  # fmt: skip
        adamw = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "fused": can_be_fused(others)}
        return MuonAndAdamW(self.groups(matrices), self.groups(others), muon, adamw)
