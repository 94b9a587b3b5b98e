"""What tuning is compared with: the base model, the same with examples in its prompt, and what needs no model."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, cast

from torch import nn

from shardtune.assemble.earlier import folder_of
from shardtune.assemble.parts import is_chat
from shardtune.assemble.prepared import Prepared
from shardtune.assemble.shots import STOP, make_shots
from shardtune.config import Config
from shardtune.evaluation import Contender, Evaluator, Judged, Split, Way
from shardtune.examples import Text
from shardtune.task.multitask import of_one
from shardtune.tuning_config import VirtualTokensSection
from shardtune.world import World

BETWEEN = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)\]])\s+|(?<=[。！？])\s*|\n+")
"""What is between two sentences: white space after a full stop, which may have a quotation mark or a bracket behind it,
or a new line."""
COUNTED = 1000
"""Training references whose sentences are counted."""
LEAD = 3
"""Sentences of a lead where references cannot be counted, as is usual for news."""


def contenders(config: Config, prepared: Prepared, evaluator: Evaluator, world: World) -> list[Contender]:
    """In the order in which they are judged, before the first step; all ranks call it. The model at step 0 is the base
    model for most methods; where it is not, the base model is among them."""
    options = config.evaluation
    if not options.baseline:
        return []
    found = []
    adapted = isinstance(config.tuning, VirtualTokensSection) or folder_of(config) is not None
    base = Way(without_adapter, of_one(prepared.task)) if adapted else Way()
    if adapted and 0 in options.shots:
        found.append(Contender("base", partial(_run, evaluator, "base", base)))
    for count in sorted({count for count in options.shots if count > 0}):
        way = base._replace(stop=() if is_chat(config.task) else (STOP,))
        found.append(Contender(f"shots-{count}", partial(_with_shots, config, prepared, world, evaluator, count, way)))
    write = _without_model(config, prepared, world)
    if write is not None:
        name, texts_of = write
        found.append(Contender(name, lambda split, advance: evaluator.write(name, split, advance, texts_of)))
    return found


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base model in one that PEFT has wrapped."""
    wrapped = cast(Any, model)
    if wrapped.active_peft_config.is_prompt_learning:
        yield wrapped.get_base_model()
        return
    # PEFT sets them as it thinks right when it enables the adapter again.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with wrapped.disable_adapter():
        yield model
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _run(evaluator: Evaluator, name: str, way: Way, split: Split, advance: Callable[[int], None]) -> Judged | None:
    return evaluator.run(name, split, advance, way)


def _with_shots(
    config: Config,
    prepared: Prepared,
    world: World,
    evaluator: Evaluator,
    count: int,
    way: Way,
    split: Split,
    advance: Callable[[int], None],
) -> Judged | None:
    name = f"shots-{count}"
    table, note = make_shots(config, prepared, split, count, world)
    judged = evaluator.run(name, split._replace(table=table), advance, way)
    if judged is None or not note:
        return judged
    return judged._replace(notes=[*judged.notes, f"{name} of {split.name}: {note}"])


def _without_model(
    config: Config, prepared: Prepared, world: World
) -> tuple[str, Callable[[Sequence[Text]], list[str]]] | None:
    """What a program of two lines would answer: its name, and its answers, which the first rank is asked for."""
    task = config.task
    if task.kind == "classification":
        if config.data.streaming:
            return None
        answer = world.first_does("majority", lambda: _majority(prepared, numbers=not prepared.labels))
        return "majority", lambda texts: [answer] * len(texts)
    if task.writes_texts and not is_chat(task):
        count = world.first_does("lead", lambda: LEAD if config.data.streaming else _sentences_in_references(prepared))
        before, after = _around(getattr(task, "prompt", None))
        return "lead", lambda texts: [lead(_within(text.source, before, after), count) for text in texts]
    return None


def _majority(prepared: Prepared, numbers: bool) -> str:
    """The most frequent label of the training data, the first by name of several; of numbers the mean."""
    assert prepared.corpus is not None
    targets = [text.target for text in prepared.corpus.splits().train]
    if numbers:
        return repr(round(statistics.fmean(map(float, targets)), 6))
    counts = Counter(targets)
    return min(counts, key=lambda target: (-counts[target], target))


def _sentences_in_references(prepared: Prepared) -> int:
    """How many sentences a training reference has in the mean, at least one."""
    assert prepared.corpus is not None
    train = prepared.corpus.splits().train
    return max(1, round(statistics.fmean(len(sentences(text.target)) for text in islice(train, COUNTED))))


def sentences(text: str) -> list[str]:
    """The text's sentences, without what is between them."""
    return [found for part in BETWEEN.split(text) if (found := part.strip())]


def lead(text: str, count: int) -> str:
    """The first so many sentences."""
    return " ".join(sentences(text)[:count])


def _around(prompt: str | None) -> tuple[str, str]:
    """What a template says before its first and after its last field."""
    parts = list(string.Formatter().parse(prompt or ""))
    if not parts:
        return "", ""
    return parts[0][0], parts[-1][0] if parts[-1][1] is None else ""


def _within(source: str, before: str, after: str) -> str:
    return source.removeprefix(before).removesuffix(after) if before or after else source
