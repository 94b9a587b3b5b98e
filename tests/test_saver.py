"""Checkpoints as the saver writes them: whole or absent, whatever happens to whom and when."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import saves
from launching import BIN, REPOSITORY, environment, wait_for
from shardtune.checkpoint import saver as saver_module
from shardtune.checkpoint import writer
from shardtune.checkpoint.manifest import problems
from shardtune.checkpoint.reading import open_checkpoint
from shardtune.errors import StorageError


@pytest.fixture
def seed() -> int:
    number = random.randrange(1 << 30)
    print("seed", number)
    return number


@pytest.fixture
def run(tmp_path: Path, seed: int):
    made = saves.Run(tmp_path / "checkpoints", saves.alone(), seed)
    yield made
    made.saver.close()


def file_of(folder: Path, step: int, rank: int = 0, ranks: int = 1) -> Path:
    return folder / f"step-{step:08}" / f"rank-{rank:05}-of-{ranks:05}.safetensors"


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value.reshape(-1))
        for key, value in expected.items()
    )


def held(pid: int) -> bool:
    """Whether a process goes on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_written_is_what_was_there_when_it_began(run: saves.Run):
    expected = {}
    for _ in range(3):
        expected[run.step] = run.copies()
        run.saver.save()  # a second one waits for the first
        run.change()
    run.saver.finish()
    for step, tensors in expected.items():
        assert not problems(run.folder / f"step-{step:08}")
        assert same(load_file(file_of(run.folder, step)), tensors)
    with safe_open(file_of(run.folder, 10), "pt") as file:
        pieces = json.loads(file.metadata()["pieces"])
    assert pieces["rank0.1"] == [0, [expected[10]["rank0.1"].numel()]]
    assert pieces["rank0.1#step"] == [0, []]
    assert len(run.said) == 3
    assert all("step-000000" in said for said in run.said)


