"""Data is read once: later runs begin with what is in the cache, until a file changes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forked import run_group
from launching import BIN, REPOSITORY, Finished, run
from shardtune.data.sources import identity
from shardtune.errors import ConfigError, DataError
from tiny import rows, tiny_config, write_rows


class Forked(NamedTuple):
    """A run that has ended."""

    code: int
    said: str


def prepare(config: Path, cache: Path, *words: str) -> Finished:
    return run([str(BIN / "shardtune"), "prepare", "--config", str(config), *words], cache)


def train(config: Path, cache: Path, name: str, *words: str) -> Forked:
    """A run whose process is forked: it has nothing in memory of what others have read, and need not import torch."""
    log = config.parent / f"{name}.log"
    script = [REPOSITORY / "launch" / "train.py", "--config", config, f"name={name}", *words]
    code = run_group(script, 1, log, {"SHARDTUNE_CACHE": str(cache)})
    return Forked(code, log.read_text(encoding="utf-8"))


def spoil(path: Path) -> None:
    """Other content, in which no row can be read, under the same size and time: whoever reads it fails."""
    stat = path.stat()
    path.write_bytes(b"?" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("model", ["t5", "bert"])
def test_a_second_start_reads_no_texts(model: str, tmp_path: Path) -> None:
    config, cache = tiny_config(tmp_path, model, duration={"steps": 2}), tmp_path / "cache"
    files = [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]
    contents = [path.read_bytes() for path in files]
    first = prepare(config, cache)
    assert first.code == 0, first.said
    assert not (tmp_path / "runs").exists()
    for path in files:
        spoil(path)
    assert prepare(config, cache).out == first.out
    done = train(config, cache, "remembered")
    assert done.code == 0, done.said
    predictions = (tmp_path / "runs" / "remembered" / "predictions" / "step-2-validation.jsonl").read_text()
    texts = {json.loads(line)["source"] for line in predictions.splitlines()}
    assert texts == {row["text"] for row in rows(7, seed=2)[:5]}, "references are remembered, too"

    os.utime(files[0])
    done = train(config, cache, "read-again")
    assert done.code == DataError.exit_code, done.said
    assert f"{files[0]}:1: not valid JSON" in done.said
    # What a run has read is remembered as well.
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    assert train(config, cache, "anew").code == 0
    for path in files:
        spoil(path)
    assert train(config, cache, "after").code == 0
    assert losses(tmp_path, "remembered") == losses(tmp_path, "anew") == losses(tmp_path, "after")


def test_other_settings_read_again(tmp_path: Path) -> None:
    config, cache = tiny_config(tmp_path, data__validation=None), tmp_path / "cache"
    assert prepare(config, cache).code == 0
    spoil(tmp_path / "train.jsonl")
    for words in (["data.splits=[0.5,0.5,0.0]"], ["task.target=label"], [f"data.test={tmp_path / 'validation.jsonl'}"]):
        assert prepare(config, cache, *words).code == DataError.exit_code
    done = prepare(config, cache, "task.max_source_tokens=9")
    assert done.code == DataError.exit_code, done.said
    assert "not valid JSON" in done.err
    for path in (tmp_path / "cache" / "texts").rglob("facts.json"):
        path.write_text("[")
    assert "not valid JSON" in prepare(config, cache).err, "what is damaged counts as absent"


def test_what_prepare_says(tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", [*rows(20, seed=4), {"text": " ", "summary": "x"}])
    train_files = [str(tmp_path / name) for name in ("train.jsonl", "other.jsonl")]
    options: dict[str, Any] = {"data__train": train_files, "task__max_source_tokens": 30}
    done = prepare(tiny_config(tmp_path, **options), tmp_path / "cache", "--ranks", "2")
    assert done.code == 0, done.said
    assert re.search(r"^train +80 +[\d,]+ +source +\d+ +\d+ +30 +30 +[1-9]\d*$", done.out, re.M), done.out
    assert re.search(r"^validation +7 +[\d,]+ +target ", done.out, re.M)
    assert not re.search(r"^test ", done.out, re.M)
    assert "1 empty source" in done.out
    assert "steps on 2 ranks" in done.out
    shares = {name: float(share) for name, share in re.findall(r"^(padded|grouped) +([\d.]+)%$", done.out, re.M)}
    assert 0 < shares["grouped"] < shares["padded"] < 100
    assert f"{tmp_path / 'cache' / 'tokens'}" in done.out


def test_what_prepare_refuses(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__tokenizer="x", data__streaming=True)
    done = prepare(config, tmp_path / "cache")
    assert done.code == ConfigError.exit_code
    assert "data.streaming: a stream is tokenized while it is trained on" in done.err
    assert prepare(tiny_config(tmp_path), tmp_path / "cache", "--ranks", "0").code == ConfigError.exit_code


def test_identity_of_sources(tmp_path: Path) -> None:
    import datasets

    paths = [write_rows(tmp_path / f"{n}.jsonl", rows(3, seed=n)) for n in range(2)]
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(3))).save_to_disk(str(saved))
    specs = [str(paths[0]), str(tmp_path / "*.jsonl"), str(saved), f"{saved}:train"]
    before = [identity(spec) for spec in specs]
    assert None not in before
    assert len(before[1] or []) == 3
    assert before[2] != before[3]
    assert before == [identity(spec) for spec in specs]
    os.utime(paths[0])
    os.utime(next(saved.rglob("*.arrow")))
    assert all(now != then for now, then in zip(map(identity, specs), before, strict=True))
    for spec in ("docs:python", "owner/name", "owner/name@config:train[:10%]", str(tmp_path / "no.jsonl"), "no/*.csv"):
        assert identity(spec) is None
