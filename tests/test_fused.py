"""Fused operations in a model's modules: found by structure, the same names, the same numbers, and reasons where not.

Here each operation is plain torch; tests/ops has the kernels, test_fused_training.py whole runs with them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

from shardtune.fused.head import After, after_head
from shardtune.fused.measured import _trials, slower_ops
from shardtune.fused.mlp import fuse_mlps
from shardtune.fused.norms import fuse_norms
from shardtune.fused.plan import NAMES, describe, fuse
from shardtune.fused.rope import fuse_rope
from shardtune.head_loss import summed_loss
from shardtune.task.tokens import sum_of_cross_entropies

CPU = torch.device("cpu")
ALL = [name for name in NAMES if name != "padding"]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "olmo": lambda: OlmoConfig(**SIZES),
    "t5": lambda: T5Config(**T5),
    "t5-gated": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(**BART),
}


def model_of(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():  # norms and biases begin as ones and zeros, which would hide errors
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def with_lora(model: Any, dropout: float = 0.0, **options: Any) -> Any:
    names = sorted({
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    })  # fmt: skip
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=names, **options)
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return tuned


def rows(model: Any, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.randint(3, 96, (3, 7), generator=generator)
    labels[0, 4:] = -100
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 96, (3, 7), generator=generator)
    return inputs, labels


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = summed_loss(model, inputs, labels, sum_of_cross_entropies)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("tuned", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_model_computes_the_same(name: str, tuned: bool) -> None:
    seed = random.SystemRandom().randrange(2**31)
    base = model_of(name, seed)
    model = with_lora(base) if tuned else base
    names = list(model.state_dict())
    inputs, labels = rows(base, seed)
    wanted, gradients = loss_and_gradients(model, inputs, labels)
    after = after_head(base)
    report = fuse(model, base, ALL, CPU, "auto", after)
    got, fused_gradients = loss_and_gradients(model, inputs, labels)
    assert list(model.state_dict()) == names
    assert report["cross_entropy"] == 1, report
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0, msg=lambda m: f"seed {seed}: {m}")
    assert fused_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        off = (fused_gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert off < 1e-4, f"seed {seed}: {key} is off by {off:.2g}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"lora": 8, "mlp": 2, "norm": 5, "rope": 2, "attention": "no relative positions"}),
        ("qwen3", {"lora": 8, "mlp": 2, "norm": 9, "rope": 2}),
        ("gemma2", {"mlp": 2, "norm": 9, "rope": 2}),
        ("phi3", {"lora": 8, "mlp": "no gated feed-forward layers", "norm": 5, "rope": 2}),
        ("olmo", {"lora": 8, "mlp": 2, "rope": 2}),
        ("t5", {"lora": 32, "norm": 12, "attention": 6, "rope": "no rotary positions"}),
        ("t5-gated", {"lora": 24, "mlp": 4, "attention": 6}),
        ("bart", {"lora": 32, "norm": 12, "mlp": "no gated feed-forward layers"}),
    ],
)
def test_what_is_fused_is_counted(name: str, expected: dict[str, Any]) -> None:
    base = model_of(name)
    tuned = with_lora(base)
    report = fuse(tuned, base, ALL, CPU, "auto", after_head(base))
    assert report | expected == report
    assert list(report) == [*ALL, "padding"]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("llama", After()), ("t5", After()), ("bart", After()), ("gemma2", After(soft_cap=30.0)),
        ("cohere", After(scale=0.0625)), ("granite", After(scale=0.125)),
    ],
)  # fmt: skip
def test_what_follows_the_output_layer_is_found(name: str, after: After) -> None:
    model = model_of(name)
    modules = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    for module in model.modules():  # as before a run's weights are read; buffers are there
        for key in module._parameters:
            if module._parameters[key] is not None:
                module._parameters[key] = nn.Parameter(module._parameters[key].to("meta"))
    assert after_head(model) == after
    assert modules == {key: module.__dict__.get("forward") for key, module in model.named_modules()}


def test_a_bias_behind_the_output_layer_is_not_lost() -> None:
    model = model_of("bart")
    model.final_logits_bias.fill_(0.5).view(-1)[3] = 2.0
    assert isinstance(after_head(model), str)


def test_layers_that_compute_otherwise_are_left() -> None:
    class Odd(type(model_of("llama").model.norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    class OddMlp(type(model_of("llama").model.layers[0].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = model_of("llama")
    model.model.norm.__class__ = Odd
    model.model.layers[0].mlp.__class__ = OddMlp
    assert fuse_norms(model) == (4, {"Odd computes otherwise": 1})
    assert fuse_mlps(model, set(), CPU) == (1, {"computes otherwise": 1})


def test_rotations_of_neighbours_are_left() -> None:
    assert fuse_rope(model_of("cohere")) == (0, {"CohereAttention rotates otherwise": 2})


def test_a_switched_off_or_merged_adapter_is_neither_counted_twice_nor_at_all() -> None:
    base = model_of("llama")
    plain = copy.deepcopy(base)
    tuned = with_lora(base)
    inputs, _ = rows(base, 1)
    adapted = tuned(**inputs).logits
    fuse(tuned, base, ALL, CPU, "auto", After())
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(**inputs).logits, plain(**inputs).logits)
    torch.testing.assert_close(tuned(**inputs).logits, adapted)
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_generation_writes_the_same(name: str) -> None:
    base = model_of(name, 3)
    tuned = with_lora(base).eval()
    inputs, _ = rows(base, 3)
    inputs.pop("decoder_input_ids", None)
    settings: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 2}
    wanted = tuned.generate(**inputs, **settings)
    fuse(tuned, base, ALL, CPU, "auto", After())
    assert torch.equal(tuned.generate(**inputs, **settings), wanted)


def test_layers_called_in_another_order_or_with_other_inputs_are_right() -> None:
    base = model_of("llama")
    tuned = with_lora(base)
    attention = base.model.layers[0].self_attn
    x, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    wanted = {(n, i): getattr(attention, n)(v) for n in ("q_proj", "k_proj", "v_proj") for i, v in ((0, x), (1, other))}
    fuse(tuned, base, ["lora"], CPU, "auto", After())
    calls = [("v_proj", 0), ("q_proj", 0), ("k_proj", 1), ("v_proj", 0), ("q_proj", 1), ("k_proj", 1), ("k_proj", 1)]
    for layer, which in calls:
        got = getattr(attention, layer)((x, other)[which])
        torch.testing.assert_close(got, wanted[layer, which], rtol=1e-5, atol=1e-5)


def test_layers_with_hooks_and_other_kinds_of_adapters_are_left() -> None:
    base = model_of("llama")
    tuned = with_lora(base, use_dora=True)
    report = fuse(tuned, base, ["lora"], CPU, "auto", After())
    assert report["lora"] == "14 × Dora computes otherwise"
    base = model_of("llama")
    tuned = with_lora(base)
    seen = []
    base.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: seen.append(1))
    report = fuse(tuned, base, ["lora"], CPU, "auto", After())
    tuned(**rows(base, 1)[0])
    assert report["lora"] == 13
    assert seen == [1]


def test_what_is_said_of_what_is_not_fused() -> None:
    base = model_of("t5")
    assert set(fuse(base, base, "off", CPU, "auto", After()).values()) == {"kernels.fused: off"}
    report = fuse(base, base, ["norm", "attention"], CPU, "sdpa", After())
    assert report["norm"] == 12
    assert report["attention"] == "model.attention: sdpa"
    assert report["cross_entropy"] == "not in kernels.fused"
    said = describe({"norm": 12, "rope": "a reason", "lora": "a reason"})
    assert said == "fused: norm in 12 (not rope, lora: a reason)"


# What dynamo does itself with every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_a_compiled_model_computes_the_same(name: str) -> None:
    base = model_of(name, 5)
    tuned = with_lora(base)
    inputs, labels = rows(base, 5)
    wanted, gradients = loss_and_gradients(tuned, inputs, labels)
    fuse(tuned, base, ALL, CPU, "auto", After())
    compiled: Any = torch.compile(tuned, backend="aot_eager")
    got, fused_gradients = loss_and_gradients(compiled, inputs, labels)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[f"_orig_mod.{key}"], gradient, rtol=1e-3, atol=1e-4)


def test_what_is_measured_computes_the_same_both_ways() -> None:
    model = with_lora(model_of("llama"))
    trials = list(_trials(model, 5, torch.float32, CPU))
    assert [trial.op for trial in trials] == ["lora", "mlp", "norm"]
    for trial in trials:
        fused, plain = trial.ways["fused"](), trial.ways["torch"]()
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5, msg=lambda m, op=trial.op: f"{op}: {m}")
    assert slower_ops(model, 5, torch.float32, CPU) == {}  # where nothing is measured
    transposed = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4))
    tuned = get_peft_model(transposed, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert not list(_trials(tuned, 5, torch.float32, CPU))


def test_what_torch_computes_faster_is_left_to_it() -> None:
    model = model_of("llama")
    found = {"norm": "torch is faster here at 5 x 32"}
    assert fuse(model, model, "auto", CPU, "auto", After(), found)["norm"] != 5
    assert fuse(model, model, ["norm"], CPU, "auto", After(), found)["norm"] == 5
