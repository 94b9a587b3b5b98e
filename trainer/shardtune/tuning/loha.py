"""Elementwise products of low-rank updates (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from shardtune.tuning.peft_adapter import LinearAdapter

if TYPE_CHECKING:
    from peft import LoHaConfig


class Loha(LinearAdapter):
    """Implements the Tuning protocol: y = (W + (alpha / r) (A1 B1) ∘ (A2 B2)) x; each A is [d_out, r], B [r, d_in]."""

    transposed = False

    def __init__(self, task: str, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]) -> None:
        super().__init__(task, targets)
        self._rank = rank
        self._alpha = alpha
        self._dropout = dropout

    def peft_config(self, model: PreTrainedModel) -> LoHaConfig:
        """PEFT's settings; `dropout` is its `rank_dropout`, of rows of the update."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=self._rank,
            alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            rank_dropout=self._dropout,
            target_modules=self.match(model),
        )
