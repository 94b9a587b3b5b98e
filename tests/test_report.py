import copy
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from report_pages import Page, check_self_contained, report_of
from report_runs import write_json, write_lines, write_run
from shardtune.assemble.data import read_texts
from shardtune.assemble.data_statistics import data_statistics, write_data_statistics
from shardtune.assemble.prepared import prepare
from shardtune.cli import main
from shardtune.config_file import load_config
from shardtune.errors import StorageError
from shardtune.report import write_report
from shardtune.report.charts import MOST_POINTS, thinned
from shardtune.report.page import MOST_BYTES
from shardtune.world import World
from tiny import tiny_config, write_rows

HOSTILE = "</script><script>alert('1')</script><img src=//evil.example/x onerror=alert(2)>\"'&amp;{{ 7*7 }}\x00"
STYLE = Path(write_report.__code__.co_filename).parent / "templates" / "style.css"


@pytest.mark.parametrize(
    ("gain", "title", "sentence"),
    [
        (0.13, "▲ got better", "The tuned model is better than the base model, and by more than chance explains."),
        (0.005, "≈ no clear difference", "So small a difference may well be chance"),
        (-0.1, "▼ got worse", "A simpler way does better here: base, 3 examples in the prompt, with 0.240."),
    ],
)
def test_the_page_says_first_what_tuning_did_and_whether_that_is_sure(
    tmp_path: Path, gain: float, title: str, sentence: str
) -> None:
    page = report_of(write_run(tmp_path / "news", gain=gain))
    check_self_contained(page, (tmp_path / "news" / "report.html").read_text())
    head, _, rest = page.text.partition("Before and after rougeL")
    head, _, rest = page.text.partition("All scores on test")
    assert title in head
    assert sentence in head
    after = f"{0.21 + gain:.3f}"
    assert f"On 200 examples of test, rougeL went from 0.210 to {after}: {gain:+.3f}".replace("-", "−") in head
    assert head.index("rougeL on test") < head.index("rougeL on validation")
    assert re.search(
        r"Overfitting: validation loss rises since step 150 .* at step 300\) while training loss falls", head
    )
    assert "3 of 1,000 examples of validation also stand in train" in head
    for said in (
        "google/flan-t5-base", "lora: rank 16", "4 × NVIDIA H100", "fsdp2", "0123456789abcdef", "torch 2.11.0",
        "T5 has no rotary positions", "96 places", "shardtune train --config configs/news.yaml seed=0", "41 GB",
        "6,300,000", "4 min 12 s", "0.12 kWh", "first sentences", "Largest wins", "Largest losses", "politics",
        "empty target 17", "length: 12–120",
    ):  # fmt: skip
        assert said in rest, said
    titles = [
        text for text in page.texts if text in ("Loss", "Learning rate", "Gradient norm", "Speed", "Padding", "Memory")
    ]
    assert set(titles) == {"Loss", "Learning rate", "Gradient norm", "Speed", "Padding", "Memory"}


def test_of_scores_where_less_is_better_and_of_single_examples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    found = json.loads((run / "comparison.json").read_text())
    part = found["test"]
    part |= {"metric": "loss"}
    part["variants"]["step-0"]["loss"] = {"value": 2.0, "low": 1.9, "high": 2.1}
    part["variants"]["step-300"]["loss"] = {"value": 1.5, "low": 1.4, "high": 1.6}
    part["variants"] |= {f"step-{step}": part["variants"]["step-300"] for step in (100, 200, 400)}
    part["tests"]["loss"] = {"difference": -0.5, "low": -0.6, "high": -0.4, "p": 0.001}
    write_json(run / "comparison.json", {"test": part})
    text = report_of(run).text.partition("Before and after")[2]
    assert "loss on test ▲ got better 2.000 → 1.500 −0.500" in text
    assert "base base, 3 examples in the prompt first sentences step 400 tuned (step 300) difference" in text
    # A win is shown first, with what each side wrote at that line of its file.
    first = part["differences"][0]
    lines = {
        name: (run / "predictions" / f"{name}-test.jsonl").read_text().splitlines()[first["position"]]
        for name in ("step-0", "step-300")
    }
    wins = text.partition("Largest wins")[2].partition("Largest losses")[0]
    card = wins.partition(f"Example {first['position'] + 1} ")[2].partition("Example ")[0]
    assert wins.strip().startswith(f"Example {first['position'] + 1} ▲ −{first['difference']:.3f} loss")
    plain = re.sub(r"\s", "", card)
    for line in lines.values():
        for key in ("source", "reference", "prediction"):
            assert re.sub(r"\s", "", json.loads(line)[key]) in plain


