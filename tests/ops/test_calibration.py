"""Which way is chosen, with a clock that says what the test wants; and that the answers stay."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from shardtune_kernels import calibration

CARD = torch.device("cuda", 0)


class Clock:
    """Stands for `calibration.timed`: each way says how long it takes."""

    def __init__(self) -> None:
        self.timings = 0

    def __call__(self, ways: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        self.timings += 1
        return [float(way()) for way in ways]  # pyright: ignore[reportArgumentType]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """A process on a machine with a card, that has chosen nothing yet."""
    found = Clock()
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    for name, value in {
        "timed": found, "_known": {}, "_enabled": True, "INTERPRETED": False, "_kind": lambda device: "Card 9000/x",
        "_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(calibration, name, value)
    return found


def chosen(seconds: dict[str, float], rows: int = 16, op: str = "op", dtype: torch.dtype = torch.bfloat16) -> str:
    return calibration.choose(op, (rows, 64), dtype, CARD, {name: lambda s=s: s for name, s in seconds.items()})


def new_process() -> None:
    calibration._known.clear()


def test_the_faster_way_is_chosen_and_measured_once(clock: Clock) -> None:
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    assert chosen({"fused": 1.0, "plain": 2.0}) == "plain"
    assert clock.timings == 1
    assert chosen({"fused": 1.0, "plain": 2.0}, op="other") == "fused"
    assert calibration.report() == {"op": {"bfloat16 16 x 64": "plain"}, "other": {"bfloat16 16 x 64": "fused"}}


def test_rows_are_rounded_up_and_dtypes_are_not_the_same(clock: Clock) -> None:
    for rows in (9, 12, 16):
        assert chosen({"fused": 2.0, "plain": 1.0}, rows) == "plain"
    assert clock.timings == 1
    chosen({"fused": 2.0, "plain": 1.0}, 17)
    chosen({"fused": 2.0, "plain": 1.0}, 1)
    chosen({"fused": 2.0, "plain": 1.0}, 16, dtype=torch.float16)
    assert clock.timings == 4


def test_answers_outlast_the_process(clock: Clock) -> None:
    chosen({"fused": 2.0, "plain": 1.0})
    new_process()
    assert chosen({"fused": 1.0, "plain": 2.0}) == "plain"
    assert clock.timings == 1
    file = calibration.path("Card 9000/x")
    assert json.loads(file.read_text()) == {"op": {"bfloat16 16 x 64": "plain"}}
    assert torch.__version__.partition("+")[0] in file.name
    assert "/" not in file.name
    assert {path.suffix for path in file.parent.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize(
    "damaged", ["", "{", "[1]", '{"op": 3}', '{"op": {"bfloat16 16 x 64": 7}}', '{"op": {"bfloat16 16 x 64": "gone"}}']
)
def test_a_damaged_file_is_mended(clock: Clock, damaged: str) -> None:
    file = calibration.path("Card 9000/x")
    file.parent.mkdir(parents=True)
    file.write_text(damaged)
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    assert clock.timings == 1
    new_process()
    assert chosen({"fused": 1.0, "plain": 2.0}) == "plain"
    assert clock.timings == 1


def test_a_cache_that_cannot_be_written_or_read(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "file"))
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    assert chosen({"fused": 1.0, "plain": 2.0}) == "plain"
    assert clock.timings == 1


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHARDTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibration.path("x").parent == tmp_path / "xdg" / "shardtune_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration.path("x").parent == tmp_path / ".cache" / "shardtune_kernels"


def test_two_processes_keep_each_others_answers(clock: Clock) -> None:
    children = []
    for name in ("one", "two"):
        child = os.fork()
        if child == 0:
            try:
                for rows in range(12):
                    chosen({"fused": 2.0, name: 1.0}, 1 << rows, op=name)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for name in ("one", "two"):
        assert all(chosen({"fused": 1.0, name: 2.0}, 1 << rows, op=name) == name for rows in range(12))
    assert clock.timings == 0


def test_the_first_way_where_nothing_may_be_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"fused": 2.0, "plain": 1.0}
    monkeypatch.setattr(calibration, "_capturing", lambda: True)
    assert chosen(slow) == "fused"
    first = {name: lambda: 0.0 for name in slow}
    assert calibration.choose("op", (16, 64), torch.bfloat16, torch.device("cpu"), first) == "fused"
    assert clock.timings == 0


def test_while_a_graph_is_captured_a_known_answer_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    monkeypatch.setattr(calibration, "_capturing", lambda: True)
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    assert chosen({"fused": 2.0, "plain": 1.0}, 32) == "fused"
    assert clock.timings == 1


def test_in_the_interpreter_and_while_tracing_nothing_is_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "INTERPRETED", True)
    assert chosen({"fused": 2.0, "plain": 1.0}) == "fused"
    monkeypatch.setattr(calibration, "INTERPRETED", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen({"fused": 2.0, "plain": 1.0}) == "fused"
    assert clock.timings == 0


def test_it_can_be_switched_off(clock: Clock) -> None:
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    calibration.disable()
    assert chosen({"fused": 2.0, "plain": 1.0}) == "fused"
    calibration.enable()
    assert chosen({"fused": 2.0, "plain": 1.0}) == "plain"
    assert clock.timings == 1


def test_a_way_that_does_not_fit_the_memory_is_not_taken(clock: Clock) -> None:
    assert chosen({"fused": math.inf, "plain": 1.0}) == "plain"
    assert chosen({"fused": math.inf, "plain": math.inf}, 64) == "fused"
    assert "bfloat16 64 x 64" not in calibration.report()["op"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    x = torch.randn(4096, 4096, device=CARD)

    def too_large() -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=CARD)

    little, much, never = calibration.timed([lambda: x[0] + 1, lambda: x @ x, too_large], CARD)
    assert 0 < little < much < never == math.inf
