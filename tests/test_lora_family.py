"""What the variants of LoRA begin with, next to what peft computes, and that their runs are the same everywhere."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import plain
import tiny
from forked import MANY, run_group
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.model.quantized import quantize_layers
from shardtune.optim.recipe import parameter_groups
from shardtune.protocols import Tuning, Weights
from shardtune.quantization import Quantization
from shardtune.strategy.parameters import materialize, parts
from shardtune.tuning.dora import Dora
from shardtune.tuning.eva import Eva, distribute
from shardtune.tuning.initial_values import adapted_layers
from shardtune.tuning.loftq import Loftq
from shardtune.tuning.lora import Lora, LoraPlus
from shardtune.tuning.pissa import Pissa
from shardtune.world import World
from skeletons import CLASSES, TASKS, logits, saved, skeleton_of

ALONE = World(0, 1, 0, torch.device("cpu"))
SEED = random.SystemRandom().randrange(2**31)


def applied(folder: Path, name: str, tuning: Tuning) -> tuple[Any, Weights]:
    """A tuned model on the meta device, and its initial values."""
    skeleton = skeleton_of(folder, TASKS[name])
    if tuning.quantization is not None:
        quantize_layers(skeleton.model, TASKS[name], skeleton.recorder, tuning.quantization, torch.float32, name)
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    return model, tuning.initial(model, skeleton.weights(model, 0, torch.float32, tuning.trained_dtype), ALONE)


def base_of(folder: Path, name: str) -> Any:
    return CLASSES[TASKS[name]].from_pretrained(folder)


def peft_model(folder: Path, name: str, tuned: Any, **options: Any) -> Any:
    """peft's own adapter on the same layers of a model that transformers has loaded."""
    targets = [layer.name.removeprefix("base_model.model.") for layer in adapted_layers(tuned)]
    config = LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2", **options)
    return get_peft_model(base_of(folder, name), config)


def read(weights: Weights, model: nn.Module, name: str) -> Tensor:
    shape = model.get_parameter(name).shape
    return weights.read(name, 0, shape.numel()).view(shape)


