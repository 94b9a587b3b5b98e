"""A model without its weights: the right class for the task, parameters on the meta device, buffers in place."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from shardtune import bottleneck
from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.memory import pages_of_their_own
from shardtune.model.initialization import Recorder
from shardtune.model.safetensors_files import Entry, open_files
from shardtune.model.weights import InitialWeights, entries_by_parameter, find_files

LAYER_COUNTS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip


@dataclass
class Skeleton:
    """A model on the meta device, and all that is needed to fill it."""

    model: PreTrainedModel
    recorder: Recorder
    entries: dict[str, Entry]
    """The files' tensors by parameter name; empty for random weights."""
    new_parameters: list[str]
    """Parameters that pretrained files do not have: a new head."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """The floating dtype that most of the files' bytes have; float32 for random weights."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def weights(
        self,
        tuned: nn.Module,
        seed: int,
        compute_dtype: torch.dtype,
        trained_dtype: torch.dtype = torch.float32,
    ) -> InitialWeights:
        """The initial values of `tuned`, which is `model` after a tuning method was applied to it."""
        return InitialWeights(tuned, self.recorder, self.entries, seed, compute_dtype, trained_dtype)


def load_architecture(path: str, task: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The architecture's config of a folder or hub id.

    Raises ConfigError where there is none, or where the model cannot do the task, with what would fit.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path {path}: no model can be loaded from there: {reason}") from None
    kinds = _tasks_of(config)
    if task not in kinds and not trust_remote_code:
        named = " or ".join(part for part in (", ".join(kinds[:-1]), *kinds[-1:]) if part)
        fits = f"it fits task.kind: {named}" if kinds else "it fits no task here"
        raise ConfigError(
            f"model.path {path}: a {config.model_type} model does not fit task.kind: {task}; {fits}. "
            f"For {task} take {HEADS[task].models}"
        )
    return config


def auto_class(task: str) -> Any:
    """The class of transformers that makes models for the task."""
    return getattr(transformers, HEADS[task].auto_class)


def _tasks_of(config: PreTrainedConfig) -> list[str]:
    kind = config.model_type
    both = bool(getattr(config, "is_encoder_decoder", False))
    encoder_only = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and _is_bidirectional(config)
    tasks = []
    if both and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        tasks.append("seq2seq")
    if not both and not encoder_only and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        tasks.append("causal")
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        tasks.append("classification")
    # An encoder-decoder's are for few models, and read a text twice.
    if not both and kind in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        tasks.append("token_classification")
    if not both and kind in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES:
        tasks.append("question_answering")
    return tasks


def _is_bidirectional(config: PreTrainedConfig) -> bool:
    """Encoders that also have a causal head in transformers (bert, roberta) say so by `is_decoder`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def keep_layers(config: PreTrainedConfig, layers: list[int]) -> None:
    """Lowers the config's layer counts to the layers kept.

    Raises ConfigError where a layer does not exist.
    """
    known = config.to_dict()
    counts = {name: known[name] for name in LAYER_COUNTS if isinstance(known.get(name), int)}
    shortest = min(counts.values())
    wrong = [layer for layer in layers if layer >= shortest]
    if wrong:
        raise ConfigError(f"model.layers: {wrong[0]} is not there; the model has layers 0 to {shortest - 1}")
    if known.get("relative_attention_num_buckets") and layers[0] != 0:
        raise ConfigError("model.layers: must begin with 0, which holds the position biases of all layers")
    for name, value in known.items():
        if isinstance(value, list) and len(value) == shortest and name == "layer_types":
            setattr(config, name, [value[layer] for layer in layers])
    for name in counts:
        setattr(config, name, len(layers))


def set_dropout(config: PreTrainedConfig, rate: float, head: str | None = None) -> None:
    """Sets every rate of dropout that the architecture has, those of its parts too.

    Whole layers are left out by other rates, which a 0 sets to 0 and others leave as they are.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, rate)
            continue
        is_rate = "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
        if is_rate and (rate == 0 or not ("layerdrop" in name or "drop_path" in name)):
            setattr(config, name, rate)
    if head == "token_classification":
        config.classifier_dropout = rate  # of many decoders it is 0.1 where their config does not know it


