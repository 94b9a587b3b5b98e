"""Reads a config file: YAML 1.2, overrides, and all errors at once with their lines and suggestions."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shardtune.aliases import ALIASES, VALUES
from shardtune.config import BATCH_SIZES, Config, DataConfig, SourceConfig
from shardtune.conflicts import conflicts
from shardtune.errors import ConfigError
from shardtune.optimizer_config import keys_of_optimizer

COMMAND_LINE = "command line"


class Yaml12Loader(yaml.SafeLoader):
    """Scalars as people mean them (YAML 1.2, core schema): 1e-5 is a number, off and no are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in [
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", "<"),
]:
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Yaml12Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes strings that would be something else to a reader of YAML 1.1 or of 1.2, such as off and 1e5."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + Yaml12Loader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Yaml12Loader.yaml_implicit_resolvers}
    }


NOT_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises: the latter ones where a scalar does not fit its explicit tag, or an alias contains itself."""


@dataclass
class Source:
    """The values of a file and of the command line, and the place that each key was given at."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: tuple[str, ...]) -> str:
        """`FILE:LINE` of a key, or of the nearest section around it that was given."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, f"{self.file}:1")


def load_config(path: Path, overrides: list[str]) -> Config:
    """The config of a YAML file with `key.path=value` overrides.

    Raises ConfigError with one line for each problem: `FILE:LINE key: what is wrong; did you mean …`.
    """
    source = Source(str(path))
    _read_file(path, source)
    for override in overrides:
        _apply_override(override, source)
    config, wrong_sections = None, set[str]()
    try:
        config = Config.model_validate(source.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            _explain(detail, source)
        wrong_sections = {str(detail["loc"][0]) for detail in details}
        config = _without_wrong_values(source.values, details)
    for key, problem in conflicts(config) if config is not None else []:
        if key.partition(".")[0] not in wrong_sections:
            source.problems.append(f"{source.place(tuple(key.split('.')))} {key}: {problem}")
    if config is None or source.problems:
        raise ConfigError("\n".join(source.problems))
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for all keys of the config."""

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def _without_wrong_values(values: dict[str, Any], details: list[ErrorDetails]) -> Config | None:
    """The config with defaults in place of wrong values, to find what else is wrong; None where that cannot be."""
    values = copy.deepcopy(values)
    for detail in details:
        *sections, last = _without_tags(detail["loc"])
        inner: Any = values
        for part in sections:
            inner = _inside(inner, part)
        if isinstance(inner, dict):
            inner.pop(last, None)
    try:
        return Config.model_validate(values)
    except ValidationError:
        return None


def _inside(value: Any, name: str) -> Any:
    """What a section has under a key, or a list at an index; None where there is nothing."""
    if isinstance(value, list):
        return value[int(name)] if name.isdecimal() and int(name) < len(value) else None
    return value.get(name) if isinstance(value, dict) else None


def _put(section: Any, name: str, value: Any) -> None:
    section[int(name) if isinstance(section, list) else name] = value


def _read_file(path: Path, source: Source) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such config file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        loader = Yaml12Loader(text)
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: a config is a mapping of keys to values")
        _note_places(node, (), source)
        source.values = loader.construct_document(node)
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_what_is_wrong(error)}") from None


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "an alias contains itself"
    if isinstance(error, yaml.MarkedYAMLError):
        return str(error.problem or error.context)
    return " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else "a value does not fit its tag (!!…)"


def _note_places(node: yaml.Node, key: tuple[str, ...], source: Source) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            inner = (*key, str(key_node.value))
            line = key_node.start_mark.line + 1
            if inner[-1] in seen:
                source.problems.append(f"{source.file}:{line} {'.'.join(inner)}: this key is given twice")
            seen.add(inner[-1])
            source.places[inner] = f"{source.file}:{line}"
            _note_places(value_node, inner, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.places[(*key, str(index))] = f"{source.file}:{item.start_mark.line + 1}"
            _note_places(item, (*key, str(index)), source)


def _apply_override(override: str, source: Source) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        source.problems.append(f"{COMMAND_LINE} {override}: an override has the form key.path=value")
        return
    try:
        value = yaml.load(text, Yaml12Loader)
    except NOT_YAML as error:
        source.problems.append(f"{COMMAND_LINE} {key}: the value is not valid YAML: {_what_is_wrong(error)}")
        return
    section: Any = source.values
    for depth, name in enumerate(path[:-1], 1):
        inner = _inside(section, name)
        if isinstance(section, list) and inner is None:
            index = ".".join(path[:depth])
            source.problems.append(f"{COMMAND_LINE} {key}: there is no {index}; the list has {len(section)} items")
            return
        if not isinstance(inner, dict) and not (isinstance(inner, list) and path[depth].isdecimal()):
            inner = {}
            _put(section, name, inner)
            source.places[path[:depth]] = COMMAND_LINE
        section = inner
    # Another length or method replaces the file's choice, with the options of its method, instead of joining it.
    if len(path) == 2 and (path[0] == "duration" or (path == ("tuning", "method") and section.get("method") != value)):
        for name in [name for name in section if source.places.get((path[0], name)) != COMMAND_LINE]:
            del section[name]
    if path == ("optimizer", "name"):  # most options are those of every optimizer
        known = keys_of_optimizer(value) if isinstance(value, str) else None
        for name in [name for name in section if known is not None and name not in known]:
            if source.places.get(("optimizer", name)) != COMMAND_LINE:
                del section[name]
    if len(path) == 2 and path[0] == "batch" and value is not None:
        for pair in BATCH_SIZES:
            for name in pair if path[1] in pair else ():
                if source.places.get(("batch", name)) != COMMAND_LINE:
                    section.pop(name, None)
    if isinstance(section, list) and int(path[-1]) >= len(section):
        source.problems.append(f"{COMMAND_LINE} {key}: the list has {len(section)} items, counted from 0")
        return
    _put(section, path[-1], value)
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]
    source.places[path] = COMMAND_LINE


