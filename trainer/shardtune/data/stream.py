"""Training examples that are read, checked and tokenized as they are needed, and not kept: for data beyond memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardtune.data.fields import Dropped, texts
from shardtune.data.sources import rows
from shardtune.data.splits import Splits, fingerprints_of, split_of
from shardtune.errors import DataError
from shardtune.examples import Encoded, Text, Tokens
from shardtune.row_fields import Fields

ENCODED_AT_ONCE = 256
"""Texts handed to the tokenizer together."""
OF_A_BLOCK = 2
"""Ends the seed of a block, as that of a pass over a source has another end."""

Item = TypeVar("Item")


class Example(NamedTuple):
    """A training example of a stream."""

    number: int
    """Its position among the epoch's training examples as they are read."""
    tokens: Tokens


class Mixture(NamedTuple):
    """How sources are mixed; one that ends begins again, so an epoch never ends."""

    shares: Sequence[float]
    """The part of each source; they add up to 1."""
    of_tokens: bool
    """Whether it is a part of the tokens, or of the examples."""


class Ahead(Generic[Item]):
    """An iterator whose failure is kept until it is asked for."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.failure: Exception | None = None

    def take(self, number: int) -> list[Item]:
        """The next items; fewer at the end, and none where reading them fails."""
        if self.failure is None:
            try:
                return list(islice(self._items, number))
            except Exception as error:  # raised again by whoever needs what could not be read
                self.failure = error
        return []


class Stream:
    """The training examples of any epoch, from any position on.

    Their order is that of the sources, one after the other or mixed; with a `block`, so many consecutive examples are
    permuted among themselves by (seed, epoch, block number). Every rank reads all of it.
    """

    def __init__(
        self,
        sources: Sequence[str],
        mixture: Mixture | None,
        fields: Fields,
        shares: Sequence[float] | None,
        encode: Callable[[Sequence[Text]], list[Encoded]],
        block: int | None,
        seed: int,
    ) -> None:
        """`shares` of train, validation and test: only what a hash gives to train is read; None: all of it."""
        self._sources = sources
        self._mixture = mixture
        self._fields = fields
        self._shares = shares
        self._encode = encode
        self._block = block
        self._seed = seed
        self.noted: Dropped = Counter()
        """Rows left out, by reason, and what was cut: of the first pass, as far as it was read."""

    def examples(self, epoch: int, cursor: int) -> Iterator[Example]:
        """The epoch's examples after the first `cursor`. Raises DataError where a row is wrong, once it is needed: with
        blocks, when the first example of its block is; and where there is no example at all.

        What stands before is read again, but not tokenized, unless the mixture counts tokens.
        """
        if epoch == 0:
            self.noted.clear()
        noted = self.noted if epoch == 0 else Counter()
        first = cursor - cursor % (self._block or 1)
        examples = self._tokens(first, noted)
        if self._block is None:
            yield from map(Example, count(first), examples)
        else:
            yield from islice(self._permuted(Ahead(examples), epoch, first // self._block), cursor - first, None)

    def _permuted(self, coming: Ahead[Tokens], epoch: int, number: int) -> Iterator[Example]:
        assert self._block is not None
        block = coming.take(self._block)
        while coming.failure is None and block:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch, number, OF_A_BLOCK]))
            following = []
            for position in generator.permutation(len(block)).tolist():
                yield Example(number * self._block + position, block[position])
                following += coming.take(1)  # keeps pace, so that no step waits for a whole block
            block, number = following, number + 1
        if coming.failure is not None:
            raise coming.failure

    def _tokens(self, start: int, noted: Dropped) -> Iterator[Tokens]:
        """The tokens of all examples in the order of the sources, from number `start` on."""
        if self._mixture is not None and self._mixture.of_tokens:
            sources = [lambda noted, s=source: self._encoded(self._texts(s, noted), noted) for source in self._sources]
            mixed = _mixed(self._sources, sources, self._mixture.shares, lambda t: len(t.source) + len(t.target), noted)
            yield from islice(mixed, start, None)
            return
        if self._mixture is not None:
            sources = [lambda noted, s=source: self._texts(s, noted) for source in self._sources]
            found = _mixed(self._sources, sources, self._mixture.shares, lambda _: 1, noted)
        else:
            found = chain.from_iterable(self._texts(source, noted) for source in self._sources)
        yield from self._encoded(islice(found, start, None), noted)

    def _texts(self, source: str, noted: Dropped) -> Iterator[Text]:
        for text in texts(rows(source, "train", stream=True), self._fields, noted):
            if self._shares is None or split_of(text, self._shares) == "train":
                yield text

    def _encoded(self, found: Iterator[Text], noted: Dropped) -> Iterator[Tokens]:
        coming = Ahead(found)
        while coming.failure is None:
            some: list[Text] = []
            while len(some) < ENCODED_AT_ONCE and (text := coming.take(1)):
                some += text
            if not some:
                break
            for encoded in self._each_encoded(some):
                cut = {"source cut to length": encoded.source_cut, "target cut to length": encoded.target_cut}
                noted.update(what for what, is_so in cut.items() if is_so)
                yield Tokens(np.asarray(encoded.source, np.int32), np.asarray(encoded.target, np.int32))
        if coming.failure is not None:
            raise coming.failure

    def _each_encoded(self, some: Sequence[Text]) -> Iterator[Encoded]:
        try:
            yield from self._encode(some)
        except DataError:
            for text in some:  # those before the wrong one are good
                yield from self._encode([text])


def _mixed(
    names: Sequence[str],
    sources: Sequence[Callable[[Dropped], Iterator[Item]]],
    shares: Sequence[float],
    size: Callable[[Item], int],
    noted: Dropped,
) -> Iterator[Item]:
    """Endlessly the next item of the source that is farthest behind its share."""

    def endless(name: str, source: Callable[[Dropped], Iterator[Item]]) -> Iterator[Item]:
        notes, found = noted, True
        while found:
            found = False
            for item in source(notes):
                found = True
                yield item
            notes = Counter()
        raise DataError(f"{name}: the stream holds no training example")

    streams = [endless(name, source) for name, source in zip(names, sources, strict=True)]
    taken = [0] * len(streams)
    total = 0
    while True:
        index = max(range(len(streams)), key=lambda i: shares[i] * (total + 1) - taken[i])
        item = next(streams[index])
        taken[index] += size(item)
        total += size(item)
        yield item


def read_judged(
    train: Sequence[str],
    validation: str | None,
    test: str | None,
    shares: Sequence[float],
    fields: Fields,
    limit: int,
    mixed: bool,
) -> Splits:
    """What a streaming run reads before it begins: the first `limit` examples of validation and test, and no others.

    Where only `train` is given they are found in it from its start (of `mixed` sources, as many in each), up to its
    end if there are fewer. Raises DataError where data is missing or wrong, or train has no example.
    """
    dropped: Dropped = Counter()
    parts: dict[str, list[Text]] = {"train": [], "validation": [], "test": []}
    given = {"validation": validation, "test": test}
    for split, source in given.items():
        if source is not None:
            whole = source.endswith(".json")  # which cannot be streamed, and need not be
            parts[split] = list(islice(texts(rows(source, split, stream=not whole), fields, dropped), limit))
    divided = validation is None and test is None
    wanted = {"train": 1}
    if divided:
        wanted |= {name: limit for name, share in zip(given, shares[1:], strict=True) if share > 0}
    begun = 0
    for number, source in enumerate(train, 1):
        reached = {name: -(-many * number // len(train)) if mixed else many for name, many in wanted.items()}
        reached["train"] = begun + 1  # the first rows of every source are checked
        for text in texts(rows(source, "train", stream=True), fields, dropped):
            split = split_of(text, shares) if divided else "train"
            if len(parts[split]) < reached.get(split, 0):
                parts[split].append(text)
            if all(len(parts[name]) >= many for name, many in reached.items()):
                break
        if mixed and len(parts["train"]) == begun:
            raise DataError(f"{source}: the stream holds no training example")
        begun = len(parts["train"])
    if not parts["train"]:
        raise DataError(nothing_usable(train, dropped))
    parts["train"] = []
    return Splits([], parts["validation"], parts["test"], {}, *fingerprints_of(parts), train_counts=[])


def nothing_usable(sources: Sequence[str], dropped: Dropped) -> str:
    """What to say of a stream without any training example."""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(dropped.items()))
    return f"{', '.join(sources)}: the stream holds no training example" + (f" ({reasons})" if reasons else "")


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[n, 2]: source and target length of each example."""
    return np.array([(len(e.tokens.source), len(e.tokens.target)) for e in examples], np.int64).reshape(-1, 2)
