"""Answers that stand in a text: what is read of a row and where its answer stands, next to transformers."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardtune.cli import main
from shardtune.data.fields import texts
from shardtune.data.sources import Row
from shardtune.errors import ConfigError, DataError
from shardtune.examples import Text, Tokens
from shardtune.protocols import Generation
from shardtune.task.question_answering import Config, QuestionAnswering
from skeletons import drawn_model
from small_tokenizers import byte_level, sentencepiece, wordpiece
from tiny import TASKS as TINY
from tiny import WORDS, questions, tiny_config
from tiny import rows as tiny_rows

SECTION = Config(kind="question_answering")
TOKENIZERS = {"bert-like": wordpiece, "roberta-like": byte_level, "llama-like": lambda: sentencepiece("<s> $A")}
LONGEST_ANSWER = Generation(8)


def text_of(row: dict[str, Any], place: str = "f:1") -> Text:
    return next(iter(texts([Row(place, row)], SECTION.fields, Counter())))


def as_tokens(encoded: Any) -> list[Tokens]:
    return [Tokens(np.array(e.source, np.int32), np.array(e.target, np.int32)) for e in encoded]


def read_ids(source: Any) -> list[int]:
    return [token if token >= 0 else ~token for token in source]


def random_row(rng: random.Random, *more: str) -> dict[str, Any]:
    words = [rng.choice([*WORDS, *WORDS, "zebra", "it's", *more]) for _ in range(rng.randint(2, 25))]
    context = " ".join(words)
    first = rng.randrange(len(words))
    answer = " ".join(words[first : rng.randint(first, len(words)) + 1])
    start = len(" ".join([*words[:first], ""]))
    question = " ".join(rng.choices(WORDS, k=rng.randint(1, 2)))
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_and_answers_are_those_of_transformers(name: str, side: str) -> None:
    """Its tokenizer cuts the context alone; an answer that is not whole in what is left is not learned."""
    tokenizer, seed = TOKENIZERS[name](), random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng, cut_off = random.Random(seed), 0
    tokenizer.truncation_side = side
    for _ in range(200):
        row, limit = random_row(rng), rng.randint(40, 70) if name == "roberta-like" else rng.randint(16, 25)
        theirs = tokenizer(row["question"], row["context"], truncation="only_second", max_length=limit)
        (encoded,) = QuestionAnswering(tokenizer, limit).encode([text_of(row)])
        assert read_ids(encoded.source) == theirs["input_ids"]
        assert [token >= 0 for token in encoded.source] == [number == 1 for number in theirs.sequence_ids()]
        assert encoded.source_cut == (len(tokenizer(row["question"], row["context"])["input_ids"]) > limit)
        (answer,), (start,) = row["answers"].values()
        places = [theirs.char_to_token(0, place, 1) for place in (start, start + len(answer) - 1)]
        assert encoded.target_cut == (None in places)
        assert encoded.target == ([] if None in places else places)
        cut_off += encoded.target_cut
    assert cut_off > 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_comes_back_as_it_is_written(name: str) -> None:
    """In the context's own characters."""
    tokenizer, seed = TOKENIZERS[name](), random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    task = QuestionAnswering(tokenizer, 1000)
    some = [text_of(random_row(rng, "漢字", "🙂")) for _ in range(40)]
    found = [" ".join(map(str, e.target)) for e in task.encode(some)]
    written = task.as_written(some, found)
    assert [[answer] for answer in written] == [task.references(text) for text in some]
    assert task.as_written(some[:2], ["", ""]) == ["", ""]


def test_accents_and_capitals_stay() -> None:
    context = "A  Big\tCät, near\nthe DOG ."
    row = {"question": " cat ?\n\n cat", "context": context, "answers": {"text": ["Big\tCät"], "answer_start": [3]}}
    tokenizer = wordpiece()  # reads all in lower case, without accents
    task, text = QuestionAnswering(tokenizer, 1000), text_of(row)
    (encoded,) = task.encode([text])
    assert task.as_written([text], [" ".join(map(str, encoded.target))]) == ["Big\tCät"]


