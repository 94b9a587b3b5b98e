"""A little of what `python tests/chaos.py` does at length: runs are killed, damaged, starved, and nothing is lost."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chaos import CASES, Case, Chaos, Outcome
from warm import Warm

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    folder, seed = tmp_path_factory.mktemp("chaos"), random.SystemRandom().randrange(2**31)
    with Warm(folder / "cache") as warm:
        yield Chaos(folder, seed, warm)


def check(chaos: Chaos, outcome: Outcome, count: int) -> None:
    assert outcome.done == count
    assert outcome.good == outcome.done, f"seed {chaos.seed}: {outcome.summary()}"


def test_a_lora_checkpoint_holds_only_what_is_trained(chaos: Chaos) -> None:
    whole = chaos.whole(Case("ddp", "lora"))
    trained = sum(tensor.nbytes for tensor in load_file(whole.folder / "final" / "adapter_model.safetensors").values())
    held = [sum(file.stat().st_size for file in path.iterdir()) for path in whole.folder.glob("checkpoints/step-*")]
    # A value and two moments of each, and less than half a megabyte of names, counts and random states.
    assert held
    assert all(size < 3 * trained + 500_000 for size in held), (held, trained)


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(chaos: Chaos) -> None:
    check(chaos, chaos.kills(len(CASES) // 2, chaos.at_random, in_a_run=1), len(CASES) // 2)  # of a first one drawn


def test_killed_while_it_saves_a_run_ends_as_if_it_had_not_been(chaos: Chaos) -> None:
    check(chaos, chaos.kills(6, chaos.while_saving), 6)


def test_any_layout_goes_on_with_what_another_has_saved(chaos: Chaos) -> None:
    outcome = chaos.reshards(2)
    print(f"{outcome.worst:.1e}")
    check(chaos, outcome, 2)


def test_every_flipped_bit_is_noticed(chaos: Chaos) -> None:
    check(chaos, chaos.damages(100, chaos.flip), 100)


def test_truncated_missing_and_swapped_files_are_noticed(chaos: Chaos) -> None:
    check(chaos, chaos.damages(30, chaos.spoil), 30)


def test_a_full_disk_costs_nothing_that_was_saved(chaos: Chaos, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(probe)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    subprocess.run(["umount", str(probe)], check=True)
    check(chaos, chaos.full_disks(2), 2)
