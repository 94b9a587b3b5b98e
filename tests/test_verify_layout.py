"""`shardtune verify-layout`: a sample of the grid of layouts, and what it says where runs do differ."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import grid
import tiny
from shardtune.cli import main

Verify = Callable[[Path, str], "Said"]


class Said(NamedTuple):
    """What `shardtune verify-layout` said and returned."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def verify(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Verify:
    """The command in this process, its ranks forked."""

    def verified(config: Path, options: str) -> Said:
        with grid.forked_ranks(tmp_path_factory.mktemp("logs")):
            code = main(["verify-layout", "--config", str(config), *options.split()])
        return Said(code, *capsys.readouterr())

    return verified


@pytest.mark.parametrize(("model", "options"), [(model, o) for model, some in grid.SAMPLES.items() for o in some])
def test_every_layout_is_the_same_run(model: str, options: str, tmp_path: Path, verify: Verify) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    config = grid.config_of(tmp_path, model, seed)
    # One of them as a user would have it.
    done = grid.verify(config, options, capture_output=True) if model == "llama" else verify(config, options)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(
        r"largest relative difference over (\d+) layouts and 10 steps: loss (\S+), gradient norm (\S+)", last
    )
    assert found is not None, last
    given = dict(zip(options.split()[::2], options.split()[1::2], strict=True))
    counts = [len(value.split(",")) for value in given.values()]
    batchings = 1 if "--batchings" in given else 3
    assert int(found[1]) == batchings * math.prod(counts)
    assert max(float(found[2]), float(found[3])) <= 1e-5


def test_what_differs_is_told(tmp_path: Path, verify: Verify) -> None:
    """No two layouts agree to the last bit."""
    config = grid.config_of(tmp_path, "llama", 3)
    done = verify(config, "--ranks 1 --micro-batches 1,each --steps 3 --tolerance 1e-30")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "that is above 1e-30" in done.stderr
    assert len(re.findall(r"(?m)^ *1  auto ", done.stderr)) == 6


def test_dropout_is_left_out(tmp_path: Path, verify: Verify) -> None:
    """Masks would be drawn by the layout."""
    config = grid.config_of(tmp_path, "t5", 4, tuning={"method": "lora", "rank": 2, "dropout": 0.5})
    model = tmp_path / "model" / "config.json"
    model.write_text(model.read_text().replace('"dropout_rate": 0.0', '"dropout_rate": 0.3'))
    assert '"dropout_rate": 0.3' in model.read_text()
    done = verify(config, "--ranks 1 --micro-batches 1,3 --batchings packed --steps 3")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--ranks 0", "--ranks: '0' is not a whole number from 1 on"),
        ("--batchings packd", "--batchings: 'packd' is not one of padded, grouped, packed"),
        ("--strategies fsdp", "--strategies: 'fsdp' is not one of auto, single, ddp, fsdp2, zero1, zero2, zero3"),
        ("--ranks 2 --strategies single", "strategy single works on one rank only"),
        ("--ranks 1 --micro-batches 1 --batchings packed", "a single layout has nothing to be compared with"),
        ("--steps 0", "--steps: '0' is not a whole number from 1 on"),
        ("--batchings packed model.attention=eager", "model.attention: eager does not keep packed examples apart"),
    ],
)
def test_wrong_options(options: str, problem: str, tmp_path: Path, verify: Verify) -> None:
    done = verify(tiny.tiny_config(tmp_path, "t5"), options)
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_layout_that_fails(tmp_path: Path, verify: Verify) -> None:
    """What is wrong with it is said, with its exit code."""
    config = tiny.tiny_config(tmp_path, "t5", optimizer__lr=1e30)
    done = verify(config, "--ranks 1 --micro-batches 1")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "not finite" in done.stderr
    assert "layout 1-auto-padded-1 failed; 0 layouts came to their end" in done.stderr


def test_the_config_itself_is_not_run(tmp_path: Path, verify: Verify) -> None:
    config = grid.config_of(tmp_path, "t5", 5)
    before = sorted(tmp_path.rglob("*"))
    assert verify(config, "--ranks 1 --micro-batches 1 --steps 1").returncode == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path(yaml.safe_load(config.read_text())["runs"]).exists()
