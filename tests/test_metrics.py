import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from shardtune.metrics import score

ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


@pytest.fixture
def draw() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def random_text(draw: random.Random) -> str:
    words = ["The", "cat", "runs", "running", "über", "naïve", "日本", "3.5%", "x_y", "a,b", ".", "don't"]
    lines = [" ".join(draw.choices(words, k=draw.randrange(12))) for _ in range(draw.randrange(4))]
    return draw.choice(["", " "]) + "\n".join(lines) + draw.choice(["", " .", "\n"])


def random_pairs(draw: random.Random) -> tuple[list[str], list[str]]:
    references = [random_text(draw) for _ in range(draw.randrange(1, 150))]
    # Some equal, some equal up to white space, some cut, some unrelated.
    changes = [lambda t: t, lambda t: f" {t}\n", lambda t: t[: len(t) // 2], lambda _: random_text(draw)]
    return [draw.choice(changes)(text) for text in references], references


@pytest.mark.parametrize("_round", range(8))
def test_texts_score_as_the_libraries_called_directly(draw: random.Random, _round: int) -> None:
    predictions, references = random_pairs(draw)
    got = score(["rouge", "bleu", "chrf", "exact_match"], predictions, references)

    scorer = RougeScorer(ROUGE, use_stemmer=False)
    each = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    expected = {name: sum(s[name].fmeasure for s in each) / len(each) for name in ROUGE}
    expected["bleu"] = sacrebleu.corpus_bleu(predictions, [references], force=True).score
    expected["chrf"] = sacrebleu.corpus_chrf(predictions, [references]).score
    equal = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
    expected["exact_match"] = equal.count(True) / len(equal)

    assert list(got) == [*ROUGE, "bleu", "chrf", "exact_match"]
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize("_round", range(8))
def test_labels_score_as_scikit_learn_and_as_counted_by_hand(draw: random.Random, _round: int) -> None:
    labels = ["1", "2.5", "no", "yes", "vielleicht"]
    count = draw.randrange(1, 60)
    predictions, references = draw.choices(labels, k=count), draw.choices(labels[:3], k=count)
    got = score(["accuracy", "macro_f1"], predictions, references)

    assert list(got) == ["accuracy", "macro_f1"]
    assert got["accuracy"] == accuracy_score(references, predictions)
    assert got["macro_f1"] == f1_score(references, predictions, average="macro", zero_division=0.0)  # type: ignore
    each = []
    for label in {*predictions, *references}:
        hits = sum(p == r == label for p, r in zip(predictions, references, strict=True))
        each.append(2 * hits / (predictions.count(label) + references.count(label)))
    assert got["macro_f1"] == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_known_values() -> None:
    # Two of three words, all in the reference: precision 2/3, recall 1, F1 0.8.
    assert score(["rouge"], ["the cat sat"], ["The cat."])["rouge1"] == pytest.approx(0.8)
    # The same sentences in another order: as one sequence half of it matches, line by line all of it.
    swapped = score(["rouge"], ["one two\nthree four"], ["three four\none two"])
    assert swapped["rougeL"] == pytest.approx(0.5)
    assert swapped["rougeLsum"] == pytest.approx(1.0)
    same = ["a perfect text of seven words here"] * 60
    perfect = score(["rouge", "bleu", "chrf", "exact_match"], same, same)
    assert perfect == pytest.approx(dict.fromkeys(ROUGE, 1.0) | {"bleu": 100, "chrf": 100, "exact_match": 1})
    assert max(perfect.values()) <= 100.0


def test_nothing_to_score_gives_no_scores() -> None:
    assert score(["rouge", "accuracy"], [], []) == {}
    assert score(["perplexity"], ["a"], ["b"]) == {}
    assert list(score(["perplexity", "exact_match"], ["a"], ["b"])) == ["exact_match"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metrics: blue"):
        score(["blue"], ["a"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["bleu"], ["a"], ["a", "b"])


LEAVES_NOTHING = """
import logging, socket, sys
logging.basicConfig(level=logging.INFO)  # an application may show every library's messages

def refuse(*_):
    raise AssertionError("the network was used")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from shardtune.metrics import score
assert not {"evaluate", "torch", "sklearn"} & set(sys.modules), "imported before it is needed"
texts = ["one two three four ."] * 200
score(["rouge", "bleu", "chrf", "exact_match"], texts, texts)
score(["accuracy", "macro_f1"], [str(i) for i in range(200)], ["1"] * 200)
"""


def test_nothing_is_printed_nothing_is_left_behind_and_no_network_is_used(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    unwanted = ("HF_", "XDG_", "PYTHONWARNINGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAVES_NOTHING],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []
