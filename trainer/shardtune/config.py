"""The config's types: every key, its default and its unit.

The tasks and their keys are in `task/`, the tuning methods and theirs in `tuning_config.py`, the optimizers and theirs
in `optimizer_config.py`, the file format (YAML, overrides, errors with their lines) in `config_file.py`, what cannot go
together in `conflicts.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from shardtune.optimizer_config import AdamwConfig, OptimizerConfig
from shardtune.section import Positive, Section, Share
from shardtune.task.registry import AnyTask
from shardtune.task.section import TaskSection
from shardtune.tuning_config import FullConfig, TuningConfig


class ModelConfig(Section):
    """Which model, and how it computes."""

    path: Annotated[str, Field(min_length=1)]
    """Hub id, or local folder with a config.json."""
    tokenizer: str | None = None
    """null: the model's own; a path or hub id; or train:N, a byte-level BPE of N pieces trained on the
    training texts."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """pretrained, or random: the architecture of `path` with weights drawn from `seed`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the model computes in; the trained (master) weights stay float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention", "fused"] = "auto"
    """Attention implementation of transformers; auto lets the architecture choose, and `kernels.fused`. fused: the
    kernel for T5's relative positions."""
    recompute: Literal["none", "full"] = "none"
    """full: activations are recomputed in the backward pass (activation checkpointing), saving memory."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """All the model's dropout rates; null: those of its own config. 0 makes a run independent of its layout even
    where the model has dropout."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices of the layers to keep, in order (of the encoder and of the decoder alike); null: all."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub repository."""


if TYPE_CHECKING:
    TaskConfig: TypeAlias = TaskSection
else:
    TaskConfig = AnyTask

Path = Annotated[str, Field(min_length=1)]


class SourceConfig(Section):
    """One of several sources, and how much of it is trained on: exactly one of `weight` and `tokens`."""

    path: Path
    """Like `data.train`: a file, a glob, a folder, a hub id, or docs:python."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """How often an epoch visits each of its examples: 2 is twice, 0.5 every other epoch. Of a stream: its part of the
    examples, beside the weights of the others."""
    tokens: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Its share of the tokens that are trained on; the shares of all sources add up to 1."""


# Which member of a union the user means. No key is written in <>, so messages can leave these tags out.


