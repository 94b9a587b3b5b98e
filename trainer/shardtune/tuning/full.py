"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from torch import nn

from shardtune.tuning.method import Method


class Full(Method):
    """Implements the Tuning protocol."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Every parameter of `model` is trained."""
        return model.requires_grad_(True)
