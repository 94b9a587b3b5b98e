import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from browser import PROGRAM, Browser
from report_pages import Page, check_self_contained, report_of
from report_runs import write_run
from shardtune.cli import main
from shardtune.comparing import compare
from shardtune.metrics import Scorer
from shardtune.report import write_report
from tiny import tiny_config


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two real runs that judge the same examples."""
    folder = tmp_path_factory.mktemp("report")
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDTUNE_CACHE", str(folder / "cache"))
        for name, lr in (("slow", 1e-4), ("fast", 1e-2)):
            options = {"evaluation__baseline": True, "evaluation__metrics": ["rouge", "exact_match"]}
            path = tiny_config(folder, "t5", name=name, optimizer__lr=lr, **options)
            assert main(["train", "--config", str(path), "--ranks", "1"]) == 0
            runs.append(folder / "runs" / name)
        yield runs


def test_the_page_of_a_real_run(tiny_runs: list[Path]) -> None:
    page = report_of(tiny_runs[1])
    check_self_contained(page, (tiny_runs[1] / "report.html").read_text())
    lines = [json.loads(line) for line in (tiny_runs[1] / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line.get("split") == "validation"][-1]
    assert f"{last['rougeL']:.3f}" in page.text
    assert "cannot be shown" not in page.text
    assert {"Loss", "rougeL", "Learning rate", "Memory"} <= set(page.texts)
    first = json.loads((tiny_runs[1] / "predictions" / "step-4-validation.jsonl").read_text().splitlines()[0])
    assert first["reference"] in page.text


def test_runs_that_judged_the_same_examples_are_tested_against_each_other(
    tiny_runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "comparison.html"
    words = ["report", "--run", str(tiny_runs[0]), "--run", str(tiny_runs[1]), "--out", str(out)]
    assert main(words) == 0
    page = Page(out.read_text())
    check_self_contained(page, out.read_text())
    rows = [np.load(run / "statistics" / "step-4-validation.npy") for run in tiny_runs]
    main_score = json.loads((tiny_runs[0] / "comparison.json").read_text())["validation"]["metric"]
    part = compare(Scorer(["rouge", "exact_match"]), {"A": rows[0], "B": rows[1]}, "B", "A", main_score)
    test, values = part["tests"][main_score], [part["variants"][name][main_score]["value"] for name in "AB"]
    said = f"{main_score} is {values[0]:.3f} for A (slow) and {values[1]:.3f} for B (fast): "
    assert said in page.text
    ends = [f"{test[end]:+.3f}".replace("-", "−") if test[end] else "±0.000" for end in ("low", "high")]
    assert f"(95 % interval {ends[0]} to {ends[1]}, p " in page.text
    assert f"B (fast) did better on {part['wins']} example" in page.text
    drawn = re.findall(r'class="name"[^>]*>([AB]) \(.*?class="whisker s(\d)"', out.read_text(), re.DOTALL)
    assert {("A", "1"), ("B", "2")} == set(drawn), "as their letters are coloured"
    predictions = tiny_runs[1] / "predictions" / "step-4-validation.jsonl"
    whole = predictions.read_text()
    predictions.write_text("".join(whole.splitlines(keepends=True)[::-1]))
    assert main(words) == 0
    assert "did not judge the same examples" in Page(out.read_text()).text
    predictions.write_text(whole)


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_in_a_browser_nothing_is_wrong_asked_for_or_cut(tmp_path: Path, tiny_runs: list[Path]) -> None:
    run = write_run(tmp_path / "runs" / ("a-long-name-" * 12), name="a_long_name_" * 30)
    pages = [run / "report.html", tmp_path / "both.html", tiny_runs[0] / "report.html"]
    for path in (run, tiny_runs[0]):
        assert write_report(path) is None
    assert main(["report", "--run", str(run), "--run", str(tiny_runs[0]), "--out", str(pages[1])]) == 0
    browser = Browser()
    try:
        for page in pages:
            for width in (1280, 400):
                for dark in (False, True):
                    browser.show(page, width, dark)
                    wide, inner = browser.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                    assert wide <= inner == width, page
                    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                    assert background == ("rgb(17, 21, 26)" if dark else "rgb(255, 255, 255)")
                    outside = browser.evaluate(OUTSIDE)
                    assert outside == [], (page, width)
                    told = [event["method"] for event in browser.events if event["method"] in SPOKEN]
                    assert told == []
                    asked = {
                        event["params"]["request"]["url"]
                        for event in browser.events
                        if event["method"] == "Network.requestWillBeSent"
                    }
                    assert asked <= {page.resolve().as_uri(), "data:,"}
        assert browser.printed().startswith(b"%PDF")
    finally:
        browser.close()


SPOKEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
OUTSIDE = """[...document.querySelectorAll('svg text, p, h1, h2, h3, h4, dd, dt, li, figcaption, mark')].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(one => one.textContent.slice(0, 60))"""
"""Texts that stand out of the window, tables apart, which scroll in their boxes."""