def test_training_goes_on_meanwhile(run: saves.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run.boundary()
    run.boundary()  # memory and process are made ready
    assert run.saver._writer is not None
    os.kill(run.saver._writer._process.pid, signal.SIGSTOP)
    run.saver.save()
    for _ in range(20):
        run.boundary()
    assert not any(name.startswith("step-") for name in saves.names(run.folder))
    os.kill(run.saver._writer._process.pid, signal.SIGCONT)
    assert wait_for(lambda: run.boundary() or run.said, 20)
    assert saves.names(run.folder) == ["step-00000010"]


def test_larger_than_before(run: saves.Run):
    run.saver.save()
    run.change()
    run.tensors["more"] = torch.randn(3_000_001)
    run.saver.save()
    run.saver.finish()
    assert same(load_file(file_of(run.folder, 20)), run.copies())


def test_without_background_it_is_there_at_once(tmp_path: Path, seed: int):
    run = saves.Run(tmp_path / "checkpoints", saves.alone(), seed, background=False)
    run.saver.save()
    assert saves.names(run.folder) == ["step-00000010"]
    run.saver.close()


def test_only_so_many_are_kept_and_a_hurried_one_leaves_them_alone(tmp_path: Path, seed: int):
    run = saves.Run(tmp_path / "checkpoints", saves.alone(), seed, keep=2)
    damaged = run.folder / "step-00000005.damaged"
    damaged.mkdir(parents=True)
    for _ in range(3):
        run.saver.save()
        run.step += 10
    run.saver.save(hurried=True)
    assert saves.names(run.folder) == [damaged.name, "step-00000020", "step-00000030", "step-00000040"]
    run.step += 10
    run.saver.save()
    run.saver.finish()
    assert saves.names(run.folder) == [damaged.name, "step-00000040", "step-00000050"]
    run.saver.close()


def test_the_best_stays_until_a_better_one_is_whole(tmp_path: Path, seed: int):
    found = {10: 10, 20: 10, 30: 10, 40: 40, 50: 40, 60: 40}
    run = saves.Run(tmp_path / "checkpoints", saves.alone(), seed, keep=1, best=found.__getitem__)
    kept = []
    for _ in found:
        run.saver.save()
        kept.append([int(name.removeprefix("step-")) for name in saves.names(run.folder) if name.startswith("step-")])
        run.saver.finish()
        run.step += 10
    kept.append([int(name.removeprefix("step-")) for name in saves.names(run.folder)])
    assert kept[1:] == [[10], [10, 20], [10, 30], [40], [40, 50], [40, 60]], "as each save begins, and at last"
    run.saver.close()


def test_the_same_step_again_takes_the_place_of_the_older(run: saves.Run):
    run.saver.save()
    run.change()
    run.step = 10
    run.saver.save()
    run.saver.finish()
    assert saves.names(run.folder) == ["step-00000010"]
    assert same(load_file(file_of(run.folder, 10)), run.copies())


def test_what_an_earlier_run_left_unfinished_goes(tmp_path: Path, seed: int):
    (tmp_path / ".step-00000010.partial-x").mkdir()
    saves.Run(tmp_path, saves.alone(), seed).saver.close()
    assert saves.names(tmp_path) == []


def test_the_write_process_is_light_and_deaf_to_signals(run: saves.Run):
    command = [*writer.COMMAND, "0"]
    command[1:1] = ["-X", "importtime"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    log = done.stderr
    assert "shardtune.checkpoint.writing" in log
    assert "torch" not in log
    assert "numpy" not in log
    run.saver.save()
    run.saver.finish()
    assert run.saver._writer is not None
    pid = run.saver._writer._process.pid
    assert os.getsid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, number)
    run.step += 10
    run.saver.save()
    run.saver.finish()
    assert saves.names(run.folder) == ["step-00000010", "step-00000020"]
    assert run.saver._writer._process.pid == pid
    run.saver.close()
    assert not held(pid)


def test_a_write_process_that_ends_costs_one_checkpoint_and_no_more(
    run: saves.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run.saver.save()
    run.saver.finish()
    run.saver.close()
    run.change()
    monkeypatch.setattr(writer, "COMMAND", saves.faulty("end", 2, tmp_path / "mark"))
    run.saver.save()
    assert wait_for(lambda: run.boundary() or len(run.said) > 1, 20)
    assert "step 20" in run.said[1]
    assert "rank 0 was ended by signal 9" in run.said[1]
    assert f"{run.folder / 'step-00000010'} is kept" in run.said[1]
    assert saves.names(run.folder) == ["step-00000010"]
    monkeypatch.undo()
    run.change()
    run.saver.save()
    run.saver.finish()
    assert saves.names(run.folder) == ["step-00000010", "step-00000030"]
    assert same(load_file(file_of(run.folder, 30)), run.copies())


def test_one_that_ended_between_two_saves_costs_nothing(run: saves.Run):
    run.saver.save()
    run.saver.finish()
    assert run.saver._writer is not None
    run.saver._writer._process.kill()
    run.saver._writer._process.wait()
    run.change()
    run.saver.save()
    run.saver.finish()
    assert saves.names(run.folder) == ["step-00000010", "step-00000020"]


def test_an_error_of_any_operation_on_the_disk_keeps_the_older(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    template = saves.two(tmp_path / "before", seed)
    came_to = []
    for number in itertools.count(1):
        folder, mark = tmp_path / str(number), tmp_path / f"{number}.mark"
        shutil.copytree(template, folder)
        run = saves.Run(folder, saves.alone(), seed + number, keep=1)
        run.step = 20
        monkeypatch.setattr(writer, "COMMAND", saves.faulty("error", number, mark))
        run.saver.save()
        try:
            run.saver.finish()
            failed = None
        except StorageError as error:
            failed = str(error)
        run.saver.close()
        whole = [name for name in saves.names(folder) if name.startswith("step-")]
        assert all(not problems(folder / name) for name in whole)
        assert "step-00000020" in whole
        if not mark.exists():
            assert failed is None
            assert saves.names(folder) == ["step-00000020"]
            break
        came_to.append(mark.read_text())
        if failed is None:
            assert "could not be removed: " in run.said[-1]
            assert "No space left" in run.said[-1]
        else:
            assert saves.names(folder) == ["step-00000010", "step-00000020"]
            assert "No space left on device" in failed
            assert f"{folder / 'step-00000020'} is kept" in failed
    assert {"create", "write", "cut", "flush", "exchange", "rename", "unlink", "rmdir"} <= set(came_to), came_to


@pytest.mark.parametrize(("how", "count"), [("operations", 99), ("random", 8)])
def test_killed_while_saving(tmp_path: Path, seed: int, how: str, count: int):
    script = REPOSITORY / "tests" / "ranks" / "killed_while_saving.py"
    variables = {**environment(tmp_path), "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), *sys.path])}
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(seed), how, str(count)], env=variables, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed_at = json.loads(done.stdout)
    print(how, killed_at)
    if how == "operations":
        assert {"create", "write", "cut", "flush", "exchange", "rename", "unlink", "rmdir"} <= set(killed_at)


@pytest.fixture
def small_disk(tmp_path: Path):
    """Of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_disk: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    run = saves.Run(small_disk / "checkpoints", saves.alone(), seed)
    run.tensors["large"] = torch.randn(400_000)
    run.saver.save()
    run.saver.finish()
    run.change()
    with pytest.raises(
        StorageError, match=r"[\d,]+ bytes are needed, and [\d,]+ to spare; [\d,]+ are free(.|\n)*step-00000010 is kept"
    ):
        run.saver.save()
    monkeypatch.setattr(saver_module, "MARGIN", -1 << 30)  # as if the room had been taken meanwhile
    rest = small_disk / "of others"
    rest.write_bytes(bytes(1 << 20))
    for _ in range(2):
        run.saver.save()
        with pytest.raises(StorageError, match=r"rank-00000.*: No space left on device\n.*step-00000010 is kept"):
            run.saver.finish()
        assert saves.names(run.folder) == ["step-00000010"]
    rest.unlink()
    (run.folder / "step-00000010").rename(run.folder / ".step-00000010.partial-gone")
    run.saver.close()
    again = saves.Run(run.folder, saves.alone(), seed)
    again.tensors = run.tensors
    again.saver.save(hurried=True)
    again.saver.close()
    assert not problems(run.folder / "step-00000010")


def test_a_folder_that_cannot_be_made(tmp_path: Path, seed: int):
    (tmp_path / "file").write_text("")
    run = saves.Run(tmp_path / "file" / "checkpoints", saves.alone(), seed)
    with pytest.raises(StorageError, match="Not a directory\nthere is no older checkpoint"):
        run.saver.save()
    run.saver.close()


def test_closing_in_the_middle_leaves_nothing(run: saves.Run):
    run.tensors["large"] = torch.randn(4_000_000)
    run.saver.save()
    assert run.saver._writer is not None
    pid = run.saver._writer._process.pid
    begun = time.monotonic()
    run.saver.close()
    assert time.monotonic() - begun < 5
    assert not held(pid)
    assert saves.names(run.folder) == []


def test_two_ranks(tmp_path: Path, seed: int):
    variables = {**environment(tmp_path), "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), *sys.path])}
    words = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(REPOSITORY / "tests/ranks/saving.py")]
    done = subprocess.run(
        [*words, str(tmp_path), str(seed)], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"noted-{rank}.json").read_text()) for rank in range(2))
    folder = tmp_path / "checkpoints"

    assert first["boundaries"] == second["boundaries"] > 1
    checkpoint = open_checkpoint(folder / "step-00000010")
    for rank in range(2):
        expected = load_file(tmp_path / f"expected-{rank}.safetensors")
        assert same(load_file(file_of(folder, 10, rank, 2)), expected)
        large = f"rank{rank}.1"
        assert torch.equal(checkpoint.read(large, "", 0, expected[large].numel()), expected[large])
        assert torch.equal(checkpoint.read("both", "", rank * 9, rank * 9 + 9), expected["both"])

    saved, lost, again = first["heard"]
    assert second["heard"] == [[], [], []]
    assert "step-00000010: " in saved[0]
    assert "step 20 failed" in lost[0]
    assert "of rank 1 was ended by signal 9. Training goes on" in lost[0]
    assert "step-00000010 is kept" in lost[0]
    assert "step-00000030: " in again[0]

    assert first["full"][:2] == ["StorageError", 7]
    assert "rank 1: " in first["full"][2]
    assert "No space left on device" in first["full"][2]
    assert "rank 0: " not in first["full"][2]
    assert first["no room"][:2] == ["StorageError", 7]
    assert second["full"][:2] == second["no room"][:2] == ["FailedElsewhere", 7]
    assert saves.names(folder) == ["step-00000010", "step-00000030"]
