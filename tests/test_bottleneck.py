"""Bottleneck adapters: where they are, that they compute what they should, and that transformers loads them alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import plain
import run_many
import skeletons
from launching import environment
from shardtune import cli
from shardtune.errors import ConfigError
from shardtune.tuning.bottleneck import BottleneckAdapters
from skeletons import TASKS, architecture, filled, logits, saved, skeleton_of

LLAMA = skeletons.LLAMA
ENDS = {
    "t5": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"], 6, 4),
    "t5-untied": (["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"], 6, 4),
    "bart": (["self_attn.out_proj", "encoder_attn.out_proj"], ["fc2"], 6, 4),
    "llama": (["self_attn.o_proj"], ["mlp.down_proj"], 2, 2),
    "qwen3": (["self_attn.o_proj"], ["mlp.down_proj"], 2, 2),
    "mistral": (["self_attn.o_proj"], ["mlp.down_proj"], 2, 2),
    "gpt2": (["attn.c_proj"], ["mlp.c_proj"], 2, 2),
    "bert": (["attention.output.dense"], ["output.dense"], 2, 2),
    "roberta": (["attention.output.dense"], ["output.dense"], 2, 2),
    "distilbert": (["attention.out_lin"], ["ffn.lin2"], 2, 2),
}
"""What ends attention and feed-forward parts, and how many of them there are."""
HEADS = ("classifier.", "pre_classifier.")


def adapters(name: str, **options: Any) -> BottleneckAdapters:
    given = {"placement": "houlsby", "size": 8, "activation": "relu", "dropout": 0.0, **options}
    return BottleneckAdapters(TASKS.get(name, "causal"), **given)


# ------------------------------------------------------------------------------------------- where they are


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", ENDS)
def test_places(tmp_path: Path, name: str, placement: str) -> None:
    """Nothing else is trained, no name of the base changes, and the model begins as the base."""
    folder = saved(tmp_path, name)
    base = filled(skeleton_of(folder, TASKS[name]))
    names = {n for n, _ in base.named_parameters()}
    skeleton = skeleton_of(folder, TASKS[name])
    tuning = adapters(name, placement=placement)
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    places = {n.partition(".adapter.")[0] for n in trained if ".adapter." in n}
    attention, feedforward, attentions, feedforwards = ENDS[name]
    endings = [*feedforward, *(attention if placement == "houlsby" else [])]
    assert len(places) == feedforwards + (attentions if placement == "houlsby" else 0)
    for ending in endings:
        assert any(place.endswith(f".{ending}") for place in places), places
    assert all(place.endswith(tuple(f".{ending}" for ending in endings)) for place in places)
    if placement == "pfeiffer":
        assert not any("attn" in place.lower() or "attention" in place.lower() for place in places)
    assert {n for n, _ in model.named_parameters()} - trained | {n for n in trained if ".adapter." not in n} == names
    assert all(n.startswith(HEADS) for n in trained if ".adapter." not in n)
    if TASKS[name] == "classification":
        assert {n for n in names if n.startswith(HEADS)} <= trained
    assert tuning.notes()[0].startswith(f"on {len(places)} linear layers")

    assert torch.equal(logits(filled(skeleton)), logits(base))
    with torch.no_grad():
        for n, parameter in skeleton.model.named_parameters():
            if ".adapter.down.weight" in n:
                assert parameter.std() > 0, "or nothing would ever be learned"
            if ".adapter.up.weight" in n:
                parameter.normal_()
    assert not torch.allclose(logits(skeleton.model), logits(base))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}, "experts"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 4}, "no attention"),
    ],
    ids=["mixtral", "mamba"],
)
def test_no_place(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ConfigError, match=rf"tuning.method: adapters find no place in a .* model: .*{said}"):
        adapters("other").apply(model)


def test_code_of_its_own(tmp_path: Path) -> None:
    skeleton = skeleton_of(architecture(tmp_path, "llama"), "causal", pretrained=False)
    skeleton.model.__class__ = type("TheirsForCausalLM", (type(skeleton.model),), {})
    with pytest.raises(ConfigError, match=r"tuning.method: the code of TheirsForCausalLM comes with its weights"):
        adapters("llama").apply(skeleton.model)


# ------------------------------------------------------------------------------------------------- the runs

HOULSBY = {"method": "adapter", "placement": "houlsby", "size": 8}
TUNINGS: dict[str, dict[str, Any]] = {
    "t5": HOULSBY,
    "bart": {**HOULSBY, "activation": "gelu"},
    "llama": {"method": "adapter", "size": 6, "activation": "silu"},
    "gpt2": HOULSBY,
    "bert": {"method": "adapter"},
    "distilbert": HOULSBY,
}
ARCHITECTURES = {
    **{name: skeletons.MODELS[name] for name in TUNINGS},
    "t5": {**skeletons.MODELS["t5"], "feed_forward_proj": "gated-gelu"},
    "distilbert": {**skeletons.MODELS["distilbert"], "dropout": 0.0, "attention_dropout": 0.0},
}
plain.TASKS["distilbert"] = "classification"
ON_TWO = [("t5", kind) for kind in ("ddp", "fsdp2", "zero3")] + [("gpt2", "zero3"), ("bert", "fsdp2")]
STEPS = 4
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def task_of(model: str) -> str:
    return plain.task_of(ARCHITECTURES[model]["model_type"])


class Runs:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        for name in TUNINGS:
            plain.make_model(folder / name, ARCHITECTURES[name], seed)
        alone = [self.config(name, name) for name in TUNINGS]
        begun = [
            self.config("t5", "begin", duration__steps=0),
            self.config("t5", "again", model__path=str(folder / "runs" / "t5" / "final"), duration__steps=0),
            self.config(
                "t5", "whole", model__path=str(folder / "runs" / "t5" / "final"), duration__steps=1,
                tuning={"method": "full"},
            ),
        ]  # fmt: skip
        pairs = [self.config(name, f"{name}-{kind}", strategy__kind=kind) for name, kind in ON_TWO]
        run_many.train_both(folder, [*alone, *begun], pairs)

    def config(self, model: str, name: str, **options: Any) -> Path:
        given = {
            "tuning": TUNINGS[model], "duration__steps": STEPS, "optimizer__lr": 1e-2, "optimizer__eps": 1e-4,
            "data__shuffle": False, "model__path": self.folder / model, **options,
        }  # fmt: skip
        path = given.pop("model__path")
        return run_many.config(
            self.folder, name, Path(path), plain.task_of(ARCHITECTURES[model]["model_type"]), **given
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def final(self, name: str) -> dict[str, Tensor]:
        return load_file(self.run(name) / "final" / "model.safetensors")

    def predictions(self, name: str, steps: int = STEPS) -> list[str]:
        lines = plain.read_rows(self.run(name) / "predictions" / f"step-{steps}-validation.jsonl")
        return [line["prediction"] for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("bottleneck"), random.randrange(2**31))


def test_transformers_loads_them_without_us(runs: Runs) -> None:
    """Token for token, with the file of code beside the weights and nothing else."""
    names = [*TUNINGS, "t5-fsdp2", "t5-zero3", "whole"]
    words = [
        word for name in names
        for word in (task_of(name.partition("-")[0].replace("whole", "t5")), runs.run(name) / "final")
    ]  # fmt: skip
    script = Path(__file__).parent / "ranks" / "predict_alone.py"
    variables = {**environment(runs.folder / "cache"), "HF_MODULES_CACHE": str(runs.folder / "modules")}
    done = subprocess.run(
        [sys.executable, str(script), str(runs.folder / "validation.jsonl"), *map(str, words)],
        env=variables, capture_output=True, text=True, check=False, cwd=runs.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, theirs in zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert theirs == runs.predictions(name, 1 if name == "whole" else STEPS), (runs.seed, name)


@pytest.mark.parametrize("name", TUNINGS)
def test_they_compute_the_formula(runs: Runs, name: str) -> None:
    """h + W_up a(W_down h + b) + b behind the base's own layers, by hand; of the base nothing has changed."""
    tensors, base_tensors = runs.final(name), load_file(runs.folder / name / "model.safetensors")
    task = task_of(name)
    base = plain.AUTO[task].from_pretrained(runs.folder / name)
    activation = ACTIVATIONS[TUNINGS[name].get("activation", "relu")]
    places = [key.removesuffix(".adapter.up.weight") for key in tensors if key.endswith(".adapter.up.weight")]
    for place in places:
        up, down, up_bias, down_bias = (
            tensors[f"{place}.adapter.{key}"] for key in ("up.weight", "down.weight", "up.bias", "down.bias")
        )
        assert down.shape == (TUNINGS[name].get("size", 64), 32)

        def adapt(module: nn.Module, given: Any, h: Tensor, w=(up, down, up_bias, down_bias)) -> Tensor:
            return h + activation(h @ w[1].T + w[3]) @ w[0].T + w[2]

        base.get_submodule(place).register_forward_hook(adapt)
    heads = {key: value for key, value in tensors.items() if key.startswith(HEADS)}
    base.load_state_dict(heads, strict=False)
    untouched = {key for key in tensors if ".adapter." not in key} - heads.keys()
    assert untouched == base_tensors.keys() - heads.keys()
    assert all(torch.equal(tensors[key], base_tensors[key]) for key in untouched)
    tokenizer = plain.load_tokenizer(runs.folder / name)
    rows = plain.read_rows(runs.folder / "validation.jsonl")
    assert [plain.predict(base, tokenizer, task, row) for row in rows] == runs.predictions(name), runs.seed
    losses = [step["loss"] for step in run_many.metrics(runs.run(name))[0]]
    assert losses[-1] < losses[0], losses


