"""What a run that goes on may change, and how it tells that data and model are what they were."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

import tiny
from shardtune.assemble.data import read_texts
from shardtune.assemble.resumable import FIXED, FREE, FREE_SECTIONS, UNSAID, compare
from shardtune.config import Config, DataConfig
from shardtune.config_file import load_config, places
from shardtune.errors import CheckpointError, ConfigError
from shardtune.model.identity import identity_of

DATA = {"fingerprint": "aa", "examples": 1200}
LORA = {"method": "lora", "rank": 4}


def saved(config: Config, **other: Any) -> dict[str, Any]:
    """A checkpoint's state, as JSON gives it back."""
    state = {"step": 1500, "config": config.model_dump(mode="json"), "data": DATA, "base": "bb"}
    return json.loads(json.dumps({**state, **other}))


def every_key(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = [] if (section, name) == (DataConfig, "train") else list(sections(info.annotation))
        for one in inner:
            yield from every_key(one, f"{prefix}{name}.")
        if not inner:
            yield prefix + name


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not list:
        for part in get_args(annotation):
            yield from sections(part)


def test_every_key_is_in_one_class() -> None:
    keys = set(every_key(Config))
    assert {"seed", "optimizer.lr", "tuning.from", "data.train", "duration.minutes"} <= keys
    for key in sorted(keys):
        free = key in FREE or (key.partition(".")[0] in FREE_SECTIONS and key not in UNSAID)
        assert [key in UNSAID, free, key in FIXED].count(True) == 1, f"{key}: say in resumable.py whether it may change"
    assert not {*FIXED, *FREE, *UNSAID} - keys, "keys that are no more"


HARMLESS = {
    "optimizer.lr=5e-4": "optimizer.lr: 0.0005, was 0.001",
    "optimizer.weight_decay=0.1": "optimizer.weight_decay: 0.1, was 0.0",
    "optimizer.betas=[0.8, 0.9]": "optimizer.betas: [0.8, 0.9], was [0.9, 0.999]",
    "optimizer.schedule=constant": "optimizer.schedule: constant, was linear",
    "optimizer.max_grad_norm=null": "optimizer.max_grad_norm: null, was 1.0",
    "batch.micro_examples=2": "batch.micro_examples: 2, was 4",
    "strategy.kind=zero3": "strategy.kind: zero3, was auto",
    "checkpoint.every=10m": "checkpoint.every: 10m, was 500",
    "evaluation.every=20000": "evaluation.every: 20,000, was 500",
    "tracking.tensorboard=true": "tracking.tensorboard: true, was false",
    "kernels.fused=off": "kernels.fused: off, was auto",
    "data.batching=grouped": "data.batching: grouped, was padded",
    "data.prefetch=0": "data.prefetch: 0, was 2",
    "data.splits=[0.5, 0.3, 0.2]": "data.splits: [0.5, 0.3, 0.2], was [0.8, 0.1, 0.1]",  # validation is given
    "data.test=other.jsonl": "data.test: other.jsonl, was null",
    "data.shuffle_buffer=7": "data.shuffle_buffer: 7, was 10,000",
    "model.dtype=bfloat16": "model.dtype: bfloat16, was float32",
    "model.recompute=full": "model.recompute: full, was none",
    "model.attention=sdpa": "model.attention: sdpa, was auto",
    "model.dropout=0.1": "model.dropout: 0.1, was null",
    "tuning.dropout=0.2": "tuning.dropout: 0.2, was 0.0",
    "name=other": "",
    "runs=elsewhere": "",
    "checkpoint.resume=never": "",
}
REFUSED = {
    "seed=1": "seed: 1, was 0",
    "model.tokenizer=train:500": "model.tokenizer: train:500, was train:400",
    "task.max_target_tokens=5": "task.max_target_tokens: 5, was 128",
    "task.max_source_tokens=47": "task.max_source_tokens: 47, was 48",
    "task.prompt=null": "task.prompt: null, was {text}",
    "data.validation=null": "data.validation: null, was ",
    "data.shuffle=false": "data.shuffle: false, was true",
    "batch.examples=13": "batch.examples: 13, was 12",
    "tuning.rank=8": "tuning.rank: 8, was 4",
    "tuning.alpha=7.5": "tuning.alpha: 7.5, was 32",
    "tuning.targets=mlp": "tuning.targets: mlp, was all-linear",
    "tuning.dtype=bfloat16": "tuning.dtype: bfloat16, was float32",
    "tuning.from=an/adapter": "tuning.from: an/adapter, was null",
    "tuning.method=dora": "tuning.method: dora, was lora",
    "tuning.method=full": "tuning.method: full, was lora",
    "optimizer.name=lion": "optimizer.name: lion, was adamw",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = {"kind": "causal", "prompt": "{text}", "target": "summary", "max_source_tokens": 48}
    return tiny.tiny_config(tmp_path_factory.mktemp("resumable"), "llama", tuning=LORA, task=task)


def refusal(state: dict[str, Any], config: Config, data: dict[str, Any] | None = DATA, base: str = "bb") -> str:
    with pytest.raises(CheckpointError) as caught:
        compare(state, config, data, base)
    return str(caught.value)


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_changes_are_listed(file: Path, change: str) -> None:
    state = saved(load_config(file, []))
    wanted = [HARMLESS[change]] if HARMLESS[change] else []
    assert compare(state, load_config(file, [change]), DATA, "bb") == wanted


@pytest.mark.parametrize("change", REFUSED)
def test_what_makes_the_saved_state_meaningless_is_refused(file: Path, change: str) -> None:
    overrides = [change, "task.source=text"] if change == "task.prompt=null" else [change]
    said = refusal(saved(load_config(file, [])), load_config(file, overrides))
    assert said.startswith(REFUSED[change]) or f"\n{REFUSED[change]}" in said
    assert "step 1,500" in said
    assert "checkpoint.resume=never" in said
    assert len(said.splitlines()) == len(overrides) + 1, "options of another method or optimizer are no news"


def test_all_that_is_refused_is_said_at_once_with_its_place(file: Path) -> None:
    overrides = ["seed=7", "tuning.rank=2", "optimizer.lr=1e-5"]
    with pytest.raises(CheckpointError) as caught:
        compare(saved(load_config(file, [])), load_config(file, overrides), DATA, "bb", places(file, overrides))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["command line seed", "command line tuning.rank"]
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "max_source_tokens" in text)
    assert places(file, [])("task.max_source_tokens") == f"{file}:{line}"


def test_any_set_of_harmless_changes_is_listed_whole(file: Path) -> None:
    state, seed = saved(load_config(file, [])), random.randrange(1000)
    print(f"seed {seed}")
    for _ in range(5):
        chosen = random.Random(seed).sample([key for key in HARMLESS if HARMLESS[key]], 6)
        lines = compare(state, load_config(file, [c for c in chosen if "=grouped" not in c]), DATA, "bb")
        assert sorted(lines) == sorted(HARMLESS[c] for c in chosen if "=grouped" not in c)
        seed += 1


@pytest.mark.parametrize(
    ("before", "change", "allowed"),
    [
        (["data.validation=null"], "data.splits=[0.8,0.2,0.0]", True),
        (["data.validation=null"], "data.splits=[0.7,0.2,0.1]", False),
        (["data.validation=null"], "data.test=t.jsonl", False),
        (["data.test=t.jsonl"], "data.validation=null", True),
        (["data.validation=null", "data.splits=[1.0,0.0,0.0]"], "data.validation=v.jsonl", True),
        (["data.streaming=true"], "data.shuffle_buffer=50", False),
        (["data.streaming=true", "data.shuffle=false"], "data.shuffle_buffer=50", True),
        (["data.streaming=true"], "data.train=moved.jsonl", False),
    ],
)
def test_what_is_trained_on_stays(file: Path, before: list[str], change: str, allowed: bool) -> None:
    streams = "data.streaming=true" in before
    before = [*before, "model.tokenizer=null"] if streams else before
    data = None if streams else DATA
    state, now = saved(load_config(file, before), data=data), load_config(file, [*before, change])
    if allowed:
        assert [line.partition(":")[0] for line in compare(state, now, data, "bb")] == [change.partition("=")[0]]
    else:
        assert refusal(state, now, data).startswith(change.partition("=")[0])


def test_files_that_moved_are_the_same_and_files_that_changed_are_not(file: Path) -> None:
    state, config = saved(load_config(file, [])), load_config(file, [])
    moved = load_config(file, ["data.train=moved.jsonl", "model.path=moved"])
    assert [line.split(":")[0] for line in compare(state, moved, DATA, "bb")] == ["model.path", "data.train"]
    other = {"fingerprint": "cc", "examples": 1000}
    assert "data.train: the training data has changed: 1,000 examples, was 1,200" in refusal(state, config, other)
    assert "other examples, 1,200 as before" in refusal(state, config, {**other, "examples": 1200})
    assert "model.path: the model in" in refusal(state, config, base="cc")
    said = refusal(state, moved, other, "cc")
    assert said.startswith("model.path: moved, was")
    assert "\ndata.train: moved.jsonl, was" in said


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_changed_duration_says_what_becomes_of_the_rate(file: Path, schedule: str) -> None:
    given = [f"optimizer.schedule={schedule}"]
    state = saved(load_config(file, [*given, "duration.steps=2000"]))

    def line(change: str) -> str:
        (only,) = compare(state, load_config(file, [*given, change]), DATA, "bb")
        return only

    assert line("duration.steps=3000").startswith("duration.steps: 3,000, was 2,000")
    assert line("duration.minutes=5").startswith("duration.minutes: 5.0, was 2,000 steps")
    for change, rate in (("steps=3000", "higher"), ("steps=1000", "lower"), ("epochs=2", "another")):
        assert (f"is {rate} than planned" in line(f"duration.{change}")) == (schedule == "linear")


def test_the_ranks_of_adalora_need_the_steps_they_were_planned_for(file: Path) -> None:
    state = saved(load_config(file, ["tuning.method=adalora", "duration.steps=2000"]))
    longer = load_config(file, ["tuning.method=adalora", "duration.steps=3000"])
    assert len(compare(state, longer, DATA, "bb")) == 1
    for change in ("steps=1000", "epochs=2"):
        assert "ranks" in refusal(state, load_config(file, ["tuning.method=adalora", f"duration.{change}"]))


def test_a_config_of_an_older_version_has_the_defaults_of_this_one(file: Path) -> None:
    config = load_config(file, [])
    state = saved(config)
    del state["config"]["checkpoint"]["background"]
    assert compare(state, config, DATA, "bb") == []
    state["config"]["checkpoint"]["pigeons"] = 3
    assert "another version" in refusal(state, config)
    for unusable in (None, [], "config"):
        assert "another version" in refusal({**state, "config": unusable}, config)
    del state["config"]
    assert "another version" in refusal(state, config)


def test_the_training_examples_have_a_fingerprint_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    file = tiny.tiny_config(tmp_path, "t5")
    first = read_texts(load_config(file, []))
    again = read_texts(load_config(file, []))  # remembered
    without = read_texts(load_config(file, [f"data.validation={tmp_path / 'train.jsonl'}"]))
    assert first.train_fingerprint == again.train_fingerprint == without.train_fingerprint
    assert first.fingerprint != without.fingerprint
    made = tiny.rows(60, seed=1)
    tiny.write_rows(tmp_path / "train.jsonl", [*made[1:], made[0]])
    assert read_texts(load_config(file, [])).train_fingerprint != first.train_fingerprint, "their order counts"


def test_a_model_is_known_by_its_weights_wherever_they_lie(tmp_path: Path) -> None:
    torch.manual_seed(seed := random.randrange(10_000))
    print(f"seed {seed}")
    tensors = {"a": torch.randn(70, 80), "b": torch.randn(5000), "c": torch.randn(3).bfloat16(), "d": torch.ones(())}

    def model(name: str, shards: list[list[str]], config: str = "{}", **other: torch.Tensor) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        files = {f"model-{number}.safetensors": names for number, names in enumerate(shards)}
        for shard, names in files.items():
            save_file({key: {**tensors, **other}[key] for key in names}, folder / shard)
        where = {key: shard for shard, names in files.items() for key in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return folder

    one = identity_of(str(model("one", [list("abcd")])), pretrained=True)
    assert identity_of(str(model("two", [["c", "a"], ["d", "b"]])), pretrained=True) == one
    for name in tensors:
        changed = tensors[name] + 0.01 * torch.rand(tensors[name].shape).to(tensors[name].dtype) + 0.01
        assert identity_of(str(model(f"other-{name}", [list("abcd")], **{name: changed})), pretrained=True) != one
    shaped = model("shaped", [list("abcd")], a=tensors["a"].view(80, 70))
    assert identity_of(str(shaped), pretrained=True) != one
    described = str(model("described", [list("abcd")], '{"x": 1}'))
    assert identity_of(described, pretrained=True) != one
    alike = [identity_of(str(tmp_path / name), pretrained=False) for name in ("one", "shaped", "described")]
    assert alike[0] == alike[1] != alike[2], "random weights are not those of the files"
    with pytest.raises(ConfigError, match=r"model\.path"):
        identity_of(str(tmp_path / "absent"), pretrained=False)
