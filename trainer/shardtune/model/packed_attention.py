"""Attention over packed rows: every example attends to itself only, with its own positions.

Implemented once for all models that use transformers' attention interface; what each architecture adds to it (T5's
relative bias, the learned positions of BART) is made to restart with every example. Without documents to read, all of
it is transformers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from shardtune.documents import Documents, Spread, being_read
from shardtune.errors import ConfigError
from shardtune.model.dropout import dropout as drop

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""What layers may be, where a config lists them; others keep a state along the row, or attend in chunks."""
STRETCHED = {"dynamic", "longrope"}
"""Rotary positions with frequencies that depend on the longest example computed at once."""
SDPA, FLASH = "shardtune_packed_sdpa", "shardtune_packed_varlen"
"""Names for transformers, which takes whatever has `flash` in its name for a library to load."""


class _Gather(torch.autograd.Function):
    """Rows [row, …] to slots [slots, …]. What padding repeats has no gradient: nothing that counts depends on it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, slots: Tensor) -> Tensor:
        """`index` [slots], `slots` [row] as in Spread."""
        ctx.save_for_backward(slots)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient at each position's own slot."""
        (slots,) = ctx.saved_tensors
        return gradients[0].index_select(0, slots), None, None


class _PutBack(torch.autograd.Function):
    """Slots [slots, …] to rows [row, …]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        """`slots` [row] as in Spread."""
        ctx.save_for_backward(slots)
        ctx.size = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Zero at slots of padding."""
        (slots,) = ctx.saved_tensors
        padded = gradients[0].new_zeros((ctx.size, *gradients[0].shape[1:]))
        return padded.index_copy_(0, slots, gradients[0]), None


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, heads, row, head width] -> [1, row, heads, head width].

    `attention_mask` is what `_packed_mask` made: as in transformers, the mask says how far one sees, not the module.
    `position_bias`: [1, heads, longest, longest], by position within an example.
    """
    documents = being_read()
    if documents is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse(kwargs)
    window = _window(attention_mask)
    spread, causal, crossing = _which(module, documents)
    queries = _Gather.apply(query[0].transpose(0, 1), spread.query_index, spread.query_slots)
    keys, values = (_Gather.apply(t[0].transpose(0, 1), spread.key_index, spread.key_slots) for t in (key, value))
    done = []
    query_at = key_at = 0
    for part in spread.rectangles:
        query_end, key_end = query_at + part.examples * part.queries, key_at + part.examples * part.keys
        q = queries[query_at:query_end].unflatten(0, (part.examples, part.queries)).transpose(1, 2)
        k, v = (t[key_at:key_end].unflatten(0, (part.examples, part.keys)).transpose(1, 2) for t in (keys, values))
        query_at, key_at = query_end, key_end
        bias = None if position_bias is None or crossing else position_bias[:, :, : part.queries, : part.keys]
        mask = _mask(part.hidden, causal, window, bias, q, k)
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = _attend(q, k, v, mask, dropout, scaling, causal and mask is None)
        done.append(out.transpose(1, 2).flatten(0, 1))
    rows = _PutBack.apply(torch.cat(done) if len(done) > 1 else done[0], spread.query_slots)
    return rows.unsqueeze(0), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, scaling: float | None, causal: bool
) -> Tensor:
    """softmax(q·kᵀ·scaling + mask)·v with dropout in between, all [examples, heads, length, head width]."""
    if not rate or query.device.type != "cpu":
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=rate, scale=scaling, is_causal=causal
        )
    # Not fused on a CPU either, and with slower dropout.
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if causal:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril_()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores.add_(mask)
    return drop(scores.softmax(-1), rate) @ value


def packed_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same through flash-attn's function for sequences of different lengths: no padding at all, no masks.

    Rows of one example, as evaluation reads them, go through SDPA.
    """
    documents = being_read()
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    _refuse(kwargs)
    window = _window(attention_mask)
    _, causal, crossing = _which(module, documents)
    own, read = documents.attending(_decodes(module), crossing)
    # Norms and rotations may leave float32 behind, under autocast.
    autocast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    rows = flash_attn_varlen_func(
        q, k, v, own.offsets, read.offsets, own.longest, read.longest, dropout_p=dropout, softmax_scale=scaling,
        causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return rows.unsqueeze(0), None


def _refuse(kwargs: dict[str, Any]) -> None:
    """What changes the scores and is not known here would be left out in silence."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"data.batching: packed does not know this model's attention ({name}); use grouped")


def _decodes(module: nn.Module) -> bool:
    return bool(getattr(module, "is_decoder", False))


def _which(module: nn.Module, documents: Documents) -> tuple[Spread, bool, bool]:
    """How to spread the examples, whether attention is causal, and whether it is the decoder's to the encoder."""
    causal = bool(getattr(module, "is_causal", True))
    if documents.target_spread is None or documents.cross_spread is None:
        return documents.source_spread, causal, False
    if not _decodes(module):
        return documents.source_spread, False, False
    return (documents.target_spread, True, False) if causal else (documents.cross_spread, False, True)


def _mask(
    hidden: Tensor | None, causal: bool, window: int | None, bias: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """What is added to the scores, [examples or 1, heads or 1, queries, keys]; None: nothing but what `causal` says.

    Behind causal attention stand only an example's own tokens: padding comes after them.
    """
    lowest = torch.finfo(query.dtype).min
    length = query.shape[2]
    if causal:
        if bias is None and (window is None or window >= length):
            return None
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        outside = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        return (
            torch.zeros((), device=query.device, dtype=query.dtype).where(~outside, lowest)
            if bias is None
            else (bias.to(query.dtype).masked_fill(outside, lowest))
        )
    if bias is None:
        return None if hidden is None else ~hidden
    bias = bias.to(query.dtype)
    return bias if hidden is None else bias.masked_fill(hidden, lowest)


def _packed_mask(*args: Any, **kwargs: Any) -> Any:
    """Where documents say what may be seen, only the width of a sliding window, a scalar; else the mask of SDPA."""
    if being_read() is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    width = kwargs.get("local_size")
    return None if width is None else torch.tensor(width)


def _window(attention_mask: Tensor | None) -> int | None:
    if attention_mask is None:
        return None
    if attention_mask.dim():
        raise ConfigError("data.batching: packed does not know this model's attention mask; use grouped")
    return int(attention_mask)


AttentionInterface.register(SDPA, packed_sdpa)
AttentionInterface.register(FLASH, packed_flash)
AttentionMaskInterface.register(SDPA, _packed_mask)
AttentionMaskInterface.register(FLASH, _packed_mask)


def keep_apart(model: PreTrainedModel, path: str, longest: int, flash: bool) -> None:
    """Makes the model attend within examples, whose positions begin at 0; changes nothing while no documents are read.

    Decoders are given positions. Encoder-decoders count them by themselves, in the embedding of positions (BART and
    its kin) or in the relative bias (T5 and its kin). `longest`: of the examples, in tokens. Raises ConfigError for a
    model with another way.
    """
    if not (model._supports_flash_attn if flash else model._supports_sdpa):
        way = "flash_attention_2" if flash else "sdpa"
        raise ConfigError(_cannot(path, model, f"it has no model.attention: {way}"))
    kinds = set(getattr(model.config, "layer_types", None) or ()) - KNOWN_LAYERS
    if kinds or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise ConfigError(_cannot(path, model, f"{', '.join(sorted(kinds)) or 'a convolution'} mixes neighbours"))
    text_config = model.config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") or getattr(text_config, "max_position_embeddings", 0)
    if rope.get("rope_type") in STRETCHED and longest > first:
        reason = f"its frequencies are those of the longest neighbour, and examples may have more than {first} tokens"
        raise ConfigError(_cannot(path, model, reason))
    model.set_attn_implementation(FLASH if flash else SDPA)
    if not model.config.is_encoder_decoder:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ConfigError(_cannot(path, model, "its positions cannot be told"))
        return
    found = False
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and "position_ids" in inspect.signature(module.forward).parameters:
            module.forward = _restarting(module.forward, "decoder" in name.split("."))
            found = True
        elif hasattr(module, "compute_bias") and hasattr(module, "has_relative_attention_bias"):
            if module.has_relative_attention_bias:
                module.compute_bias = _of_the_longest(module, module.compute_bias)  # pyright: ignore
            if "position_bias" in inspect.signature(module.forward).parameters:
                module.forward = _without_zeros(module, module.forward)
            found = True
    if not found:
        raise ConfigError(_cannot(path, model, "it has neither learned positions nor a relative bias that can restart"))


def _cannot(path: str, model: nn.Module, reason: str) -> str:
    return (
        f"data.batching: packed examples of {path} ({type(model).__name__}) cannot be kept apart: {reason}; use grouped"
    )


def _restarting(forward: Callable[..., Tensor], decodes: bool) -> Callable[..., Tensor]:
    def restarting(input_ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        documents = being_read()
        if documents is not None:
            lengths = documents.target if decodes else documents.source
            assert lengths is not None
            position_ids = lengths.positions
        return forward(input_ids, past_key_values_length, position_ids=position_ids)

    return restarting


def _of_the_longest(module: Any, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The bias depends on distances only, so that of the longest example holds those of all."""

    def compute_bias(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        documents = being_read()
        if documents is not None:
            lengths = documents.target if module.is_decoder else documents.source
            assert lengths is not None
            query_length = key_length = lengths.longest
        return compute(query_length, key_length, *args, **kwargs)

    return compute_bias


def _without_zeros(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Attention without a bias makes one of zeros for each pair of the row's positions; packed, it is not used."""

    def forward_packed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if being_read() is not None and not module.has_relative_attention_bias and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = hidden_states.new_zeros((1, module.n_heads, 1, 1))
        return forward(hidden_states, *args, **kwargs)

    return forward_packed
