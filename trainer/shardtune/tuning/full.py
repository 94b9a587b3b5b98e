"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from torch import nn


class Full:
    """Implements the Tuning protocol."""

    makes_adapter = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Every parameter of `model` is trained."""
        return model.requires_grad_(True)
