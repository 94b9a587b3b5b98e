"""Methods that train vectors in front of the text and leave the model as it is, by PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.protocols import Adapter, Weights
from shardtune.tuning.front import put_in_front
from shardtune.tuning.method import Method, heads_of, settings_of
from shardtune.tuning.targets import head
from shardtune.world import World

if TYPE_CHECKING:  # takes seconds to import
    from peft import PromptLearningConfig

ENCODER = "prompt_encoder.default."
"""Before the names of the trained parameters."""


class VirtualTokens(Method):
    """Implements the Tuning protocol but for `settings`: n vectors before the text, in the encoder of two stacks."""

    makes_adapter = True

    def __init__(self, task: str, virtual_tokens: int) -> None:
        self._task = task
        self._count = virtual_tokens

    def settings(self, model: PreTrainedModel) -> PromptLearningConfig:
        """PEFT's settings for the base `model`. Raises ConfigError where the model cannot be tuned so."""
        raise NotImplementedError

    def check(self, model: PreTrainedModel) -> None:
        """Raises ConfigError where the model does not take embeddings in place of tokens."""
        if self._task == "classification" and model.config.is_encoder_decoder:
            raise ConfigError(
                f"tuning.method: {type(model).__name__} finds its end token in the token ids, so no virtual tokens can "
                "stand before them; use lora, or a model such as bert or llama"
            )

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps `model` in a PeftModel. Raises ConfigError where the model cannot be tuned so."""
        from peft import get_peft_model

        assert isinstance(model, PreTrainedModel)
        self.check(model)
        model.requires_grad_(False)
        with torch.device("meta"):  # where the initialization is recorded
            tuned: Any = get_peft_model(model, self.settings(model))
        tuned.prompt_tokens["default"] = torch.arange(len(tuned.prompt_tokens["default"]))
        put_in_front(tuned)
        return tuned

    def common(self, model: PreTrainedModel) -> dict[str, Any]:
        """Settings of all these methods."""
        config = model.config.get_text_config()
        return {
            # PEFT looks for these under some of the names that architectures have for them.
            "token_dim": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "task_type": HEADS[self._task].peft_task,
            "num_virtual_tokens": self._count,
            # PEFT's default for two stacks is 2, but only multitask prompts and prefixes have something for the second.
            "num_transformer_submodules": 1,
            "modules_to_save": head(model, self._task),
        }

    def result(self, model: nn.Module, trained: dict[str, Tensor], initial: Weights) -> Adapter:
        """The vectors themselves; the network that computes them, where there is one, goes beside them."""
        settings = settings_of(model)
        encoder = {n.removeprefix(ENCODER): tensor for n, tensor in trained.items() if n.startswith(ENCODER)}
        tensors, beside = self.vectors(settings, encoder)
        return Adapter(tensors | heads_of(model, trained), settings, beside)

    def vectors(self, settings: Any, encoder: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What PEFT reads, and what it leaves out, from the trained parameters of its prompt encoder."""
        return {"prompt_embeddings": encoder["embedding.weight"]}, {}

    def notes(self) -> list[str]:
        """How many there are."""
        return [f"{self._count} virtual tokens before the text"]


