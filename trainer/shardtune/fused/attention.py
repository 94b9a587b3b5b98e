"""Attention with T5's relative positions: the bias is computed where it is added, so that memory grows with the length
and not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from shardtune.documents import being_read
from shardtune.fused.linears import replace_forward
from shardtune_kernels import biased_attention

NAME = "shardtune_biased"
"""For transformers, of the attention function and of the function that makes its masks."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [b, heads, s, head width] -> [b, s, heads, head width].

    `attention_mask`: bool [b, t], what is no padding, or None; `position_bias`: [1, heads, 1, buckets], the table.
    """
    crossing = module.is_decoder and not module.is_causal
    table = None if crossing or position_bias is None else position_bias[0, :, 0].t()
    offsets = longest = None
    documents = being_read()
    if documents is not None:
        own, read = documents.attending(module.is_decoder, crossing)
        offsets, longest = (own.offsets, read.offsets), (own.longest, read.longest)
    out = biased_attention(
        query, key.to(query.dtype), value.to(query.dtype), table, bidirectional=not module.is_decoder,
        max_distance=module.relative_attention_max_distance, causal=module.is_causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, shown=attention_mask, offsets=offsets,
        longest=longest, dropout=dropout,
    )  # fmt: skip
    return out.transpose(1, 2), None


def fuse_attention(model: PreTrainedModel) -> tuple[int, dict[str, int]]:
    """Makes the attention layers of a model with relative positions use the fused one; how many."""
    layers: list[Any] = [module for module in model.modules() if _is_relative(module)]
    if not layers:
        return 0, {}
    model.set_attn_implementation(NAME)
    for layer in layers:
        if layer.has_relative_attention_bias:
            layer.compute_bias = _table_of(layer)
        replace_forward(layer, _without_zeros)
    return len(layers), {}


def _is_relative(module: Any) -> bool:
    """T5's attention and what is built like it, calling an attention function that can be chosen."""
    code = getattr(type(module).forward, "__code__", None)
    return (
        hasattr(module, "compute_bias") and hasattr(module, "relative_attention_max_distance")
        and hasattr(module, "has_relative_attention_bias") and hasattr(module, "is_causal")
        and code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    )  # fmt: skip


def _table_of(layer: Any) -> Callable[..., Tensor]:
    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        """The table as the other layers are handed the bias: a copy, as a sharded parameter may be gone by then."""
        return layer.relative_attention_bias.weight.clone().t()[None, :, None, :]

    return compute_bias


def _without_zeros(layer: nn.Module, original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer without a table makes a bias of zeros for each pair of positions, which is not needed."""
    own: Any = layer
    if not own.has_relative_attention_bias and kwargs.get("position_bias") is None:
        kwargs["position_bias"] = hidden.new_zeros((1, own.n_heads, 1, 1))
    return original(hidden, *args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What is no padding, bool [b, t]: order and documents are known otherwise."""
    shown = kwargs.get("attention_mask")
    return None if shown is None or being_read() is not None else shown.bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
