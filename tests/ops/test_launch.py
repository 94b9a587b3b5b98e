"""Kernels are started where their arguments are, and only what fits a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardtune_kernels import _launch


class _OfAGpu(Tensor):
    """Says that it lies on the second GPU."""

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda", 1)


@pytest.mark.parametrize(("count", "current", "wanted"), [(1, 0, None), (2, 1, None), (2, 0, torch.device("cuda", 1))])
def test_the_device_of_the_arguments(
    monkeypatch: pytest.MonkeyPatch, count: int, current: int, wanted: torch.device | None
) -> None:
    monkeypatch.setattr(_launch, "_several_devices", lambda: count > 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    given: Any = (None, 3, torch.zeros(2), torch.zeros(2).as_subclass(_OfAGpu))
    assert _launch._another_device(given) == wanted
    assert _launch._another_device(given[:3]) is None
