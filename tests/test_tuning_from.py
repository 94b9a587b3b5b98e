"""Going on from an earlier adapter: the same values under every layout, and clear words where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import plain
import run_many
import tiny
from shardtune.assemble.begin_with import begin_with
from shardtune.assemble.earlier import take_over
from shardtune.assemble.tunings import make_tuning
from shardtune.config import Config
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.protocols import Weights
from skeletons import skeleton_of

FIRST: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"method": "lora", "rank": 3, "alpha": 5, "targets": ["q_proj", "up_proj"]}),
    "prompt": ("t5", {"method": "prompt", "virtual_tokens": 4}),
    "prefix": ("llama", {"method": "prefix", "virtual_tokens": 4}),
    "projected": ("t5", {"method": "prefix", "virtual_tokens": 4, "projection": True, "hidden_size": 20}),
    "lstm": ("llama", {"method": "p_tuning", "virtual_tokens": 4, "encoder": "lstm", "hidden_size": 12}),
    "multitask": ("t5", {"method": "multitask_prompt", "virtual_tokens": 4, "rank": 2}),
}
STRATEGIES = {"lora": "zero3", "prompt": "fsdp2", "prefix": "zero3", "projected": "fsdp2", "lstm": "zero3"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs: the first ones, and others that begin with their adapters."""
    folder = tmp_path_factory.mktemp("from")
    for model in ("t5", "llama"):
        plain.make_model(folder / model, tiny.ARCHITECTURES[model], 4)
    other = str(tiny.write_rows(folder / "other.jsonl", tiny.rows(12, seed=6)))
    first, second, sharded = [], [], []
    for name, (model, tuning) in FIRST.items():
        task = plain.task_of(model)
        path, options = folder / model, {"data__validation": other, "duration__steps": 3}
        first.append(run_many.config(folder, f"{name}-1", path, task, tuning=tuning, **options))
        # Only the method and the folder: all else is that of the adapter.
        begun = {"method": tuning["method"], "from": str(folder / "runs" / f"{name}-1" / "final")}
        options = {"tuning": begun, "data__train": other, "optimizer__lr": 1e-3}
        second.append(run_many.config(folder, f"{name}-2", path, task, duration__steps=1, **options))
        second.append(run_many.config(folder, f"{name}-same", path, task, duration__steps=0, **options))
        if name in STRATEGIES:
            options |= {"strategy__kind": STRATEGIES[name], "duration__steps": 0}
            sharded.append(run_many.config(folder, f"{name}-sharded", path, task, **options))
    run_many.train(folder, first, 1)
    run_many.train_both(folder, second, sharded)
    return folder


@pytest.mark.parametrize("name", FIRST)
def test_without_steps_it_is_the_same_adapter(done: Path, name: str) -> None:
    earlier = done / "runs" / f"{name}-1"
    for other in [f"{name}-same", *([f"{name}-sharded"] if name in STRATEGIES else [])]:
        for file in ("adapter_model.safetensors", "trained_encoder.safetensors"):
            assert (earlier / "final" / file).exists() == (done / "runs" / other / "final" / file).exists()
            if (earlier / "final" / file).exists():
                expected, found = (load_file(done / "runs" / run / "final" / file) for run in (earlier.name, other))
                assert expected.keys() == found.keys()
                for key, tensor in expected.items():
                    torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
                assert all(bool(tensor.any()) for tensor in found.values())
        settings = [json.loads((done / "runs" / run / "final" / "adapter_config.json").read_text())
                    for run in (earlier.name, other)]  # fmt: skip
        for one in settings:
            one["target_modules"] = sorted(one.get("target_modules") or [])
        assert settings[0] == settings[1]


@pytest.mark.parametrize("name", FIRST)
def test_the_second_task_begins_where_the_first_ended(done: Path, name: str) -> None:
    """The loss of its first step is what the first result is judged with on the second's examples."""
    _, evaluations = run_many.metrics(done / "runs" / f"{name}-1")
    steps, _ = run_many.metrics(done / "runs" / f"{name}-2")
    assert steps[0]["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-5)
    changed, earlier = (run_many.adapter(done / "runs" / f"{name}-{number}") for number in (2, 1))
    assert any(not torch.equal(changed[key], earlier[key]) for key in earlier)


def test_the_run_is_repeated_by_its_config(done: Path) -> None:
    """The options taken over stand in it."""
    again = load_config(done / "runs" / "lora-2" / "config.yaml", [])
    assert (again.tuning.rank, again.tuning.alpha) == (3, 5)  # pyright: ignore
    assert take_over(again) == again
    log = (done / "runs" / "lora-2.log").read_text(encoding="utf-8")
    assert f"begins as the adapter in {done / 'runs' / 'lora-1' / 'final'}" in log


def test_going_on_needs_no_adapter_any_more(tmp_path: Path) -> None:
    """The options that were taken over are those of the run that is gone on with."""
    gone = {"method": "lora", "from": str(tmp_path / "gone"), "alpha": 7}
    config = load_config(tiny.tiny_config(tmp_path, tuning=gone), [])
    with pytest.raises(ConfigError, match=r"tuning\.from .*gone: there is no adapter_config\.json"):
        take_over(config)
    resolved: Any = config.tuning.model_copy(update={"rank": 3, "targets": ["q", "v"]})
    again: Any = take_over(config, resolved.model_dump(mode="json")).tuning
    assert (again.rank, again.alpha, again.targets) == (3, 7, ["q", "v"])


# --------------------------------------------------------------------------------------------- PEFT's adapters


def base_of(folder: Path, model: str, task: str | None = None, **changes: Any) -> Any:
    plain.make_model(folder / model, tiny.ARCHITECTURES[model], 4)
    return plain.AUTO[task or plain.task_of(model)].from_pretrained(folder / model, **changes)


def theirs(folder: Path, base: Any, settings: Any) -> Any:
    """An adapter of random values, saved by PEFT; returns the model."""
    torch.manual_seed(7)
    model: Any = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(str(folder))
    return model


def begun(
    folder: Path, model: str, tuning: dict[str, Any], labels: list[str] | None = None
) -> tuple[Any, Weights, list[str]]:
    """A tuned skeleton, its initial values, and what is said of them."""
    tuning = {"from": str(folder / "adapter"), **tuning}
    given = load_config(
        tiny.tiny_config(
            folder / "c", "t5", tuning=tuning, **({"task": tiny.TASKS["classification"]} if labels else {})
        ),
        [],
    )
    config: Config = take_over(given)
    task = "classification" if labels else plain.task_of(model)

    def name_labels(architecture: Any) -> None:
        if labels:
            architecture.num_labels = len(labels)

    skeleton = skeleton_of(folder / model, task, change=name_labels)
    method = make_tuning(config.tuning, task, plain.load_tokenizer(folder / model), ["train.jsonl"], 0)
    with skeleton.recorder:
        tuned = method.apply(skeleton.model)
    initial = skeleton.weights(tuned, 0, torch.float32)
    weights, notes = begin_with(folder / "adapter", config.tuning.method, method, tuned, initial, labels or [])
    return tuned, weights, notes


def same(tuned: Any, weights: Weights, model: Any) -> None:
    """Each trained parameter begins as PEFT's."""
    values = dict(model.named_parameters())
    trained = [(name, p) for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    for name, parameter in trained:
        expected = values[name].detach().flatten()[: parameter.numel()]
        assert torch.equal(weights.read(name, 0, parameter.numel()), expected), name
        low, high = parameter.numel() // 4, parameter.numel() // 2
        assert torch.equal(weights.read(name, low, high), expected[low:high]), name


@pytest.mark.parametrize(
    ("model", "tuning", "settings"),
    [
        ("llama", {"method": "lora"}, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"])),
        ("t5", {"method": "lora", "rank": 2, "targets": "attention"},
         peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=6, target_modules=r".*\.(q|k|v|o)")),
        ("t5", {"method": "prompt"}, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)),
        ("llama", {"method": "prompt"}, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ("t5", {"method": "prefix"}, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)),
        ("llama", {"method": "multitask_prompt", "virtual_tokens": 4},
         peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_ranks=2, num_tasks=1)),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else None,
)  # fmt: skip
def test_from_an_adapter_of_peft(tmp_path: Path, model: str, tuning: dict[str, Any], settings: Any) -> None:
    peft_model = theirs(tmp_path / "adapter", base_of(tmp_path, model), settings)
    tuned, weights, notes = begun(tmp_path, model, tuning)
    same(tuned, weights, peft_model)
    assert notes == [f"begins as the adapter in {tmp_path / 'adapter'}"]


def test_other_tasks_begin_as_the_mean(tmp_path: Path) -> None:
    settings = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3)
    theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    _, weights, notes = begun(tmp_path, "llama", {"method": "multitask_prompt"})
    for key in ("prefix_task_cols", "prefix_task_rows"):
        expected = held[key].mean(0).flatten()
        found = weights.read(f"prompt_encoder.default.{key}", 0, expected.numel())
        torch.testing.assert_close(found, expected)
        assert torch.equal(weights.read(f"prompt_encoder.default.{key}", 1, 3), found[1:3])
        assert f"{key} of each task begins as the mean of those of the adapter's 3 tasks" in notes


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_head_for_other_labels_begins_anew(tmp_path: Path, method: str) -> None:
    settings: Any = {
        "lora": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]),
        "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    }[method]
    model = theirs(tmp_path / "adapter", base_of(tmp_path, "bert", num_labels=2), settings)
    anew = "the classification head begins anew: the adapter has none for these labels"
    tuned, weights, notes = begun(tmp_path, "bert", {"method": method}, ["no", "pet"])
    same(tuned, weights, model)
    assert anew not in notes
    for labels, saved in ((["a", "b", "c"], None), (["no", "pet"], ["yes", "pet"])):
        if saved:
            (tmp_path / "adapter" / "labels.json").write_text(json.dumps(saved))
        tuned, weights, notes = begun(tmp_path, "bert", {"method": method}, labels)
        assert anew in notes
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and ".modules_to_save." not in name:
                expected = dict(model.named_parameters())[name].detach().flatten()
                assert torch.equal(weights.read(name, 0, parameter.numel()), expected)
        values = dict(model.named_parameters())
        head = next(name for name in values if name.endswith("classifier.modules_to_save.default.weight"))
        assert not torch.equal(weights.read(head, 0, 40), values[head].detach().flatten()[:40])


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        ({"method": "lora", "rank": 4}, r"tuning.rank: is 4, but that of the adapter in .* is 3; give the same"),
        ({"method": "lora", "alpha": 3}, r"tuning.alpha: is 3.*is 8"),
        ({"method": "prompt"}, r"holds an adapter of kind LORA \(tuning.method: lora\), but tuning.method is prompt"),
        ({"method": "lora", "targets": ["q_proj"]}, r"4 of its tensors have no place in this model, such as .*v_proj"),
        ({"method": "lora", "targets": "all-linear"}, r"has nothing for 24 of 28 trained parameters, such as .*q_proj"),
        ({"method": "lora", "from": "nowhere"}, r"tuning.from nowhere: there is no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path: Path, tuning: dict[str, Any], says: str) -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"])
    theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    with pytest.raises(ConfigError, match=says):
        begun(tmp_path, "llama", tuning)


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_an_adapter_of_another_kind_of_lora(tmp_path: Path, option: str) -> None:
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"], **{option: True})
    theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    with pytest.raises(ConfigError, match=rf"its {option} is True, but that of tuning.method: lora is False"):
        begun(tmp_path, "llama", {"method": "lora"})


