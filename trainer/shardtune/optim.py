"""The optimizer, the learning rate of each step, and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The learning rate of step number `step`, counted from 0: the one about to be done.

    With w warm-up steps and n = total_steps it is peak × step / w while step < w (so 0 in the first step),
    then

    - constant: peak
    - linear: peak × (n - step) / (n - w)
    - cosine: peak × (1 + cos(π (step - w) / (n - w))) / 2

    The falling ones reach 0 at step n, which is not done any more. These are the values of
    `get_{constant,linear,cosine}_schedule_with_warmup` of transformers, bit for bit.

    `warmup`: see `warmup_steps`. Raises ValueError for an unknown schedule.
    """
    rising = warmup_steps(warmup, total_steps)
    if step < rising:
        return peak * (step / rising)
    falling = max(1, total_steps - rising)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * max(0.0, (total_steps - step) / falling)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - rising) / falling))))
    raise ValueError(f"unknown schedule {schedule}; there are constant, linear, cosine")


def warmup_steps(warmup: float, total_steps: int) -> int:
    """The number of warm-up steps: `warmup` itself (cut to a whole number) from 1 on, below 1 that share of
    `total_steps`, rounded up. As `TrainingArguments.get_warmup_steps` of transformers, but a share never takes
    all the steps."""
    if warmup >= 1:
        return int(warmup)
    # A run of a single step would have a learning rate of zero.
    return min(math.ceil(total_steps * warmup), max(total_steps - 1, 0))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: for each learning rate the parameters with weight decay, then biases and norms.

    Biases and norms are the parameters of fewer than two dimensions and those whose name ends in "bias"; they have no
    weight decay. A group's `lr_scale` is what its learning rate is multiplied by, see `set_learning_rate`. A group
    without parameters is left out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        # Under ZeRO-3 a parameter is empty until it is gathered; DeepSpeed keeps its shape beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decay = 0.0 if len(shape) < 2 or name.endswith("bias") else weight_decay
        groups.setdefault((lr_scale(name), decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `named_parameters`, which are all trained.

    torch's fused implementation where all parameters are plain tensors or DTensors on CUDA devices; its
    default one otherwise. Raises ValueError when there are no parameters.
    """
    named = list(named_parameters)
    groups = parameter_groups(named, weight_decay, lr_scale)
    fused = all(_can_be_fused(parameter) for _, parameter in named) or None
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def _can_be_fused(parameter: nn.Parameter) -> bool:
    from torch.distributed.tensor import DTensor

    plain = type(parameter) is nn.Parameter
    return parameter.device.type == "cuda" and (plain or isinstance(parameter, DTensor))


def clip_scale(grad_norm: float, max_grad_norm: float | None) -> float:
    """What to multiply the gradients by so that their norm is at most `max_grad_norm` (None: 1, no clipping).

    min(1, max_grad_norm / (grad_norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`. A norm of nan gives nan.
    """
    if max_grad_norm is None:
        return 1.0
    # In this order min keeps a nan, as torch.clamp does; min(1.0, nan) would be 1.0.
    return min(max_grad_norm / (grad_norm + 1e-6), 1.0)