def test_a_question_gives_way_to_its_context() -> None:
    """To half of the row."""
    tokenizer = wordpiece()
    row = {"question": "cat " * 50, "context": "dog " * 50, "answers": {"text": ["dog"], "answer_start": [0]}}
    (encoded,) = QuestionAnswering(tokenizer, 23).encode([text_of(row)])
    words = tokenizer.convert_ids_to_tokens(read_ids(encoded.source))
    assert words == ["[CLS]", *["cat"] * 10, "[SEP]", *["dog"] * 10, "[SEP]"]
    assert encoded.target == [12, 12]


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama", "gpt2", "qwen3"])
def test_loss_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    """Of each row alone, as transformers counts padding among the places where an answer may be; averaged there."""
    tokenizer = wordpiece() if name in ("bert", "distilbert") else byte_level()
    model = drawn_model(tmp_path, name, "question_answering", tokenizer.pad_token_id)
    limit = 20 if name in ("bert", "distilbert") else 60
    task = QuestionAnswering(tokenizer, limit, tells_apart=name == "bert")
    rng = random.Random(4)
    rows = [random_row(rng) for _ in range(12)]
    some = [text_of(row) for row in rows]
    examples = as_tokens(task.encode(some))
    kept = [number for number, example in enumerate(examples) if len(example.target)]
    batch = task.collate(examples)
    assert batch.targets == len(kept) < len(examples), "some answers are cut off"
    assert batch.slots == batch.inputs["input_ids"].numel() > batch.tokens, "padded"
    with torch.no_grad():
        each = task.losses(model, batch)
        theirs = torch.zeros(len(rows))
        for number in kept:
            row = rows[number]
            inputs = tokenizer(
                row["question"], row["context"], truncation="only_second", max_length=limit,
                return_tensors="pt", return_token_type_ids=name == "bert",
            )  # fmt: skip
            first, last = examples[number].target.tolist()
            theirs[number] = model(
                **inputs, start_positions=torch.tensor([first]), end_positions=torch.tensor([last])
            ).loss
        torch.testing.assert_close(each, theirs, rtol=1e-5, atol=1e-5)
        loss = task.loss_sum(model, batch)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(theirs.sum().item(), rel=2e-6)
        alike = task.collate([examples[kept[0]]] * 3)  # without padding there is no difference
        starts, ends = alike.labels.T
        mean = model(**alike.inputs, start_positions=starts, end_positions=ends).loss
        assert task.loss_sum(model, alike).item() == pytest.approx(3 * mean.item(), rel=2e-6)
    blank = batch.blank()
    loss = task.loss_sum(model, blank)
    assert (loss.item(), blank.targets) == (0.0, 0)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_best_answer_is_predicted(tmp_path: Path, name: str) -> None:
    """Of all pairs of places in the context, tried one by one; or none, where the first token's logits say so."""
    tokenizer = wordpiece() if name == "bert" else byte_level()
    model = drawn_model(tmp_path, name, "question_answering", tokenizer.pad_token_id)
    task = QuestionAnswering(tokenizer, 40, tells_apart=name == "bert")
    some = [text_of(row)._replace(target="") for row in questions(tiny_rows(16, seed=6))]
    examples = as_tokens(task.encode(some))
    with torch.no_grad():
        found = task.predict(model, examples, LONGEST_ANSWER)
        for example, prediction in zip(examples, found, strict=True):
            output = model(**task.collate([example]).inputs)
            begins, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            context = np.flatnonzero(example.source >= 0).tolist()
            pairs = [(begins[i] + ends[j], f"{i} {j}") for i in context for j in context if i <= j < i + 8]
            assert prediction == max([*pairs, (begins[0] + ends[0], "")])[1]
    assert len(set(found)) > 4
    model.qa_outputs.bias.data += 1.0  # for all places alike
    assert task.predict(model, examples, LONGEST_ANSWER) == found
    spans = [tuple(map(int, prediction.split())) for prediction in found if prediction]
    assert all(0 <= last - first < 8 for first, last in spans)


def test_none_is_predicted_where_the_context_does_not_say_it(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    model = drawn_model(tmp_path, "bert", "question_answering", tokenizer.pad_token_id)
    task = QuestionAnswering(tokenizer, 40)
    row = {"question": "cat", "context": "dog", "answers": {"text": [], "answer_start": []}}
    text = text_of(row)
    (example,) = as_tokens(task.encode([text]))
    assert (example.target.tolist(), task.references(text), task.targets(example)) == ([0, 0], [""], 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        task.loss_sum(model, task.collate([example])).backward()
        optimizer.step()
    assert task.predict(model, [example], LONGEST_ANSWER) == [""]


# -------------------------------------------------------------------------------------------------- rows

ROW = {"question": "who", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": None}, "field `question`: null, not a text"),
        ({"context": ["a"]}, "field `context`: a list, not a text"),
        ({"answers": {"text": ["cat"]}}, "field `answers.answer_start`: absent; `answers` has: text"),
        ({"answers": {"text": ["cat"], "answer_start": []}}, "answer_start`: 0 numbers for the 1 answers of"),
        ({"answers": {"text": [3], "answer_start": [2]}}, "field `answers.text`: answer 1: a number, not a text"),
        ({"answers": {"text": ["cat"], "answer_start": ["2"]}}, "number 1: a string, not a whole number"),
        ({"answers": {"text": ["cat"], "answer_start": [1]}}, "1 is 'cat', but at 1 of the context stands ' ca'"),
        ({"answers": {"text": ["cat"], "answer_start": [-3]}}, "answer 1 is 'cat', but at -3 of the context stands ''"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        text_of({**ROW, **change}, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7 field `")
    assert problem in str(caught.value)


def test_answers_in_other_places_and_forms() -> None:
    """One answer may stand outside of a list; several are each as good, and the first is learned."""
    section = Config(kind="question_answering", question="q", context="c", answers="a.text", starts="a.start")
    given = {"q": "who", "c": "a cat or a dog", "a": {"text": "cat", "start": 2}}
    (found,) = texts([Row("f:1", given)], section.fields, Counter())
    assert json.loads(found.target) == [["cat", 2]]
    given["a"] = {"text": ["dog", "cat", "dog"], "start": [11, 2, 11]}
    (found,) = texts([Row("f:1", given)], section.fields, Counter())
    task = QuestionAnswering(wordpiece(), 100)
    assert task.references(found) == ["dog", "cat"]
    assert task.as_written([found], [" ".join(map(str, task.encode([found])[0].target))]) == ["dog"]


def test_a_wrong_row_ends_the_run_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, "bert", task=TINY["question_answering"])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({**ROW, "context": "the cat"}) + "\n")
    assert main(["train", "--config", str(config)]) == 3
    said = capsys.readouterr().err
    assert f"{tmp_path / 'train.jsonl'}:61 field `answers.text`: answer 1 is 'cat', but at 2" in said


def test_a_question_on_the_command_line() -> None:
    assert SECTION.source_of('{"question": "who", "context": "a cat"}') == "who\n\na cat"
    for text in ("who?", '{"question": "who"}', "[1]"):
        with pytest.raises(ConfigError, match="needs the context that answers it"):
            SECTION.source_of(text)
