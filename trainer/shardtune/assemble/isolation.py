"""Tries out, before a packed run begins, that examples of one row do not see each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from shardtune.data.tables import TokenTable
from shardtune.errors import ConfigError
from shardtune.protocols import IGNORED, Strategy, Task, Tokens

SOURCE, TARGET = 12, 6
"""Tokens of the examples that are tried."""
LEAK, ROUNDING = 1e-5, 0.02
"""Relative differences of a loss: between the same shapes; and between other shapes, also in bfloat16."""


def check_isolation(task: Task, strategy: Strategy, table: TokenTable, device: torch.device, path: str) -> None:
    """Computes the loss of an example behind another one, behind a third of the same length, and alone.

    All ranks call it. Raises ConfigError where these differ: then the architecture mixes neighbours in a way that is
    not known here (a convolution or a recurrence over the row), or its positions do not restart.
    """
    first, second = (_short(table[index % len(table)], index) for index in (0, 1))
    other = Tokens(
        np.where(first.source == 1, 2, 1).astype(np.int32), np.where(first.target == 1, 2, 1).astype(np.int32)
    )

    def loss(before: list[Tokens]) -> float:
        batch = task.collate([*before, second], packed=bool(before))
        learned = sum(int((example.target >= 0).sum()) for example in before)
        labels = batch.labels.clone()
        labels[:, :learned] = IGNORED
        return float(task.loss_sum(model, replace(batch, labels=labels).to(device)))

    with strategy.evaluating() as model:
        behind, behind_other, alone = loss([first]), loss([other]), loss([])
    for found, limit, reason in (
        (behind_other, LEAK, "the loss of one changes with another"),
        (alone, ROUNDING, "the loss of one is not what it is alone"),
    ):
        if not abs(found - behind) <= limit * max(1.0, abs(behind)):
            raise ConfigError(
                f"data.batching: packed examples of {path} are not kept apart: {reason} "
                f"({behind:.6g} and {found:.6g}); use grouped"
            )


def _short(example: Tokens, turn: int) -> Tokens:
    """The beginning of an example; two that are the same text differ in length."""
    return Tokens(example.source[: SOURCE - turn], example.target[: TARGET - turn])
