"""What goes wrong for users ends early, with the code of the contract, the place, and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from launching import BIN, Finished, command, marked, ranks_of, run, started, wait_for
from shardtune.cli import main
from shardtune.errors import ConfigError
from shardtune.model.tokenizer import train_tokenizer
from tiny import ARCHITECTURES, TASKS, rows, tiny_config, write_rows

CPU_SECONDS = 5.0
"""User time within which an error is found that needs no weights; wall-clock time depends on the machine's load."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny T5 and its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained") / "t5"
    train_tokenizer((row["text"] for row in rows(60)), 400, "seq2seq", folder)
    (folder / "config.json").write_text(json.dumps(ARCHITECTURES["t5"]))
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(folder))
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def train(config: Path, cache: Path, launcher: str = "python", ranks: int = 1, *overrides: str, **how: Any) -> Finished:
    return run(command(launcher, ranks, "--config", config, *overrides), cache, **how)


def check(done: Finished, code: int, *words: str, launcher: str = "python") -> None:
    """The exit code, once said; the words in the message; nothing that only programmers understand; nobody left."""
    assert done.code == (1 if launcher == "torchrun" else code), done.said
    assert done.err.count(f"shardtune: error (exit code {code})") == 1, done.said
    for word in words:
        assert done.err.count(word) == 1, (word, done.said)
    own = done.err.partition("ChildFailedError")[0] if launcher == "torchrun" else done.err
    if launcher == "torchrun":  # it shows a traceback of its own
        own = own.rpartition("Traceback")[0]
    assert "Traceback" not in own, done.said
    assert done.left == [], done.said


def imports_torch(done: Finished) -> bool:
    assert "argparse" in done.modules  # the log of imports is there
    return "torch" in done.modules


def line_of(config: Path, text: str) -> str:
    """FILE:LINE of the line that begins with `text`."""
    lines = config.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.strip().startswith(text)]
    assert len(found) == 1
    return f"{config}:{found[0]}"


# ------------------------------------------------------------------------------------ config and command line


@dataclass
class Wrong:
    """A wrong config or command line."""

    keys: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    line: str = ""
    """How the wrong line of the file begins; none: the mistake is on the command line."""
    message: str = ""