def test_same_run_as_a_plain_loop(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(runs.folder / "modules-here"))
    model = plain.AUTO["seq2seq"].from_pretrained(runs.run("begin") / "final", trust_remote_code=True)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name)
    rows = plain.read_rows(runs.folder / "train.jsonl")
    batch = plain.batch_of(plain.load_tokenizer(runs.folder / "t5"), "seq2seq", rows)
    steps = plain.train(model, "seq2seq", [batch] * STEPS, 1e-2, 0.0, 1e-4, 0, 1.0)
    for ours, theirs in zip(run_many.metrics(runs.run("t5"))[0], steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs.loss, rel=1e-5), (runs.seed, ours["step"])
        assert ours["grad_norm"] == pytest.approx(theirs.grad_norm, rel=1e-4), (runs.seed, ours["step"])


@pytest.mark.parametrize(("name", "kind"), ON_TWO)
def test_ranks_train_the_same(runs: Runs, name: str, kind: str) -> None:
    ours, alone = runs.final(f"{name}-{kind}"), runs.final(name)
    assert ours.keys() == alone.keys()
    for key, tensor in ours.items():
        assert (tensor - alone[key]).abs().max() <= 1e-4 * max(1e-2, alone[key].abs().max()), (runs.seed, key)
    judged, right = (run_many.metrics(runs.run(run))[1] for run in (f"{name}-{kind}", name))
    assert [line["loss"] for line in judged] == pytest.approx([line["loss"] for line in right], rel=1e-5), runs.seed


