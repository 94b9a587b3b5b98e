"""The keys of `optimizer`: one section an update rule, with the options that this rule has."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from shardtune.section import Positive, Rate, Section

Rates = Annotated[list[Rate], Field(min_length=2, max_length=2)]
LearningRate = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]


class OptimizerSection(Section):
    """Keys of every update rule."""

    lr: LearningRate = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; not on biases and norms."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: constant, or falling along a line or a half cosine, to be
    zero once the last step is taken. Step 1 of a warm-up has rate 0, as in transformers."""
    warmup: Annotated[float, Field(ge=0.0)] = 0.03
    """Linear rise from zero: a share of the steps below 1, a number of steps from 1 on."""
    max_grad_norm: AboveZero | None = 1.0
    """Gradients are scaled down to this norm, all of them together; null: no clipping."""


class AdamSection(OptimizerSection):
    """Keys of Adam and its kin."""

    betas: Rates = [0.9, 0.999]
    """Decay rates of the running means of the gradient and of its square."""
    eps: AboveZero = 1e-8
    """Added to the denominator of the update."""


class AdamwConfig(AdamSection):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """The update rule."""


class Adamw8bitConfig(AdamSection):
    """AdamW of bitsandbytes whose running means are stored in 8 bits, with a scale for each block of 256 (Dettmers et
    al. 2021, arXiv:2110.02861). Tensors of fewer than 4096 elements, and embeddings, keep 32 bits."""

    name: Literal["adamw_8bit"]
    """The update rule."""


class PagedAdamwConfig(AdamSection):
    """AdamW of bitsandbytes whose running means move to the host's memory when the GPU's is full (Dettmers et al.
    2023, arXiv:2305.14314)."""

    name: Literal["paged_adamw"]
    """The update rule."""


class PagedAdamw8bitConfig(AdamSection):
    """`adamw_8bit`, paged like `paged_adamw`."""

    name: Literal["paged_adamw_8bit"]
    """The update rule."""


class LionSection(OptimizerSection):
    """Keys of Lion."""

    lr: LearningRate = 1e-5
    """Peak learning rate; 3 to 10 times smaller than AdamW's."""
    betas: Rates = [0.9, 0.99]
    """How much of the running mean of the gradient is in the update, and its decay rate."""


class LionConfig(LionSection):
    """Lion: steps of equal size along the sign of a running mean (Chen et al. 2023, arXiv:2302.06675). Half the state
    of AdamW."""

    name: Literal["lion"]
    """The update rule."""


class Lion8bitConfig(LionSection):
    """Lion whose running mean is stored in 8 bits, as by `adamw_8bit`."""

    name: Literal["lion_8bit"]
    """The update rule."""


class AdafactorConfig(OptimizerSection):
    """Adafactor, which keeps a running mean for each row and column of a matrix in place of each element (Shazeer and
    Stern 2018, arXiv:1804.04235)."""

    name: Literal["adafactor"]
    """The update rule."""
    lr: LearningRate = 1e-3
    """Peak learning rate."""
    scale_parameter: bool = False
    """Multiply the learning rate of each parameter by the root mean square of its values."""
    decay_rate: AboveZero = 0.8
    """The running means' decay rate in step t is 1 - t^-decay_rate."""
    clip_threshold: AboveZero = 1.0
    """Largest root mean square of a parameter's update, before the learning rate."""


class MuonConfig(AdamSection):
    """Muon, which orthogonalizes the update of each matrix inside a layer (Jordan et al. 2024); AdamW for embeddings,
    output layers, biases and norms. Updates are scaled to the size of AdamW's, so that one learning rate and weight
    decay serve both (Liu et al. 2025, arXiv:2502.16982)."""

    name: Literal["muon"]
    """The update rule."""
    momentum: Rate = 0.95
    """Decay rate of the running mean of the gradient that is orthogonalized."""
    iterations: Positive = 5
    """Newton-Schulz iterations that orthogonalize it."""


class ScheduleFreeConfig(OptimizerSection):
    """AdamW whose averaged iterates take the place of a falling learning rate (Defazio et al. 2024,
    arXiv:2405.15682); evaluations and the result use the average."""

    name: Literal["schedule_free"]
    """The update rule."""
    schedule: Literal["constant"] = "constant"  # pyright: ignore[reportIncompatibleVariableOverride]
    """After warm-up."""
    betas: Annotated[list[Annotated[float, Field(gt=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How far gradients are taken towards the average, and the decay rate of the running mean of their squares."""
    eps: AboveZero = 1e-8
    """Added to the denominator of the update."""


def _adamw_unless_named(given: Any) -> Any:
    return {"name": "adamw", **given} if isinstance(given, dict) else given


OptimizerConfig = Annotated[
    AdamwConfig | Adamw8bitConfig | PagedAdamwConfig | PagedAdamw8bitConfig | LionConfig | Lion8bitConfig
    | AdafactorConfig | MuonConfig | ScheduleFreeConfig,
    Field(discriminator="name"),
    BeforeValidator(_adamw_unless_named),
]  # fmt: skip


def keys_of_optimizer(name: str) -> set[str] | None:
    """The keys that the section of an update rule has; None if there is no such rule."""
    for section in get_args(get_args(OptimizerConfig)[0]):
        if name in get_args(section.model_fields["name"].annotation):
            return set(section.model_fields)
    return None
