"""What full, freeze and lora train, and that an adapter begins as the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardtune.errors import ConfigError
from shardtune.layers import layer_names, layer_stacks
from shardtune.model.skeleton import Skeleton
from shardtune.strategy.parameters import materialize
from shardtune.tuning.bitfit import Bitfit
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.lora import Lora
from shardtune.tuning.virtual_tokens import Prompt
from skeletons import TASKS, architecture, filled, logits, saved, skeleton_of


def random_skeleton(folder: Path, name: str, task: str | None = None, **changes: Any) -> Skeleton:
    return skeleton_of(architecture(folder, name, **changes), task or TASKS[name], pretrained=False)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def lora(model: nn.Module, task: str, targets: str | Sequence[str] = "all-linear", rank: int = 4) -> nn.Module:
    return Lora(task, rank, 8.0, 0.0, targets).apply(model)


def adapted(model: nn.Module) -> set[str]:
    """Names of the linear layers that have an adapter."""
    return {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }


# --------------------------------------------------------------------------------------------------- full


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bert"])
def test_full(tmp_path: Path, name: str) -> None:
    model = random_skeleton(tmp_path, name).model
    model.requires_grad_(False)
    assert Full().apply(model) is model
    assert not frozen(model)
    assert not Full().makes_adapter


# -------------------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize(
    ("name", "stacks"),
    [("t5", ["encoder.block", "decoder.block"]), ("bart", ["model.encoder.layers", "model.decoder.layers"]),
     ("llama", ["model.layers"]), ("gpt2", ["transformer.h"]), ("bert", ["bert.encoder.layer"]),
     ("distilbert", ["distilbert.transformer.layer"])],
)  # fmt: skip
def test_freeze_layers(tmp_path: Path, name: str, stacks: list[str]) -> None:
    """Of each stack the first ones, with all that is inside them: a T5 block is a list of sublayers itself."""
    model = random_skeleton(tmp_path, name).model
    assert list(layer_stacks(model)) == stacks
    assert layer_names(model) == [f"{stack}.{layer}" for stack in stacks for layer in (0, 1)]
    Freeze(1, embeddings=False, patterns=[]).apply(model)
    first = tuple(f"{stack}.0." for stack in stacks)
    assert frozen(model) == {parameter for parameter, _ in model.named_parameters() if parameter.startswith(first)}
    assert frozen(model)


EMBEDDINGS = {
    "t5": {"shared.weight"},
    "t5-untied": {"shared.weight"},
    "bart": {"model.shared.weight"},
    "llama": {"model.embed_tokens.weight"},
    "llama-tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight"},
    "bert": {"bert.embeddings.word_embeddings.weight"},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_freeze_embeddings(tmp_path: Path, name: str) -> None:
    """The tokens' embeddings, and with them an output layer that is tied to them."""
    model = random_skeleton(tmp_path, name).model
    Freeze(0, embeddings=True, patterns=[]).apply(model)
    assert frozen(model) == EMBEDDINGS[name]
    head: Any = model.get_output_embeddings()
    if head is not None:
        assert head.weight.requires_grad == (name == "llama")


def test_freeze_embeddings_leaves_an_output_layer_of_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    model = skeleton_of(folder, "causal").model
    Freeze(2, embeddings=True, patterns=["norm"]).apply(model)
    assert trained(model) == {"lm_head.weight"}


def test_freeze_patterns(tmp_path: Path) -> None:
    model = random_skeleton(tmp_path, "t5").model
    Freeze(0, embeddings=False, patterns=[r"SelfAttention\.[qk]\b", r"^decoder.*layer_norm"]).apply(model)
    names = [name for name, _ in model.named_parameters()]
    assert frozen(model) == {
        name
        for name in names
        if "SelfAttention.q." in name or "SelfAttention.k." in name
        or (name.startswith("decoder") and "layer_norm" in name)
    }  # fmt: skip


def test_freeze_refusals(tmp_path: Path) -> None:
    model = random_skeleton(tmp_path, "t5").model
    with pytest.raises(ConfigError, match=r"tuning.layers: cannot freeze 3 layers of the model's 2"):
        Freeze(3, embeddings=True, patterns=[]).apply(model)
    with pytest.raises(ConfigError, match=r"tuning.patterns: 'q_proj' finds none of the 47 parameters, such as shared"):
        Freeze(0, embeddings=True, patterns=["q_proj"]).apply(model)
    with pytest.raises(ConfigError, match=r"tuning.patterns: '\(' is no regular expression"):
        Freeze(0, embeddings=True, patterns=["("])
    with pytest.raises(ConfigError, match="everything is frozen"):
        Freeze(0, embeddings=True, patterns=["."]).apply(model)
    Freeze(0, embeddings=False, patterns=[]).apply(model)
    assert not frozen(model), "a second call starts over"