def build_skeleton(
    config: PreTrainedConfig,
    path: str,
    task: str,
    pretrained: bool,
    attention: str,
    layers: list[int] | None,
    trust_remote_code: bool,
) -> Skeleton:
    """Builds the model class of the task from `config` and finds its weights.

    Raises ConfigError where the attention is not available or the files do not fit the model.
    """
    arguments: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    adapters: dict[str, Any] | None = getattr(config, bottleneck.SETTINGS, None)
    if adapters is not None:
        trust_remote_code = False  # its code is that of transformers and of this package
        if layers is not None:
            raise ConfigError(f"model.layers: {path} has adapters in all its layers; leave the key out")
    if layers is not None:
        keep_layers(config, layers)
    try:
        # Parameters are replaced by meta ones as modules register them; buffers (rotary frequencies) keep values.
        with pages_of_their_own(), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = auto_class(task).from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, **arguments
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model {path}: {str(error).strip().splitlines()[0]}") from None
    # As in transformers, tied parameters are initialized each by itself; the one that stays is the source's.
    own = _untie(model)
    recorder = Recorder()
    try:
        with recorder:
            model.initialize_weights()
            if adapters is not None:
                bottleneck.attach(model, adapters)
    except NotImplementedError as error:
        raise ConfigError(f"model {path}: {error}") from None
    model.tie_weights()
    entries: dict[str, Entry] = {}
    if pretrained:
        folder = weights_folder(path)
        entries = entries_by_parameter(model, open_files(find_files(folder)), layers, str(folder))
        _keep_apart(model, own, entries)
        if HEADS[task].is_new:
            _drop_other_heads(model, entries)
        with contextlib.suppress(OSError, ValueError):  # absent in many folders
            model.generation_config = GenerationConfig.from_pretrained(path)
        _fill_buffers(model, entries)
    recorder.name_parameters(model)
    missing = [name for name, _ in model.named_parameters() if name not in entries] if pretrained else []
    # A classifier may come without a head, and an encoder without the pooling layer that only heads use.
    base = model.base_model_prefix + "."
    lacking = [n for n in missing if not HEADS[task].is_new or (n.startswith(base) and "pooler" not in n)]
    if lacking:
        raise ConfigError(
            f"model.path {path}: its files lack {len(lacking)} of the model's parameters, such as {lacking[0]}"
        )
    return Skeleton(model, recorder, entries, missing)


def load_model(folder: str, task: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder as transformers loads it, with the adapters that it may have."""
    kind = auto_class(task)
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, bottleneck.SETTINGS):
        return kind.from_pretrained(folder, dtype=dtype)
    chosen: Any = _get_model_class(config, kind._model_mapping)
    return bottleneck.adapted(chosen).from_pretrained(folder, dtype=dtype)


def _untie(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Gives each tied parameter a storage of its own; returns them by name."""
    own = {}
    for target in model.all_tied_weights_keys:
        module, _, key = target.rpartition(".")
        parameter = model.get_submodule(module)._parameters.get(key)
        if parameter is not None:
            own[target] = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            setattr(model.get_submodule(module), key, own[target])
    return own


def _keep_apart(model: PreTrainedModel, own: dict[str, nn.Parameter], entries: dict[str, Entry]) -> None:
    """Parameters that the config ties but the files have with different values are not tied.

    transformers does the same: it takes every T5 for tied, also T5 1.1 and Flan-T5, whose output layer is their own.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in own and target in entries and source in entries and not entries[target].equals(entries[source]):
            module, _, key = target.rpartition(".")
            setattr(model.get_submodule(module), key, own[target])
            del model.all_tied_weights_keys[target]


def _drop_other_heads(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    """A head for another number of labels is not taken over."""
    for name, parameter in model.named_parameters():
        in_head = name in entries and not name.startswith(model.base_model_prefix + ".")
        if in_head and entries[name].shape != parameter.shape:
            del entries[name]


def _fill_buffers(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    for name, buffer in model.named_buffers():
        entry = entries.get(name)
        if entry is not None and entry.shape == buffer.shape:
            buffer.copy_(entry.read(0, buffer.numel()).view(buffer.shape))


def weights_folder(path: str) -> Path:
    """The local folder of the weights; from the hub they are fetched into its cache, without pickles."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json"]
        return Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=["consolidated*"]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path}: {str(error).strip().splitlines()[0]}") from None