def _explain(detail: ErrorDetails, source: Source) -> None:
    key = _without_tags(detail["loc"])
    place, name = source.place(key), ".".join(key) or "config"
    kind, given = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        message = _unknown_key(key, source)
    elif kind == "missing":
        message = "is missing"
    elif kind == "union_tag_not_found":
        tag = context["discriminator"].strip("'")
        near = difflib.get_close_matches(tag, map(str, given) if isinstance(given, dict) else [], 1, 0.6)
        if near:  # the other keys are checked once it is known which there are
            place, name = source.place((*key, near[0])), f"{name}.{near[0]}"
            message = f"unknown key; did you mean {'.'.join(key)}.{tag}?"
        else:
            name, message = f"{name}.{tag}", "is missing"
    elif kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        key, name = (*key, tag), f"{name}.{tag}"
        place = source.place(key)
        message = _not_one_of(
            given[tag] if isinstance(given, dict) else context["tag"],
            re.findall(r"'([^']*)'", context["expected_tags"]),
            VALUES.get(name, {}),
        )
    elif kind == "literal_error":
        message = _not_one_of(given, re.findall(r"'([^']*)'|\b(True|False)\b", context["expected"]))
    elif kind == "string_pattern_mismatch":
        message = f"{_show(given)} should be letters, digits, '.', '_' and '-', beginning with a letter or a digit"
    elif kind in {"too_short", "too_long"}:
        count = context.get("min_length", context.get("max_length"))
        least = "at least " if key == ("data", "train") else ""
        message = f"should be a list of {least}{count}, not {_show(given)}"
    elif kind in {"model_type", "model_attributes_type", "dict_type"}:
        message = f"expects a section of keys, not {_show(given)}"
    else:
        message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, not {_show(given)}"
        message = message.replace("input should be", "should be").replace("a valid ", "a ").replace("a int", "an int")
    problem = f"{place} {name}: {message}"
    if problem not in source.problems:
        source.problems.append(problem)


def _show(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _not_one_of(given: object, allowed: list[Any], elsewhere: Mapping[str, str] | None = None) -> str:
    """`elsewhere`: what other tools call some of the values."""
    names = [a if isinstance(a, str) else (a[0] or a[1].lower()) for a in allowed]
    meant = (elsewhere or {}).get(str(given).lower())
    near = [meant] if meant else difflib.get_close_matches(str(given).lower(), names, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    if names in (["true"], ["false"]):
        return f"{_show(given)} is not possible in this version, only {names[0]}"
    return f"{_show(given)} is not one of {', '.join(names)}{hint}"


def _without_tags(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """pydantic puts the value of a discriminator into the location; keys of the file do not have it."""
    parts = [str(part) for part in location if not (isinstance(part, str) and re.fullmatch("<.*>", part))]
    if len(parts) > 1 and parts[0] in {"task", "tuning", "optimizer"}:
        del parts[1]
    return tuple(parts)


def _unknown_key(key: tuple[str, ...], source: Source) -> str:
    known = keys_of(Config, source.values)
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == ".".join(key[:-1])]
    here = difflib.get_close_matches(key[-1], siblings, 1, 0.75)
    alias = ALIASES.get(key[-1])
    if alias and (len(key) == 1 or alias.partition(".")[0] == key[0]):
        return f"unknown key; did you mean {alias}?"
    if here:
        return f"unknown key; did you mean {'.'.join((*key[:-1], here[0]))}?"
    if alias:
        return f"unknown key; did you mean {alias}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == key[-1]]
    near = elsewhere[:1] or [
        k for n in difflib.get_close_matches(key[-1], siblings, 1, 0.5) for k in [".".join((*key[:-1], n))]
    ]
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; known here: {', '.join(siblings) or 'none'}"


def keys_of(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all keys below `model`; of a section with variants, those of the one chosen."""
    found = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        chosen = info.annotation
        given = values.get(name) if isinstance(values, dict) else None
        if (model, name) == (DataConfig, "train") and isinstance(given, list):
            for index in range(len(given)):
                found += keys_of(SourceConfig, {}, f"{prefix}{name}.{index}.")
            continue
        if isinstance(info.discriminator, str):
            tag = given.get(info.discriminator) if isinstance(given, dict) else None
            variants = [v for v in get_args(chosen) if issubclass(v, BaseModel)]
            matching = [v for v in variants if tag in get_args(v.model_fields[info.discriminator].annotation)]
            chosen = (matching or variants)[0]
        if isinstance(chosen, type) and issubclass(chosen, BaseModel):
            found += keys_of(chosen, given if isinstance(given, dict) else {}, f"{prefix}{name}.")
    return found
