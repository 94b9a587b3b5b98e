"""The shipped configs load, name their schema, and run where that needs no hub; schema and tables are fresh."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardtune import schema
from shardtune.cli import train_as_rank
from shardtune.config_file import Yaml12Loader, load_config
from shardtune.data import docs, sources

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
NEEDS_NO_HUB = [path for path in SHIPPED if (ROOT / load_config(path, []).model.path).is_dir()]

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
         "null": type(None)}  # fmt: skip
KNOWN = {
    "$ref", "$defs", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "discriminator",
    "enum", "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maximum", "minItems", "minLength", "minimum",
    "oneOf", "pattern", "properties", "required", "type",
}  # fmt: skip


def faults(value: Any, rule: dict[str, Any], root: dict[str, Any], place: str = "") -> list[str]:
    """What is wrong with `value` by the part of JSON schema that config.py uses."""
    assert set(rule) <= KNOWN, set(rule) - KNOWN
    found = []
    if "$ref" in rule:
        return faults(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root, place)
    for key, wanted in (("anyOf", range(1, 9)), ("oneOf", (1,))):
        if key in rule:
            fitting = sum(not faults(value, option, root, place) for option in rule[key])
            found += [] if fitting in wanted else [f"{place}: fits {fitting} of {key}"]
    if "type" in rule:
        is_number = rule["type"] in ("integer", "number")
        if not isinstance(value, TYPES[rule["type"]]) or (is_number and isinstance(value, bool)):
            return [f"{place}: {value!r} is no {rule['type']}"]
    if "const" in rule and value != rule["const"]:
        found.append(f"{place}: {value!r} is not {rule['const']!r}")
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{place}: {value!r} is not in {rule['enum']}")
    if isinstance(value, str):
        found += [] if re.search(rule.get("pattern", ""), value) else [f"{place}: {value!r} has another form"]
        found += [] if len(value) >= rule.get("minLength", 0) else [f"{place}: too short"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = rule.get("minimum", value) <= value <= rule.get("maximum", value)
        inside &= rule.get("exclusiveMinimum", value - 1) < value < rule.get("exclusiveMaximum", value + 1)
        found += [] if inside else [f"{place}: {value!r} is out of range"]
    if isinstance(value, list):
        fits = rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value))
        found += [] if fits else [f"{place}: {len(value)} items"]
        for index, item in enumerate(value):
            found += faults(item, rule.get("items", {}), root, f"{place}.{index}")
    if isinstance(value, dict):
        found += [f"{place}: {key} is missing" for key in rule.get("required", []) if key not in value]
        for key, item in value.items():
            if key in rule.get("properties", {}):
                found += faults(item, rule["properties"][key], root, f"{place}.{key}")
            elif rule.get("additionalProperties") is False:
                found.append(f"{place}: unknown key {key}")
    return found


@pytest.fixture(scope="module")
def json_schema() -> dict[str, Any]:
    return json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))


def read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Yaml12Loader)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config(path: Path, json_schema: dict[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    first, second, *_ = text.splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second == "#", "a comment says what it is for"
    config = load_config(path, [])
    assert config.name == path.stem, "so that runs of two configs do not meet in one folder"
    assert "float16" not in text.replace("bfloat16", "").replace("in float16", "")
    assert not faults(read(path), json_schema, json_schema)


def test_readme_lists_the_shipped_configs() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(.*?)\]\((.*?)\)", text, re.MULTILINE)
    assert sorted(listed) == sorted((path.name, path.name) for path in SHIPPED)


def test_commands_of_the_page_on_reports_are_right() -> None:
    """Configs are there and take what is overridden; runs that are compared are those of a config or a command."""
    text = (CONFIGS / "reports.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    commands = [shlex.split(line) for line in [*blocks.splitlines(), *re.findall(r"`(shardtune [^`]*)`", text)]]
    runs, compared = {"quickstart"}, set[str]()
    for _, command, *words in (words for words in commands if words[0] == "shardtune"):
        if command in ("train", "evaluate"):
            path = Path(words[words.index("--config") + 1])
            overrides = [word for word in words if "=" in word]
            if path.parts[0] == "runs":
                path = CONFIGS / f"{path.parts[1]}.yaml"
            runs.add(load_config(CONFIGS.parent / path, overrides).name)
        compared |= {word.removeprefix("runs/") for before, word in pairwise(words) if before == "--run"}
    assert len(runs) > 6
    assert compared - {"<name>", "…"} <= runs


def test_schema_refuses_what_load_config_refuses(json_schema: dict[str, Any]) -> None:
    good = read(CONFIGS / "flan-t5-xl-dialogsum.yaml")
    assert not faults(good, json_schema, json_schema)
    for section, key, value in [
        ("model", "pth", "x"), ("model", "dtype", "float8"), ("batch", "examples", 0), ("batch", "examples", "8"),
        ("task", "label", "x"), ("task", "kind", "chat"), ("tuning", "rank", 0), ("tuning", "method", "full"),
        ("optimizer", "betas", [0.9]), ("optimizer", "betas", [0.9, 1]), ("optimizer", "lr", None),
        ("evaluation", "metrics", ["rogue"]), ("data", "shuffle", 1), ("optimizer", "lr", True),
    ]:  # fmt: skip
        bad = {**good, section: {**good[section], key: value}}
        assert faults(bad, json_schema, json_schema), (section, key, value)
    assert faults({k: v for k, v in good.items() if k != "task"}, json_schema, json_schema)
    assert faults({**good, "lr": 1}, json_schema, json_schema)
    assert faults({**good, "name": "a/b"}, json_schema, json_schema)


def test_schema_and_key_tables_are_fresh() -> None:
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == schema.schema_text(), "run `make schema`"
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert readme == schema.with_key_tables(readme), "run `make schema`"


def test_write_makes_them_fresh(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{schema.BEGIN}\nold\n{schema.END}\nafter\n")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from shardtune import schema; from pathlib import Path; "
         "schema.write(Path(sys.argv[1])); assert 'torch' not in sys.modules", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "schema.json").read_bytes() == (CONFIGS / "schema.json").read_bytes()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith(f"{schema.END}\nafter\n")
    assert "old" not in text.splitlines()
    assert schema.with_key_tables(text) == text


def test_every_key_is_described_and_in_the_tables(json_schema: dict[str, Any]) -> None:
    tables = (CONFIGS / "README.md").read_text(encoding="utf-8")
    seen = 0
    for name, section in {"": json_schema, **json_schema["$defs"]}.items():
        for key, info in section["properties"].items():
            described = json_schema["$defs"][info["$ref"].rpartition("/")[2]] if "$ref" in info else info
            assert described.get("description", "").endswith("."), f"{name}.{key} has no description"
            assert "title" not in info or isinstance(info["title"], dict)
            assert re.search(rf"`(\w+\.)*{key}`|### {key}\n", tables), f"{name}.{key} is in no table"
            seen += 1
    assert seen > 60


def test_data_of_the_hub_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a split is a slice, whose brackets could be those of a glob."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(sources, "read_hub", lambda spec, split, stream: asked.append((spec, split)) or iter(()))
    wanted = []
    for path in SHIPPED:
        data = load_config(path, []).data
        for split in ("train", "validation", "test"):
            spec = getattr(data, split)
            if spec and spec != sources.DOCS:
                wanted.append((spec, split))
                assert not list(sources.rows(spec, split))
    assert asked == wanted
    assert any("[" in spec for spec, _ in asked)


@pytest.mark.parametrize("path", NEEDS_NO_HUB, ids=lambda path: path.stem)
def test_runs_small(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    # The built-in corpus is the same but for its size.
    monkeypatch.setattr(docs, "extract", functools.partial(docs.extract, limit=1500))
    overrides = [f"runs={tmp_path}", "duration.steps=2", "evaluation.examples=2", "evaluation.max_new_tokens=4"]
    code = train_as_rank(["--config", str(path.relative_to(ROOT)), *overrides])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    folder = tmp_path / load_config(path, []).name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1, 2}
    assert (folder / "final" / "config.json").exists()
    assert "done in" in shown.out
