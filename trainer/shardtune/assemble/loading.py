"""A run's result, or the model that it began from, in one process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shardtune.assemble.parts import DTYPES, saved_labels
from shardtune.assemble.tunings import quantization_of
from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.model.quantized import quantize_layers
from shardtune.model.quantized_weights import QuantizedWeights
from shardtune.model.skeleton import build_skeleton, load_architecture, load_model
from shardtune.model.tokenizer import fit_config
from shardtune.protocols import Weights
from shardtune.quantization import Quantization
from shardtune.strategy.parameters import materialize
from shardtune.tuning.front import put_in_front


def load_result(config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> nn.Module:
    """The model in a result's folder; an adapter comes on its base model.

    Raises ConfigError where the folder holds neither.
    """
    if not (folder / "adapter_config.json").exists():
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder}: holds neither a model nor an adapter")
        return load_model(str(folder), config.task.head, dtype)
    base, _ = base_model(config, folder, tokenizer, dtype, quantization_of(config.tuning))
    model = with_adapter(base, folder)
    put_in_front(model)
    return model


def with_adapter(base: PreTrainedModel, folder: Path) -> Any:
    """The base with the adapter of `folder` beside it.

    Raises ConfigError where the file lacks a tensor of the adapter, of which peft only warns.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, str(folder))
        except UserWarning as lacking:
            raise ConfigError(f"{folder}: the adapter is not whole: {lacking}") from None


def base_model(
    config: Config,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model that an adapter was trained beside, and the dtype of its files; random weights are drawn again.

    Quantized layers are what they were while training; the rest has `dtype`.
    """
    settings = config.model
    architecture = load_architecture(settings.path, config.task.head, settings.trust_remote_code)
    fit_to(architecture, config, tokenizer, saved_labels(folder))
    skeleton = build_skeleton(
        architecture, settings.path, config.task.head, settings.weights == "pretrained", settings.attention,
        settings.layers, settings.trust_remote_code,
    )  # fmt: skip
    model, device = skeleton.model.requires_grad_(False), torch.device("cpu")
    if quantization is not None:
        compute_dtype = DTYPES[settings.dtype]
        quantize_layers(model, config.task.head, skeleton.recorder, quantization, compute_dtype, settings.path)
    weights: Weights = skeleton.weights(model, config.seed, dtype)
    if quantization is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = QuantizedWeights(model, weights, device, lambda scales: scales)
    materialize(model, weights, device)
    return model, skeleton.stored_dtype


def fit_to(
    architecture: PreTrainedConfig, config: Config, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> None:
    """Gives the architecture the vocabulary and the labels of a run's result."""
    fit_config(architecture, tokenizer, (config.model.tokenizer or "").startswith("train:"))
    config.task.fit(architecture, labels)
