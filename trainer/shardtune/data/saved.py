"""Rows of datasets in the format of the `datasets` library: folders saved by it, and the hub."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardtune.data.files import Row
from shardtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_ID = re.compile(r"(?P<path>\w[\w.-]*/\w[\w.-]*)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?")
"""owner/name[@config][:split]; the split may be a slice such as train[:10%]."""


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a Dataset or a DatasetDict in this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, split: str, named: bool) -> Iterator[Row]:
    """The rows of a saved folder; of a DatasetDict those of `split`. `named`: the user wrote the split.

    Raises DataError where the folder is damaged or has no such split.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
            if split not in splits:
                raise DataError(_no_split(folder, split, splits))
            folder = folder / split
        elif named:
            raise DataError(f"{folder}: one saved Dataset without splits; leave out :{split}")
        if not json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]:
            raise DataError(f"{folder}: the dataset holds no rows")  # which load_from_disk fails on

        import datasets

        found = datasets.Dataset.load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged folder makes the libraries below raise
        raise DataError(f"{folder}: cannot be read as a saved dataset: {_reason(error)}") from error
    yield from _rows(found, str(folder))


def _no_split(folder: Path, split: str, splits: list[str]) -> str:
    near = difflib.get_close_matches(split, splits, 1)
    hint = f"; did you mean {folder}:{near[0]}?" if near else ""
    return f"{folder}: no split {split!r}; there are: {', '.join(splits)}{hint}"


def read_hub(spec: str, split: str, stream: bool = False) -> Iterator[Row]:
    """The rows of a dataset on the hub (or in its local cache), never running code from there.

    `stream`: as they come, without downloading all of it first.

    Raises DataError where it does not exist, cannot be reached, or has no such config or split.
    """
    match = HUB_ID.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: not a hub id of the form owner/name[@config][:split]")
    import datasets

    split = match["split"] or split
    for name in ("huggingface_hub", "datasets"):  # each try to reach the hub is told otherwise
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(match["path"], match["config"], split=split, streaming=stream)
    except Exception as error:  # network, hub, unknown split or config, broken files: the text says
        raise DataError(
            f"{spec}: no such file or folder, and no dataset of the hub that can be loaded: {_reason(error)}"
        ) from error
    yield from _rows(found, f"{match['path']}:{split}")  # pyright: ignore[reportArgumentType]


def _rows(dataset: Dataset | IterableDataset, where: str) -> Iterator[Row]:
    number = 0
    try:
        # A saved output format (torch, numpy) would give tensors, and import their library.
        named = _named(dataset.features)
        for fields in dataset.with_format(None):
            number += 1
            row: dict[str, Any] = dict(fields)
            row |= {key: _name(row[key], names) for key, names in named.items()}
            yield Row(f"{where}:row {number}", row)
    except Exception as error:  # a column of images or sounds is decoded here, by whatever library that needs
        raise DataError(f"{where}: cannot be read after row {number}: {_reason(error)}") from error
    if number == 0:
        raise DataError(f"{where}: the dataset holds no rows")


def _named(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The columns whose integers, or whose lists of them, stand for names, and the names."""
    inner = {key: getattr(feature, "feature", feature) for key, feature in (features or {}).items()}
    return {key: feature.names for key, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _name(value: Any, names: Sequence[str]) -> Any:
    """-1, where a label is not known, stays as it is."""
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
