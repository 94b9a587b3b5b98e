"""Kronecker products as updates (LoKr, Yeh et al. 2023, arXiv:2309.14859), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from shardtune.tuning.peft_adapter import LinearAdapter

if TYPE_CHECKING:
    from peft import LoKrConfig


class Lokr(LinearAdapter):
    """Implements the Tuning protocol: y = (W + (alpha / r) C ⊗ (A B)) x.

    C is [f_out, f_in], with the divisors of d_out and d_in that are nearest to `factor` from below, or to their square
    roots if it is None; A is [d_out / f_out, r] and B [r, d_in / f_in], or one whole matrix where that is not larger.
    """

    transposed = False

    def __init__(
        self, task: str, rank: int, alpha: float, factor: int | None, dropout: float, targets: str | Sequence[str]
    ) -> None:
        super().__init__(task, targets)
        self._rank = rank
        self._alpha = alpha
        self._factor = factor
        self._dropout = dropout

    def peft_config(self, model: PreTrainedModel) -> LoKrConfig:
        """PEFT's settings; `dropout` is its `rank_dropout`, of rows of the update."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self._rank,
            alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            decompose_factor=-1 if self._factor is None else self._factor,
            rank_dropout=self._dropout,
            target_modules=self.match(model),
        )
