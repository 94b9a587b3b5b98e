import json
import math
import os
import random
import re
import string
import subprocess
import sys
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from sklearn.preprocessing import MultiLabelBinarizer

from shardtune.errors import ConfigError
from shardtune.metrics import Scorer, check_own, score, score_names

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
    got = score(["accuracy", "macro_f1", "micro_f1", "matthews"], predictions, references)

    assert list(got) == ["accuracy", "macro_f1", "micro_f1", "matthews"]
    assert got["micro_f1"] == pytest.approx(got["accuracy"], rel=1e-12)
    # scikit-learn warns where there is one label only.
    several = len({*predictions, *references}) > 1
    expected = matthews_corrcoef(references, predictions) if several else 0.0
    assert got["matthews"] == pytest.approx(expected, abs=1e-12)
    assert got["accuracy"] == accuracy_score(references, predictions)
    expected = f1_score(references, predictions, average="macro", zero_division=0.0)  # type: ignore
    assert got["macro_f1"] == pytest.approx(expected, rel=1e-12)
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


def test_bleu_halves_what_it_gives_for_every_further_length_that_matches_nowhere() -> None:
    for prediction, reference in (("a b c d e", "a b x d e"), ("a b c d e", "a x c x e"), ("a b c", "a b c")):
        expected = sacrebleu.corpus_bleu([prediction], [[reference]]).score
        assert score(["bleu"], [prediction], [reference])["bleu"] == pytest.approx(expected, rel=1e-12)