def test_an_adapter_whose_layers_have_ranks_of_their_own(tmp_path: Path) -> None:
    ranks = {"0.self_attn.v_proj": 2}
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"], rank_pattern=ranks)
    theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    with pytest.raises(ConfigError, match=r"its layers have ranks of their own.*; begin from an adapter with one rank"):
        begun(tmp_path, "llama", {"method": "lora"})


def test_adapters_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    settings = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    with pytest.raises(ConfigError, match=r"does not hold trained_encoder.safetensors, the network"):
        begun(tmp_path, "llama", {"method": "p_tuning"})
    shutil.rmtree(tmp_path / "adapter")
    model.save_pretrained(str(tmp_path / "adapter" / "final"))
    with pytest.raises(ConfigError, match=r"no adapter, in it; did you mean .*adapter/final\?"):
        begun(tmp_path, "llama", {"method": "p_tuning"})
    shutil.rmtree(tmp_path / "adapter")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs(tmp_path / "adapter", base_of(tmp_path, "llama"), settings)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(4, 8)}, str(file))
    with pytest.raises(ConfigError, match=r"prompt_embeddings has shape \[4, 8\], but this model needs \[4, 32\]"):
        begun(tmp_path, "llama", {"method": "prompt"})
    file.unlink()
    with pytest.raises(ConfigError, match=r"there is no adapter_model.safetensors in it"):
        begun(tmp_path, "llama", {"method": "prompt"})
