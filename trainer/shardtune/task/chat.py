"""Decoders: answer in conversations, written with the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardtune.conversations import ASSISTANT, Conversation, Turn, from_text, to_text
from shardtune.errors import ConfigError, DataError
from shardtune.examples import Batch, Encoded, Text, Tokens
from shardtune.protocols import Generation
from shardtune.ragged import LayOut
from shardtune.task.causal import Causal
from shardtune.task.chat_template import NAMES
from shardtune.task.generation import all_ends, generate
from shardtune.task.tokens import learned, mask, pad
from shardtune.task.turns import UnclearTurnError, assistant_spans

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REFUSALS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""What a template raises for a conversation that it cannot write."""


class Written(NamedTuple):
    """A conversation as tokens, up to the last learned one."""

    ids: list[int]
    learned: NDArray[np.bool_]
    """Of each token, whether it is the assistant's."""


class Chat:
    """Implements the Task protocol.

    The tokens are those of `apply_chat_template`; the loss is on the assistant's turns, each with its end token, and on
    nothing else. In Tokens and Encoded, the source is what stands before the first learned token, and the target ends
    with the last one.
    """

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        keeps_logits: bool = True,
        lay_out: LayOut | None = None,
    ) -> None:
        """`max_tokens`: of a whole conversation; which end is cut is the tokenizer's `truncation_side`.
        `keeps_logits`, `lay_out`: as in `Causal`.

        Raises ConfigError where the template does not show which tokens are the assistant's.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model.tokenizer {tokenizer.name_or_path}: has no fast version, which task.messages needs to tell the "
                "assistant's tokens from the others"
            )
        self._tokenizer: Any = tokenizer
        self._limit = max_tokens
        self._markup = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._causal = Causal(tokenizer, max_tokens, 1, True, keeps_logits, lay_out)
        self._ends = self._end_tokens()

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Whole conversations; without a target, the turns up to the beginning of the answer.

        What is longer than the limit loses whole turns: the last ones, or, where the left is cut and in a question, the
        oldest after the system message. Where one exchange is too long, the reply keeps its beginning and its end
        token, at most half of the limit, and the prompt its first token and its last ones. A conversation that has lost
        its last turn predicts an earlier one. Raises DataError where the template cannot write a conversation.
        """
        return [
            self._example(from_text(text.source, text.target), text.place)[1]
            if text.target
            else self._question(from_text(text.source, ""), text.place)
            for text in texts
        ]

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """As `Causal.collate`."""
        return self._causal.collate(examples, packed)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Causal.loss_sum`."""
        return self._causal.loss_sum(model, batch)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """The assistant's last turn, given all that stands before it, without special tokens."""
        prompts = [_before_last_turn(example) for example in examples]
        read = pad(prompts, self._tokenizer.pad_token_id, left=True), mask(prompts, left=True)
        return generate(model, *read, how, self._tokenizer, examples, self._ends)  # pyright: ignore[reportArgumentType]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Causal.losses`."""
        return self._causal.losses(model, batch)

    def targets(self, example: Tokens) -> int:
        """The assistant's tokens."""
        return self._causal.targets(example)

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """As they are."""
        return list(predictions)

    def references(self, text: Text) -> list[str]:
        """The assistant's last turn, of those that are left of a conversation that is too long."""
        return [self.left_of(text).target]

    def left_of(self, text: Text) -> Text:
        """The turns up to that which is predicted: of a conversation that is too long the last ones may be cut off."""
        if not text.target or self._tokenizer.truncation_side == "left":
            return text
        conversation = from_text(text.source, text.target)
        turns, _ = self._example(conversation, text.place)
        if len(turns) == len(conversation.turns):
            return text
        source, target = to_text(Conversation(list(turns), conversation.tools))
        return text._replace(source=source, target=target)

    def stop_at_turns_end(self, model: PreTrainedModel) -> None:
        """Others who load the result generate with the model's own settings, and should stop where this task does."""
        settings = model.generation_config
        if settings is not None and self._ends:
            settings.eos_token_id = all_ends(settings.eos_token_id or self._tokenizer.eos_token_id, self._ends)

    # ----------------------------------------------------------------------------------------- to tokens

    def _example(self, conversation: Conversation, place: str) -> tuple[Sequence[Turn], Encoded]:
        """The turns that are left, and their tokens."""
        turns, tools = conversation
        whole = self._write(turns, tools, place)
        if len(whole.ids) <= self._limit:
            return turns, _encoded(whole, False, False)
        left = self._tokenizer.truncation_side == "left"
        best, shortest, kept = None, whole, turns
        for number, fewer in enumerate(_endings(turns) if left else _beginnings(turns)):
            try:
                written = self._write(fewer, tools, place)
            except DataError:  # the template wants a turn that is left out
                continue
            if number == 0:
                shortest, kept = written, fewer
            if len(written.ids) > self._limit:
                break
            best, kept = written, fewer
        if best is not None:
            return kept, _encoded(best, left, not left)
        dropped = len(shortest.ids) < len(whole.ids)
        return kept, self._squeezed(shortest, dropped and left, dropped and not left)

    def _question(self, conversation: Conversation, place: str) -> Encoded:
        turns, tools = conversation
        ids = self._ids(self._render(turns, tools, place, True))
        if len(ids) <= self._limit:
            return Encoded(ids, [], False, False)
        best = None
        for fewer in _endings(turns):
            try:
                shorter = self._ids(self._render(fewer, tools, place, True))
            except DataError:
                continue
            ids = ids if best else shorter
            if len(shorter) > self._limit:
                break
            best = shorter
        return Encoded(best or self._first_and_last(ids, self._limit), [], True, False)

    def _squeezed(self, exchange: Written, source_cut: bool, target_cut: bool) -> Encoded:
        """One exchange, cut inside of its turns; the flags: whether other turns were cut off before."""
        start, stop = _last_run(exchange.learned)
        prompt, reply = exchange.ids[:start], exchange.ids[start:stop]
        room = max(self._limit // 2, 1)
        target = reply if len(reply) <= room else [*reply[: room - 1], reply[-1]]
        source = self._first_and_last(prompt, self._limit - len(target))
        return Encoded(source, target, source_cut or len(source) < len(prompt), target_cut or len(target) < len(reply))

    def _first_and_last(self, ids: list[int], room: int) -> list[int]:
        """At most `room` of the tokens: the begin token, or whatever is first, and the last ones."""
        if len(ids) <= room:
            return ids
        first = next((n for n, token in enumerate(ids) if token != self._tokenizer.bos_token_id), 0) or 1
        first = first if first < room else 0
        return [*ids[:first], *ids[len(ids) - (room - first) :]]

    def _write(self, turns: Sequence[Turn], tools: Sequence[Any], place: str) -> Written:
        if GENERATION_TAG.search(self._template(tools)):
            found = self._apply(
                turns, tools, place, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_QUIET
            )
            ids, is_learned = list(found["input_ids"]), np.array(found["assistant_masks"], dtype=bool)
        else:
            ids, is_learned = self._write_untagged(turns, tools, place)
        if is_learned[1:].any():
            is_learned[0] = False  # nothing predicts the first token
        elif is_learned.any():
            begin = self._tokenizer.bos_token_id
            ids.insert(0, self._tokenizer.eos_token_id if begin is None else begin)
            is_learned = np.array([False, True])
        else:
            raise DataError(f"{place}: the chat template writes nothing of the assistant's turns")
        stop = int(np.flatnonzero(is_learned)[-1]) + 1  # nothing learns from what comes after
        return Written(ids[:stop], is_learned[:stop])

    def _write_untagged(
        self, turns: Sequence[Turn], tools: Sequence[Any], place: str
    ) -> tuple[list[int], NDArray[np.bool_]]:
        whole = self._render(turns, tools, place, False)
        try:
            spans = assistant_spans(
                turns, whole, lambda some, ask: self._render(some, tools, place, ask), list(self._markup.values())
            )
        except UnclearTurnError as error:
            raise ConfigError(
                f"{place}: task.template: this chat template does not show where the assistant's turn {error.number} "
                f"{error.what}; name one that marks these turns with {{% generation %}}: {', '.join(NAMES)}, or a "
                "path ending in .jinja"
            ) from None
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, **_QUIET)
        offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        is_learned = np.zeros(len(offsets), dtype=bool)
        for start, stop in spans:
            # Also a token that begins before the turn, or ends after it.
            inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
            if len(inside):
                is_learned[inside[0] : inside[-1] + 1] = True
        return list(found["input_ids"]), is_learned

    def _template(self, tools: Sequence[Any]) -> str:
        """A tokenizer may have several templates, one of them for conversations with tools."""
        try:
            return self._tokenizer.get_chat_template(None, list(tools) or None)
        except ValueError as error:
            raise ConfigError(f"task.template: the tokenizer's own: {str(error).splitlines()[0]}") from None

    def _render(self, turns: Sequence[Turn], tools: Sequence[Any], place: str, ask: bool) -> str:
        return self._apply(turns, tools, place, tokenize=False, add_generation_prompt=ask)

    def _apply(self, turns: Sequence[Turn], tools: Sequence[Any], place: str, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(turns), tools=list(tools) or None, **options)
        except REFUSALS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{place}: the chat template cannot write this conversation: {reason}") from error

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, **_QUIET)["input_ids"])

    def _end_tokens(self) -> list[int]:
        """The token that ends the assistant's turns, where it is not the tokenizer's end token."""
        turns = [{"role": "user", "content": "Hello"}, {"role": ASSISTANT, "content": "Hello"}]
        try:
            ids, is_learned = self._write(turns, [], "two turns, for a trial")
        except DataError:  # it wants something else of a conversation
            return []
        start, stop = _last_run(is_learned)
        # Some templates mark the newline after the end token as well.
        visible = [token for token in ids[start:stop] if self._tokenizer.decode([token]).strip()]
        known = visible and visible[-1] in self._markup and visible[-1] != self._tokenizer.eos_token_id
        return visible[-1:] if known else []


