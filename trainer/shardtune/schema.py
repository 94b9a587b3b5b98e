"""Writes what editors and readers know of a config file from the types in `config.py`.

`python -m shardtune.schema configs` writes configs/schema.json, and the table of keys in configs/README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from shardtune.config import Config

Schema: TypeAlias = "dict[str, Any]"

BEGIN, END = "<!-- keys: written by `make schema` -->", "<!-- end of keys -->"


def schema_text() -> str:
    """The JSON schema of a config file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(_without_titles(schema), indent=2, ensure_ascii=False) + "\n"


def key_tables() -> str:
    """A Markdown table of the keys of each section: type, default, meaning."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    sections = {key: info for key, info in schema["properties"].items() if "type" not in info}
    plain = {key: info for key, info in schema["properties"].items() if key not in sections}
    parts = ["### Top level", _table("", plain, [], {})]
    for name, info in sections.items():
        if "discriminator" not in info:
            section = definitions[_name(info)]
            meaning, default = _one_line(section["description"]), info.get("default", {})
            table = _table(f"{name}.", section["properties"], section.get("required", []), default)
            for key, inner in section["properties"].items():
                for item in (definitions[_name(ref)] for ref in _sections_in(inner)):
                    table += "\n" + "\n".join(_rows(f"{name}.{key}.N.", item["properties"], item["required"], {}))
            parts += [f"### {name}", meaning, table]
            continue
        meaning, choice = _one_line(info["description"]), info["discriminator"]["propertyName"]
        variants = {tag: definitions[_name({"$ref": ref})] for tag, ref in info["discriminator"]["mapping"].items()}
        parts += [f"### {name}", meaning, *_variants(name, choice, variants, info.get("default", {}))]
    return "\n\n".join(parts)


def write(folder: Path) -> None:
    """Writes schema.json and the key tables of README.md in `folder`."""
    (folder / "schema.json").write_text(schema_text(), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(with_key_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_key_tables(text: str) -> str:
    """`text` with the present tables between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{key_tables()}\n\n{END}{after}"


def _variants(name: str, choice: str, variants: dict[str, Schema], default: Schema) -> Iterator[str]:
    """The keys that all variants of a section have, then those of each."""
    first, *others = (variant["properties"] for variant in variants.values())
    shared = {key: info for key, info in first.items() if all(info == other.get(key) for other in others)}
    tags = " \\| ".join(variants)
    default_tag = _value(default[choice]) if choice in default else "required"
    head = f"| `{name}.{choice}` | {tags} | {default_tag} | Decides which other keys there are. |"
    yield "\n".join([_table(f"{name}.", {}, [], {}), head, *_rows(f"{name}.", shared, [], {})])
    for tag, variant in variants.items():
        own = {key: info for key, info in variant["properties"].items() if key not in {choice, *shared}}
        meaning = f"`{name}.{choice}: {tag}`: {_one_line(variant['description'])}"
        yield meaning if own else f"{meaning} No other keys."
        if own:
            yield _table(f"{name}.", own, variant.get("required", []), {})


def _table(prefix: str, keys: dict[str, Schema], required: list[str], defaults: Schema) -> str:
    head = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *_rows(prefix, keys, required, defaults)])


def _rows(prefix: str, keys: dict[str, Schema], required: list[str], defaults: Schema) -> Iterator[str]:
    for key, info in keys.items():
        # A section that is left out may have other defaults than its keys have.
        default = _value(defaults.get(key, info.get("default"))) if "default" in info else "required"
        assert (default == "required") == (key in required or "default" not in info)
        yield f"| `{prefix}{key}` | {_type(info)} | {default} | {_one_line(info['description'])} |"


def _type(schema: Schema) -> str:
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(_type(option) for option in schema.get("anyOf") or schema["oneOf"])
    if "$ref" in schema:
        return "section"
    if "const" in schema:
        return _value(schema["const"])
    if "enum" in schema:
        return " \\| ".join(schema["enum"])
    if schema["type"] == "array":
        fixed = schema.get("minItems") if schema.get("minItems") == schema.get("maxItems") else None
        items = _type(schema["items"])
        return f"list of {f'{fixed} × ' if fixed else ''}{f'({items})' if ' or ' in items else items}"
    name: str = {"integer": "whole number", "boolean": "true \\| false"}.get(schema["type"], str(schema["type"]))
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    shown = [f"{sign} {_number(schema[key])}" for key, sign in limits.items() if key in schema]
    return " ".join([name, ", ".join(shown)]).strip()


def _sections_in(schema: Schema) -> list[Schema]:
    """References to the sections that the items of a list may be."""
    options = schema.get("oneOf", [])
    return [item for option in options for item in option.get("items", {}).get("oneOf", []) if "$ref" in item]


def _number(value: float) -> str:
    exponent = value.bit_length() - 1 if isinstance(value, int) and value > 1_000_000 else 0
    return f"2^{exponent}" if exponent and value == 1 << exponent else f"{value:g}"


def _value(value: object) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _name(schema: Schema) -> str:
    return schema["$ref"].rpartition("/")[2]


def _without_titles(schema: Any) -> Any:
    """pydantic repeats each key as a title, which editors then show in place of the description."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    write(Path(sys.argv[1]))
