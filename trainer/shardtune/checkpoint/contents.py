"""What a checkpoint's files say that they hold, checked: every element of every tensor once. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shardtune.checkpoint.names import STATE, rank_file, split_key, step_of
from shardtune.checkpoint.plain_files import open_plain, read_object, unreadable
from shardtune.errors import CheckpointError
from shardtune.tensor_files import NotWhole, is_count, is_shape, parse_object, read_header

MOST_RANKS = 1 << 17


class Part(NamedTuple):
    """A range of a flattened tensor, and where it lies."""

    start: int
    stop: int
    file: Path
    begin: int
    """Bytes from the file's beginning."""


@dataclass(frozen=True)
class Held:
    """A tensor in the files of a checkpoint."""

    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    parts: list[Part]
    """In order, without gaps; those without elements are left out."""


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds."""

    state: dict[str, Any]
    """Of state.json."""
    ranks: int
    """That have written it."""
    tensors: dict[str, dict[str, Held]]
    """By name and what; see `shardtune.protocols.Piece`."""


def read_contents(folder: Path) -> Contents:
    """Reads state.json and the headers of the ranks' files; whether bytes were changed, `problems` tells.

    Raises CheckpointError naming the file, and what is wrong with it.
    """
    name = STATE
    try:
        state = read_object(folder / STATE)
        ranks = _checked(state, folder)
        pieces: dict[str, dict[str, Held]] = {}
        for rank in range(ranks):
            name = rank_file(rank, ranks)
            _add_file(folder / name, pieces)
    except NotWhole as error:
        raise CheckpointError(f"{folder / name}: {error}") from None
    for key, whats in pieces.items():
        for what, held in whats.items():
            problem = _incomplete(held)
            if problem is not None:
                raise CheckpointError(f"{folder}: {what or 'the value'} of {key}: {problem}")
    return Contents(state, ranks, pieces)


def _checked(state: dict[str, Any], folder: Path) -> int:
    """The number of ranks, if the state has what is needed here."""
    step, ranks, of_folder = state.get("step"), state.get("ranks"), step_of(folder)
    if not is_count(step) or not is_count(ranks) or not isinstance(state.get("tuning"), dict):
        raise NotWhole("it is damaged: step, ranks or tuning is missing")
    if not 0 < state["ranks"] <= MOST_RANKS:
        raise NotWhole(f"it is damaged: it is of {ranks} ranks")
    if of_folder is not None and step != of_folder:
        raise NotWhole(f"of step {step}, in a folder that says step {of_folder}")
    return state["ranks"]


def _add_file(path: Path, tensors: dict[str, dict[str, Held]]) -> None:
    """Adds the pieces of a rank's file. Raises NotWhole."""
    with open_plain(path) as file:
        try:
            header = read_header(file)
        except OSError as error:
            raise unreadable(error) from None
    if "pieces" not in header.metadata:
        raise NotWhole("its header does not say which pieces it has")
    pieces = parse_object(header.metadata["pieces"].encode("utf-8", "surrogatepass"), "the list of its pieces")
    if pieces.keys() != header.tensors.keys():
        differing = sorted(pieces.keys() ^ header.tensors.keys())[0]
        raise NotWhole(f"its header and the list of its pieces differ in {differing!r:.200}")
    for key, place in pieces.items():
        stored = header.tensors[key]
        if not (isinstance(place, list) and len(place) == 2 and is_count(place[0]) and is_shape(place[1])):
            raise NotWhole(f"the piece {key!r:.200} is not described by its start and the whole shape")
        if len(stored.shape) != 1:
            raise NotWhole(f"the piece {key!r:.200} is not 1-D")
        start, shape = place[0], tuple(place[1])
        stop = start + stored.shape[0]
        if stop > math.prod(shape):
            raise NotWhole(f"the piece {key!r:.200} leaves its tensor: elements {start} to {stop} of {list(shape)}")
        name, what = split_key(key)
        held = tensors.setdefault(name, {}).setdefault(what, Held(stored.dtype, shape, []))
        if (held.dtype, held.shape) != (stored.dtype, shape):
            raise NotWhole(
                f"the piece {key!r:.200} is {stored.dtype} of {list(shape)}, in an earlier file "
                f"{held.dtype} of {list(held.shape)}"
            )
        if stop > start:
            held.parts.append(Part(start, stop, path, stored.begin))


def _incomplete(held: Held) -> str | None:
    """What is wrong where the parts, which this sorts, are not just the whole tensor."""
    held.parts.sort()
    end = 0
    for part in held.parts:
        if part.start != end:
            wrong = "missing" if part.start > end else "there twice"
            return f"elements {min(part.start, end)} to {max(part.start, end)} are {wrong}"
        end = part.stop
    total = math.prod(held.shape)
    return f"elements {end} to {total} are missing" if end != total else None
