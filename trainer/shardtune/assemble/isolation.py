"""Tries out, before a packed run begins, that examples of one row do not see each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from shardtune.errors import ConfigError
from shardtune.examples import IGNORED, Tokens
from shardtune.protocols import Strategy, Task

SOURCE, TARGET = 12, 6
"""Tokens of the longest example that is tried."""
LEAK, OTHER_SHAPES, OTHER_SHAPES_ROUNDED = 1e-5, 5e-4, 0.02
"""Relative differences of a loss: between the same shapes, between others, and between others in bfloat16."""


def check_isolation(
    task: Task, strategy: Strategy, vocabulary: int, device: torch.device, rounded: bool, path: str
) -> None:
    """Computes the loss of an example behind another one, behind a third of the same length, and alone.

    All ranks call it; `rounded`: the model computes in bfloat16. Raises ConfigError where these differ: then the
    architecture mixes neighbours in a way that is not known here (a convolution or a recurrence over the row), or its
    positions do not restart.
    """
    first, other, second = (_example(vocabulary, *drawn) for drawn in ((5, SOURCE), (11, SOURCE), (7, SOURCE - 1)))

    def loss(before: list[Tokens]) -> float:
        batch = task.collate([*before, second], packed=bool(before)).to(device)
        labels = batch.labels.clone()
        labels[:, : sum(len(example.target) for example in before)] = IGNORED
        return float(task.loss_sum(model, replace(batch, labels=labels)))

    with strategy.evaluating() as model:
        behind, behind_other, alone = loss([first]), loss([other]), loss([])
    for found, limit, reason in (
        (behind_other, LEAK, "the loss of one changes with another"),
        (alone, OTHER_SHAPES_ROUNDED if rounded else OTHER_SHAPES, "the loss of one is not what it is alone"),
    ):
        if not abs(found - behind) <= limit * max(1.0, abs(behind)):
            raise ConfigError(
                f"data.batching: packed examples of {path} are not kept apart: {reason} "
                f"({behind:.6g} and {found:.6g}); use grouped"
            )


def _example(vocabulary: int, stride: int, length: int) -> Tokens:
    """Some tokens of the vocabulary."""
    ids = (3 + stride * np.arange(length + TARGET)) % vocabulary
    return Tokens(ids[:length].astype(np.int32), ids[length:].astype(np.int32))
