"""Several sources: what the config may say, how many examples come from each, and what a run says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launching import command, run
from shardtune.config_file import dump_config, load_config
from shardtune.data.splits import read_splits
from shardtune.errors import ConfigError, DataError
from shardtune.row_fields import Fields
from tiny import rows, tiny_config, write_rows

FIELDS = Fields("text", None, "summary")


def refusal(folder: Path, train: Any, *overrides: str) -> list[str]:
    """The problems of a config, without the file's name."""
    path = tiny_config(folder, data__train=train)
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value).replace(f"{path}:", "").splitlines()


def line_of(folder: Path, text: str) -> int:
    lines = (folder / "config.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_sources_are_named_in_three_ways(tmp_path: Path) -> None:
    for train in ("a", ["a", "b"], [{"path": "a", "weight": 2}, {"path": "a", "weight": 0.5}],
                  [{"path": "a", "tokens": 0.3}, {"path": "b", "tokens": 0.7}]):  # fmt: skip
        config = load_config(tiny_config(tmp_path, data__train=train), [])
        assert [source.path for source in config.data.sources] == [
            source["path"] if isinstance(source, dict) else source for source in ([train], train)[type(train) is list]
        ]
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml", []) == config
    config = load_config(tmp_path / "again.yaml", ["data.train.0.tokens=0.4", "data.train.1.tokens=0.6"])
    assert [source.tokens for source in config.data.sources] == [0.4, 0.6]
    assert load_config(tmp_path / "again.yaml", ["data.train=x.jsonl"]).data.train == "x.jsonl"


def test_wrong_sources_are_placed(tmp_path: Path) -> None:
    problems = refusal(tmp_path, [{"path": "a", "weight": -1.5}, {"path": "b", "weigth": 3}, 7])
    assert problems == [
        f"{line_of(tmp_path, '-1.5')} data.train.0.weight: should be greater than 0, not -1.5",
        f"{line_of(tmp_path, 'weigth')} data.train.1.weigth: unknown key; did you mean data.train.1.weight?",
        f"{line_of(tmp_path, '- 7')} data.train.2: should be a string, not 7",
    ]
    assert refusal(tmp_path, [])[0].endswith("data.train: should be a list of at least 1, not []")
    assert refusal(tmp_path, [{"weight": 1}])[0].endswith("data.train.0.path: is missing")
    two = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    assert refusal(tmp_path, two, "data.train.2.weight=1") == [
        "command line data.train.2.weight: there is no data.train.2; the list has 2 items"
    ]


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ([{"path": "a", "weight": 1}, "b"], "data.train.1: has a path alone, but the first source a weight"),
        (["a", {"path": "b", "tokens": 1.0}], "data.train.1: has a share of tokens, but the first source a path alone"),
        ([{"path": "a", "weight": 1}, {"path": "b", "tokens": 1}], "data.train.1: has a share of tokens, but the"),
        ([{"path": "a"}], "data.train.0: give exactly one of weight and tokens"),
        ([{"path": "a", "weight": 1, "tokens": 1}], "data.train.0: give exactly one of weight and tokens"),
        (
            [{"path": "a", "tokens": 0.5}, {"path": "b", "tokens": 0.4}],
            "data.train: the shares of tokens add up to 0.",
        ),
    ],
)
def test_sources_that_cannot_be_mixed(tmp_path: Path, train: Any, problem: str) -> None:
    problems = refusal(tmp_path, train)
    assert len(problems) == 1
    assert problem in problems[0]


def test_splits_of_several_sources(tmp_path: Path) -> None:
    first, second = rows(80, seed=1), rows(50, seed=2)
    paths = [str(write_rows(tmp_path / f"{n}.jsonl", made)) for n, made in enumerate((first, second, first))]
    splits = read_splits(paths, None, None, [0.6, 0.2, 0.2], FIELDS)
    alone = [read_splits(path, None, None, [0.6, 0.2, 0.2], FIELDS) for path in paths]
    for name in ("train", "validation", "test"):
        assert getattr(splits, name) == [text for one in alone for text in getattr(one, name)]
    assert splits.train_counts == [len(one.train) for one in alone]
    assert read_splits(paths[0], None, None, [1.0, 0, 0], FIELDS).train_counts == [80]
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": " ", "summary": "x"}])
    with pytest.raises(DataError, match=rf"^{re.escape(str(empty))}: no training example is left of 1 rows read"):
        read_splits([paths[0], str(empty)], None, None, [0.6, 0.2, 0.2], FIELDS)


def test_a_mixed_run_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", rows(40, seed=9))
    train = [{"path": str(tmp_path / "train.jsonl"), "tokens": 0.25}, {"path": str(other), "tokens": 0.75}]
    options = {"batch": {"tokens": 300, "micro_examples": 3}, "data__train": train, "duration": {"epochs": 1.5}}
    steps = []
    for ranks, launcher in ((1, "python"), (2, "torchrun")):
        config = tiny_config(tmp_path, name=f"on-{ranks}", **options)
        done = run(command(launcher, ranks, "--config", config), tmp_path / "cache")
        assert done.code == 0, done.said
        assert re.search(rf"{other}: 40 examples × [\d.]+ an epoch, [\d.]+% of the examples, 75\.\d% of", done.err)
        lines = (tmp_path / "runs" / f"on-{ranks}" / "metrics.jsonl").read_text().splitlines()
        steps.append([line for line in map(json.loads, lines) if "grad_norm" in line])
    one, two = steps
    assert len(one) > 10
    assert [(line["examples"], line["tokens"]) for line in one] == [(line["examples"], line["tokens"]) for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    assert one[-1]["epoch"] == pytest.approx(1.5, abs=0.1)


def test_a_weight_too_small_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data__train=[{"path": str(tmp_path / "train.jsonl"), "weight": 0.01}])
    done = run(command("python", 1, "--config", config), tmp_path / "cache")
    assert done.code == ConfigError.exit_code, done.said
    assert "data.train.0.weight: 0.01 is less than one of the 60 examples" in done.err
