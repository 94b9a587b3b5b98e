"""A label for each word: what is read of a row and where its labels stand, next to transformers."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from shardtune.cli import main
from shardtune.data.fields import texts
from shardtune.data.sources import Row, rows
from shardtune.errors import DataError
from shardtune.examples import IGNORED, Text, Tokens
from shardtune.protocols import Generation
from shardtune.task.token_classification import Config, TokenClassification
from skeletons import drawn_model
from small_tokenizers import byte_level, sentencepiece, wordpiece
from tiny import TASKS as TINY
from tiny import WORDS, tagged, tiny_config
from tiny import rows as tiny_rows

LABELS = ["B-PET", "I-PET", "O"]
TOKENIZERS = {"bert-like": wordpiece, "roberta-like": byte_level, "llama-like": lambda: sentencepiece("<s> $A")}
ANY_TEXT = Generation(1)


def text_of(row: dict[str, Any], place: str = "f:1") -> Text:
    fields = Config(kind="token_classification", labels="tags").fields
    return next(iter(texts([Row(place, row)], fields, Counter())))


def as_tokens(encoded: Any) -> list[Tokens]:
    return [Tokens(np.array(e.source, np.int32), np.array(e.target, np.int32)) for e in encoded]


def read_ids(source: Any) -> list[int]:
    return [token if token >= 0 else ~token for token in source]


def random_row(rng: random.Random) -> dict[str, Any]:
    strange = ["", "zebra", "漢字", "🙂🙂", "it's", "...", "two words", "x" * 40]
    words = [rng.choice([*WORDS, *WORDS, *strange]) for _ in range(rng.randint(1, 25))]
    words[rng.randrange(len(words))] = "cat"
    return {"tokens": words, "tags": [rng.choice(LABELS) for _ in words]}


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("row", tagged(tiny_rows(4, seed=3)), ids=range(4))
def test_tokens_and_labels_are_those_of_transformers(row: dict[str, Any]) -> None:
    """As its examples do it: words that are split already, the label on a word's first token."""
    tokenizer = wordpiece()
    row["tokens"][0] = "zebracat"  # of several tokens
    (encoded,) = TokenClassification(tokenizer, 1000, LABELS).encode([text_of(row)])
    theirs = tokenizer(row["tokens"], is_split_into_words=True)
    assert read_ids(encoded.source) == theirs["input_ids"]
    of = theirs.word_ids()
    firsts = [n for n, word in enumerate(of) if word is not None and word != of[n - 1]]
    assert np.flatnonzero(np.array(encoded.source) >= 0).tolist() == firsts
    assert [LABELS[index] for index in encoded.target] == row["tags"]
    assert not encoded.source_cut


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whole_words_are_cut_off(name: str) -> None:
    """Whatever the words and the limit: what is left is as much as fits of one end, and each label stays its word's."""
    tokenizer, seed = TOKENIZERS[name](), random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng, some_cut = random.Random(seed), 0
    for _ in range(60):
        row, limit = random_row(rng), rng.randint(6, 40)
        tokenizer.truncation_side = side = rng.choice(["right", "left"])
        task = TokenClassification(tokenizer, limit, LABELS)
        text = text_of(row)
        (whole,) = TokenClassification(tokenizer, 10_000, LABELS).encode([text])
        (encoded,) = task.encode([text])
        assert len(encoded.source) <= limit
        assert encoded.source_cut == (len(whole.source) > limit)
        found, count = encoded.source, len(encoded.source)
        special = len(tokenizer("")["input_ids"])
        if not encoded.source_cut:
            assert found == whole.source
            continue
        some_cut += 1
        assert read_ids(found)[0] == read_ids(whole.source)[0], "the begin token"
        begins = [n for n, token in enumerate(whole.source) if token >= 0]
        kept = sum(token >= 0 for token in found)
        assert kept, "something is left"
        assert encoded.target == (whole.target[:kept] if side == "right" else whole.target[-kept:])
        bounds = [*begins, len(whole.source) - (special - 1)]
        lengths = np.diff(bounds)
        sizes = lengths[:kept] if side == "right" else lengths[len(lengths) - kept :]
        if kept > 1:
            assert count >= special + sizes.sum(), "words are whole"
        if kept < len(lengths):
            more = lengths[kept] if side == "right" else lengths[-kept - 1]
            assert count + more > limit, "no further word would have fitted"
    assert some_cut > 10


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_that_are_known_come_back_as_they_were(name: str) -> None:
    """Written from what is read: words that were cut off, or that have no tokens, have O."""
    tokenizer, seed = TOKENIZERS[name](), random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(30):
        row, limit = random_row(rng), rng.choice([12, 1000])
        task, text = TokenClassification(tokenizer, limit, LABELS), text_of(row)
        (encoded,) = task.encode([text])
        (written,) = task.as_written([text], [json.dumps([LABELS[index] for index in encoded.target])])
        labels = json.loads(written)
        assert len(labels) == len(row["tags"])
        read = [(a, b) for a, b, word in zip(labels, row["tags"], row["tokens"], strict=True) if word]
        if limit == 1000:
            assert all(a == b for a, b in read)
        else:
            cut_off = next((n for n, (a, b) in enumerate(read) if a != b), len(read))
            assert all(a == "O" for a, _ in read[cut_off:])
        assert task.references(text) == [json.dumps(row["tags"])]


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama", "gpt2", "qwen3"])
def test_loss_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    """Of a padded batch; summed here, averaged there; and each prediction is that of its text alone."""
    tokenizer = wordpiece() if name in ("bert", "distilbert") else byte_level()
    model = drawn_model(tmp_path, name, "token_classification", tokenizer.pad_token_id, len(LABELS))
    task = TokenClassification(tokenizer, 30, LABELS)
    examples = as_tokens(task.encode([text_of(row) for row in tagged(tiny_rows(7, seed=4))]))
    batch = task.collate(examples)
    assert batch.targets == sum(map(task.targets, examples)) == int((batch.labels != IGNORED).sum())
    assert batch.slots == batch.labels.numel() > batch.tokens, "padded"
    ours = task.loss_sum(model, batch)
    theirs = model(**batch.inputs, labels=batch.labels).loss * batch.targets
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)
    with torch.no_grad():
        each = task.losses(model, batch)
        alone = torch.cat([task.losses(model, task.collate([example])) for example in examples])
        torch.testing.assert_close(each, alone, rtol=1e-5, atol=1e-5)
        found = task.predict(model, examples, ANY_TEXT)
        assert found == [task.predict(model, [example], ANY_TEXT)[0] for example in examples]
        best = model(**task.collate(examples[:1]).inputs).logits[0].argmax(-1)[examples[0].source >= 0]
    assert json.loads(found[0]) == [LABELS[index] for index in best.tolist()]
    assert len(set(found)) > 3
    blank = batch.blank()
    assert (task.loss_sum(model, blank).item(), blank.targets) == (0.0, 0)
    unknown = as_tokens(task.encode([text_of(row)._replace(target="") for row in tagged(tiny_rows(7, seed=4))]))
    assert task.predict(model, unknown, ANY_TEXT) == found, "no target is needed"