class Counting:
    """Weights that know how much was read at once."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.largest = 0

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def buffers(self, name: str) -> dict[str, Tensor]:
        return self.weights.buffers(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        self.largest = max(self.largest, stop - start)
        return self.weights.read(name, start, stop)


def assert_ranges_agree(weights: Weights, model: nn.Module, names: list[str]) -> None:
    """Any range of a parameter is that range of the whole."""
    rng = random.Random(SEED)
    for name in names:
        whole = weights.read(name, 0, model.get_parameter(name).numel())
        for _ in range(5):
            start, stop = sorted(rng.choices(range(len(whole) + 1), k=2))
            torch.testing.assert_close(weights.read(name, start, stop), whole[start:stop], msg=f"{name}, seed {SEED}")


# ------------------------------------------------------------------------------------------------- dora


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bert"])
def test_dora_begins_with_pefts_magnitudes_and_as_the_base(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    model, weights = applied(tmp_path, name, Dora(TASKS[name], 4, 8.0, 0.0, "all-linear"))
    theirs = dict(peft_model(tmp_path, name, model, r=4, use_dora=True).named_parameters())
    layers = adapted_layers(model)
    for layer in layers:
        mine = read(weights, model, layer.magnitude)
        torch.testing.assert_close(mine, theirs[layer.magnitude].detach())
        assert mine.std() > 0
    assert_ranges_agree(weights, model, [layer.magnitude for layer in layers])
    materialize(model, weights, torch.device("cpu"))
    torch.testing.assert_close(logits(model), logits(base_of(tmp_path, name)), rtol=1e-4, atol=1e-4)


def test_dora_reads_only_the_rows_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    skeleton = skeleton_of(tmp_path, "causal")
    tuning = Dora("causal", 4, 8.0, 0.0, ["down_proj"])
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    counting = Counting(skeleton.weights(model, 0, torch.float32))
    tuning.initial(model, counting, ALONE).read(adapted_layers(model)[0].magnitude, 3, 5)
    assert counting.largest == 2 * 64


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qdora_begins_with_the_magnitudes_of_the_stored_weights(tmp_path: Path, kind: Any) -> None:
    import bitsandbytes.functional as bnb

    saved(tmp_path, "llama")
    model, weights = applied(
        tmp_path, "llama", Dora("causal", 4, 8.0, 0.0, "all-linear", quantization=Quantization(kind))
    )
    base = base_of(tmp_path, "llama")
    for layer in adapted_layers(model):
        matrix = base.get_submodule(layer.name.removeprefix("base_model.model.")).weight.detach()
        if kind == "int8":
            rows, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
            stored = rows.float() * scales[:, None] / 127
        else:
            stored = bnb.dequantize_4bit(*bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=True))
        mine = read(weights, model, layer.magnitude)
        torch.testing.assert_close(mine, stored.norm(dim=1), rtol=1e-3 if kind == "int8" else 1e-5, atol=0)
        assert not torch.allclose(mine, matrix.norm(dim=1), rtol=1e-4)
    assert_ranges_agree(weights, model, [adapted_layers(model)[0].magnitude])


# ------------------------------------------------------------------------------------------------ lora+


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_lora_plus_has_pefts_learning_rates(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    tuning = LoraPlus(TASKS[name], 4, 8.0, 0.0, "all-linear", ratio=7.0)
    model, _ = applied(tmp_path, name, tuning)
    wanted = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=7.0, loraplus_weight_decay=0.1
    )
    names = {parameter: parameter_name for parameter_name, parameter in model.named_parameters()}
    theirs = {names[p]: (group["lr"], group["weight_decay"]) for group in wanted.param_groups for p in group["params"]}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = parameter_groups(trained, 0.1, tuning.lr_scale)
    mine = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert mine == theirs
    assert {rate for rate, _ in mine.values()} == {1.0, 7.0}


def test_rank_stabilized_scale(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    model, _ = applied(tmp_path, "llama", Lora("causal", 4, 8.0, 0.0, "mlp", rank_stabilized=True))
    assert {layer.scale for layer in adapted_layers(model)} == {8 / 4**0.5}
    assert model.peft_config["default"].use_rslora


# ------------------------------------------------------------------------------------------------ pissa


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("iterations", [None, 16])
def test_pissa_begins_as_pefts(tmp_path: Path, name: str, iterations: int | None) -> None:
    saved(tmp_path, name)
    model, weights = applied(tmp_path, name, Pissa(TASKS[name], 4, 8.0, "all-linear", iterations=iterations))
    theirs = peft_model(tmp_path, name, model, r=4, lora_alpha=8, init_lora_weights="pissa")
    base = base_of(tmp_path, name)
    layers = adapted_layers(model)
    for layer in layers:
        down, up, rest = (read(weights, model, part) for part in (layer.down, layer.up, layer.weight))
        product = layer.scale * up @ down
        module = theirs.get_submodule(layer.name)
        wanted = module.get_delta_weight("default").T if layer.transposed else module.get_delta_weight("default")
        torch.testing.assert_close(down @ down.T, torch.diag((down @ down.T).diag()), rtol=0, atol=1e-4)
        whole = base.get_submodule(layer.name.removeprefix("base_model.model.")).weight.detach()
        torch.testing.assert_close(rest + (product.T if layer.transposed else product), whole)
        if iterations is None:
            torch.testing.assert_close(product, wanted, rtol=0, atol=1e-4)
        matrix = whole.T if layer.transposed else whole
        assert (matrix - product).norm() < 1.005 * (matrix - wanted).norm(), layer
    assert_ranges_agree(weights, model, [layers[0].weight, layers[-1].weight, layers[0].down])
    materialize(model, weights, torch.device("cpu"))
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_of_pissa_lies_beside_the_original_base(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    saved(tmp_path, name)
    tuning = Pissa(TASKS[name], 4, 8.0, "all-linear", dtype)
    model, weights = applied(tmp_path, name, tuning)
    materialize(model, weights, torch.device("cpu"))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    adapter = tuning.result(model, trained, weights)
    (tmp_path / "adapter").mkdir()
    stored = {key: value.float().contiguous() for key, value in adapter.tensors.items()}
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter.settings.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_of(tmp_path, name), str(tmp_path / "adapter"))
    ours = logits(model.float())
    torch.testing.assert_close(logits(loaded), ours, rtol=1e-3, atol=1e-2, msg=lambda text: f"{text}\nseed {SEED}")
    assert (ours - logits(base_of(tmp_path, name))).abs().max() > 0.1


def test_pissa_refuses_what_it_cannot_begin_with(tmp_path: Path) -> None:
    saved(tmp_path / "llama", "llama")
    saved(tmp_path / "tied", "llama-tied")
    with pytest.raises(ConfigError, match=r"tuning.rank: 17 directions are more than the 16 x 32 weight of .*k_proj"):
        applied(tmp_path / "llama", "llama", Pissa("causal", 17, 8.0, "all-linear"))
    with pytest.raises(ConfigError, match=r"tuning.targets: lm_head shares its weight"):
        applied(tmp_path / "tied", "llama-tied", Pissa("causal", 4, 8.0, ["lm_head"]))


# ------------------------------------------------------------------------------------------------ loftq


@pytest.mark.parametrize("double", [True, False])
def test_loftq_begins_as_the_correction_of_the_error(tmp_path: Path, double: bool) -> None:
    import bitsandbytes.functional as bnb

    saved(tmp_path, "llama")
    model, weights = applied(
        tmp_path, "llama", Loftq("causal", 4, 4.0, 0.0, "all-linear", quantization=Quantization("nf4", double))
    )
    base = base_of(tmp_path, "llama")
    layers = adapted_layers(model)
    assert all(layer.quantized for layer in layers)
    for layer in layers:
        matrix = base.get_submodule(layer.name.removeprefix("base_model.model.")).weight.detach()
        packed, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=double)
        error = matrix - bnb.dequantize_4bit(packed, state)
        wanted = _low_rank_decomposition(error, 4)
        product = read(weights, model, layer.up) @ read(weights, model, layer.down)
        torch.testing.assert_close(product, wanted["L"] @ wanted["R"])
        assert (error - product).norm() < 0.95 * error.norm()


def test_loftq_corrects_at_any_scale(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    products = []
    for alpha in (4.0, 32.0):
        model, weights = applied(
            tmp_path, "llama", Loftq("causal", 4, alpha, 0.0, ["q_proj"], quantization=Quantization("nf4"))
        )
        layer = adapted_layers(model)[0]
        products.append(layer.scale * read(weights, model, layer.up) @ read(weights, model, layer.down))
    torch.testing.assert_close(*products)


# -------------------------------------------------------------------------------------------------- eva


def observed(tuning: Eva, model: Any, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    inputs = tuning.watch(model)
    for row in rows:
        with torch.no_grad(), inputs.example():
            model(**row)
    return inputs.found()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eva_finds_pefts_directions_and_ranks(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    base = base_of(tmp_path, name).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 400, (24, 9)))
    tuning = Eva("causal", 5, 8.0, 0.0, "all-linear", rho=1.6)
    found = observed(tuning, base, [{"input_ids": row[None]} for row in ids])
    ranks = tuning.ranks(found)
    config = LoraConfig(
        r=5, target_modules=list(found), fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
        init_lora_weights="eva", eva_config=EvaConfig(rho=1.6),
    )  # fmt: skip
    theirs = get_eva_state_dict(
        base, [{"input_ids": ids}], config, prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda value, *_: value[0].flatten(0, -2), gather_distributed_inputs=False,
        show_progress_bar=False,
    )  # fmt: skip
    assert sum(ranks.values()) == 5 * len(found) == sum(map(len, theirs.values()))
    assert len(set(ranks.values())) > 1
    # Layers with the same inputs have the same shares, and peft deals the last one to any of them.
    assert all(abs(ranks[layer] - len(rows)) <= 1 for layer, rows in theirs.items())
    assert sum(ranks[layer] != len(rows) for layer, rows in theirs.items()) <= 2
    for layer, rows in theirs.items():
        mine = found[layer].components
        torch.testing.assert_close(mine @ mine.T, torch.eye(len(mine)), rtol=0, atol=1e-4)
        if len(rows):  # each of peft's directions lies in the space of as many of ours and one more
            inside = (rows.float() @ mine[: len(rows) + 1].T).norm(dim=1)
            assert inside.min() > 0.97, layer


def test_eva_counts_no_input_twice_and_sees_decoders_inputs(tmp_path: Path) -> None:
    saved(tmp_path, "t5")
    base = base_of(tmp_path, "t5").eval()
    rng = np.random.default_rng(0)
    rows = [
        {key: torch.from_numpy(rng.integers(2, 400, (1, n))) for key, n in (("input_ids", s), ("labels", t))}
        for s, t in rng.integers(3, 9, (30, 2))
    ]  # fmt: skip
    tuning = Eva("seq2seq", 4, 8.0, 0.0, "all-linear", rho=1.5)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2)))
        for name, module in base.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
    found = observed(tuning, base, rows)
    for hook in hooks:
        hook.remove()
    for name, directions in found.items():
        inputs = torch.cat(seen[name]).double()
        values = torch.linalg.svdvals(inputs - inputs.mean(0)) ** 2
        assert len(directions.shares) == 6
        assert directions.shares == pytest.approx((values / values.sum())[:6].tolist(), rel=1e-3), name
    cross = "decoder.block.1.layer.1.EncDecAttention."
    assert found[cross + "k"] is found[cross + "v"] is found["decoder.block.0.layer.1.EncDecAttention.k"]
    assert found[cross + "q"] is not found[cross + "k"]


def test_eva_in_pieces_is_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardtune.tuning import eva

    rows = torch.from_numpy(np.random.default_rng(SEED).normal(size=(700, 24)) * np.geomspace(5, 0.05, 24)).float()
    analyses = []
    for at_once in (4000, 50):
        monkeypatch.setattr(eva, "ROWS", at_once)
        analysis = eva._Analysis(6)
        for piece in rows.split(13):
            analysis.add(piece)
        analyses.append(analysis.directions())
    whole, pieces = analyses
    assert pieces.shares == pytest.approx(whole.shares, rel=0.02), SEED
    assert (pieces.components[:3] @ whole.components[:3].T).abs().diag().min() > 0.99, SEED


def test_eva_gives_ranks_and_keeps_scales(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    base = base_of(tmp_path, "llama")
    tuning = Eva("causal", 4, 8.0, 0.0, "mlp", rho=2.0)
    names = [name for name, _ in base.named_modules() if name.endswith(("up_proj", "down_proj", "gate_proj"))]
    generator = torch.Generator().manual_seed(SEED)
    rows = {
        name: torch.randn(rank, 64 if "down" in name else 32, generator=generator)
        for name, rank in zip(names, (0, 4, 8, 1, 5, 6), strict=True)
    }
    tuning.begin_with(rows)
    model, weights = applied(tmp_path, "llama", tuning)
    layers = {layer.name.removeprefix("base_model.model."): layer for layer in adapted_layers(model)}
    assert set(layers) == set(names[1:])
    for name, layer in layers.items():
        assert (layer.rank, layer.scale) == (len(rows[name]), 2.0)
        assert torch.equal(read(weights, model, layer.down), rows[name])
        assert not read(weights, model, layer.up).any()
    notes = " ".join(tuning.notes())
    assert "ranks from 1 to 8" in notes
    assert "no adapter on 1 layers" in notes


def test_ranks_go_where_they_explain_most() -> None:
    assert distribute({"a": [0.5, 0.1], "b": [0.3, 0.2], "c": [0.3, 0.05]}, 4) == {"a": 1, "b": 2, "c": 1}
    assert distribute({"a": [0.5, 0.5], "b": [0.5, 0.5]}, 3) == {"a": 2, "b": 1}
    assert distribute({"a": [0.5], "b": []}, 5) == {"a": 1, "b": 0}


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tuning": {"method": "pissa", "dropout": 0.1}}, "tuning.dropout: pissa's adapters"),
        ({"tuning": {"method": "eva"}, "data__streaming": True}, "tuning.method: eva reads training examples"),
        ({"tuning": {"method": "dora", "ratio": 2}}, "tuning.ratio"),
        ({"tuning": {"method": "loftq", "quantization": "int8"}}, "tuning.quantization"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.tiny_config(tmp_path, "llama", **changes), [])
    assert problem in str(caught.value).replace(" tuning", "\ntuning")


def test_parts_hold_every_parameter_and_no_two_layers(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    model = base_of(tmp_path, "bert")
    names = {module: name for name, module in model.named_modules()}
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert [names[part] for part in parts(model, blocks)] == [
        "bert.embeddings", *blocks, "bert.pooler", "classifier",
    ]  # fmt: skip
    assert {p for part in parts(model, blocks) for p in part.parameters()} == set(model.parameters())


# --------------------------------------------------------------------------------------------------- whole runs


STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "qdora": {"method": "qdora"},
    "loraplus": {"method": "lora+"},
    "pissa": {"method": "pissa"},
    "loftq": {"method": "loftq"},
    "eva": {"method": "eva"},
}
# bitsandbytes' blocks of 64 weights; smooth activations, or rounding decides a whole gradient.
MODELS: dict[str, dict[str, Any]] = {
    "t5": {**tiny.ARCHITECTURES["t5"], "feed_forward_proj": "gated-gelu", "initializer_factor": 0.6},
    "llama": {**tiny.ARCHITECTURES["llama"], "num_key_value_heads": 4},
    "gpt2": tiny.ARCHITECTURES["gpt2"],
    "bert": tiny.ARCHITECTURES["bert"],
}


class Run(NamedTuple):
    model: str
    method: str
    strategy: str
    ranks: int
    recompute: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def single(self) -> Run:
        return Run(self.model, self.method, "single", 1)

    @property
    def quantized(self) -> bool:
        return self.method in ("qdora", "loftq")


OTHERS = [
    Run("t5", "dora", "zero3", 2, "full"),
    Run("bert", "dora", "zero3", 2),  # whose pooling layer is adapted, too, and stands outside of the layers
    Run("gpt2", "dora", "fsdp2", 2),
    Run("t5", "qdora", "fsdp2", 2, "full"),
    Run("t5", "pissa", "fsdp2", 2),
    Run("gpt2", "pissa", "zero3", 2),
    Run("llama", "loftq", "ddp", 2),
    Run("t5", "eva", "zero3", 2),
    Run("llama", "eva", "fsdp2", 2),
    Run("bert", "loraplus", "zero1", 2),
    Run("llama", "rslora", "fsdp2", 2),
]
SINGLE = list(dict.fromkeys([*(run.single for run in OTHERS), Run("bert", "eva", "single", 1)]))


class Done:
    """The runs' folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[int, str] = {}
        for name, architecture in MODELS.items():
            plain.make_model(folder / name, architecture, SEED)
        tiny.write_rows(folder / "train.jsonl", tiny.rows(29, SEED))
        tiny.write_rows(folder / "validation.jsonl", tiny.rows(5, SEED + 1))

    def config(self, which: Run) -> Path:
        task = plain.task_of(MODELS[which.model]["model_type"])
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        settings: dict[str, Any] = {
            "name": which.name,
            "runs": str(self.folder / "runs"),
            "model__path": str(self.folder / which.model),
            "model__weights": "pretrained",
            "model__tokenizer": None,
            "model__recompute": which.recompute,
            "task": {**tiny.TASKS[task], **limits},
            "data__train": str(self.folder / "train.jsonl"),
            "data__validation": str(self.folder / "validation.jsonl"),
            "batch": {"examples": 29, "micro_examples": 8},
            "optimizer__lr": 2e-4 if which.method == "loraplus" else 2e-3,
            "optimizer__eps": 1e-4,  # or a gradient of pure noise decides
            "duration__steps": STEPS,
            "strategy__kind": which.strategy,
            "evaluation__examples": 5,
            "tuning": METHODS[which.method],
        }
        return tiny.tiny_config(self.folder / "configs" / which.name, "t5", **settings)

    def train(self, ranks: int) -> None:
        configs = [self.config(which) for which in [*SINGLE, *OTHERS] if which.ranks == ranks]
        log = self.folder / f"{ranks}-ranks.log"
        run_group([MANY, *configs], ranks, log, {"SHARDTUNE_CACHE": str(self.folder / f"cache-{ranks}")})
        self.said[ranks] = log.read_text()

    def path(self, which: Run) -> Path:
        folder = self.folder / "runs" / which.name
        if not (folder / "final").is_dir():
            pytest.fail(f"{which.name} did not finish; seed {SEED}\n{self.said[which.ranks][-6000:]}")
        return folder

    def lines(self, which: Run) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.path(which) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, which: Run) -> list[float]:
        return [line["loss"] for line in self.lines(which) if "grad_norm" in line]

    def loaded(self, which: Run) -> Any:
        """The adapter on the base, by transformers and peft alone."""
        task, options = plain.task_of(MODELS[which.model]["model_type"]), {}
        if which.quantized:
            wanted = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            options = {"quantization_config": wanted, "device_map": "cpu"}
        base = plain.AUTO[task].from_pretrained(self.folder / which.model, dtype=torch.float32, **options)
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks weights, less exactly, in eval mode
                module.support_avx512bf16_for_cpu = False
        return PeftModel.from_pretrained(base, str(self.path(which) / "final"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = Done(tmp_path_factory.mktemp("lora"))
    threads = [threading.Thread(target=made.train, args=(ranks,)) for ranks in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", SINGLE, ids=lambda which: which.name)
def test_learns_and_loads_without_us(done: Done, which: Run) -> None:
    """The loss falls; peft has our loss and predictions with the adapter on the base that transformers loads."""
    losses = done.losses(which)
    assert losses[-1] < losses[0], (SEED, losses)
    task = plain.task_of(MODELS[which.model]["model_type"])
    tokenizer = plain.load_tokenizer(done.folder / which.model)
    model = done.loaded(which)
    rows = plain.read_rows(done.folder / "validation.jsonl")
    ours = [line for line in done.lines(which) if "split" in line][-1]["loss"]
    theirs = plain.evaluation_loss(model, task, plain.batch_of(tokenizer, task, rows))
    assert theirs == pytest.approx(ours, rel=1e-4), SEED
    ours, theirs = (
        load_file(done.path(each) / "final" / "adapter_model.safetensors") for each in (which, which.single)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-4), (SEED, name)