def test_nothing_to_score_gives_no_scores() -> None:
    assert score(["rouge", "accuracy"], [], []) == {}
    assert score(["perplexity"], ["a"], ["b"]) == {}
    assert list(score(["perplexity", "exact_match"], ["a"], ["b"])) == ["exact_match"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metrics: blue"):
        score(["blue"], ["a"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["bleu"], ["a"], ["a", "b"])


TEXTS = ["rouge", "bleu", "chrf", "exact_match", "squad_em", "token_f1", "length"]


def random_unicode(draw: random.Random) -> str:
    return "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xA0, 0xD000)])) for _ in range(30))


def several_references(draw: random.Random, count: int) -> tuple[list[str], list[list[str]]]:
    """Predictions, some of them empty or equal to a reference, and one to four references of each."""
    some = [random_text, random_unicode, lambda _: ""]
    references = [[draw.choice(some)(draw) for _ in range(draw.randrange(1, 5))] for _ in range(count)]
    predictions = [draw.choice([draw.choice(right), draw.choice(some)(draw), right[0][:9]]) for right in references]
    return predictions, references


def by_libraries(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    each = [scorer.score_multi(right, p) for p, right in zip(predictions, references, strict=True)]
    found = {name: sum(s[name].fmeasure for s in each) / len(each) for name in ROUGE}
    streams = list(zip_longest(*references))  # sacrebleu takes the first references of all, the second ones, …
    found["bleu"] = sacrebleu.corpus_bleu(predictions, streams, force=True).score  # type: ignore
    found["chrf"] = sacrebleu.corpus_chrf(predictions, streams).score  # type: ignore
    return found


@pytest.mark.parametrize("count", [1, 2, 60, 150])
def test_several_references_and_resamples_score_as_the_libraries_called_directly(
    draw: random.Random, count: int
) -> None:
    predictions, references = several_references(draw, count)
    scorer = Scorer(TEXTS)
    statistics = scorer.statistics(predictions, references)
    got = scorer.scores(statistics)
    expected = by_libraries(predictions, references)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)

    # Scores of a resample are those of its texts: examples are counted, not looked at again.
    drawn = [draw.randrange(count) for _ in range(count)]
    resample = scorer.values(np.bincount(drawn, minlength=count) @ statistics, np.float64(count))  # type: ignore
    expected = by_libraries([predictions[i] for i in drawn], [references[i] for i in drawn])
    assert {name: float(resample[name]) for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_answers_score_as_squad_defines_it(draw: random.Random) -> None:
    words = ["the", "The", "a", "An", "cat", "Cat!", "theatre", "U.S.", "don't", "1,000", "é", "-"]
    predictions = ["".join(draw.choices([*words, " ", "  "], k=draw.randrange(12))) for _ in range(300)]
    references = [
        [" ".join(draw.choices(words, k=draw.randrange(4))) for _ in range(draw.randrange(1, 4))] for _ in range(300)
    ]

    def normal(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    def f1(prediction: str, reference: str) -> float:
        left, right = normal(prediction), normal(reference)
        if not left or not right:
            return float(left == right)
        common = sum(min(left.count(word), right.count(word)) for word in set(left))
        precision, recall = common / len(left), common / len(right)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    got = score(["squad_em", "token_f1"], predictions, references)
    pairs = list(zip(predictions, references, strict=True))
    assert got["squad_em"] == pytest.approx(sum(normal(p) in map(normal, right) for p, right in pairs) / 300)
    assert got["token_f1"] == pytest.approx(sum(max(f1(p, r) for r in right) for p, right in pairs) / 300)
    assert 0 < got["squad_em"] < got["token_f1"] < 1
    assert score(["squad_em", "token_f1", "exact_match"], ["", "x"], [[], []])["token_f1"] == 0.5


@pytest.mark.parametrize("_round", range(4))
def test_sets_of_labels_score_as_scikit_learn(draw: random.Random, _round: int) -> None:
    labels = ["a", "b", "c", "d", '["e"]']
    count = draw.randrange(1, 40)

    def sets(some: list[str]) -> list[list[str]]:
        return [sorted(draw.sample(some, draw.randrange(len(some) + 1))) for _ in range(count)]

    predictions, references = sets(labels[:4]), sets(labels[1:])
    scorer = Scorer(["accuracy", "macro_f1", "micro_f1"], labels)
    written = [json.dumps(names) for names in predictions], [[json.dumps(names)] for names in references]
    got = scorer.scores(scorer.statistics(*written))
    one_hot = MultiLabelBinarizer(classes=labels).fit(labels)
    right, wanted = one_hot.transform(predictions), one_hot.transform(references)
    assert got["accuracy"] == pytest.approx(accuracy_score(wanted, right))
    expected = f1_score(wanted, right, average="micro", zero_division=0.0)  # type: ignore
    assert got["micro_f1"] == pytest.approx(expected)
    if wanted.any() or right.any():  # type: ignore
        # nan: labels that nobody names are left out of the mean.
        expected = f1_score(wanted, right, average="macro", zero_division=np.nan)  # type: ignore
        assert got["macro_f1"] == pytest.approx(expected)


def test_labels_fix_the_columns_and_what_is_none_of_them_is_one_label_more() -> None:
    listed = '["no"]'  # a label that looks like a list of labels
    scorer = Scorer(["macro_f1", "matthews"], ["no", "yes", listed])
    one = scorer.statistics(["yes"], [["yes"]])
    many = scorer.statistics(["oh", "no", "yes", "what", listed], [["no"], ["no"], ["yes"], ["yes"], [listed]])
    assert one.shape[1] == many.shape[1]
    assert (many[2] == one[0]).all()
    known = ["other" if text in ("oh", "what") else text for text in ["oh", "no", "yes", "what", listed]]
    expected = f1_score(["no", "no", "yes", "yes", listed], known, average="macro", zero_division=0.0)  # type: ignore
    assert scorer.scores(many)["macro_f1"] == pytest.approx(expected)
    assert scorer.scores(many)["matthews"] == pytest.approx(
        matthews_corrcoef(["no", "no", "yes", "yes", listed], known)
    )
    unknown = scorer.statistics(["oh", "oh"], [["oh"], ["what"]])
    assert scorer.each("matthews", unknown).tolist() == [1, 0]
    with pytest.raises(ValueError, match="matthews cannot be computed without the class labels"):
        Scorer(["accuracy", "matthews"])


def test_entities_score_as_conlleval_reads_them() -> None:
    cases = [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 2, 2, 2),
        ("B-PER I-PER O", "B-PER O O", 0, 1, 1),  # the end is wrong
        ("I-PER I-PER O", "B-PER I-PER O", 1, 1, 1),  # an I begins an entity
        ("B-PER I-LOC O", "B-PER O O", 1, 2, 1),  # an I of another type begins one
        ("B-LOC B-LOC", "B-LOC I-LOC", 0, 2, 1),  # a B always begins one
        ("B-LOC O I-LOC", "B-LOC O O", 1, 2, 1),
        ("O O", "B-X-Y I-X-Y", 0, 0, 1),
        ("", "O", 0, 0, 0),
    ]
    predictions = [json.dumps(case[0].split()) for case in cases]
    references = [json.dumps(case[1].split()) for case in cases]
    for prediction, reference, (*_, right, predicted, expected) in zip(predictions, references, cases, strict=True):
        f1 = 2 * right / (predicted + expected) if predicted + expected else 0.0
        assert score(["entity_f1"], [prediction], [reference])["entity_f1"] == pytest.approx(f1), (
            prediction,
            reference,
        )
    right, predicted, expected = (sum(case[index] for case in cases) for index in (2, 3, 4))
    got = score(["entity_f1", "token_accuracy"], predictions, references)
    assert got["entity_f1"] == pytest.approx(2 * right / (predicted + expected))
    tags = [(p, r) for case in cases for p, r in zip_longest(case[0].split(), case[1].split())]
    assert got["token_accuracy"] == pytest.approx(sum(p == r for p, r in tags) / len(tags))


@pytest.mark.parametrize("_round", range(4))
def test_numbers_score_as_scipy_and_scikit_learn(draw: random.Random, _round: int) -> None:
    mean, spread = draw.choice([0.0, -3.0, 1000.0]), draw.choice([0.1, 1.0, 50.0])
    x = [draw.gauss(mean, spread) for _ in range(draw.randrange(3, 200))]
    y = [value * draw.uniform(-1, 2) + draw.gauss(0, spread) for value in x]
    got = score(["mse", "pearson"], list(map(repr, x)), list(map(repr, y)))
    assert got["mse"] == pytest.approx(mean_squared_error(y, x))
    assert got["pearson"] == pytest.approx(pearsonr(x, y)[0], abs=1e-6 if spread < abs(mean) / 100 else 1e-9)
    same = [repr(0.1)] * len(x)
    assert score(["pearson"], same, list(map(repr, y)))["pearson"] == 0.0
    assert score(["pearson"], ["1"], ["2"])["pearson"] == 0.0


def test_loss_is_per_target_and_perplexity_its_exponential() -> None:
    scorer = Scorer(["perplexity", "exact_match", "length"])
    assert scorer.names == ("loss", "perplexity", "exact_match", "length")
    losses = np.array([[3.0, 2], [1.0, 3], [0.0, 0]])
    statistics = scorer.statistics(["a", "b", ""], [["a"], ["c"], [""]], losses)
    scores = scorer.scores(statistics)
    assert scores == pytest.approx({"loss": 0.8, "perplexity": math.exp(0.8), "exact_match": 2 / 3, "length": 2 / 3})
    assert scorer.each("loss", statistics)[:2] == pytest.approx([1.5, 1 / 3])
    assert np.isnan(scorer.each("loss", statistics)[2])
    without = scorer.statistics(["a", "b", ""], [["a"], ["c"], [""]])
    assert without.shape == statistics.shape
    assert list(scorer.scores(without)) == ["exact_match", "length"]
    only = Scorer(["perplexity"])
    assert only.scores(only.statistics([], [], np.array([[1e9, 1.0]])))["perplexity"] == pytest.approx(math.exp(700))
    assert [name for name in ("loss", "perplexity", "mse", "rougeL", "length") if only.lower_is_better(name)] == [
        "loss", "perplexity", "mse",
    ]  # fmt: skip
    assert only.has_direction("rougeL")
    assert not only.has_direction("length")


def test_parts_add_up_and_sums_may_have_any_shape(draw: random.Random) -> None:
    metrics = [*TEXTS, "accuracy", "macro_f1", "micro_f1", "matthews", "perplexity"]
    labels = ["x", "y", "z"]
    predictions, references = several_references(draw, 41)
    predictions[:20], references[:20] = draw.choices(labels, k=20), [[label] for label in draw.choices(labels, k=20)]
    losses = np.array([[draw.random(), draw.randrange(1, 5)] for _ in predictions])
    scorer = Scorer(metrics, labels)
    whole = scorer.statistics(predictions, references, losses)
    cuts = [0, 1, 17, 40, 41]
    parts = [scorer.statistics(predictions[a:b], references[a:b], losses[a:b]) for a, b in pairwise(cuts)]
    assert whole.dtype == np.float64
    assert (np.concatenate(parts) == whole).all()
    assert scorer.statistics([], [], losses[:0]).shape == (0, whole.shape[1])

    sums, counts = np.stack([part.sum(0) for part in parts]), np.array([float(len(part)) for part in parts])
    together = scorer.values(sums.reshape(2, 2, -1), counts.reshape(2, 2))
    assert list(together) == list(scorer.names)
    for index, part in enumerate(parts):
        alone = scorer.scores(part)
        assert {name: value.ravel()[index] for name, value in together.items()} == pytest.approx(
            alone, rel=1e-9, abs=1e-9
        )
    for name in ("rougeL", "bleu", "chrf", "macro_f1", "loss", "perplexity"):
        first = scorer.scores(whole[20:21])[name]
        assert scorer.each(name, whole)[20] == pytest.approx(first, rel=1e-12), name
    right = [p == r[0] for p, r in zip(predictions[:20], references, strict=False)]
    assert scorer.each("matthews", whole)[:20].tolist() == right


def test_one_example_has_no_correlation_but_it_is_nearer_or_farther() -> None:
    scorer = Scorer(["pearson"])
    assert scorer.each("pearson", scorer.statistics(["1", "5"], [["3"], ["5"]])).tolist() == [-4.0, 0.0]


def test_metrics_are_those_of_evaluate(tmp_path: Path) -> None:
    import evaluate

    from shardtune.metrics import labels, regression, tags, texts

    settings = {"keep_in_memory": True, "cache_dir": str(tmp_path), "seed": 0}
    classes = [texts.Rouge, texts.Bleu, texts.Chrf, texts.ExactMatch, texts.SquadEm, texts.TokenF1, texts.Length]
    classes += [labels.Accuracy, labels.MacroF1, labels.MicroF1, labels.Matthews, tags.EntityF1, tags.TokenAccuracy]
    classes += [regression.Mse, regression.Pearson]
    written = {
        tags.EntityF1: '["B-A", "O"]',
        tags.TokenAccuracy: '["B-A", "O"]',
        regression.Mse: "2",
        regression.Pearson: "2",
    }
    found = []
    for metric_class in classes:
        metric = metric_class(**settings)
        assert isinstance(metric, evaluate.Metric)
        assert metric.citation
        assert metric.description
        text = written.get(metric_class, "one two three four")
        one = metric.compute(predictions=[text, text], references=[text, text])
        assert one == metric.compute(predictions=[text, text], references=[[text], [text, text]])
        found += list(one or {})
    assert sorted([*found, "loss", "perplexity"]) == sorted(score_names(list(texts.SCORES)))


OWN = """
import numpy as np

def shared(prediction, reference):
    return len(set(prediction) & set(reference))

def truth(prediction, reference):
    return np.bool_(prediction == reference)

def nothing(prediction, reference): pass

def text(prediction, reference): return "0.5"

def infinite(prediction, reference): return np.float32("inf")

def first(prediction, reference): return ord(prediction[0])

number = 3
"""


def test_metrics_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_metrics_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    (tmp_path / f"{name}_broken.py").write_text("x = (1,\n", encoding="utf-8")
    (tmp_path / f"{name}_lacks.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    scorer = Scorer([f"{name}:shared", "exact_match", f"{name}:truth"])
    assert scorer.names == ("loss", f"{name}:shared", "exact_match", f"{name}:truth")
    statistics = scorer.statistics(["abc", "x"], [["a", "bc"], ["x"]])
    assert scorer.scores(statistics) == {f"{name}:shared": 1.5, "exact_match": 0.5, f"{name}:truth": 0.5}

    check_own(["rouge", f"{name}:shared"])
    for wrong, message in {
        f"{name}:nothing": r"nothing returned NoneType, not a finite number, given prediction 'a short text'",
        f"{name}:text": "text returned str, not a finite number",
        f"{name}:infinite": "infinite returned inf, not a finite number",
        f"{name}:first": rf"first failed, given prediction '' .*IndexError.*{name}.py, line 16",
        f"{name}:sharde": rf"{name}.py has no function sharde; did you mean {name}:shared?",
        f"{name}:number": r"number in .* is no function",
        f"{name}_broken:x": r"cannot be imported: .*_broken.py, line 1",
        f"{name}_lacks:x": "needs nothing_of_that_name, which is absent",
        f"{name}_absent:x": rf"no module {name}_absent, neither in {tmp_path}",
        f"{name}.inner:x": rf"{name}",
    }.items():
        with pytest.raises(ConfigError, match=message) as raised:
            Scorer([wrong])
        assert f"evaluation.metrics: {wrong}" in str(raised.value)
    with pytest.raises(ConfigError, match="given prediction '' and reference 'ab'"):
        check_own([f"{name}:first"], "ab")


def test_numbers_of_examples_must_agree() -> None:
    scorer = Scorer(["exact_match"])
    for arguments in ((["a"], []), (["a"], [["a"]], np.zeros((2, 2)))):
        with pytest.raises(ValueError, match="1 predictions"):
            scorer.statistics(*arguments)
    with pytest.raises(ValueError, match="7 columns of statistics, not 3"):
        scorer.scores(np.zeros((2, 7)))


LEAVES_NOTHING = """
import logging, socket, sys
logging.basicConfig(level=logging.INFO)  # an application may show every library's messages

def refuse(*_):
    raise AssertionError("the network was used")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from shardtune.metrics import Scorer, check_own, score, score_names
score_names(["rouge"]), check_own(["rouge"]), Scorer(["rouge"])
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
