"""The penalty that keeps the factors of AdaLoRA's updates orthogonal (Zhang et al. 2023, arXiv:2303.10512, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shardtune.examples import Batch
from shardtune.protocols import Task


class _WithPenalty(torch.autograd.Function):
    """A layer's output unchanged, and the penalty ‖A Aᵀ - 1‖ + ‖Bᵀ B - 1‖ of its A [r, d_in] and B [d_out, r] in the
    Frobenius norm, float32.

    One node of the graph for both: its backward, which reads A and B, comes when the gradient of the output does, at a
    time when a strategy that splits parameters has gathered those of the layer.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return output.clone(), _distance(a)[1] + _distance(b.T)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad_output, grad_penalty = grads
        with torch.autocast(a.device.type, enabled=False):
            return grad_output, (grad_penalty * _slope(a)).to(a.dtype), (grad_penalty * _slope(b.T).T).to(b.dtype)


def _distance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """P Pᵀ - 1 of P [r, d], and its norm."""
    rows = rows.float()
    off = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return off, torch.linalg.matrix_norm(off)


def _slope(rows: Tensor) -> Tensor:
    """The derivative of ‖P Pᵀ - 1‖ by P: 2 (P Pᵀ - 1) P / ‖P Pᵀ - 1‖; 0 where that is 0 / 0."""
    off, norm = _distance(rows)
    return 2 * (off @ rows.float()) / norm.clamp_min(torch.finfo(torch.float32).tiny)


class Orthogonal:
    """Implements the Task protocol: the same task, whose loss draws the factors of `layers` towards orthogonality.

    To the gradient of the loss comes that of weight × the mean of the penalties of all A and B, once a step, whatever
    the ranks and the micro-batches: each brings the share that it has of the step's targets. The value of the loss
    stays that of the targets. Outside of training nothing is changed.
    """

    def __init__(self, task: Task, layers: Sequence[nn.Module], weight: float) -> None:
        """`layers`: PEFT's AdaLoRA layers, in the model that is trained."""
        self._task = task
        self._weight = weight
        self._penalties: dict[nn.Module, Tensor] = {}
        for layer in layers:
            layer.register_forward_hook(self._note)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the task's own."""
        return getattr(self._task, name)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's loss."""
        self._penalties.clear()
        loss = self._task.loss_sum(model, batch)
        if not self._penalties:
            return loss
        mean = torch.stack(list(self._penalties.values())).sum() / (2 * len(self._penalties))
        share = self._weight * batch.targets * mean
        self._penalties.clear()
        return loss + (share - share.detach())

    def _note(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return output
        factors = cast(Any, layer)
        output, self._penalties[layer] = _WithPenalty.apply(  # pyright: ignore[reportGeneralTypeIssues]
            output, factors.lora_A["default"], factors.lora_B["default"]
        )
        return output
