"""The learning rate of each step, and how far its gradients are scaled down."""

from __future__ import annotations

import math


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
    return peak * _left(schedule, step - rising, total_steps - step, max(1, total_steps - rising))


def learning_rate_by_time(step: int, seconds: float, limit: float, peak: float, schedule: str, warmup: float) -> float:
    """The learning rate of step number `step`, counted from 0, in a run whose length is `limit` seconds.

    The step begins `seconds` after the first one began. With p = seconds / limit and a `warmup` w below 1, which is a
    share of the time, it is peak × p / w while p < w (so 0 in the first step), then

    - constant: peak
    - linear: peak × (1 - p) / (1 - w)
    - cosine: peak × (1 + cos(π (p - w) / (1 - w))) / 2

    From 1 on `warmup` is a number of steps (cut to a whole one): then it is the above with w = 0, times
    min(1, step / warmup). Raises ValueError for an unknown schedule.
    """
    past = min(seconds / limit, 1.0)
    share = warmup if warmup < 1 else 0.0
    if past < share:
        return peak * (past / share)
    risen = min(1.0, step / int(warmup)) if warmup >= 1 else 1.0
    return peak * risen * _left(schedule, past - share, 1.0 - past, 1.0 - share)


def _left(schedule: str, done: float, left: float, whole: float) -> float:
    """What is left of the peak after `done` of the `whole` that it falls in, when `left` is to come."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, left / whole)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done / whole))))
    raise ValueError(f"unknown schedule {schedule}; there are constant, linear, cosine")


def warmup_steps(warmup: float, total_steps: int) -> int:
    """The number of warm-up steps: `warmup` itself (cut to a whole number) from 1 on, below 1 that share of
    `total_steps`, rounded up. As `TrainingArguments.get_warmup_steps` of transformers, but a share never takes
    all the steps."""
    if warmup >= 1:
        return int(warmup)
    # A run of a single step would have a learning rate of zero.
    return min(math.ceil(total_steps * warmup), max(total_steps - 1, 0))


def clip_scale(grad_norm: float, max_grad_norm: float | None) -> float:
    """What to multiply the gradients by so that their norm is at most `max_grad_norm` (None: 1, no clipping).

    min(1, max_grad_norm / (grad_norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`. A norm of nan gives nan.
    """
    if max_grad_norm is None:
        return 1.0
    # In this order min keeps a nan, as torch.clamp does; min(1.0, nan) would be 1.0.
    return min(max_grad_norm / (grad_norm + 1e-6), 1.0)
