"""Training, validation and test examples: given by the user, or divided by a hash of each source."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from shardtune.data.fields import Dropped, texts
from shardtune.data.sources import DOCS, Row, rows
from shardtune.errors import DataError
from shardtune.examples import Text
from shardtune.row_fields import Fields

LabelsOf: TypeAlias = "Callable[[str], Sequence[str]]"
"""The labels that a target names."""
NAMES = ("train", "validation", "test")
DUPLICATE = "duplicate"
UNKNOWN_LABEL = "label not in train"

_LABELS_SHOWN = 20


@dataclass
class Splits:
    """The examples of a run, in the order of the data."""

    train: list[Text]
    validation: list[Text]
    test: list[Text]
    dropped: dict[str, int]
    """How many rows were left out, by reason; and, as notes, how many examples of a given validation or test
    source also stand in train (these are kept)."""
    fingerprint: str
    """SHA-256, in hex, of all sources and targets in order with their splits."""
    train_fingerprint: str
    """The same of `train` alone."""
    train_counts: list[int]
    """How many examples of `train` are from each of its sources, which come one after the other."""
    judged_counts: dict[str, list[int]] = field(default_factory=dict)
    """The same of validation and test, where they are shares of these sources."""


def read_splits(
    train: str | Sequence[str],
    validation: str | None,
    test: str | None,
    shares: Sequence[float],
    fields: Fields,
) -> Splits:
    """Reads all data of a run; `train` names one source or several.

    Where only `train` is given, its examples are divided by `shares` (of train, validation, test): a hash of
    the source decides, so adding, removing or reordering rows moves no other example, and one source never
    stands in two splits. Otherwise the sources are used as they are, and the one not given is empty. Where targets name
    labels, those of train are all there are.

    Raises DataError where data is missing or wrong, no training example of a source is left, or a given validation or
    test source has a label that train has not; ConfigError where the prompt is malformed.
    """
    dropped: Dropped = Counter()
    parts: dict[str, list[Text]] = {name: [] for name in NAMES}
    counts, divisions = [], []
    sources = [train] if isinstance(train, str) else list(train)
    for source in sources:
        dropped_before = dropped.copy()
        found, read = _read(source, "train", fields, dropped)
        divided = divide(found, shares) if validation is None and test is None else {"train": found}
        if not divided["train"]:
            raise DataError(_nothing_left(source, read, len(found), dropped - dropped_before))
        counts.append(len(divided["train"]))
        divisions.append(divided)
        for name, examples in divided.items():
            parts[name] += examples
    if fields.labels_of is not None and validation is None and test is None:
        _drop_unknown_labels(", ".join(sources), parts, fields.labels_of, dropped)
    for split, source in (("validation", validation), ("test", test)):
        if source is not None:
            parts[split], _ = _read(source, split, fields, dropped)
            if fields.labels_of is not None:
                _check_labels(parts, split, fields.labels_of, fields.target or fields.parts[-1])
            repeated = len(parts[split]) - len(_without(parts[split], _contents(parts["train"])))
            if repeated:
                dropped[f"{split} examples also in train"] += repeated
    fingerprint, train_fingerprint = fingerprints_of(parts)
    judged_counts = {}
    if validation is None and test is None:
        kept = {name: {id(example) for example in parts[name]} for name in NAMES[1:]}
        judged_counts = {
            name: [sum(id(example) in kept[name] for example in divided[name]) for divided in divisions]
            for name in NAMES[1:]
        }
    return Splits(
        **parts,
        dropped=dict(dropped),
        fingerprint=fingerprint,
        train_fingerprint=train_fingerprint,
        train_counts=counts,
        judged_counts=judged_counts,
    )


def divide(examples: Iterable[Text], shares: Sequence[float]) -> dict[str, list[Text]]:
    """The examples of each split, by a hash of their sources; `shares` are of train, validation and test."""
    parts: dict[str, list[Text]] = {name: [] for name in NAMES}
    for example in examples:
        parts[split_of(example, shares)].append(example)
    return parts


def split_of(example: Text, shares: Sequence[float]) -> str:
    """The split that a hash of the example's source gives it to."""
    edges = list(accumulate(shares))
    digest = hashlib.blake2b(example.source.encode("utf-8"), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64 * edges[-1]
    # The product can round up to the last edge; that example belongs to the last share that is not zero.
    last = max(index for index, share in enumerate(shares) if share > 0)
    return NAMES[next((index for index, edge in enumerate(edges) if point < edge), last)]


def _read(source: str, split: str, fields: Fields, dropped: Dropped) -> tuple[list[Text], int]:
    """The examples, and how many rows they were."""
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for row in rows(source, split):
            read += 1
            yield row

    found = list(texts(counted(), fields, dropped))
    if source == DOCS:  # users repeat rows of their own files on purpose, as a weight
        unique = list({content_of(example): example for example in reversed(found)}.values())[::-1]
        if len(unique) < len(found):
            dropped[DUPLICATE] += len(found) - len(unique)
        found = unique
    return found, read


def _drop_unknown_labels(source: str, parts: dict[str, list[Text]], labels_of: LabelsOf, dropped: Dropped) -> None:
    """A rare class may have all its examples outside train by chance, which is no fault of the data.

    Raises DataError where nearly every example has a label of its own: those are no classes.
    """
    known = labels_in(parts["train"], labels_of)
    for split in ("validation", "test"):
        kept = [example for example in parts[split] if known.issuperset(labels_of(example.target))]
        if parts[split] and not kept and 2 * len(known) > len(parts["train"]):
            raise DataError(
                f"{source}: {len(parts['train'])} training examples have {len(known)} different labels, and none of "
                f"the {len(parts[split])} {split} examples has one of these; is task.label the field of the classes?"
            )
        if len(kept) < len(parts[split]):
            dropped[UNKNOWN_LABEL] += len(parts[split]) - len(kept)
        parts[split] = kept


def _check_labels(parts: dict[str, list[Text]], split: str, labels_of: LabelsOf, field: str) -> None:
    known = labels_in(parts["train"], labels_of)
    for example in parts[split]:
        for label in labels_of(example.target):
            if label not in known:
                shown = sorted(known)[:_LABELS_SHOWN]
                more = ", …" if len(known) > len(shown) else ""
                raise DataError(
                    f"{example.place} field `{field}`: the label {label!r} is not in the training data; "
                    f"known are: {', '.join(shown)}{more}"
                )


def labels_in(examples: Iterable[Text], labels_of: LabelsOf) -> set[str]:
    """All labels that the examples' targets name."""
    return {label for example in examples for label in labels_of(example.target)}


def _nothing_left(source: str, read: int, kept: int, dropped: Dropped) -> str:
    reasons = [f"{reason}: {count}" for reason, count in sorted(dropped.items())]
    if kept:
        reasons.append(f"in validation or test by data.splits: {kept}")
    return f"{source}: no training example is left of {read} rows read ({', '.join(reasons)})"


def content_of(example: Text) -> bytes:
    """A digest of source and target, smaller to remember than they are."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (example.source, example.target):
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


def _contents(examples: Iterable[Text]) -> set[bytes]:
    return {content_of(example) for example in examples}


def _without(examples: Iterable[Text], contents: set[bytes]) -> list[Text]:
    return [example for example in examples if content_of(example) not in contents]


def fingerprints_of(parts: dict[str, list[Text]]) -> tuple[str, str]:
    """SHA-256, in hex, of all sources and targets in order with their splits; and that of the training examples."""
    digest, train = hashlib.sha256(), ""
    for name in NAMES:
        digest.update(f"{name} {len(parts[name])}\n".encode())
        for example in parts[name]:
            digest.update(content_of(example))
        if name == "train":
            train = digest.hexdigest()
    return digest.hexdigest(), train
