"""Dropout of our own, on CPUs: it drops what it should, and nothing depends on the numbers it draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shardtune.model.dropout import dropout, quicken_dropout
from shardtune.model.packed_attention import _attend


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.03, 0.9, 2**-16])
def test_how_many_are_dropped(rate: float) -> None:
    count = 999_999  # no multiple of what one random number decides
    x = torch.ones(count)
    out = dropout(x, rate)
    dropped = float((out == 0).double().mean())
    exact = round(rate * 2**16) / 2**16
    assert abs(dropped - exact) <= 5 * math.sqrt(exact * (1 - exact) / count)
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - exact)], rel=1e-6)
    # Neighbours, and those that come from the same number, are independent.
    for distance in (1, 2, 3, 4):
        both = float(((out[distance:] == 0) & (out[:-distance] == 0)).double().mean())
        assert abs(both - exact**2) <= 6 * math.sqrt(exact**2 / count) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_has_the_same_holes(dtype: torch.dtype) -> None:
    x = (torch.rand(7, 33, dtype=torch.float32) + 1).to(dtype).transpose(0, 1).requires_grad_()
    out = dropout(x, 0.3)
    assert out.dtype == dtype
    wanted = torch.rand(33, 7).to(dtype)
    out.backward(wanted)
    scale = 1 / (1 - round(0.3 * 2**16) / 2**16)
    assert x.grad is not None
    kept = (out != 0).to(dtype)
    torch.testing.assert_close(out, (x * kept).mul(scale))
    torch.testing.assert_close(x.grad, (wanted * kept).mul(scale))


def test_seeds() -> None:
    x = torch.ones(1000)
    first = dropout(x, 0.5)
    assert not torch.equal(first, dropout(x, 0.5))
    torch.manual_seed(7)
    assert torch.equal(first, dropout(x, 0.5))


def test_layers_of_a_model() -> None:
    class OfItsOwn(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.25), OfItsOwn(0.5), nn.Dropout(0.0), nn.Dropout(1.0))
    quicken_dropout(model)
    x = torch.ones(64, 64)
    assert "forward" not in vars(model[1]), "what does more than dropout keeps its own forward"
    assert torch.equal(model[3](x), torch.zeros_like(x))
    assert torch.equal(model[2](x), x)
    assert model[0](x).unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(model.eval()[0](x), x)


@pytest.mark.parametrize("kind", ["causal", "bool", "float", "none"])
def test_attention_with_dropout(kind: str) -> None:
    """A rate that rounds to nothing leaves attention as PyTorch's."""
    q, k, v = (torch.randn(3, 4, length, 8) for length in (5, 5, 5))
    mask = {"bool": torch.rand(3, 1, 1, 5) < 0.7, "float": torch.randn(1, 4, 5, 5)}.get(kind)
    if kind == "bool":
        assert mask is not None
        mask[..., 0] = True
    for scaling in (None, 1.0):
        wanted = _attend(q, k, v, mask, 0.0, scaling, kind == "causal")
        torch.testing.assert_close(_attend(q, k, v, mask, 1e-9, scaling, kind == "causal"), wanted)
        mean = torch.stack([_attend(q, k, v, mask, 0.2, scaling, kind == "causal") for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, wanted, atol=0.08, rtol=0)