def _train_form(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


def _source_form(value: object) -> str:
    return "<section>" if isinstance(value, dict | SourceConfig) else "<text>"


Source = Annotated[
    Annotated[Path, Tag("<text>")] | Annotated[SourceConfig, Tag("<section>")],
    Discriminator(_source_form),
]


class DataConfig(Section):
    """Where the examples come from, and how they are batched."""

    train: Annotated[
        Annotated[Path, Tag("<text>")] | Annotated[list[Source], Field(min_length=1), Tag("<list>")],
        Discriminator(_train_form),
    ]
    """File or glob (.jsonl .json .csv .parquet), a folder saved by `datasets`, a hub id (owner/name[@config][:split]),
    or docs:python. A list of these is read one after the other; with a weight or a share of tokens each, they are
    mixed."""
    validation: str | None = None
    """Like `train`; null: a share of the training data (see `splits`)."""
    test: str | None = None
    """Like `train`; null: a share of the training data (see `splits`)."""
    splits: Annotated[list[Share], Field(min_length=3, max_length=3)] = [0.8, 0.1, 0.1]
    """Shares of train, validation and test, by a hash of each example's content; used when only `train`
    is given."""
    batching: Literal["padded", "grouped", "packed"] = "padded"
    """padded: micro-batches in the step's order; grouped: examples of like length share a micro-batch; packed: a
    micro-batch is one row of examples without padding, each of which attends to itself only."""
    shuffle: bool = True
    """A new order each epoch, drawn from `seed`. false: step k takes the next rows in file order."""
    streaming: bool = False
    """Read, check and tokenize the training data while training, and keep nothing of it: for data larger than memory,
    in .jsonl, .csv or .parquet files or on the hub."""
    shuffle_buffer: Positive = 10_000
    """Of a stream, so many examples in a row are shuffled among themselves."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Steps that are prepared ahead while one is computed; 0: each when it is needed."""

    @property
    def sources(self) -> list[SourceConfig]:
        """What `train` names, as a list."""
        given = [self.train] if isinstance(self.train, str) else self.train
        return [SourceConfig(path=source) if isinstance(source, str) else source for source in given]


BATCH_SIZES = (("examples", "tokens"), ("micro_examples", "micro_tokens"))
"""Pairs of keys of `batch`, of which exactly one is given."""


class BatchConfig(Section):
    """How many examples make one optimizer step, over all ranks."""

    examples: Positive | None = 32
    """Examples of one optimizer step, over all ranks and micro-batches; null where `tokens` says it."""
    tokens: Positive | None = None
    """Instead of `examples`: source and target tokens of one optimizer step, at most; at least one example."""
    micro_examples: Positive | None = 8
    """Examples that one rank computes at once; null where `micro_tokens` says it."""
    micro_tokens: Positive | None = None
    """Instead of `micro_examples`: source and target positions, padding included, that one rank computes at once; a
    longer example is computed alone."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_each(cls, values: Any) -> Any:
        """A number of tokens takes the place of the default number of examples."""
        if isinstance(values, dict):
            replaced = {examples: None for examples, tokens in BATCH_SIZES if values.get(tokens) is not None}
            values = {**replaced, **values}
        return values


class StrategyConfig(Section):
    """How model, gradients and optimizer are spread over the ranks."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """auto: single on one rank; on several ddp where all of it fits one device, else fsdp2. With offload: cpu fsdp2,
    with offload: nvme zero3."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where what a step does not need at once rests. cpu: in the host's memory, parameters, gradients and optimizer
    under fsdp2 and zero3, the optimizer under zero2. nvme: as cpu, but the optimizer on a disk, under zero3."""
    nvme: Annotated[str, Field(min_length=1)] | None = None
    """Folder on a fast local disk, for offload: nvme; some 12 bytes for each trained parameter."""


class DurationConfig(Section):
    """How long to train: exactly one of the keys."""

    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training data (1.5 is one and a half)."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps; 0 writes the result without training."""
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Minutes since the first step, evaluating and saving included; the learning rate falls with them."""

    @property
    def seconds(self) -> float | None:
        """None where `minutes` is not given."""
        return None if self.minutes is None else 60 * self.minutes


def _every_form(value: object) -> str:
    return "<time>" if isinstance(value, str) else "<steps>"


class CheckpointConfig(Section):
    """What is saved during the run, so that it can go on after anything; also once at the end."""

    every: Annotated[
        Annotated[Positive, Tag("<steps>")]
        | Annotated[str, Field(pattern=r"^[0-9]*[1-9][0-9]*(s|m|h)$"), Tag("<time>")],
        Discriminator(_every_form),
    ] = 500
    """Steps between two checkpoints; or time: 30s, 10m, 2h."""
    keep: Positive = 3
    """How many are kept; older ones are removed when a newer one has been verified."""
    background: bool = True
    """Write while training goes on; it stops only to copy what is saved."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """auto: go on from the newest good checkpoint of the run's folder, begin where there is none; never: set an old
    folder aside and begin anew; a path: go on from that checkpoint."""

    @property
    def every_steps(self) -> int | None:
        """None where `every` is a time."""
        return self.every if isinstance(self.every, int) else None

    @property
    def every_seconds(self) -> float | None:
        """None where `every` is a number of steps."""
        if isinstance(self.every, int):
            return None
        return float(self.every[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.every[-1]]


MetricName = Literal[
    "rouge", "bleu", "chrf", "exact_match", "squad_em", "token_f1", "length", "accuracy", "macro_f1", "micro_f1",
    "matthews", "entity_f1", "token_accuracy", "mse", "pearson", "perplexity",
]  # fmt: skip
OwnMetric = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


def _metric_form(value: object) -> str:
    return "<own>" if isinstance(value, str) and ":" in value else "<name>"


Metric = Annotated[
    Annotated[MetricName, Tag("<name>")] | Annotated[OwnMetric, Tag("<own>")],
    Discriminator(_metric_form),
]


class EvaluationConfig(Section):
    """When and how the model is judged, and what it is compared with."""

    every: Positive = 500
    """Steps between two evaluations; also at the end."""
    examples: Positive | None = 200
    """How many examples of a split are used: the first ones; null: all."""
    metrics: list[Metric] | None = None
    """null: those that suit the task. module:function is one of your own: it gets a prediction and a reference, both
    texts, and returns a number; higher is better."""
    max_new_tokens: Positive = 64
    """Longest text generated, in tokens."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Shortest text generated, in tokens."""
    beams: Positive = 1
    """Beam search width; 1 is greedy."""
    length_penalty: float = 1.0
    """Of beam search: above 0 prefers longer texts, below 0 shorter ones."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """No so many tokens in a row are written twice; 0: they may be."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0: the most probable token each time, or beams; above, tokens are drawn, the flatter the higher."""
    top_k: Positive | None = None
    """Tokens are drawn from so many of the most probable ones."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Tokens are drawn from the most probable ones that have this much probability together."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A text ends before one of these."""
    baseline: bool = True
    """Also judge what tuning is compared with, before the first step: the base model, and what needs no model."""
    shots: list[Annotated[int, Field(ge=0, le=256)]] = [0]
    """How many training examples stand in the prompt of the base model; several numbers are judged one by one. Each is
    written as "Input: …" and, on the next line, "Output: …", with an empty line after it; in conversations they are
    earlier turns."""
    slices: list[Annotated[str, Field(min_length=1)]] = []
    """Fields of the data by whose values results are also told apart; by length they always are."""
    best: str | None = None
    """A metric such as rougeL, or loss: the checkpoint that has the best one in validation is kept, and final/ is made
    of it. null: final/ is the model after the last step."""
    patience: Positive | None = None
    """Training stops after so many evaluations of validation in which `best` (loss, where that is null) was not
    better."""


class TrackingConfig(Section):
    """Where the curves go."""

    tensorboard: bool = True
    """Write TensorBoard event files to the run's folder."""
    wandb: bool = False
    """Weights & Biases, by its own settings (WANDB_PROJECT, WANDB_MODE=offline, …); needs `shardtune[track]`."""
    mlflow: bool = False
    """MLflow, by its own settings (MLFLOW_TRACKING_URI, …); needs `shardtune[track]`."""
    every: Positive = 10
    """Steps between two training lines; the first and the last step always have one."""
    histograms: Positive | None = None
    """Steps between two histograms of each trained parameter's gradient; null: none."""


FusedOp = Literal["lora", "four_bit", "cross_entropy", "norm", "rope", "mlp", "attention", "padding"]


class KernelsConfig(Section):
    """Fused kernels."""

    fused: Literal["auto", "off"] | list[FusedOp] = "auto"
    """auto: all that fit the model and pay on the device; off: none; or a list of those wanted."""


class Config(Section):
    """One run: what is trained, on what, how, and for how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """The run's folder is <runs>/<name>."""
    runs: Annotated[str, Field(min_length=1)] = "runs"
    """Parent folder of runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the order of the examples, random weights and dropout."""
    model: ModelConfig
    task: TaskConfig
    """What the model learns to do, from which fields of the data."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    tuning: TuningConfig = FullConfig()
    """Which parameters are trained."""
    optimizer: OptimizerConfig = AdamwConfig()
    """The update rule, its learning rate over the run, and clipping."""
    strategy: StrategyConfig = StrategyConfig()
    duration: DurationConfig = DurationConfig(epochs=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    kernels: KernelsConfig = KernelsConfig()
