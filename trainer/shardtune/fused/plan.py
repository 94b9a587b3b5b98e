"""Which operations are fused in a model on a device, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Reasons = dict[str, int]
NAMES = ("lora", "four_bit", "cross_entropy", "norm", "rope", "mlp", "attention", "padding")
"""What `kernels.fused` can list."""
WITHOUT_KERNELS = ("lora", "cross_entropy")
"""Fused by `auto` also where no Triton kernel runs: fewer calls and less memory, whatever the device."""
ON_CPU = "without a GPU torch's own does as well"
ABSENT = {
    "lora": "no low-rank adapters", "four_bit": "no other layers in four bits", "norm": "no norms of a known kind",
    "rope": "no rotary positions", "mlp": "no gated feed-forward layers", "attention": "no relative positions",
}  # fmt: skip


def runs_kernels(device: torch.device) -> bool:
    """Whether operations on `device` are Triton kernels: on a GPU, or in Triton's interpreter."""
    if device.type == "cuda":
        return True
    import triton.knobs

    return bool(triton.knobs.runtime.interpret)


def fuse(
    tuned: nn.Module,
    base: PreTrainedModel,
    wanted: str | Collection[str],
    device: torch.device,
    attention: str,
    after_head: Any,
    slower: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, int | str]:
    """Fuses what is `wanted` ("auto", "off", or names) in the model `tuned`, of which `base` is transformers' part;
    on the meta device, before a strategy takes it. `attention`: `model.attention`; `after_head`: see `head.after_head`;
    `slower`: operations that `auto` leaves to torch, and why, see `measured.slower_ops`.

    Returns for each operation in how many modules it is (padding: in how many streams of tokens), or the reason why in
    none.
    """
    report: dict[str, int | str] = {}
    kernels = runs_kernels(device)
    if wanted == "off":
        return dict.fromkeys(NAMES, "kernels.fused: off")
    done: set[nn.Module] = set()
    fusers: Mapping[str, Callable[[], tuple[int, Reasons]]] = _fusers(tuned, base, after_head, done, device)
    for name, fuser in fusers.items():
        reason = _unwanted(name, wanted, kernels) or (slower.get(name) if wanted == "auto" else None)
        if reason is None and name == "attention" and attention not in ("auto", "fused"):
            reason = f"model.attention: {attention}"
        if name == "attention" and attention == "fused":
            reason = None
        if reason is not None:
            report[name] = reason
            continue
        count, reasons = fuser()
        report[name] = count or _said(reasons) or ABSENT[name]
    report["padding"] = _unwanted("padding", wanted, kernels) or (
        (1 + base.config.is_encoder_decoder) if kernels else "without a GPU it is done on the host"
    )
    return {name: report[name] for name in NAMES}


def _fusers(
    tuned: nn.Module, base: PreTrainedModel, after: Any, done: set[nn.Module], device: torch.device
) -> dict[str, Callable[[], tuple[int, Reasons]]]:
    """In the order in which they choose modules: a whole feed-forward layer before the linear layers in it."""
    from shardtune.fused.attention import fuse_attention
    from shardtune.fused.head import fuse_head
    from shardtune.fused.lora import fuse_four_bit, fuse_lora
    from shardtune.fused.mlp import fuse_mlps
    from shardtune.fused.norms import fuse_norms
    from shardtune.fused.rope import fuse_rope

    return {
        "attention": lambda: fuse_attention(base),
        "mlp": lambda: fuse_mlps(tuned, done, device),
        "lora": lambda: fuse_lora(tuned, done, device),
        "four_bit": lambda: fuse_four_bit(tuned, done, device),
        "norm": lambda: fuse_norms(tuned),
        "rope": lambda: fuse_rope(tuned),
        "cross_entropy": lambda: fuse_head(base.get_output_embeddings(), after),
    }


def _unwanted(name: str, wanted: str | Collection[str], kernels: bool) -> str | None:
    if wanted == "auto":
        return None if kernels or name in WITHOUT_KERNELS else ON_CPU
    return None if name in wanted else "not in kernels.fused"


def _said(reasons: Reasons) -> str:
    return "; ".join(f"{count} × {reason}" if count > 1 else reason for reason, count in reasons.items())


def describe(report: Mapping[str, int | str]) -> str:
    """A line of what is fused, and the reasons of what is not, the common ones together."""
    fused = ", ".join(f"{name} in {count}" for name, count in report.items() if isinstance(count, int))
    left: dict[str, list[str]] = {}
    for name, reason in report.items():
        if isinstance(reason, str):
            left.setdefault(reason, []).append(name)
    others = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in left.items())
    return f"fused: {fused or 'nothing'}" + (f" (not {others})" if others else "")
