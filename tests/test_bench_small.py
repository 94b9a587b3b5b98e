"""Each benchmark for a GPU, in small form on a CPU: one JSON line with what every line has; and how lines are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parent / "bench"
SCRIPTS = sorted(BENCH.glob("gpu_*.py"))
KEYS = {"benchmark", "number", "device", "date", "versions", "command", "correctness", "cases", "met"}
CASE_KEYS = {"ours_ms", "peers_ms", "absent", "ratio", "target", "met"}
ALL = os.environ.get("SHARDTUNE_TEST_ALL") == "1"


def ran(script: Path, *options: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpreted else "0"}
    return subprocess.run(
        [sys.executable, str(script), *options], env=variables, capture_output=True, text=True, check=False
    )


def check_line(line: dict[str, Any], script: Path) -> None:
    assert line.keys() >= KEYS
    assert line["benchmark"] == script.stem
    assert line["small"]
    assert line["met"] is None, "a CPU meets no target"
    assert line["correctness"]
    assert all(of["ok"] and of["largest_error"] < 0.03 for of in line["correctness"].values())
    assert line["cases"]
    for case in line["cases"]:
        assert case.keys() >= CASE_KEYS, case
        assert "ours" not in case["absent"], case
        missing = {name for name, taken in case["peers_ms"].items() if taken is None}
        assert missing == set(case["absent"]), case
        assert case["ratio"].keys() == case["peers_ms"].keys(), case
        assert all({"found", "met"} < target.keys() for target in case["target"].values()), case


@pytest.mark.parametrize("interpreted", [False, True], ids=["torch", "interpreted"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_prints_one_line(script: Path, interpreted: bool) -> None:
    if not ALL and (not interpreted or script.stem == "gpu_qlora"):
        pytest.skip("takes a while: SHARDTUNE_TEST_ALL=1")
    done = ran(script, "--small", interpreted=interpreted)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("\n") == 1, done.stdout
    check_line(json.loads(done.stdout), script)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = ran(BENCH / "gpu_pointwise.py")
    assert done.returncode == 1
    assert "--small" in done.stderr
    assert not done.stdout


def fake(folder: Path, name: str, body: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(body, encoding="utf-8")
    return path


def printing(**line: Any) -> str:
    return f"print({json.dumps(line)!r})"


def write_results(*options: object) -> subprocess.CompletedProcess[str]:
    return ran(BENCH / "_write_results.py", *map(str, options))


def test_each_line_is_written_to_a_file(tmp_path: Path) -> None:
    right = fake(tmp_path, "right", printing(benchmark="right", device="A GPU, 80 GB"))
    fast = fake(tmp_path, "fast", printing(benchmark="fast", device="A GPU, 80 GB", met=True))
    broken = fake(tmp_path, "broken", "raise SystemExit('it broke')")
    wrong_line = fake(tmp_path, "wrong_line", "print('no JSON')")
    into = tmp_path / "results"
    done = write_results("--into", into, "--correctness", right, broken, wrong_line, fast)
    assert done.returncode == 1
    assert "failed: broken.py, wrong_line.py" in done.stderr
    assert sorted(path.name for path in into.iterdir()) == ["fast-A-GPU-80-GB.json", "right-A-GPU-80-GB.json"]
    text = (into / "fast-A-GPU-80-GB.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"benchmark": "fast", "device": "A GPU, 80 GB", "met": True}
    assert text.count("\n") == 5, "one line a key"


def test_nothing_is_measured_where_ops_are_wrong(tmp_path: Path) -> None:
    wrong = fake(tmp_path, "wrong", "raise SystemExit(1)")
    fast = fake(tmp_path, "fast", printing(benchmark="fast", device="A GPU"))
    done = write_results("--into", tmp_path / "results", "--correctness", wrong, fast)
    assert done.returncode == 1
    assert "not right on this device" in done.stderr
    assert not (tmp_path / "results").exists()


def test_small_is_no_result() -> None:
    done = write_results("--small")
    assert done.returncode == 1
    assert "--into" in done.stderr