_QUIET = {"verbose": False}
"""Lengths are ours to check."""


def _beginnings(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The conversation up to each of the assistant's turns, shortest first."""
    return (turns[: index + 1] for index, turn in enumerate(turns) if turn["role"] == ASSISTANT)


def _endings(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The system message with the turns from each of the user's turns on, shortest first; at least the whole."""
    first = next((n for n, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), 0)
    starts = [n for n in range(first, len(turns)) if turns[n]["role"] == "user"]
    return ([*turns[:first], *turns[start:]] for start in reversed(starts or [first]))


def _last_run(is_learned: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and stop of the last learned tokens without a gap; (0, 0) if there are none."""
    places = np.flatnonzero(is_learned)
    if not len(places):
        return 0, 0
    gaps = np.flatnonzero(np.diff(places) > 1)
    return int(places[gaps[-1] + 1] if len(gaps) else places[0]), int(places[-1]) + 1


def _before_last_turn(example: Tokens) -> NDArray[np.int32]:
    ids, labels = learned(example.target)
    start, _ = _last_run(labels >= 0)
    return np.concatenate((example.source, ids[:start]))


def _encoded(written: Written, source_cut: bool, target_cut: bool) -> Encoded:
    places = np.flatnonzero(written.learned)
    first = int(places[0])
    rest = zip(written.ids[first:], written.learned[first:], strict=True)
    target = [token if is_learned else ~token for token, is_learned in rest]
    return Encoded(written.ids[:first], target, source_cut, target_cut)
