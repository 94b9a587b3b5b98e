"""The optimizers of bitsandbytes: states in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), paged states (Dettmers et
al. 2023, arXiv:2305.14314), and Lion (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from shardtune.optim.recipe import Recipe


def _none(name: str) -> bool:
    return False


@dataclass(frozen=True)
class _BitsAndBytes(Recipe):
    betas: tuple[float, float] = (0.9, 0.999)
    eight_bit: bool = False
    is_embedding: Callable[[str], bool] = _none
    """Whether the parameter of this name is an embedding: their gradients are too uneven for 8 bits."""

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """8-bit states share a scale in blocks of 256 elements, counted from a tensor's first one."""
        return not self.eight_bit

    def _keep_32_bits(self, named: list[tuple[str, nn.Parameter]]) -> None:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        manager.initialize()  # it is one for the process, and knows parameters by their addresses
        embeddings = [parameter for name, parameter in named if self.eight_bit and self.is_embedding(name)]
        if embeddings:
            manager.override_config(embeddings, "optim_bits", 32)


@dataclass(frozen=True)
class BitsAdamW(_BitsAndBytes):
    """AdamW of bitsandbytes, with states of 8 or 32 bits, paged or not."""

    eps: float = 1e-8
    paged: bool = False

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ValueError without parameters."""
        from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

        classes = {(True, False): AdamW8bit, (False, True): PagedAdamW, (True, True): PagedAdamW8bit}
        make = classes[self.eight_bit, self.paged]
        named = list(named_parameters)
        optimizer = make(self.groups(named), lr=self.lr, betas=self.betas, eps=self.eps)
        self._keep_32_bits(named)
        return optimizer


@dataclass(frozen=True)
class BitsLion(_BitsAndBytes):
    """Lion of bitsandbytes, with states of 8 or 32 bits."""

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ValueError without parameters."""
        from bitsandbytes.optim import Lion, Lion8bit

        named = list(named_parameters)
        optimizer = (Lion8bit if self.eight_bit else Lion)(self.groups(named), lr=self.lr, betas=self.betas)
        self._keep_32_bits(named)
        return optimizer
