"""Small models of many architectures as folders on disk, and skeletons made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    set_seed,
)

from shardtune.model.skeleton import Skeleton, build_skeleton, load_architecture
from shardtune.strategy.parameters import materialize
from tiny import ARCHITECTURES

LLAMA = ARCHITECTURES["llama"]
MODELS: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "t5-untied": {**ARCHITECTURES["t5"], "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
    "mistral": {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "distilbert": {
        "model_type": "distilbert", "architectures": ["DistilBertModel"], "vocab_size": 400, "dim": 32,
        "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128,
    },
    "roberta": {**ARCHITECTURES["bert"], "model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1},
}  # fmt: skip
SEQ2SEQ, ENCODERS = ("t5", "t5-untied", "bart"), ("bert", "distilbert", "roberta")
CAUSAL = ("llama", "llama-tied", "qwen3", "mistral", "gpt2")
TASKS = {name: "seq2seq" if name in SEQ2SEQ else "classification" if name in ENCODERS else "causal" for name in MODELS}
CLASSES = {
    "seq2seq": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}


def architecture(folder: Path, name: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODELS[name], **changes}))
    return folder


def saved(
    folder: Path, name: str, auto: Any = None, dtype: torch.dtype = torch.float32, shards: str = "5GB", **changes: Any
) -> Path:
    """A folder as transformers saves it, every value of every parameter random."""
    config = AutoConfig.from_pretrained(architecture(folder / "plan", name, **changes))
    set_seed(1)
    model = (auto or CLASSES[TASKS[name]]).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def skeleton_of(
    path: Path, task: str, pretrained: bool = True, layers: list[int] | None = None,
    change: Callable[[Any], object] = lambda config: None,
) -> Skeleton:  # fmt: skip
    config = load_architecture(str(path), task, False)
    change(config)
    return build_skeleton(config, str(path), task, pretrained, "auto", layers, False)


def values(skeleton: Skeleton, seed: int = 0) -> dict[str, Tensor]:
    model = skeleton.model
    weights = skeleton.weights(model, seed, torch.float32)
    return {name: weights.read(name, 0, p.numel()).view(p.shape) for name, p in model.named_parameters()}


def filled(skeleton: Skeleton) -> Any:
    model = skeleton.model
    materialize(model, skeleton.weights(model, 0, torch.float32), torch.device("cpu"))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2, 22).view(2, 10)
    inputs = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **inputs, use_cache=False).logits


def drawn_model(folder: Path, name: str, head: str, pad_token_id: int, labels: int = 2) -> Any:
    """A model of transformers in eval mode, with weights that are far enough apart to tell its outputs apart."""
    config = AutoConfig.from_pretrained(architecture(folder, name))
    config.num_labels, config.pad_token_id = labels, pad_token_id
    set_seed(0)
    model = CLASSES[head].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()
