"""Options of evaluation that cannot work together are refused, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

import tiny
from shardtune.assemble.positions import check_positions
from shardtune.config_file import load_config
from shardtune.errors import ConfigError

SEQ2SEQ = "task: {kind: seq2seq, source: a, target: b}\n"
CLASSES = "task: {kind: classification, text: a, label: b}\n"
WHOLE = "task: {kind: causal, text: a}\n"
HAS_NONE = "is for texts that a model writes, and task.kind: {} has none"


def faults(folder: Path, task: str, evaluation: str, data: str = "data: {train: x.jsonl}\n", more: str = "") -> str:
    path = folder / "config.yaml"
    path.write_text(f"model: {{path: a/b}}\n{task}{data}evaluation: {{{evaluation}}}\n{more}", encoding="utf-8")
    try:
        load_config(path, [])
    except ConfigError as error:
        return str(error).replace(str(path), "FILE")
    return ""


@pytest.mark.parametrize(
    ("evaluation", "fault"),
    [
        ("temperature: 0.5, beams: 2",
         "evaluation.temperature: beams are not drawn; use evaluation.beams: 1, or temperature: 0"),
        ("top_k: 3", "evaluation.top_k: nothing is drawn at temperature 0; give evaluation.temperature"),
        ("top_p: 0.9", "evaluation.top_p: nothing is drawn at temperature 0; give evaluation.temperature"),
        ("min_new_tokens: 9, max_new_tokens: 8",
         "evaluation.min_new_tokens: 9 is more than evaluation.max_new_tokens, which is 8"),
        ("length_penalty: 2.0",
         "evaluation.length_penalty: texts of different length are compared by beam search only; give beams"),
        ("shots: [0, 1], baseline: false",
         "evaluation.shots: are judged before the first step, which evaluation.baseline: false leaves out"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, evaluation: str, fault: str) -> None:
    assert faults(tmp_path, SEQ2SEQ, evaluation) == f"FILE:4 {fault}"


@pytest.mark.parametrize(("task", "kind"), [(CLASSES, "classification"), (WHOLE, "causal")])
@pytest.mark.parametrize(
    "given",
    ["shots: [2]", "stop: [x]", "beams: 2", "length_penalty: 0.5", "min_new_tokens: 1", "no_repeat_ngram: 2",
     "temperature: 1.0", "top_k: 2", "top_p: 0.5"],
)  # fmt: skip
def test_tasks_that_write_no_text_have_no_options_for_it(tmp_path: Path, task: str, kind: str, given: str) -> None:
    assert faults(tmp_path, task, given) == f"FILE:4 evaluation.{given.partition(':')[0]}: {HAS_NONE.format(kind)}"


def test_shots_need_all_texts(tmp_path: Path) -> None:
    data = "data: {train: x.jsonl, streaming: true}\n"
    found = faults(tmp_path, SEQ2SEQ, "shots: [1]", data, "duration: {steps: 3}\n")
    assert found.startswith("FILE:4 evaluation.shots: are drawn from all training examples, which a stream does not")


@pytest.mark.parametrize(
    "evaluation",
    ["temperature: 0.5, top_k: 3, top_p: 0.9, stop: [x]", "beams: 3, length_penalty: 2.0, no_repeat_ngram: 3",
     "shots: [0, 1, 3], min_new_tokens: 8, max_new_tokens: 8", "baseline: false", "shots: [0], baseline: false"],
)  # fmt: skip
def test_taken(tmp_path: Path, evaluation: str) -> None:
    assert faults(tmp_path, SEQ2SEQ, evaluation) == ""


@pytest.mark.parametrize("task", [CLASSES, WHOLE])
def test_defaults_fit_every_task(tmp_path: Path, task: str) -> None:
    assert faults(tmp_path, task, "max_new_tokens: 5, shots: [0]") == ""


@pytest.mark.parametrize(
    ("model", "new", "tuning", "room"),
    [
        ("gpt2", 80, {"method": "full"}, None),
        ("gpt2", 81, {"method": "full"}, "behind the 48 tokens .* the 128 positions of .*gpt2; use at most 80"),
        ("gpt2", 80, {"method": "prompt", "virtual_tokens": 1}, "behind the 49 tokens .*; use at most 79"),
        ("bart", 128, {"method": "full"}, None),
        ("bart", 129, {"method": "prompt", "virtual_tokens": 9}, "129 are more than .*at most 128"),
        ("bart", 120, {"method": "prefix", "virtual_tokens": 9}, "behind the 9 tokens .*; use at most 119"),
        ("llama", 9999, {"method": "full"}, None),  # rotary positions go on
        ("t5", 9999, {"method": "full"}, None),
        ("bert", 9999, {"method": "full"}, None),  # writes nothing
    ],
)
def test_there_are_positions_for_what_is_written(
    tmp_path: Path, model: str, new: int, tuning: dict[str, object], room: str | None
) -> None:
    path = tiny.tiny_config(tmp_path, model, evaluation__max_new_tokens=new, tuning=tuning)
    config, architecture = load_config(path, []), AutoConfig.from_pretrained(tmp_path / model)
    if room is None:
        check_positions(config, architecture)
        return
    with pytest.raises(ConfigError, match=f"evaluation.max_new_tokens: .*{room}"):
        check_positions(config, architecture)
