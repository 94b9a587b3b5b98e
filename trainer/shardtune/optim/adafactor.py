"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from shardtune.optim.recipe import Recipe


@dataclass(frozen=True)
class Adafactor(Recipe):
    """That of transformers, with the learning rate of the run's schedule in place of its own."""

    scale_parameter: bool = False
    decay_rate: float = 0.8
    clip_threshold: float = 1.0

    elementwise = False

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ValueError without parameters."""
        from transformers.optimization import Adafactor

        return Adafactor(
            self.groups(named_parameters),
            lr=self.lr,
            decay_rate=-self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=self.scale_parameter,
            relative_step=False,
        )