# -------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tokens": "a cat", "tags": ["O"]}, "field `tokens`: a string, not a list of words"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "field `tokens`: word 2: a number, not a string"),
        ({"tokens": ["a"], "tags": None}, "field `tags`: null, not a list of labels"),
        ({"tokens": ["a", "cat"], "tags": ["O"]}, "field `tags`: 1 labels for the 2 words of "),
        ({"tokens": ["a", "cat"], "tags": ["O", True]}, "field `tags`: label 2: a boolean, not the name or the number"),
        ({"tokens": ["a", "\ud83d"], "tags": ["O", "O"]}, "field `tokens`: word 2: not valid text"),
        ({"words": ["a"], "tags": ["O"]}, "field `tokens`: absent; the row has: words, tags"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        text_of(row, "rows.jsonl:7")
    assert f"rows.jsonl:7 {problem}" in str(caught.value)


def test_a_wrong_row_ends_the_run_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, "bert", task=TINY["token_classification"])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"tokens": ["a"], "tags": ["O", "O"]}\n')
    assert main(["train", "--config", str(config)]) == 3
    assert f"{tmp_path / 'train.jsonl'}:61 field `tags`: 2 labels for the 1 words of" in capsys.readouterr().err


def test_blank_rows_are_left_out() -> None:
    dropped: Counter[str] = Counter()
    fields = Config(kind="token_classification", labels="tags").fields
    given = [{"tokens": [], "tags": []}, {"tokens": [" "], "tags": ["O"]}, {"tokens": ["a"], "tags": [3]}]
    (found,) = texts([Row("f:1", row) for row in given], fields, dropped)
    assert (found.source, found.target, dropped) == ('["a"]', '["3"]', {"empty source": 2})


def test_integers_of_a_saved_dataset_have_their_names(tmp_path: Path) -> None:
    """Those of labels alone; a label that is not known (-1) and other integers stay."""
    names = ClassLabel(names=["O", "B-PET"])
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(names), "label": names, "count": Value("int64")}
    )
    made = {"tokens": [["a", "cat"], ["so"]], "ner_tags": [[0, 1], [0]], "label": [1, -1], "count": [1, 0]}
    Dataset.from_dict(made, features=features).save_to_disk(tmp_path / "saved")
    first, second = (row.fields for row in rows(str(tmp_path / "saved"), "train"))
    assert first == {"tokens": ["a", "cat"], "ner_tags": ["O", "B-PET"], "label": "B-PET", "count": 1}
    assert (second["ner_tags"], second["label"], second["count"]) == (["O"], -1, 0)