def test_they_are_trained_further(runs: Runs) -> None:
    """From `model.path`, as whole models are."""
    first, again = runs.final("t5"), runs.final("again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    whole = runs.final("whole")
    assert whole.keys() == first.keys()
    assert not any(torch.equal(whole[key], first[key]) for key in first if "adapter.up.weight" in key)


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({**HOULSBY, "size": 4}, "tuning.size: the model has adapters already, whose size is 8"),
        ({**HOULSBY, "activation": "silu"}, "tuning.activation: the model has adapters already, whose"),
        ({**HOULSBY, "placement": "pfeiffer"}, "tuning.placement: the model has 10 adapters in other places"),
        ({"method": "lora"}, "has bottleneck adapters, beside which PEFT's do not work"),
        ({"method": "qlora"}, "has bottleneck adapters, beside which PEFT's do not work"),
    ],
    ids=lambda value: value.get("method", "") + str(len(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_trained_further(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tuning: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(runs.folder / "cache"))
    path = runs.config("t5", "refused", model__path=str(runs.run("t5") / "final"), tuning=tuning)
    try:
        assert cli.main(["train", "--config", str(path)]) == 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert said in capsys.readouterr().err


def test_our_commands_need_no_leave(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`evaluate`, `generate` and `export` without model.trust_remote_code."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(runs.folder / "cache"))
    folder = runs.run("t5")
    assert cli.main(["evaluate", "--config", str(folder / "config.yaml"), "--split", "validation"]) == 0
    again = plain.read_rows(folder / "predictions" / "final-validation.jsonl")
    assert [line["prediction"] for line in again] == runs.predictions("t5")
    capsys.readouterr()
    assert cli.main(["generate", "--run", str(folder), again[0]["source"]]) == 0
    assert capsys.readouterr().out.strip() == again[0]["prediction"]
    assert cli.main(["export", "--run", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert (tmp_path / "out" / "bottleneck.py").exists()
    assert cli.main(["export", "--run", str(folder), "--out", str(tmp_path / "merged"), "--merge"]) == 2
    assert "bottleneck adapters are not linear" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
