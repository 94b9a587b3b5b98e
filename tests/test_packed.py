"""Packed rows compute what each example computes alone: losses, gradients, and isolation."""

from __future__ import annotations

import json
import math
import random
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import launching
import plain
import tiny
from layouts import ARCHITECTURES
from shardtune import documents
from shardtune.documents import make_documents
from shardtune.errors import ConfigError
from shardtune.examples import IGNORED, Batch, Tokens
from shardtune.model.packed_attention import keep_apart
from shardtune.protocols import Task
from shardtune.task.causal import Causal
from shardtune.task.seq2seq import Seq2Seq

DECODER = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    **{name: ARCHITECTURES[name] for name in ("t5", "t5-untied", "bart", "llama", "gpt2")},
    "qwen3": {"model_type": "qwen3", **DECODER, "head_dim": 8},
    "mistral": {"model_type": "mistral", **DECODER, "sliding_window": 6},  # shorter than most examples
    # Their modules do not know of the window, only the mask does.
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **DECODER,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {
        "model_type": "phimoe",
        **DECODER,
        "sliding_window": 6,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    },
    "mt5": {**ARCHITECTURES["t5"], "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]},
}
SAME = 1e-5


class Case:
    """A model with packed attention, and the same one as transformers makes it."""

    def __init__(self, name: str, folder: Path, seed: int, flash: bool = False) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        plain.make_model(folder, MODELS[name], seed)
        self.kind = (
            "seq2seq" if MODELS[name].get("architectures", [""])[0].endswith("ConditionalGeneration") else "causal"
        )
        tokenizer = plain.load_tokenizer(folder)
        self.task: Task = Seq2Seq(tokenizer, 40, 40, 0) if self.kind == "seq2seq" else Causal(tokenizer, 40, 40, False)
        self.alone: Any = plain.AUTO[self.kind].from_pretrained(folder)
        self.packed: Any = plain.AUTO[self.kind].from_pretrained(folder)
        keep_apart(self.packed, name, 80, flash)

    def examples(self, count: int, longest: int = 30) -> list[Tokens]:
        def ids(limit: int) -> Any:
            return self.rng.integers(4, 41, self.rng.integers(1, limit + 1)).astype(np.int32)

        return [Tokens(ids(longest), ids(12)) for _ in range(count)]

    def loss_alone(self, example: Tokens) -> Tensor:
        """As transformers computes it."""
        source, target = (torch.from_numpy(part.astype(np.int64))[None] for part in example[:2])
        if self.kind == "seq2seq":
            return self.alone(input_ids=source, labels=target).loss * target.numel()
        ids = torch.cat([source, target], 1)
        labels = torch.cat([torch.full_like(source, IGNORED), target], 1)
        return self.alone(input_ids=ids, labels=labels).loss * target.numel()

    def losses(self, batch: Batch, examples: list[Tokens]) -> list[float]:
        """The loss of each example of a packed batch."""
        found, at = [], 0
        for example in examples:
            labels = torch.full_like(batch.labels, IGNORED)
            labels[:, at : at + len(example.target)] = batch.labels[:, at : at + len(example.target)]
            at += len(example.target)
            with torch.no_grad():
                found.append(float(self.task.loss_sum(self.packed, replace(batch, labels=labels))))
        return found


@pytest.fixture
def seed() -> int:
    drawn = random.SystemRandom().randrange(2**31)
    print("seed", drawn)
    return drawn