WRONG = {
    "unknown key": Wrong({"optimizer__learning_rate": 1}, line="learning_rate", message="did you mean optimizer.lr?"),
    "unknown section": Wrong({"optimiser": {"lr": 1e-3}}, line="optimiser", message="did you mean optimizer?"),
    "wrong type": Wrong({"batch__examples": "many"}, line="examples: many", message="batch.examples: should be an int"),
    "wrong choice": Wrong({"strategy__kind": "fsdp"}, line="kind: fsdp", message="did you mean fsdp2?"),
    "conflict": Wrong({"tuning__method": "full", "task__prompt": "{text}"}, line="prompt", message="exactly one of"),
    "override without value": Wrong(overrides=("optimizer.lr",), message="the form key.path=value"),
    "override of an unknown key": Wrong(overrides=("optimizer.learn=1",), message="optimizer.learn: unknown key"),
    "override of a wrong type": Wrong(overrides=("batch.examples=many",), message="batch.examples: should be an int"),
    "own metric": Wrong(overrides=("evaluation.metrics=[no_such:score]",), message="no module no_such, neither in"),
    "model path": Wrong(overrides=("model.path=./nowhere",), message="model.path ./nowhere: there is no such folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config(name: str, tmp_path: Path, cache: Path) -> None:
    wrong = WRONG[name]
    config = tiny_config(tmp_path, **wrong.keys)
    done = train(config, cache, "python", 1, *wrong.overrides, imports=True)
    check(done, ConfigError.exit_code, wrong.message, *([line_of(config, wrong.line)] if wrong.line else []))
    assert not imports_torch(done)
    assert done.cpu_seconds < CPU_SECONDS, done.said
    assert not (tmp_path / "runs").exists()
    print(f"{name}: {done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


def test_all_problems_at_once(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, optimizer__learning_rate=1, batch__examples="many", data__batching="pack")
    done = train(config, cache, "shardtune", 2, "nonsense=1", imports=True)
    check(done, ConfigError.exit_code, line_of(config, "learning_rate"), "batch.examples", "data.batching", "nonsense")
    assert not imports_torch(done)


def test_conflicts_are_told_beside_wrong_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(
        tmp_path, name="a/b", batch__examples="many", task__prompt="{text}", duration={"steps": 1, "epochs": 1}
    )
    assert main(["train", "--config", str(config), "batch.micro_exampels=1"]) == ConfigError.exit_code
    said = capsys.readouterr().err.splitlines()[1:]
    starts = ("name", "batch.examples", "batch.micro_exampels", "task.prompt", "duration")
    for key in starts:
        assert sum(f" {key}: " in line for line in said) == 1, said
    assert len(said) == len(starts), "nothing that only a default in place of a wrong value makes wrong"


@pytest.mark.parametrize("launcher", ["shardtune", "torchrun", "deepspeed"])
def test_wrong_config_on_two_ranks(launcher: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, optimizer__learning_rate=1)
    done = train(config, cache, launcher, 2)
    check(done, ConfigError.exit_code, line_of(config, "learning_rate"), launcher=launcher)
    print(f"{launcher}: {done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


@pytest.mark.parametrize("launcher", ["shardtune", "torchrun", "deepspeed"])
def test_single_is_refused_on_two_ranks(launcher: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, strategy__kind="single")
    done = train(config, cache, launcher, 2, imports=launcher == "shardtune")
    check(done, ConfigError.exit_code, "single cannot use 2 ranks", launcher=launcher)
    assert launcher != "shardtune" or not imports_torch(done)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["train", "--help"], 0), (["train", "--confg", "x"], 2), (["no-such-command"], 2), ([], 2)],
)
def test_help_and_wrong_flags(arguments: list[str], code: int, cache: Path) -> None:
    done = run([str(BIN / "shardtune"), *arguments], cache, imports=True)
    assert done.code == code, done.said
    assert "usage: shardtune" in done.out + done.err
    assert not imports_torch(done)
    assert "Traceback" not in done.err


def test_overrides_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    words = ["train", "a.b=1", "--config", str(config), "c.d=2", "e.f=3", "--ranks", "1", "g.h=4"]
    assert main(words) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert [key for key in ("a.b", "c.d", "e.f", "g.h") if f"command line {key[0]}: unknown key" in said] == [
        "a.b", "c.d", "e.f", "g.h",
    ], said  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "x", "--epochs", "3"], "--epochs: unknown option; keys of the config are given as"),
        (["train", "--config", "x", "--strategy.kind=ddp"], "--strategy.kind=ddp: unknown option"),
        (["export", "--run", "x", "--out", "y", "z"], "z: unknown"),
    ],
)
def test_unknown_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == ConfigError.exit_code
    said = capsys.readouterr().err
    assert message in said
    assert f"usage: shardtune {words[0]}" in said


CONFLICTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two sources": ("t5", {"task__prompt": "{text}"}),
    "no source": ("t5", {"task": {"kind": "seq2seq", "target": "summary"}}),
    "text and target": ("llama", {"task": {"kind": "causal", "text": "text", "target": "summary"}}),
    "no target": ("llama", {"task": {"kind": "causal", "source": "text"}}),
    "shares": ("t5", {"data__validation": None, "data__splits": [0.5, 0.1, 0.1]}),
    "no share for training": ("t5", {"data__validation": None, "data__splits": [0.0, 0.5, 0.5]}),
    "two lengths": ("t5", {"duration": {"steps": 1, "epochs": 1}}),
    "too few pieces": ("t5", {"model__tokenizer": "train:10"}),
    "new tokenizer, old weights": ("t5", {"model__weights": "pretrained"}),
    "no layers": ("t5", {"model__layers": []}),
    "texts judged as labels": ("t5", {"evaluation__metrics": ["accuracy"]}),
    "labels judged as texts": ("bert", {"evaluation__metrics": ["rouge"]}),
    "a whole text with references": (
        "llama", {"task": {"kind": "causal", "text": "text"}, "evaluation__metrics": ["bleu"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, keys = CONFLICTS[name]
    config = tiny_config(tmp_path, model, **keys)
    assert main(["train", "--config", str(config)]) == ConfigError.exit_code
    problem = capsys.readouterr().err.splitlines()[-1]
    key = re.fullmatch(rf"{re.escape(str(config))}:\d+ ([a-z_.]+): .+", problem)
    assert key, problem
    assert key[1].split(".")[0] in {"task", "data", "duration", "model", "evaluation"}


# ---------------------------------------------------------------------------------------------------- data


def missing_field(folder: Path) -> str:
    made = rows(500)
    made[411] = {"text": made[411]["text"], "sumary": "a"}
    write_rows(folder / "train.jsonl", made)
    return f"{folder / 'train.jsonl'}:412 field `summary`: absent; the row has: text, sumary; did you mean `sumary`?"


def empty_file(folder: Path) -> str:
    (folder / "train.jsonl").write_text("")
    return f"{folder / 'train.jsonl'}: the file is empty"


def not_utf8(folder: Path) -> str:
    write_rows(folder / "train.jsonl", rows(5))
    with (folder / "train.jsonl").open("ab") as file:
        file.write('{"text": "Müller", "summary": "x"}\n'.encode("latin-1"))
    return f"{folder / 'train.jsonl'}:6: not UTF-8: byte 0xfc"


def empty_targets(folder: Path) -> str:
    write_rows(folder / "train.jsonl", [{**row, "summary": " "} for row in rows(60)])
    return f"{folder / 'train.jsonl'}: no training example is left of 60 rows read (empty target: 60)"


def missing_file(folder: Path) -> str:
    (folder / "train.jsonl").rename(folder / "train-1.jsonl")
    return f"{folder / 'train.jsonl'}: no such file; did you mean {folder / 'train-1.jsonl'}?"


DATA: list[Callable[[Path], str]] = [missing_field, empty_file, not_utf8, empty_targets, missing_file]


@pytest.mark.parametrize("spoil", DATA, ids=lambda spoil: spoil.__name__)
def test_wrong_data(spoil: Callable[[Path], str], tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path)
    message = spoil(tmp_path)
    done = train(config, cache, imports=True)
    check(done, 3, message)
    assert not imports_torch(done)
    assert done.cpu_seconds < CPU_SECONDS, done.said
    print(f"{spoil.__name__}: {done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


@pytest.mark.parametrize("launcher", ["shardtune", "torchrun", "deepspeed"])
def test_wrong_data_on_two_ranks(launcher: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path)
    message = missing_field(tmp_path)
    done = train(config, cache, launcher, 2)
    check(done, 3, message, launcher=launcher)
    print(f"{launcher}: {done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


# --------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("model", "task", "fits"),
    [
        ("bert", "seq2seq", "it fits task.kind: classification, token_classification or question_answering."),
        ("t5", "causal", "it fits task.kind: seq2seq or classification."),
        ("gpt2", "seq2seq", "it fits task.kind: causal"),
    ],
)
def test_model_does_not_fit(model: str, task: str, fits: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, model, task=TASKS[task])
    done = train(config, cache)
    check(done, 2, f"model.path {tmp_path / model}: a {model} model does not fit task.kind: {task}; ", fits)
    assert done.cpu_seconds < 2 * CPU_SECONDS, done.said
    print(f"{model} for {task}: {done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


def only_a_pickle(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return f"model.path {folder}: only pytorch_model.bin, a pickle, which is never read"


def cut_off(folder: Path) -> str:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    return f"{file}: "


def cut_off_early(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 100)
    return f"{folder / 'model.safetensors'}: not a whole safetensors file"


def other_shapes(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_ff": 48}))
    return f"{folder / 'model.safetensors'}: encoder.block.0.layer.1.DenseReluDense.wi.weight has shape [64, 32]"


def copied(pretrained: Path, folder: Path) -> Path:
    target = folder / "t5"
    target.mkdir(exist_ok=True)
    for file in pretrained.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("spoil", [only_a_pickle, cut_off, cut_off_early, other_shapes], ids=lambda s: s.__name__)
def test_wrong_weights(spoil: Callable[[Path], str], tmp_path: Path, pretrained: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, model__weights="pretrained", model__tokenizer=str(pretrained))
    message = spoil(copied(pretrained, tmp_path))
    done = train(config, cache)
    check(done, 2, message)
    assert not (tmp_path / "runs" / "tiny" / "final").exists()


def test_model_does_not_fit_on_two_ranks(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, "bert", task=TASKS["seq2seq"])
    check(train(config, cache, "shardtune", 2), 2, "a bert model does not fit task.kind: seq2seq")


# ------------------------------------------------------------------------------------------------- storage


def test_a_file_in_place_of_runs(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "runs").write_text("")
    done = train(config, cache, imports=True)
    check(done, 7, f"{tmp_path / 'runs' / 'tiny'}: cannot be made: {tmp_path / 'runs'} is a file")
    assert not imports_torch(done)
    assert done.cpu_seconds < CPU_SECONDS, done.said
    print(f"{done.cpu_seconds:.2f} s of CPU, {done.seconds:.2f} s")


@pytest.mark.parametrize("launcher", ["shardtune", "torchrun", "deepspeed"])
def test_a_file_in_place_of_runs_on_two_ranks(launcher: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "runs").write_text("")
    check(train(config, cache, launcher, 2), 7, "cannot be made", launcher=launcher)


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("launcher", "ranks", "kind"), [("python", 1, "single"), ("shardtune", 2, "fsdp2"), ("torchrun", 2, "zero2")]
)
def test_too_high_a_learning_rate(launcher: str, ranks: int, kind: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(
        tmp_path, optimizer__lr=1e30, optimizer__max_grad_norm=None, duration__steps=12, strategy__kind=kind,
        checkpoint__every=1,
    )  # fmt: skip
    done = train(config, cache, launcher, ranks)
    check(done, 5, "not finite; the step was not taken", launcher=launcher)
    kept = sorted((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    assert f"{kept[-1]} is kept" in done.said, "what was on its way when the numbers went wrong is whole"
    assert list((tmp_path / "runs" / "tiny").glob("final*")) == []


def test_weights_that_are_not_finite(tmp_path: Path, pretrained: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, model__weights="pretrained", model__tokenizer=str(pretrained))
    file = copied(pretrained, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 5] = torch.inf
    save_file(tensors, file)
    done = train(config, cache, "python", 1, "evaluation.baseline=true")
    check(done, 5, "step 1: ", "not finite")
    assert list((tmp_path / "runs" / "tiny").glob("final*")) == []


# --------------------------------------------------------------------------------------------------- ranks


def test_a_folder_that_a_run_is_writing(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, duration__steps=100_000, evaluation__every=1_000_000)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    with started(command("shardtune", 2, "--config", config), cache, tmp_path / "output"):
        assert wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, 120), (tmp_path / "output").read_text()
        for overrides in ([], ["checkpoint.resume=never"]):
            done = train(config, cache, "python", 1, *overrides)
            check(done, ConfigError.exit_code, f"{metrics.parent}: another run is writing there")
        size = metrics.stat().st_size
        assert wait_for(lambda: metrics.stat().st_size > size, 60), "the first run goes on"
        assert [path.name for path in metrics.parents[1].iterdir()] == ["tiny"]
    # The lock ends with the process that held it.
    done = train(config, cache, "python", 1, "duration.steps=1", "checkpoint.resume=never")
    assert done.code == 0, done.said
    assert f"what was there is now in {metrics.parent}.old-1" in done.err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(victim: int, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(tmp_path, duration__steps=100_000, evaluation__every=1_000_000)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    with started(command("shardtune", 2, "--config", config), cache, tmp_path / "output") as process:
        assert wait_for(lambda: metrics.exists() and len(metrics.read_bytes()) > 0, 120), (
            tmp_path / "output"
        ).read_text()
        os.kill(ranks_of(process.mark)[victim], signal.SIGKILL)  # type: ignore[attr-defined]
        assert wait_for(lambda: process.poll() is not None, 20)
        said = (tmp_path / "output").read_text()
        assert process.returncode == 6, said
        assert f"rank {victim} was killed by SIGKILL" in said
        assert not marked(process.mark)  # type: ignore[attr-defined]
