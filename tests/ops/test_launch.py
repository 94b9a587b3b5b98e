"""Kernels are started where their arguments are, and what they compute can be differentiated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import DEVICE
from torch import Tensor

import shardtune_kernels as ops
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


def _loss(x: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, torch.randn(5, 8, device=DEVICE), torch.tensor([0, 4], device=DEVICE))


ONCE: dict[str, Callable[[Tensor], Any]] = {
    "rms_norm": lambda x: ops.rms_norm(x, torch.ones(8, device=DEVICE), 1e-6),
    "layer_norm": lambda x: ops.layer_norm(x, None, None, 1e-6),
    "gated_activation": lambda x: ops.gated_activation(x, x),
    "rope": lambda x: ops.rope(x[None, None], x[None, None], *torch.ones(2, 1, 2, 8, device=DEVICE))[0],
    "biased_attention": lambda x: ops.biased_attention(x[None, None], x[None, None], x[None, None]),
    "linear_cross_entropy": _loss,
}


@pytest.mark.parametrize("name", ONCE)
def test_gradients_of_gradients_are_right_or_refused(name: str) -> None:
    """Silent zeros would be neither."""
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    if not _launch.on_triton(x) and name != "linear_cross_entropy":
        pytest.skip("plain torch can")
    (dx,) = torch.autograd.grad(ONCE[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