# ---------------------------------------------------------------------------------------------------- lora

ALL_LINEAR = {
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "t5-untied": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bert": {"query", "key", "value", "dense"},
    "distilbert": {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
}


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear(tmp_path: Path, name: str) -> None:
    skeleton = random_skeleton(tmp_path, name)
    linear = {
        module: value for module, value in skeleton.model.named_modules()
        if type(value).__name__ in ("Linear", "Conv1D") and value is not skeleton.model.get_output_embeddings()
        and not module.startswith(("classifier", "pre_classifier"))
    }  # fmt: skip
    model = lora(skeleton.model, TASKS[name])
    assert adapted(model) == set(linear)
    assert {module.rpartition(".")[2] for module in linear} == ALL_LINEAR[name]
    # Nothing but the adapters and a head is trained.
    assert all(".lora_" in parameter or ".modules_to_save." in parameter for parameter in trained(model))
    for parameter, value in model.named_parameters():
        if ".lora_A." in parameter:
            assert value.shape[0] == 4
        if ".lora_B." in parameter:
            assert value.shape[1] == 4


@pytest.mark.parametrize(
    ("name", "head"),
    [("bert", {"classifier"}), ("distilbert", {"classifier", "pre_classifier"}), ("roberta", {"classifier"}),
     ("llama", {"score"}), ("gpt2", {"score"}), ("t5", {"classification_head"}), ("bart", {"classification_head"})],
)  # fmt: skip
def test_a_classification_head_is_trained_in_full(tmp_path: Path, name: str, head: set[str]) -> None:
    skeleton = random_skeleton(tmp_path, name, "classification")
    parameters = {f"base_model.model.{p}" for p, _ in skeleton.model.named_parameters() if p.partition(".")[0] in head}
    with skeleton.recorder:
        model = lora(skeleton.model, "classification")
    others = {p for p in trained(model) if ".lora_" not in p}
    assert {p.replace("modules_to_save.default.", "") for p in others} == parameters
    assert not any(module.partition(".")[0] in head for module in adapted(model))
    # And it begins with what the base model would have begun with.
    weights = skeleton.weights(model, 0, torch.float32)
    for p in others:
        count = model.get_parameter(p).numel()
        original = weights.read(p.replace("modules_to_save.default", "original_module"), 0, count)
        assert torch.equal(weights.read(p, 0, count), original)


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("t5", ["q", "v"], 12), ("t5", ["SelfAttention.q"], 4), ("t5", r".*EncDecAttention\.(q|v)", 4),
        ("t5", r"encoder\.block\.1\..*\.wi", 1), ("llama", ["q_proj"], 2), ("llama", ["lm_head", "q_proj"], 3),
        ("llama", ["model.layers.1.mlp.up_proj"], 1), ("gpt2", ["c_attn"], 2), ("gpt2", ["mlp.c_proj"], 2),
        ("bert", ["attention.self.query", "output.dense"], 6), ("bert", "bert.encoder.layer.0.attention.self.key", 1),
    ],
)  # fmt: skip
def test_targets(tmp_path: Path, name: str, targets: str | list[str], count: int) -> None:
    assert len(adapted(lora(random_skeleton(tmp_path, name).model, TASKS[name], targets))) == count


def test_one_of_several_matches_nothing(tmp_path: Path) -> None:
    model = random_skeleton(tmp_path, "llama").model
    with pytest.raises(ConfigError, match=r"tuning.targets: 'v_porj' matches no linear layer; did you mean v_proj\?"):
        lora(model, "causal", ["q_proj", "v_porj"])


