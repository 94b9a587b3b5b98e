"""Questions whose answers stand in a text: which words of it they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shardtune.errors import ConfigError, DataError
from shardtune.examples import IGNORED, Batch, Encoded, Text, Tokens
from shardtune.kinds import check_text, kind
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.task.section import Parts, TaskSection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from shardtune.ragged import LayOut
    from shardtune.task.places import Places

BETWEEN = "\n\n"
"""Stands between question and context in a source; a question holds no line ends."""
SHORTEST_ROW = 16
"""Tokens: less leaves no room for a question beside its context."""


class Config(TaskSection):
    """Two outputs at each token of a context say where the answer to a question begins and ends, as in SQuAD."""

    kind: Literal["question_answering"]
    """What the model learns to do."""
    question: str = "question"
    """Field with the question."""
    context: str = "context"
    """Field with the text that the answer stands in. Where both are longer than max_source_tokens the context is cut;
    if the answer is cut off, training leaves the example out, and evaluation counts what is found in the rest."""
    answers: str = "answers.text"
    """Field with the answers, a list of strings, each as good as the others; the first one is learned. An empty list:
    the context does not say it (SQuAD 2), and the prediction is to be empty."""
    starts: str = "answers.answer_start"
    """Field with a list of where each of them begins in the context, in characters from 0."""

    head: ClassVar[str] = "question_answering"
    packs: ClassVar[bool] = False

    @property
    def fields(self) -> Fields:
        """Question, context and answers."""
        return Fields(
            None, None, None, parts=(self.question, self.context, self.answers, self.starts), read=read_answered
        )

    @property
    def asked(self) -> Fields:
        """Question and context."""
        return Fields(None, None, None, parts=(self.question, self.context), read=read_question)

    def source_of(self, text: str) -> str:
        """A JSON object with both."""
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        names = (self.question, self.context)
        if not isinstance(row, dict) or not all(name in row for name in names):
            example = json.dumps({self.question: "…", self.context: "…"}, ensure_ascii=False)
            raise ConfigError(
                f"command line TEXT: a question needs the context that answers it; give both as '{example}', or rows "
                "of them with --input"
            )
        return read_question([row[name] for name in names], [f"command line {name}" for name in names])[0]

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of SQuAD first."""
        return ("squad_em", "token_f1", "exact_match", "rouge", "bleu", "chrf", "length", "perplexity")

    @property
    def usual_scores(self) -> list[str]:
        """As for SQuAD."""
        return ["squad_em", "token_f1"]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Both need room."""
        if self.max_source_tokens < SHORTEST_ROW:
            yield "task.max_source_tokens", f"question and context need at least {SHORTEST_ROW} tokens"

    def make(self, parts: Parts) -> QuestionAnswering:
        """The task itself."""
        # Models that learned to tell two texts apart are told; their tokenizers do the same for others.
        tells = getattr(parts.architecture, "type_vocab_size", 0) > 1
        tells = tells and "token_type_ids" in parts.tokenizer.model_input_names
        return QuestionAnswering(parts.tokenizer, self.max_source_tokens, tells, parts.lay_out)


def read_question(values: Sequence[Any], at: Sequence[str]) -> tuple[str, str] | str:
    """Question and context in one text, or why the row is left out. Raises DataError."""
    for value, place in zip(values, at, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{place}: {kind(value)}, not a text")
        check_text(value, place)
    question, context = values
    if not question.strip() or not context.strip():
        return "empty source"
    return f"{' '.join(question.split())}{BETWEEN}{context}", ""


def read_answered(values: Sequence[Any], at: Sequence[str]) -> tuple[str, str] | str:
    """The same, and as target JSON: a list of the answers, each with the character that it begins at. Raises DataError,
    also where an answer does not stand in the context."""
    found = read_question(values[:2], at[:2])
    texts, starts = (value if isinstance(value, list) else [value] for value in values[2:])
    if len(texts) != len(starts):
        raise DataError(f"{at[3]}: {len(starts)} numbers for the {len(texts)} answers of {at[2]}")
    answers = []
    for number, (text, start) in enumerate(zip(texts, starts, strict=True), 1):
        if not isinstance(text, str):
            raise DataError(f"{at[2]}: answer {number}: {kind(text)}, not a text")
        if isinstance(start, bool) or not isinstance(start, int):
            raise DataError(f"{at[3]}: number {number}: {kind(start)}, not a whole number")
        if not text.strip():
            continue
        stands = values[1][start : start + len(text)] if start >= 0 else ""
        if stands != text:
            raise DataError(f"{at[2]}: answer {number} is {text!r}, but at {start} of the context stands {stands!r}")
        answers.append([text, start])
    return found if isinstance(found, str) else (found[0], json.dumps(answers, ensure_ascii=False))


def context_of(source: str) -> str:
    """The context alone."""
    return source.partition(BETWEEN)[2]


class QuestionAnswering:
    """Implements the Task protocol.

    In `Tokens`, the source's tokens that are not of the context are `~id`; the target is the places of the first and
    the last token of the answer in the source, both 0, the first token, where the context does not say it; or nothing,
    where the answer is cut off or not known.
    """

    scores_texts = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_tokens: int,
        tells_apart: bool = False,
        lay_out: LayOut | None = None,
    ) -> None:
        """`tells_apart`: the model is told which tokens are the question's and which the context's. `lay_out`: pads
        batches on the device that computes them; None: the host does."""
        self._tokenizer: Any = tokenizer
        self._limit = max_source_tokens
        self._tells_apart = tells_apart
        self._lay_out = lay_out

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Question and context as the tokenizer joins two texts."""
        import numpy as np

        encoded = []
        for text, (found, cut) in zip(texts, self._read(texts), strict=True):
            answers = json.loads(text.target) if text.target else None
            target = None if answers is None else _target(found, cut, *answers[0]) if answers else [0, 0]
            source = np.where(found.part == 0, found.ids, ~found.ids)
            encoded.append(Encoded(source.tolist(), target or [], cut, answers is not None and target is None))
        return encoded

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """Right-padded texts [b, s], and where the answer begins and ends, [b, 2]; never packed."""
        import numpy as np
        import torch

        from shardtune.task.tokens import PADDED, laid_out, pad, stream

        assert not packed
        source = stream([e.source for e in examples], self._tokenizer.pad_token_id, False, PADDED)
        inputs = {}
        if self._tells_apart:
            context = [np.maximum.accumulate(np.asarray(e.source) >= 0).astype(np.int32) for e in examples]
            inputs["token_type_ids"] = pad(context, 0)
        targets = [e.target if len(e.target) else [IGNORED, IGNORED] for e in examples]
        batch = Batch(
            inputs=inputs,
            labels=torch.from_numpy(np.array(targets, dtype=np.int64)),
            tokens=len(source.tokens),
            targets=sum(map(self.targets, examples)),
            slots=source.slots,
        )
        return laid_out(batch, [source], self._lay_out)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the cross entropies of where the answer begins and of where it ends, over the tokens of its row.

        Unlike in transformers padding is no such place, so the loss does not depend on it.
        """
        from torch.nn.functional import cross_entropy

        logits = self._logits(model, batch)  # [2, b, s]
        wanted = batch.labels.T  # [2, b]
        found = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return found.view(wanted.shape).mean(0)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the texts."""
        return self.losses(model, batch).sum()

    def targets(self, example: Tokens) -> int:
        """One, or none where the answer is cut off."""
        return int(len(example.target) > 0)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """The first and the last token of the best answer, with a space between: those whose logits have the largest
        sum; nothing, where that of the first token of all is larger."""
        import torch

        batch = self.collate(examples).to(next(model.parameters()).device)
        begins, ends = self._logits(model, batch)
        sums = begins[:, :, None] + ends[:, None, :]  # [b, s, s]
        context = torch.zeros(begins.shape, dtype=torch.bool)
        for row, example in zip(context, examples, strict=True):
            row[: len(example.source)] = torch.from_numpy(example.source >= 0)
        context = context.to(sums.device)
        allowed = torch.ones_like(sums[0], dtype=torch.bool).triu().tril(how.max_new_tokens - 1)
        allowed = allowed & context[:, :, None] & context[:, None, :]
        best, place = sums.masked_fill(~allowed, -torch.inf).flatten(1).max(-1)
        width = sums.shape[-1]
        return [
            f"{at // width} {at % width}" if found > nothing else ""
            for at, found, nothing in zip(place.tolist(), best.tolist(), sums[:, 0, 0].tolist(), strict=True)
        ]

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """The characters of the context that the tokens stand for."""
        written = []
        for text, prediction, (found, _) in zip(texts, predictions, self._read(texts), strict=True):
            first, last = map(int, prediction.split()) if prediction else (0, 0)
            answer = context_of(text.source)[found.start[first] : found.stop[last]] if prediction else ""
            written.append(answer)
        return written

    def references(self, text: Text) -> list[str]:
        """The answers, each once; an empty one where there is none."""
        return list(dict.fromkeys(answer for answer, _ in json.loads(text.target))) or [""]

    def _read(self, texts: Sequence[Text]) -> list[tuple[Places, bool]]:
        """Of each text the tokens that are read, and whether any are left out."""
        from shardtune.task.places import kept, places

        questions = [text.source.partition(BETWEEN)[0] for text in texts]
        read = []
        for found in places(self._tokenizer, [context_of(text.source) for text in texts], questions):
            left = kept(found, self._limit, self._tokenizer.truncation_side)
            read.append((found.take(left), len(left) < len(found.ids)))
        return read

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of beginning and end, float32 [2, b, s]; -inf on padding."""
        import torch

        output = model(**batch.inputs)
        logits = torch.stack([output.start_logits, output.end_logits]).float()
        return logits.masked_fill(batch.inputs["attention_mask"] == 0, -torch.inf)


def _target(found: Places, cut: bool, answer: str, start: int) -> list[int] | None:
    """The first and the last token of the context that the answer's characters stand in; None: they are cut off."""
    import numpy as np

    start += len(answer) - len(answer.lstrip())
    stop = start + len(answer.strip())
    of_context = found.part == 0
    first = np.flatnonzero(of_context & (found.stop > start))
    last = np.flatnonzero(of_context & (found.start < stop) & (found.start < found.stop))
    if not len(first) or not len(last) or first[0] > last[-1]:
        return None
    if cut and (found.start[of_context].min() > start or found.stop[of_context].max() < stop):
        return None
    return [int(first[0]), int(last[-1])]
