"""What a model writes: greedy, by beam search, or drawn so that a text is the same in any batch on any rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardtune import documents
from shardtune.examples import Tokens
from shardtune.protocols import Generation


def all_ends(ends: int | list[int], more: Sequence[int]) -> int | list[int]:
    """End tokens as a generation config holds them, each once."""
    return [*dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *more])] if more else ends


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    how: Generation,
    tokenizer: Any,
    examples: Sequence[Tokens],
    more_ends: Sequence[int] = (),
) -> list[str]:
    """The new text of each row of `input_ids` [b, s], without special tokens, white space around it, and what comes
    from one of `how.stop` on.

    What `how` leaves as it is by default is as the model's own generation settings say (such as forced tokens).
    `more_ends`: tokens that end a text beside the model's own end tokens, or the tokenizer's where it names none.
    """
    documents.read(None)
    settings = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    ends = all_ends(settings.eos_token_id or tokenizer.eos_token_id, more_ends)
    settings.update(
        max_new_tokens=how.max_new_tokens, max_length=None, num_beams=how.beams, do_sample=False, temperature=None,
        top_k=None, top_p=None, use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends,
    )  # fmt: skip
    if how.min_new_tokens:
        settings.update(min_new_tokens=how.min_new_tokens)
    if how.no_repeat_ngram:
        settings.update(no_repeat_ngram_size=how.no_repeat_ngram)
    if how.length_penalty != 1.0:
        settings.update(length_penalty=how.length_penalty)
    # A decoder's output begins with its input, an encoder-decoder's with one start token.
    begun = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
    if how.temperature > 0:
        processors.append(Drawn(how, [example.number for example in examples], begun))
    if how.stop:
        criteria.append(Stopped(how.stop, tokenizer, begun))
    device = next(model.parameters()).device
    written: Tensor = model.generate(  # pyright: ignore[reportCallIssue, reportAssignmentType]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        logits_processor=processors,
        stopping_criteria=criteria,
        synced_gpus=how.in_step,
    )
    # An end token that is not a special one would stay in the text.
    rows = [_before(row, more_ends) for row in written[:, begun:].tolist()]
    if how.counts is not None:
        how.counts(sum(token != tokenizer.pad_token_id for row in rows for token in row))
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [_cut(text, how.stop).strip() for text in texts]


def _before(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), None)]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=None)]


class Drawn(LogitsProcessor):
    """Makes of the most probable token a drawn one, by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014,
    arXiv:1411.0030): argmax(logits / temperature + g), with g drawn from Gumbel(0, 1) for each token.

    The noise depends on the seed, the example's number and the token's place alone.
    """

    def __init__(self, how: Generation, numbers: Sequence[int], begun: int) -> None:
        """`numbers`: of the example in each row; `begun`: tokens of a row that were there before."""
        self._seed = how.seed
        self._numbers = numbers
        self._begun = begun
        self._warpers: list[Callable[[Any, Any], Tensor]] = [TemperatureLogitsWarper(how.temperature)]
        if how.top_k is not None:
            self._warpers.append(TopKLogitsWarper(how.top_k))
        if how.top_p is not None and how.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(how.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [b, v] to scores [b, v]; a token that was ruled out has -inf, before and after."""
        place, warped = input_ids.shape[1] - self._begun, scores
        for warper in self._warpers:
            warped = warper(input_ids, warped)
        noise = np.stack([self._noise(number, place, scores.shape[1]) for number in self._numbers])
        return warped + torch.from_numpy(noise).to(scores.device)

    def _noise(self, number: int, place: int, size: int) -> np.ndarray:
        # A counter-based generator: any number of streams side by side, each by its key.
        stream = np.random.Generator(np.random.Philox(key=[self._seed, number << 32 | place]))
        # -log of an exponential variable is a Gumbel one.
        drawn = np.maximum(stream.standard_exponential(size), np.finfo(np.float64).tiny)
        return -np.log(drawn).astype(np.float32)


class Stopped(StoppingCriteria):
    """A row is done where one of some strings stands in its new text."""

    def __init__(self, stop: Sequence[str], tokenizer: Any, begun: int) -> None:
        """`begun`: tokens of a row that were there before."""
        self._stop = stop
        self._tokenizer = tokenizer
        self._begun = begun
        # A character may take several tokens, four if they are bytes; some tokens write nothing.
        self._tail = 4 * max(map(len, stop)) + 8

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Token ids [b, s] to [b]."""
        rows = input_ids[:, self._begun :].tolist()
        done = [self._stops(row[-self._tail :]) and self._stops(row) for row in rows]
        return torch.tensor(done, device=input_ids.device)  # pyright: ignore[reportReturnType]

    def _stops(self, row: list[int]) -> bool:
        text = self._tokenizer.decode(row, skip_special_tokens=True)
        return any(string in text for string in self._stop)