@pytest.mark.parametrize(
    ("name", "targets", "kinds"),
    [
        ("t5", ["q_proj"], "k, o, q, v, wi, wo"), ("t5", "q", "k, o, q, v, wi, wo"),
        ("t5", ["_norm"], "k, o, q, v, wi, wo"), ("llama", ["input_layernorm"], "down_proj"),
        ("llama", ["query_key_value"], "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("llama", ["proj"], "down_proj, gate_proj"), ("gpt2", [], "c_attn, c_fc, c_proj"),
    ],
)  # fmt: skip
def test_no_layer_matches(tmp_path: Path, name: str, targets: str | list[str], kinds: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lora(random_skeleton(tmp_path, name).model, TASKS[name], targets)
    assert str(caught.value).startswith(f"tuning.targets: {targets!r} matches no linear layer; there are {kinds}")


def test_targets_that_are_no_expression(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuning.targets: '\(q' is no regular expression"):
        lora(random_skeleton(tmp_path, "t5").model, "seq2seq", "(q")


@pytest.mark.parametrize("name", ["t5", "t5-untied", "llama", "llama-tied", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_adapter_begins_as_the_model_itself(tmp_path: Path, name: str, pretrained: bool) -> None:
    folder = saved(tmp_path, name)
    base = logits(filled(skeleton_of(folder, TASKS[name], pretrained)))
    skeleton = skeleton_of(folder, TASKS[name], pretrained)
    with skeleton.recorder:
        model: Any = lora(skeleton.model, TASKS[name])
    assert all(parameter.is_meta for parameter in model.parameters())
    weights, other = (skeleton.weights(model, seed, torch.float32) for seed in (0, 1))
    materialize(model, weights, torch.device("cpu"))
    assert torch.equal(logits(model), base)
    down = {p: value for p, value in model.named_parameters() if ".lora_A." in p}
    assert all(value.std() > 0 for value in down.values()), "or nothing would ever be learned"
    assert all(not value.any() for p, value in model.named_parameters() if ".lora_B." in p)
    for p, value in down.items():
        # Kaiming's uniform with a = sqrt(5): between -1 / sqrt(d_in) and 1 / sqrt(d_in).
        assert value.abs().max() <= value.shape[1] ** -0.5
        assert value.std().item() == pytest.approx((3 * value.shape[1]) ** -0.5, rel=0.3)
        assert not torch.equal(other.read(p, 0, value.numel()), value.flatten())
    with torch.no_grad():
        for p, value in model.named_parameters():
            if ".lora_B." in p:
                value.fill_(0.05)
    assert not torch.allclose(logits(model), base)


def test_frozen_weights_have_the_compute_dtype(tmp_path: Path) -> None:
    skeleton = random_skeleton(tmp_path, "llama")
    with skeleton.recorder:
        model = lora(skeleton.model, "causal")
    weights = skeleton.weights(model, 0, torch.bfloat16)
    materialize(model, weights, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_scale(tmp_path: Path) -> None:
    """The update is scaled by alpha / rank: B A x times 8 / 4."""
    skeleton = random_skeleton(tmp_path, "llama")
    with skeleton.recorder:
        model = lora(skeleton.model, "causal", ["q_proj"])
    materialize(model, skeleton.weights(model, 0, torch.float32), torch.device("cpu"))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    with torch.no_grad():
        up.normal_()
        x = torch.randn(3, 32)
        torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 8 / 4 * (x @ down.T @ up.T))


@pytest.mark.parametrize("name", ["bart", "gpt2", "roberta"])
def test_a_normalization_layer_has_one_dtype(tmp_path: Path, name: str) -> None:
    """Biases are trained in float32 beside frozen weights, and the model computes."""
    skeleton = random_skeleton(tmp_path, name)
    model = Bitfit(TASKS[name]).apply(skeleton.model)
    materialize(model, skeleton.weights(model, 0, torch.bfloat16), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()  # pyright: ignore[reportArgumentType]
    assert {p.dtype for p in model.parameters() if p.dim() > 1 and not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("targets", [["score"], "score"])
def test_a_classifiers_head_is_no_target(tmp_path: Path, targets: str | Sequence[str]) -> None:
    skeleton = random_skeleton(tmp_path, "llama", "classification")
    with pytest.raises(ConfigError, match=r"tuning.targets: .*score.* matches no linear layer; there are down_proj"):
        lora(skeleton.model, "classification", targets)


def test_prompts_of_a_model_with_names_of_its_own(tmp_path: Path) -> None:
    """DistilBERT calls its width `dim`."""
    skeleton = random_skeleton(tmp_path, "distilbert")
    with skeleton.recorder:
        tuned: Any = Prompt("classification", 3, [5]).apply(skeleton.model)
    assert tuned.get_parameter("prompt_encoder.default.embedding.weight").shape == (3, 32)
