"""The keys of `tuning`: one section a method, with the options that this method has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model

from shardtune.section import Positive, Rate, Section, Share

Smoothing = Annotated[float, Field(gt=0.0, lt=1.0)]
Targets = Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]


class FullConfig(Section):
    """All weights are trained."""

    method: Literal["full"] = "full"
    """Which parameters are trained."""


class FreezeConfig(Section):
    """Some of the weights are trained, the others stay as they are."""

    method: Literal["freeze"]
    """Which parameters are trained."""
    layers: Annotated[int, Field(ge=0)] = 0
    """How many layers, counted from the input (in the encoder and in the decoder each), stay frozen."""
    embeddings: bool = True
    """Freeze the input embeddings (and an output layer tied to them)."""
    patterns: list[str] = []
    """Regular expressions; parameters whose name one of them finds stay frozen."""


class BitfitConfig(Section):
    """Only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199); for models that have some."""

    method: Literal["bitfit"]
    """Which parameters are trained."""


class BottleneckConfig(Section):
    """Small networks inside each layer, between frozen ones (Houlsby et al. 2019, arXiv:1902.00751)."""

    method: Literal["adapter"]
    """Which parameters are trained."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: after attention and after the feed-forward part of a layer; pfeiffer: after the feed-forward part only
    (Pfeiffer et al. 2020, arXiv:2005.00247)."""
    size: Positive = 64
    """Width of the bottleneck."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two linear layers."""
    dropout: Rate = 0.0
    """Share of the bottleneck's values dropped while training."""


if TYPE_CHECKING:

    class _StartsFrom(Section):
        pass

else:  # `from` is a word of the language, so a class body cannot name it
    _StartsFrom = create_model(
        "_StartsFrom",
        __base__=Section,
        **{
            "from": (
                Annotated[str, Field(min_length=1)] | None,
                Field(
                    default=None,
                    description="Folder of an earlier adapter of the same method to go on from, such as "
                    "runs/first/final; options that shape it and are not given here are taken from it. null: a new "
                    "one.",
                ),
            )
        },
    )


class AdapterSection(_StartsFrom):
    """Keys of every method whose result is an adapter beside the base model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the trained weights are stored in; bfloat16 takes half the memory and rounds every update. ZeRO
    keeps float32 weights beside those that it computes with in any case. The result is float32."""


class LowRankSection(AdapterSection):
    """Keys of low-rank adapters."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank (rslora: by alpha / sqrt(rank))."""
    dropout: Rate = 0.0
    """Share of the adapter's inputs dropped while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""


class LoraConfig(LowRankSection):
    """Low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    method: Literal["lora"]
    """Which parameters are trained."""


class RsloraConfig(LowRankSection):
    """LoRA whose scale suits large ranks (Kalajdzievski 2023, arXiv:2312.03732)."""

    method: Literal["rslora"]
    """Which parameters are trained."""


class DoraConfig(LowRankSection):
    """LoRA on the direction of a weight, beside a trained magnitude of each row (Liu et al. 2024, arXiv:2402.09353)."""

    method: Literal["dora"]
    """Which parameters are trained."""


class LoraPlusConfig(LowRankSection):
    """LoRA with a larger learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354)."""

    method: Literal["lora+"]
    """Which parameters are trained."""
    ratio: Annotated[float, Field(gt=0)] = 16
    """Learning rate of B over that of A, which is optimizer.lr."""


class PissaConfig(LowRankSection):
    """LoRA that begins as the principal part of a weight; the rest is frozen (Meng et al. 2024, arXiv:2404.02948)."""

    method: Literal["pissa"]
    """Which parameters are trained."""
    iterations: Positive | None = 16
    """Subspace iterations of a randomized singular value decomposition; null: an exact one."""


class EvaConfig(LowRankSection):
    """LoRA whose A begins as the principal directions of each layer's inputs on training examples, with ranks where
    they explain most (Paischer et al. 2024, arXiv:2410.07170)."""

    method: Literal["eva"]
    """Which parameters are trained."""
    examples: Positive = 64
    """Training examples that the inputs are taken from."""
    rho: Annotated[float, Field(ge=1.0)] = 2.0
    """A layer's rank is at most rho × rank; 1: all layers have the same."""


class FourBitSection(LowRankSection):
    """Keys of adapters beside 4-bit weights."""

    quantization: Literal["nf4", "fp4"] = "nf4"
    """What the frozen weights are stored as: 4-bit values for a normal distribution, or 4-bit floats."""
    double_quant: bool = True
    """Store the scales of 4-bit weights in 8 bits, with scales of their own."""


class LoftqConfig(FourBitSection):
    """LoRA beside 4-bit weights that begins as the correction of their error (Li et al. 2023, arXiv:2310.08659)."""

    method: Literal["loftq"]
    """Which parameters are trained."""


class QuantizedSection(LowRankSection):
    """Keys of adapters beside quantized weights."""

    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """What the frozen weights are stored as: 4-bit values for a normal distribution, 4-bit floats, or LLM.int8."""
    double_quant: bool = True
    """Store the scales of 4-bit weights in 8 bits, with scales of their own."""


class QloraConfig(QuantizedSection):
    """LoRA beside quantized weights (Dettmers et al. 2023, arXiv:2305.14314)."""

    method: Literal["qlora"]
    """Which parameters are trained."""


class QdoraConfig(QuantizedSection):
    """DoRA beside quantized weights."""

    method: Literal["qdora"]
    """Which parameters are trained."""