@pytest.fixture(autouse=True)
def nothing_read_before_or_after() -> Any:
    documents.read(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    documents.read(None)


def assert_same_gradients(got: nn.Module, wanted: nn.Module) -> None:
    """Every tensor's, against its own norm, or where that is nothing but noise, against the largest."""
    norms = {name: float(p.grad.norm()) for name, p in wanted.named_parameters() if p.grad is not None}
    largest = max(norms.values())
    for name, parameter in got.named_parameters():
        other = wanted.get_parameter(name).grad
        assert (parameter.grad is None) == (other is None), name
        if parameter.grad is not None and other is not None:
            far = float((parameter.grad.cpu() - other).norm()) / max(norms[name], 1e-3 * largest)
            assert far <= SAME, f"{name}: {far:.1e}"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_as_each_example_alone(name: str, packed: bool, tmp_path: Path, seed: int) -> None:
    case = Case(name, tmp_path, seed)
    examples = case.examples(int(case.rng.integers(1, 14)))
    losses = [case.loss_alone(example) for example in examples]
    sum(losses, torch.zeros(())).backward()
    batch = case.task.collate(examples, packed)
    loss = case.task.loss_sum(case.packed, batch)
    loss.backward()
    wanted = math.fsum(one.item() for one in losses)
    assert abs(loss.item() - wanted) <= SAME * wanted
    assert_same_gradients(case.packed, case.alone)
    assert batch.targets == sum(len(example.target) for example in examples)
    assert batch.tokens == sum(len(example.source) + len(example.target) for example in examples)
    assert (batch.slots == batch.tokens) or not packed
    if packed:
        far = np.subtract(case.losses(batch, examples), [one.item() for one in losses])
        assert np.abs(far).max() <= SAME * max(1.0, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_changing_one_changes_no_other(name: str, tmp_path: Path, seed: int) -> None:
    case = Case(name, tmp_path, seed)
    examples = case.examples(7)
    before = case.losses(case.task.collate(examples, packed=True), examples)
    for index in range(len(examples)):
        source, target, *_ = examples[index]
        changed = [*examples]
        changed[index] = Tokens((source - 4 + 1) % 37 + 4, (target - 4 + 5) % 37 + 4)
        after = case.losses(case.task.collate(changed, packed=True), changed)
        others = [abs(a - b) for at, (a, b) in enumerate(zip(after, before, strict=True)) if at != index]
        assert max(others) <= 1e-6
        assert after[index] != before[index]


# What runs call; transformers 5.23 has a new name for it, 5.17 has not.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_recomputed_activations(name: str, tmp_path: Path, seed: int) -> None:
    """The backward pass computes attention again, on the same documents."""
    case = Case(name, tmp_path, seed)
    examples = case.examples(6)
    for example in examples:
        case.loss_alone(example).backward()
    case.packed.gradient_checkpointing_enable({"use_reentrant": False})
    case.packed.train()
    case.task.loss_sum(case.packed, case.task.collate(examples, packed=True)).backward()
    assert_same_gradients(case.packed, case.alone)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
def test_generation_is_as_before(name: str, tmp_path: Path, seed: int) -> None:
    """After a packed step, evaluation reads rows of one example."""
    from shardtune.protocols import Generation

    case = Case(name, tmp_path, seed)
    examples = case.examples(3)
    case.task.loss_sum(case.packed, case.task.collate(examples, packed=True))
    how = Generation(5, 1, in_step=False)
    case.packed.eval()
    case.alone.eval()
    assert case.task.predict(case.packed, examples, how) == case.task.predict(case.alone, examples, how)


def test_only_predicted_positions_have_logits(tmp_path: Path, seed: int) -> None:
    case = Case("llama", tmp_path, seed)
    examples = case.examples(5)
    batch = case.task.collate(examples, packed=True)
    logits = case.packed(**batch.inputs).logits
    assert logits.shape[1] == batch.targets == batch.labels.numel()


def test_what_is_read_but_not_learned(tmp_path: Path, seed: int) -> None:
    """Between turns of a conversation."""
    case = Case("llama", tmp_path, seed)
    examples = case.examples(4)
    split = [Tokens(e.source, np.concatenate((e.target, ~e.source, e.target)).astype(np.int32)) for e in examples]
    wanted = torch.zeros(())
    for e in examples:
        ids = torch.from_numpy(np.concatenate((e.source, e.target, e.source, e.target)).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : len(e.source)] = IGNORED
        labels[:, len(e.source) + len(e.target) : -len(e.target)] = IGNORED
        wanted += case.alone(input_ids=ids, labels=labels).loss.detach() * 2 * len(e.target)
    for packed in (True, False):
        batch = case.task.collate(split, packed)
        assert batch.targets == 2 * sum(len(e.target) for e in examples)
        assert case.task.loss_sum(case.packed, batch).item() == pytest.approx(float(wanted), rel=SAME)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["t5", "bart", "llama", "gpt2", "mistral"])
def test_on_a_gpu(name: str, tmp_path: Path, seed: int) -> None:
    """In float32 as on a CPU; under bfloat16 autocast no example sees another."""
    case = Case(name, tmp_path, seed)
    device = torch.device("cuda")
    case.packed.to(device)
    examples = case.examples(9)
    losses = [case.loss_alone(example) for example in examples]
    sum(losses, torch.zeros(())).backward()
    batch = case.task.collate(examples, packed=True).to(device)
    case.task.loss_sum(case.packed, batch).backward()
    assert_same_gradients(case.packed, case.alone)
    with torch.autocast("cuda", torch.bfloat16):
        before = case.losses(batch, examples)
        changed = [Tokens((examples[0].source - 3) % 37 + 4, examples[0].target), *examples[1:]]
        after = case.losses(case.task.collate(changed, packed=True).to(device), changed)
    assert after[1:] == pytest.approx(before[1:], abs=1e-6)


# ---------------------------------------------------------------------------------------------- rectangles


def test_rectangles_hold_every_position_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        count = int(rng.integers(1, 80))
        source, target = (np.minimum(rng.lognormal(3, 1, count).astype(np.int64) + 1, 300) for _ in range(2))
        found = make_documents(source, target)
        assert found.target_spread is not None
        assert found.cross_spread is not None
        for spread, queries, keys in (
            (found.source_spread, source, source),
            (found.target_spread, target, target),
            (found.cross_spread, target, source),
        ):
            assert torch.equal(spread.query_index[spread.query_slots], torch.arange(int(queries.sum())))
            assert torch.equal(spread.key_index[spread.key_slots], torch.arange(int(keys.sum())))
            assert sum(part.examples * part.queries for part in spread.rectangles) == len(spread.query_index)
            assert sum(part.examples for part in spread.rectangles) == count
            shown = sum(
                part.examples * part.keys if part.hidden is None else int((~part.hidden).sum())
                for part in spread.rectangles
            )
            assert shown == keys.sum()
        assert found.source.positions.tolist() == [position for length in source for position in range(length)]
        assert found.source.offsets.tolist() == [0, *np.cumsum(source).tolist()]


# ------------------------------------------------------------------------------------------ flash attention


def attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, longest_q: int, longest_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What flash_attn_varlen_func computes: [row, heads, width], one example after the other, lower right aligned."""
    assert (longest_q, longest_k) == (int(offsets_q.diff().max()), int(offsets_k.diff().max()))
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    out = []
    for (a, b), (c, d) in zip(pairwise(offsets_q.tolist()), pairwise(offsets_k.tolist()), strict=True):
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        scores = q[a:b].transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        if causal:
            scores = scores.masked_fill(distance < 0, -math.inf)
        if window_size[0] >= 0:
            scores = scores.masked_fill(distance > window_size[0], -math.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["bart", "llama", "mistral"])
def test_flash_attention_is_told_the_same(
    name: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call, that is: the library's own kernel needs a GPU."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = attend_one_by_one  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = Case(name, tmp_path, seed, flash=True)
    examples = case.examples(6)
    wanted = sum(case.loss_alone(example).item() for example in examples)
    got = case.task.loss_sum(case.packed, case.task.collate(examples, packed=True)).item()
    assert abs(got - wanted) <= SAME * wanted


# ------------------------------------------------------------------------------------------------ refusals


TINY = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({**TINY, "state_size": 4}, "it has no model.attention"),
    "bloom": ({"vocab_size": 41, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "it has no model.attention: sdpa"),
    "lfm2": ({**DECODER, "layer_types": ["conv", "full_attention"]}, "conv mixes neighbours"),
    "longt5": ({"vocab_size": 41, "d_model": 32, "num_layers": 1, "num_heads": 4}, "it has no model.attention: sdpa"),
    "llama": (
        {**DECODER, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
         "max_position_embeddings": 79},
        "its frequencies are those of the longest neighbour, and examples may have more than 79 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_by_its_kind(kind: str) -> None:
    settings, reason = REFUSED[kind]
    config = transformers.AutoConfig.for_model(kind, **settings)
    auto = plain.AUTO["seq2seq" if config.is_encoder_decoder else "causal"]
    with pytest.raises(ConfigError, match=rf"cannot be kept apart: {reason}.*; use grouped"):
        keep_apart(auto.from_config(config), kind, 80, flash=False)


def test_a_model_with_attention_of_its_own_is_refused_before_the_run(tmp_path: Path) -> None:
    """It says that it has SDPA, but does not ask for an attention by name."""
    config = tiny.tiny_config(tmp_path, "llama", data__batching="packed", batch={"examples": 6, "micro_tokens": 200})
    architecture = {"model_type": "falcon", "architectures": ["FalconForCausalLM"], **TINY}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(architecture))
    done = launching.run(launching.command("shardtune", 1, "--config", config), tmp_path / "cache")
    assert done.code == 2, done.said
    assert "are not kept apart: the loss of one" in done.err
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
