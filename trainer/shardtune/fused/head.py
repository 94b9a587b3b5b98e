"""The output layer: the summed loss in place of the logits, where a task says what is to be learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from shardtune.examples import IGNORED
from shardtune.fused.linears import replace_forward
from shardtune.head_loss import awaited
from shardtune_kernels import linear_cross_entropy

TRIED = torch.linspace(-40, 40, 7)
"""Logits that the model is watched to change."""


class After(NamedTuple):
    """What a model does to its logits behind the output layer: cap · tanh(scale · z / cap)."""

    scale: float = 1.0
    soft_cap: float | None = None


@dataclass
class _Hidden(ModelOutput):
    """What the layers below the output layer return, as far as it matters here: nothing else is there."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def after_head(model: PreTrainedModel) -> After | str:
    """What a model does to its logits behind the output layer, or why that cannot be told. Before it is tuned; needs
    no weights: the model's own forward is run, with numbers in the place of what its parts return."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return "the model has no output layer of its own"
    rows = head.out_features
    logits = TRIED.repeat(-(-rows // len(TRIED)))[:rows].view(1, 1, rows)
    hidden = torch.zeros(1, 1, head.in_features)
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    parts = [*model.children(), head]
    replaced = [part.__dict__.get("forward") for part in parts]
    try:
        for part in parts:
            part.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden)
        head.forward = lambda *args, **kwargs: logits.clone()
        with torch.no_grad():
            found = model(input_ids=tokens, use_cache=False, **decoder).logits
    except Exception as error:  # whatever a model's code wants of its parts
        return f"what the model does to its logits could not be tried ({type(error).__name__})"
    finally:
        for part, forward in zip(parts, replaced, strict=True):
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward
    return _recognized(logits.flatten(), found.flatten(), model)


def _recognized(before: Tensor, after: Tensor, model: PreTrainedModel) -> After | str:
    if after.shape == before.shape and not after.is_meta:
        after = after.float()
        if torch.allclose(after, before):
            return After()
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if cap and torch.allclose(after, cap * torch.tanh(before / cap), atol=1e-4):
            return After(soft_cap=float(cap))
        moved = before != 0
        scale = float(after[moved][0] / before[moved][0])
        if torch.allclose(after, scale * before, rtol=1e-4, atol=1e-5):
            return After(scale=scale)
    return "the model changes its logits in a way that is not known here"


def fuse_head(head: nn.Module | None, after: After | str) -> tuple[int, dict[str, int]]:
    """Fuses the output layer with the loss; one or none, and why not."""
    if isinstance(after, str):
        return 0, {after: 1}
    if type(head) is not nn.Linear:
        return 0, {f"the output layer is a {type(head).__name__}": 1}
    replace_forward(head, partial(_forward, after))
    return 1, {}


def _forward(after: After, head: nn.Linear, original: Callable[..., Any], hidden: Tensor) -> Tensor:
    learning = awaited()
    if learning is None or learning.labels.shape != hidden.shape[:-1]:
        return original(hidden)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def summed(rows: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(rows, head.weight, labels, head.bias, IGNORED, after.soft_cap, scale=after.scale)

    hidden = hidden.to(dtype)
    if learning.by_row:
        learning.loss = torch.stack([summed(*row) for row in zip(hidden, learning.labels, strict=True)])
    else:
        learning.loss = summed(hidden, learning.labels)
    return 0.0 * learning.loss.sum()