class AdaloraConfig(AdapterSection):
    """Low-rank adapters whose ranks move to where they matter while training (Zhang et al. 2023, arXiv:2303.10512)."""

    method: Literal["adalora"]
    """Which parameters are trained."""
    rank: Positive = 8
    """Mean rank of the updates in the end."""
    initial_rank: Positive = 12
    """Rank of each update in the beginning."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / initial_rank."""
    dropout: Rate = 0.0
    """Share of the adapter's inputs dropped while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""
    begin: Share = 0.1
    """Share of the steps after which ranks begin to fall."""
    end: Share = 0.7
    """Share of the steps after which ranks stay as they are."""
    interval: Positive = 10
    """Steps between two reallocations."""
    beta1: Smoothing = 0.85
    """Decay rate of the running mean of a weight's sensitivity."""
    beta2: Smoothing = 0.85
    """Decay rate of the running mean of its uncertainty."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty that keeps the update's factors orthogonal."""


class Ia3Config(AdapterSection):
    """A factor for each output of keys and values, and for each input of the last feed-forward layer
    (Liu et al. 2022, arXiv:2205.05638)."""

    method: Literal["ia3"]
    """Which parameters are trained."""
    targets: Targets | None = None
    """Module name endings, or a regular expression; null: those that PEFT names for the
    architecture, otherwise its keys, values and last feed-forward layers."""
    feedforward: Targets | None = None
    """Which of `targets` have a factor for each input instead of each output; null: the last feed-forward layers."""


class VeraConfig(AdapterSection):
    """Trained scales between random projections that all layers share (Kopiczko et al. 2023, arXiv:2310.11454)."""

    method: Literal["vera"]
    """Which parameters are trained."""
    rank: Positive = 256
    """Rank of the projections."""
    dropout: Rate = 0.0
    """Share of the adapter's inputs dropped while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""


class LohaConfig(AdapterSection):
    """The update is the elementwise product of two low-rank ones (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    method: Literal["loha"]
    """Which parameters are trained."""
    rank: Positive = 8
    """Rank of each of the two."""
    alpha: Annotated[float, Field(gt=0)] = 8
    """The update is scaled by alpha / rank."""
    dropout: Rate = 0.0
    """Share of the update's rows dropped while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""


class LokrConfig(AdapterSection):
    """The update is a Kronecker product, its larger factor of low rank (Yeh et al. 2023, arXiv:2309.14859)."""

    method: Literal["lokr"]
    """Which parameters are trained."""
    rank: Positive = 8
    """Rank of the larger factor."""
    alpha: Annotated[float, Field(gt=0)] = 8
    """The update is scaled by alpha / rank."""
    factor: Positive | None = None
    """Size of the smaller factor; null: near the square root of the layer's size."""
    dropout: Rate = 0.0
    """Share of the update's rows dropped while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""


class OftConfig(AdapterSection):
    """Weights are rotated, block by block (Qiu et al. 2023, arXiv:2306.07280)."""

    method: Literal["oft"]
    """Which parameters are trained."""
    block_size: Positive = 32
    """Size of a rotation; lowered for all layers to what divides the input size of each."""
    dropout: Rate = 0.0
    """Share of the blocks left as they are while training."""
    targets: Targets = "all-linear"
    """all-linear (all but the output layer), attention, mlp, a list of module name endings, or a regular expression."""


class LnTuningConfig(AdapterSection):
    """Only the normalization layers are trained (Zhao et al. 2023, arXiv:2312.11420)."""

    method: Literal["ln_tuning"]
    """Which parameters are trained."""


class VirtualTokensSection(AdapterSection):
    """Keys of methods that train vectors in front of the text."""

    virtual_tokens: Positive = 20
    """How many vectors."""


class PrefixConfig(VirtualTokensSection):
    """Trained keys and values before those of the text, in every layer (Li and Liang 2021, arXiv:2101.00190)."""

    method: Literal["prefix"]
    """Which parameters are trained."""
    projection: bool = False
    """Compute them by a small network, which steadies training and is left out of the result."""
    hidden_size: Positive | None = None
    """Width of that network; null: that of the model."""


class PromptConfig(VirtualTokensSection):
    """Trained embeddings before those of the text (Lester et al. 2021, arXiv:2104.08691)."""

    method: Literal["prompt"]
    """Which parameters are trained."""
    text: str | None = None
    """They begin as the embeddings of this text, repeated or cut to length; null: as those of random tokens."""


class PTuningConfig(VirtualTokensSection):
    """Trained embeddings before those of the text, computed by a small network (Liu et al. 2021, arXiv:2103.10385)."""

    method: Literal["p_tuning"]
    """Which parameters are trained."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network."""
    hidden_size: Positive | None = None
    """Its width; null: that of the model."""
    dropout: Rate = 0.0
    """Of the LSTM."""


class MultitaskPromptConfig(VirtualTokensSection):
    """One prompt for all tasks times a low-rank factor for each (Wang et al. 2023, arXiv:2303.02861); each source of
    `data.train` is a task. Judged are shares of these sources as their tasks, all else as the first one."""

    method: Literal["multitask_prompt"]
    """Which parameters are trained."""
    rank: Positive = 1
    """Rank of a task's factor."""


TuningConfig = Annotated[
    FullConfig | FreezeConfig | LoraConfig | QloraConfig | DoraConfig | QdoraConfig | RsloraConfig | LoraPlusConfig
    | PissaConfig | LoftqConfig | EvaConfig | AdaloraConfig | Ia3Config | VeraConfig | LohaConfig | LokrConfig
    | OftConfig | LnTuningConfig | PrefixConfig | PromptConfig | PTuningConfig | MultitaskPromptConfig
    | BottleneckConfig | BitfitConfig,
    Field(discriminator="method"),
]  # fmt: skip
