"""Prompts with examples from the training data in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from shardtune.assemble.parts import is_chat
from shardtune.assemble.positions import known_positions
from shardtune.assemble.prepared import Prepared
from shardtune.config import Config
from shardtune.conversations import Conversation, from_text, to_text
from shardtune.data.corpus import Corpus
from shardtune.data.tables import TokenTable, cache_folder, fingerprint, open_table, write_table
from shardtune.errors import DataError
from shardtune.evaluation import Split
from shardtune.examples import Encoded, Text
from shardtune.protocols import Task
from shardtune.task.chat import Chat
from shardtune.task.multitask import of_one
from shardtune.task.section import Parts
from shardtune.world import World

STOP = "\nInput:"
"""Where a text ends that goes on with a further example."""
TRIED = 100
"""How many training examples are looked at for each that is wanted, as some are too long."""
FORMAT_TOKENS = 32
"""Room for what stands around an example."""

Prompted = Callable[[Text, Sequence[Text]], Text]


class Shots(NamedTuple):
    """A split with examples in its prompts."""

    table: TokenTable
    note: str
    """What is to be said: how many prompts have fewer than wanted; empty where none has."""


def make_shots(config: Config, prepared: Prepared, split: Split, count: int, world: World) -> Shots:
    """The split with the same `count` training examples in each prompt; all ranks call it.

    They are drawn by the seed among those that need not be cut, and do not stand in the data that is judged; with a
    larger `count` those of a smaller one come first. A prompt may have as many tokens as its parts are allowed to have
    (`task.max_source_tokens`, `task.max_target_tokens`), unless the model has fewer positions: then it has fewer
    examples.
    """

    def written() -> list[str]:
        corpus = prepared.corpus
        assert corpus is not None  # on the first rank
        drawn = _drawn(corpus, of_one(prepared.task), count, config.seed)
        texts = split.texts[: split.examples]
        key = fingerprint(
            "shots", 1, drawn, [text[:3] for text in texts], config.task.model_dump(), prepared.tokenizer.name_or_path,
            prepared.tokenizer.chat_template, prepared.tokenizer.get_vocab(), _limit(config, prepared, count),
        )  # fmt: skip
        folder = cache_folder() / "tokens" / key
        fewer: list[int] = []
        encoded = list(_encoded(config, prepared, split, drawn, count, fewer))
        write_table(folder, encoded)
        return [str(folder), _note(len(fewer), split.examples, len(drawn), count)]

    folder, note = world.first_does(f"{count} shots", written)
    table = open_table(Path(folder))
    if table is None:
        raise DataError(f"{folder}: the prompts with {count} examples are not there; do all nodes see this folder?")
    table.counts = split.table.counts
    return Shots(table, note)


def _note(fewer: int, examples: int, drawn: int, count: int) -> str:
    if drawn < count:
        return f"only {drawn} training example{'s' * (drawn != 1)} can stand in a prompt uncut"
    return f"{fewer:,} of {examples:,} prompts have fewer examples, for want of positions" if fewer else ""


def _drawn(corpus: Corpus, task: Task, count: int, seed: int) -> list[Text]:
    """Training examples that need not be cut; fewer than `count` where there are no more of them."""
    train = corpus.splits().train
    judged = {text.source for texts in corpus.judged.values() for text in texts}
    rng, seen = random.Random(f"{seed} shots"), set[int]()
    found: list[Text] = []
    while len(found) < count and len(seen) < min(len(train), TRIED * count):
        index = rng.randrange(len(train))
        if index in seen:
            continue
        seen.add(index)
        if train[index].source not in judged:
            encoded = task.encode([train[index]])[0]
            if not (encoded.source_cut or encoded.target_cut):
                found.append(train[index])
    return found


def _encoded(
    config: Config, prepared: Prepared, split: Split, drawn: Sequence[Text], count: int, fewer: list[int]
) -> Iterator[Encoded]:
    """Each example with as many of the drawn ones as there is room for; which have `fewer`."""
    chat = is_chat(config.task)
    section = config.task.model_copy(update={"max_source_tokens": _limit(config, prepared, count)})
    roomy = section.make(Parts(prepared.tokenizer, prepared.architecture, config.model.path, prepared.labels))
    prompted: Prompted = _earlier_turns if chat else _continued if config.task.head == "causal" else _written_out
    for position, text in enumerate(split.texts[: split.examples]):
        own = split.table[position]
        if chat:  # what is too long without examples loses the same turns with them
            text = cast(Chat, of_one(prepared.task)).left_of(text)
        for number in range(len(drawn), 0, -1):
            encoded = _tried(roomy, prompted(text, drawn[:number]), chat)
            if encoded is not None:
                yield _learned_at_the_end(encoded, of_one(prepared.task).targets(own)) if chat else encoded
                break
        else:
            number = 0
            yield Encoded(own.source.tolist(), own.target.tolist(), False, False)
        if number < len(drawn):
            fewer.append(position)


def _tried(task: Task, text: Text, chat: bool) -> Encoded | None:
    """None where it does not fit, or the chat template refuses so many turns. Of a conversation the last turn, which is
    judged, is the first to be cut off."""
    try:
        encoded = task.encode([text])[0]
    except DataError:
        return None
    return None if encoded.source_cut or (chat and encoded.target_cut) else encoded


def _limit(config: Config, prepared: Prepared, count: int) -> int:
    """Of a prompt's tokens."""
    task, written = config.task, max(getattr(config.task, "max_target_tokens", 0), config.evaluation.max_new_tokens)
    limit = (count + 1) * (task.max_source_tokens + FORMAT_TOKENS) + count * getattr(task, "max_target_tokens", 0)
    positions = known_positions(prepared.architecture)
    if positions is None:
        return limit
    return max(min(limit, positions - (written if task.head == "causal" else 0)), 1)


def _written_out(text: Text, shots: Sequence[Text]) -> Text:
    """Input: …, Output: …, an empty line, for each; then the input alone."""
    before = "".join(f"Input: {shot.source}\nOutput: {shot.target.strip()}\n\n" for shot in shots)
    return text._replace(source=f"{before}Input: {text.source}\nOutput:")


def _continued(text: Text, shots: Sequence[Text]) -> Text:
    """The same, where the target is joined to it."""
    return _written_out(text, shots)._replace(target=f" {text.target.strip()}")


def _earlier_turns(text: Text, shots: Sequence[Text]) -> Text:
    """Conversations that come before, after the system message of the one that is judged."""
    turns, tools = from_text(text.source, "")
    first = next((n for n, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), len(turns))
    earlier = [
        turn
        for shot in shots
        for turn in from_text(shot.source, shot.target).turns
        if turn["role"] not in ("system", "developer")
    ]
    source, _ = to_text(Conversation([*turns[:first], *earlier, *turns[first:]], tools))
    return text._replace(source=source)


def _learned_at_the_end(encoded: Encoded, targets: int) -> Encoded:
    """The loss is on the last so many targets only, as without the conversations before."""
    target = np.asarray(encoded.target)
    earlier = np.flatnonzero(target >= 0)[: -targets or None]
    target[earlier] = ~target[earlier]
    return encoded._replace(target=target.tolist())