class Prefix(VirtualTokens):
    """Trained keys and values before those of the text, in every layer (Li and Liang 2021, arXiv:2101.00190); of two
    stacks, in the decoder's self-attention."""

    def __init__(self, task: str, virtual_tokens: int, projection: bool, hidden_size: int | None) -> None:
        super().__init__(task, virtual_tokens)
        self._projection = projection
        self._hidden_size = hidden_size

    def check(self, model: PreTrainedModel) -> None:
        """Raises ConfigError where the model does not take keys and values from outside."""
        super().check(model)
        if not (_takes_keys(model) or _takes_keys(model.base_model)):
            raise ConfigError(
                f"tuning.method: {type(model).__name__} takes no keys and values from outside, which prefix gives it; "
                "use prompt or p_tuning"
            )

    def settings(self, model: PreTrainedModel) -> PromptLearningConfig:
        """Of two stacks, the decoder's shape: PEFT would take the encoder's, and d_model / heads for a head's width."""
        from peft import PrefixTuningConfig

        given = self.common(model)
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
            width = getattr(config, "d_kv", None) or config.hidden_size // heads
            layers = getattr(config, "decoder_layers", None) or config.num_decoder_layers
            given |= {
                "num_transformer_submodules": 2,
                "num_layers": layers,
                "num_attention_heads": heads,
                "token_dim": heads * width,
            }
        return PrefixTuningConfig(
            prefix_projection=self._projection, encoder_hidden_size=self._hidden_size or config.hidden_size, **given
        )

    def vectors(self, settings: Any, encoder: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keys and values of all layers [n, 2 × layers × d]."""
        if not self._projection:
            return super().vectors(settings, encoder)
        from peft import PrefixEncoder

        return _computed(PrefixEncoder, settings, encoder), encoder


def _takes_keys(model: Any) -> bool:
    return "past_key_values" in inspect.signature(type(model).forward).parameters


class Prompt(VirtualTokens):
    """Trained embeddings before those of the text (Lester et al. 2021, arXiv:2104.08691); they begin as those of the
    tokens `ids`."""

    def __init__(self, task: str, virtual_tokens: int, ids: Sequence[int]) -> None:
        super().__init__(task, virtual_tokens)
        self._ids = ids

    def settings(self, model: PreTrainedModel) -> PromptLearningConfig:
        """Where the values come from is no matter of PEFT's."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(**self.common(model))

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """Rows of the base's embeddings, repeated or cut to as many as are needed."""
        words: Any = model.word_embeddings
        name = next(name for name, parameter in model.named_parameters() if parameter is words.weight)
        ids = [self._ids[index % len(self._ids)] for index in range(self._count)]
        scale = float(getattr(words, "embed_scale", 1.0))
        return _Rows(weights, f"{ENCODER}embedding.weight", name, ids, words.weight.shape[1], scale)


class _Rows:
    """Implements the Weights protocol: one parameter consists of rows of another one, times `scale`."""

    def __init__(self, weights: Weights, name: str, source: str, rows: Sequence[int], width: int, scale: float) -> None:
        self._weights = weights
        self._name = name
        self._source = source
        self._rows = rows
        self._width = width
        self._scale = scale

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Of the rows, just what is asked for."""
        if name != self._name:
            return self._weights.read(name, start, stop)
        parts = []
        while start < stop:
            row, column = divmod(start, self._width)
            length = min(stop - start, self._width - column)
            first = self._rows[row] * self._width + column
            parts.append(self._weights.read(self._source, first, first + length).float() * self._scale)
            start += length
        return torch.cat(parts) if parts else torch.empty(0)

    def dtype(self, name: str) -> torch.dtype:
        """As without."""
        return self._weights.dtype(name)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """As without."""
        return self._weights.buffers(name)


class PTuning(VirtualTokens):
    """Trained embeddings before those of the text, computed by a small network (Liu et al. 2021, arXiv:2103.10385)."""

    def __init__(self, task: str, virtual_tokens: int, encoder: str, hidden_size: int | None, dropout: float) -> None:
        super().__init__(task, virtual_tokens)
        self._encoder = encoder
        self._hidden_size = hidden_size
        self._dropout = dropout

    def settings(self, model: PreTrainedModel) -> PromptLearningConfig:
        """An MLP of three layers, or a bidirectional LSTM of two before one of two."""
        from peft import PromptEncoderConfig, PromptEncoderReparameterizationType

        return PromptEncoderConfig(
            encoder_reparameterization_type=PromptEncoderReparameterizationType(self._encoder.upper()),
            encoder_hidden_size=self._hidden_size or model.config.get_text_config().hidden_size,
            encoder_dropout=self._dropout,
            **self.common(model),
        )

    def vectors(self, settings: Any, encoder: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The computed embeddings [n, d]."""
        from peft import PromptEncoder

        return _computed(PromptEncoder, settings, encoder), encoder


def _computed(kind: Any, settings: Any, encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an encoder with these parameters gives. It is a new one: that of a sharded model needs all ranks."""
    network: nn.Module = kind(settings).eval()
    if any(tensor.is_meta for tensor in encoder.values()):
        network.to("meta")
    network.load_state_dict(encoder, assign=True)
    with torch.no_grad():
        places = torch.arange(network.embedding.num_embeddings, device=encoder["embedding.weight"].device)  # pyright: ignore
        return {"prompt_embeddings": network(places)}


class MultitaskPrompt(VirtualTokens):
    """One prompt for all tasks, times a low-rank factor of each (Wang et al. 2023, arXiv:2303.02861): the model then
    takes `task_ids` [b]."""

    def __init__(self, task: str, virtual_tokens: int, rank: int, tasks: Sequence[str]) -> None:
        """`tasks`: their names, for messages."""
        super().__init__(task, virtual_tokens)
        self._rank = rank
        self._tasks = tasks

    def settings(self, model: PreTrainedModel) -> PromptLearningConfig:
        """As many tasks as are named."""
        from peft import MultitaskPromptTuningConfig

        return MultitaskPromptTuningConfig(num_tasks=len(self._tasks), num_ranks=self._rank, **self.common(model))

    def apply(self, model: nn.Module) -> nn.Module:
        """As the others; the factors begin as PEFT's, N(0, 0.02²)."""
        tuned = super().apply(model)
        encoder = tuned.get_submodule(ENCODER.rstrip("."))
        for name in ("prefix_task_cols", "prefix_task_rows"):  # which PEFT draws in a way that cannot be recorded
            nn.init.normal_(encoder.get_parameter(name), std=0.02)
        return tuned

    def vectors(self, settings: Any, encoder: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The shared prompt [n, d], and the factors [tasks, n, r] and [tasks, r, d]."""
        factors = {name: encoder[name] for name in ("prefix_task_cols", "prefix_task_rows")}
        return {"prompt_embeddings": encoder["embedding.weight"], **factors}, {}

    def notes(self) -> list[str]:
        """Which tasks there are."""
        return [*super().notes(), *(f"task {index}: {name}" for index, name in enumerate(self._tasks))]