def test_a_run_that_trains_nothing_is_not_said_to_have_tuned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    found = json.loads((run / "comparison.json").read_text())
    for part in found.values():
        part["tuned"] = "shots-3"
        del part["variants"]["step-300"]
    write_json(run / "comparison.json", found)
    for split in found:
        (run / "predictions" / f"step-300-{split}.jsonl").rename(run / "predictions" / f"shots-3-{split}.jsonl")
    text = report_of(run).text.partition("Repeat it")[2].partition("What was run")[0]
    assert "for the base model with 3 examples in its prompt" in text
    assert "With 3 examples in the prompt" in text.partition("Examples side by side")[2]
    assert "uned" not in text


def test_what_is_said_of_numbers_and_of_tags(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    found = json.loads((run / "comparison.json").read_text())
    for part in found.values():
        part["variants"]["majority"] = part["variants"].pop("lead")
    write_json(run / "comparison.json", found)
    assert "most frequent label" in report_of(run).text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["task"] = {"kind": "classification", "problem": "regression"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = report_of(run).text
    assert "mean of the training data" in text
    assert "most frequent label" not in text
    assert "mean squared error" in text
    assert "nats" not in text
    # Words and labels stand in the files as JSON.
    config["task"] = {"kind": "token_classification"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for file in (run / "predictions").iterdir():
        lines = [{"source": '["New", "York"]', "reference": '["B-LOC", "I-LOC"]', "prediction": '["O", "O"]'}] * 200
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = report_of(run).text.partition("Largest wins")[2]
    assert "New York Reference B-LOC I-LOC Base O O Tuned O O" in card
    assert '"B-LOC"' not in card


def test_what_a_run_says_is_text_whatever_it_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", name=HOSTILE)
    for path in run.glob("predictions/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [{key: f"{HOSTILE} {value}" for key, value in line.items()} for line in lines])
    for name in ("comparison.json", "data.json", "environment.json"):
        write_json(run / name, _with_hostile_names(json.loads((run / name).read_text())))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [{**line, HOSTILE: 1.0} for line in lines])
    page = report_of(run)
    made = (run / "report.html").read_bytes().decode()
    check_self_contained(page, made)
    assert page.text.count("<script>alert('1')</script>") > 100
    assert "{{ 7*7 }}" in page.text
    assert "\x00" not in made


def _with_hostile_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if key in _KNOWN else key + HOSTILE: _with_hostile_names(one)
            if key not in ("base", "tuned", "metric")
            else one
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_with_hostile_names(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


_KNOWN = {
    "test", "validation", "train", "examples", "metric", "base", "tuned", "variants", "tests", "wins", "losses", "ties",
    "differences", "slices", "position", "difference", "value", "low", "high", "p", "by", "source_tokens", "histogram",
    "target_tokens", "labels", "duplicates", "truncated", "source", "target", "overlap", "dropped", "median", "p95",
    "max", "mean", "step-0", "step-300", "rougeL", "sources", "fused", "versions", "command_line", "devices", "ranks",
}  # fmt: skip


@pytest.mark.parametrize(
    "absent",
    ["config.yaml", "environment.json", "metrics.jsonl", "comparison.json", "data.json", "predictions", "final", "all"],
)
def test_what_is_not_there_is_said_and_left_out(tmp_path: Path, absent: str) -> None:
    run = write_run(tmp_path / "run", steps=20)
    for path in list(run.iterdir()):
        if path.name == absent or (absent == "all" and path.name != "config.yaml"):
            path.rename(tmp_path / f"away-{path.name}")
    page = report_of(run)
    check_self_contained(page, (run / "report.html").read_text())
    said = {
        "config.yaml": "config.yaml is not there",
        "environment.json": "The command line is not known",
        "metrics.jsonl": "No step was logged, so there are no curves",
        "comparison.json": "Whether that is more than chance was not tested",
        "data.json": "nothing is known of the data",
        "predictions": "There are no predictions",
        "final": "The run has not come to its end: this is what there is up to step 20",
        "all": "Nothing was judged",
    }
    assert said[absent] in page.text
    assert "cannot be shown" not in page.text


def test_a_run_of_no_steps_and_one_that_was_cut_off_in_a_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    (run / "comparison.json").unlink()
    page = report_of(run)
    assert "On validation, rougeL is 0." in page.text
    assert "There is nothing to compare it with." in page.text
    (run / "metrics.jsonl").write_text("".join(lines[:8]) + '{"step": 5, "loss": 1.2')
    assert not [text for text in report_of(run).texts if "cannot" in text]
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 3, "loss": null, "grad_norm": null}\n')
    assert "The loss was not finite at step 3." in report_of(run).text


@pytest.mark.parametrize("seed", range(3))
def test_strange_files_cost_a_section_and_never_the_page(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = write_run(tmp_path / "run", steps=20)
    whole = {
        name: json.loads((run / name).read_text()) for name in ("comparison.json", "data.json", "environment.json")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for _ in range(8):
        for name, value in whole.items():
            write_json(run / name, _damaged(copy.deepcopy(value), rng))
        write_lines(
            run / "metrics.jsonl", [_damaged(dict(line), rng) if rng.random() < 0.1 else line for line in lines]
        )
        check_self_contained(report_of(run), (run / "report.html").read_text())
    (run / "comparison.json").write_bytes(b"\xff\xfe{")
    (run / "config.yaml").write_text("[1, 2")
    assert "config.yaml is no YAML" in report_of(run).text


def _damaged(value: Any, rng: random.Random) -> Any:
    """With a value somewhere replaced by one of another kind."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _damaged(value[key], rng)
        return value
    return rng.choice([None, -1, 0, 1e308, float("nan"), "x", [], {}, [[]], {"a": {}}, True, [1, "b"], {"value": "y"}])


def test_the_page_stays_small_and_lines_short_however_long_the_run_and_its_texts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3_000)
    for path in run.glob("predictions/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [dict.fromkeys(line, "<&'\"" * 8_000) for line in lines[:20]])
    found = json.loads((run / "comparison.json").read_text())
    for part in found.values():
        part["differences"] = [{"position": i, "difference": 1.0 - i / 10} for i in range(20)]
        part["slices"] *= 2000
    write_json(run / "comparison.json", found)
    data = json.loads((run / "data.json").read_text())
    data["train"]["labels"] = {f"label {i}": 1 for i in range(50_000)}
    write_json(run / "data.json", data)
    (run / "config.yaml").write_text("name: long\nnote: " + "x" * 3_000_000)
    page = report_of(run)
    assert (run / "report.html").stat().st_size <= MOST_BYTES
    assert "more characters are left out" in page.text
    assert "cannot be shown" not in page.text
    assert "Texts are cut at" in page.text
    assert max(len(points.split()) for points in page.of("points")) <= MOST_POINTS
    assert "and 49,980 more" in page.text or "and 49980 more" in page.text


def test_thinned_lines_keep_their_ends_and_their_least_and_largest_values() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        number = int(rng.integers(3, 5000))
        values = rng.standard_cauchy(number)
        points = [(float(x), float(y)) for x, y in enumerate(values)]
        kept = thinned(points)
        assert len(kept) <= MOST_POINTS, seed
        assert kept == sorted(set(kept)), seed
        assert set(kept) <= set(points), seed
        assert {points[0], points[-1], points[values.argmin()], points[values.argmax()]} <= set(kept), seed
        assert thinned(points[:400]) == points[:400]


def test_texts_and_lines_stand_out_from_what_they_are_on_in_light_and_dark() -> None:
    """Contrast as WCAG 2.2 has it: 4.5 for texts, 3 for lines."""
    palettes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        for part in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S)
    ]
    assert len(palettes) == 3  # light, dark, print

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for palette in palettes:
        for text in ("fg", "muted", "link", "better", "worse", "unclear"):
            for behind in ("bg", "panel"):
                assert contrast(palette[text], palette[behind]) >= 4.5, (text, behind, palette[text])
        for kind in ("better", "worse", "unclear"):
            assert contrast(palette[kind], palette[f"{kind}-bg"]) >= 4.5, kind
        assert contrast(palette["fg"], palette["mark"]) >= 4.5
        for line in range(7):
            for behind in ("bg", "panel"):
                assert contrast(palette[f"c{line}"], palette[behind]) >= 3, (line, behind)


def test_the_command_writes_the_page_anew_without_torch(tmp_path: Path) -> None:
    run, other = (
        write_run(tmp_path / "runs" / "first", "first"),
        write_run(tmp_path / "runs" / "second", "second", seed=1),
    )
    commands = [["--run", str(run)], ["--run", str(run), "--run", str(other), "--out", str(tmp_path / "both.html")]]
    script = (
        "import sys; from shardtune.cli import main\n"
        f"for words in {commands!r}: assert main(['report', *words]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"written: {run / 'report.html'}", f"written: {tmp_path / 'both.html'}"]
    page = Page((tmp_path / "both.html").read_text())
    check_self_contained(page, (tmp_path / "both.html").read_text())
    settings = page.text.partition("What is set differently")[2].partition("Curves Training loss")[0]
    assert "optimizer.lr 0.0001 0.0002" in settings
    assert "seed 0 1" in settings
    assert "tuning.rank" not in settings
    assert "left no statistics of them: there is no test" in page.text


def test_a_wrong_folder_is_answered_with_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "news")
    for words, said in (
        (
            ["--run", str(tmp_path / "nwes")],
            f"there is no folder {tmp_path / 'nwes'}; the runs in {tmp_path} are: news",
        ),
        (["--run", str(tmp_path)], "is no run's folder (no config.yaml, no metrics.jsonl); the runs in it are: news"),
        (["--run", str(tmp_path / "news"), "--out", str(tmp_path)], f"--out: {tmp_path} is a folder"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["report", "--run", str(tmp_path / "news"), "--out", str(tmp_path / "file" / "x.html")]) == 7


def test_a_finished_run_does_not_fail_for_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    report_of(run)
    before = (run / "report.html").read_text()

    def broken(run: Any) -> str:
        raise KeyError("a bug")

    monkeypatch.setattr("shardtune.report.page", broken)
    assert write_report(run) == f"no report (KeyError: 'a bug'); `shardtune report --run {run}` tries again"
    assert write_report(tmp_path / "none") is not None
    assert (run / "report.html").read_text() == before
    monkeypatch.undo()
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(run)


def test_what_is_told_of_data_is_what_counting_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    rng = random.Random(3)
    words = ["red", "cat", "dog", "sings", "over"]

    def row() -> dict[str, str]:
        text = " ".join(rng.choices(words, k=rng.randint(1, 60)))
        return {"text": text, "summary": text[:20], "label": rng.choice(["a", "b", "b"])}

    train, validation = [row() for _ in range(50)], [row() for _ in range(20)]
    train += [*train[:7], {"text": " ", "summary": "x", "label": "a"}]
    validation += [*train[:3], validation[0]]
    for model in ("bert", "t5"):
        config = load_config(
            tiny_config(
                tmp_path / model, model,
                data={
                    "train": [str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in
                              (("one", train[:30]), ("two", train[30:]))],
                    "validation": str(write_rows(tmp_path / "v.jsonl", validation)),
                },
            ),
            [],
        )  # fmt: skip
        prepared, counted = (prepare(config, World(0, 1, 0, torch.device("cpu")), read_texts(config)) for _ in range(2))
        found = data_statistics(config, prepared)
        assert data_statistics(config, counted) == found  # of what is remembered
        write_data_statistics(tmp_path, config, prepared)
        assert json.loads((tmp_path / "data.json").read_text()) == found
        assert found["overlap"] == {"train/validation": 3}
        assert found["dropped"] == {"empty source": 1}
        assert found["train"]["sources"] == {str(tmp_path / "one.jsonl"): 30, str(tmp_path / "two.jsonl"): 27}
        for split, rows in (("train", train[:-1]), ("validation", validation)):
            told = found[split]
            assert told["examples"] == len(rows)
            key = "label" if model == "bert" else "summary"
            assert told["duplicates"] == len(rows) - len({(one["text"], one[key]) for one in rows})
            if model == "bert":
                assert told["labels"] == Counter(one["label"] for one in rows)
                assert "target_tokens" not in told
            else:
                assert told["labels"] == {}
            whole = [len(prepared.tokenizer(one["text"])["input_ids"]) for one in rows]
            lengths = np.minimum(whole, 48)
            assert told["truncated"]["source"] == sum(length > 48 for length in whole)
            tokens = told["source_tokens"]
            assert tokens["mean"] == pytest.approx(lengths.mean())
            assert (tokens["median"], tokens["max"]) == (np.median(lengths), lengths.max())
            assert tokens["p95"] == pytest.approx(np.percentile(lengths, 95))
            bars = tokens["histogram"]
            assert [[low, high, int(((lengths >= low) & (lengths <= high)).sum())] for low, high, _ in bars] == bars
            assert sum(count for *_, count in bars) == len(rows)
