"""Checkpoints that other hands have written: read by ranges, verified byte by byte, and found."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import (
    flip_bit,
    flips,
    random_tensors,
    seal,
    seal_with,
    write_checkpoint,
)
from launching import BIN, REPOSITORY, run
from shardtune.checkpoint import finding
from shardtune.checkpoint.finding import check_whole, clear_partial, newest_good, reasons_against
from shardtune.checkpoint.manifest import Kept, Manifest, hash_text, problems, read_manifest
from shardtune.checkpoint.reading import open_checkpoint
from shardtune.cli import main
from shardtune.errors import CheckpointError
from shardtune.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
FLIPS = int(os.environ.get("SHARDTUNE_FLIPS", "200"))
"""More of them by hand."""
FIRST, SECOND = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture
def whole(tmp_path: Path, rng: random.Random) -> Path:
    """A checkpoint of two ranks."""
    return write_checkpoint(tmp_path / "checkpoints", 500, random_tensors(rng), 2, rng.randrange(2**31))


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_any_range_is_read_as_it_was_written(ranks: int, tmp_path: Path, rng: random.Random) -> None:
    tensors = random_tensors(rng)
    path = write_checkpoint(tmp_path, 7, tensors, ranks, rng.randrange(2**31), tuning={"method": "full"})
    assert reasons_against(path) == []
    saved = open_checkpoint(path)
    assert (saved.folder, saved.step, saved.ranks, saved.tuning) == (path, 7, ranks, {"method": "full"})
    assert sorted(saved.names()) == sorted(key for key in tensors if "#" not in key)
    assert saved.whats("nothing") == {}
    for key, tensor in tensors.items():
        name, _, what = key.partition("#")
        flat = tensor.reshape(-1)
        assert saved.whats(name)[what] == tuple(tensor.shape)
        bounds = [(0, len(flat))] + [sorted(rng.randint(0, len(flat)) for _ in range(2)) for _ in range(10)]
        for start, stop in bounds:
            read = saved.read(name, what, start, stop)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, flat[start:stop]), (key, start, stop)
            if not what:
                assert torch.equal(saved.value(name).read(start, stop), flat[start:stop])


def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    saved = open_checkpoint(write_checkpoint(tmp_path, 1, {"weight": torch.randn(1000, 1000)}, 2))

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = bytes_read()
    overhead = bytes_read() - before
    before = bytes_read()
    saved.read("weight", "", 400_000, 600_000)
    assert bytes_read() - before - overhead == 800_000


def test_what_is_not_there_is_refused(whole: Path) -> None:
    saved = open_checkpoint(whole)
    total = torch.Size(saved.whats("layers.0.weight")["exp_avg"]).numel()
    for name, what, start, stop in [
        ("layers.0.weight", "exp_avg", 0, total + 1), ("layers.0.weight", "exp_avg", -1, 0),
        ("layers.0.weight", "momentum", 0, 0), ("other", "", 0, 0),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=str(whole)):
            saved.read(name, what, start, stop)


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"weight": torch.randn(100)}, 1)
    saved = open_checkpoint(path)
    file = path / "rank-00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert len(saved.read("weight", "", 0, 99)) == 99
    with pytest.raises(CheckpointError, match=rf"{file}: ends before byte \d+; the file is cut off"):
        saved.read("weight", "", 0, 100)


# ------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(whole: Path, rng: random.Random) -> None:
    assert problems(whole) == []
    noticed = 0
    for file, bit in flips(whole, FLIPS, rng):
        flip_bit(file, bit)
        found = problems(whole)
        assert found, (file, bit)
        assert all(line.startswith(("manifest.json", f"{file.name}:")) for line in found), (file, bit, found)
        flip_bit(file, bit)
        noticed += 1
    assert problems(whole) == []
    print(f"{noticed} of {FLIPS} flipped bits noticed")


def test_ranks_share_the_reading(tmp_path: Path, rng: random.Random) -> None:
    """A flipped bit is noticed by one of them, and each reads about as much."""
    path = write_checkpoint(tmp_path, 1, {f"weight{i}": torch.randn(5000) for i in range(20)}, 6, 3)
    for ranks in (1, 2, 3, 4):
        for file, bit in flips(path, 12, rng):
            if file.name.startswith("manifest"):
                continue
            flip_bit(file, bit)
            noticing = sum(bool(problems(path, (rank, ranks))) for rank in range(ranks))
            assert noticing == 1 or (noticing > 1 and file.name == "state.json"), (file, bit, ranks)
            flip_bit(file, bit)
    sizes = [file.stat().st_size for file in path.iterdir()]
    for rank in range(2):
        before = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
        problems(path, (rank, 2))
        read = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0]) - before
        assert read < sum(sizes) / 2 + max(sizes) + 20_000


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def moved_out(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def swapped(folder: Path) -> None:
    names = [folder / FIRST, folder / SECOND]
    names[0].rename(folder / "x")
    names[1].rename(names[0])
    (folder / "x").rename(names[1])


def of_another(folder: Path, *files: str) -> None:
    """Files of an equally long checkpoint."""
    other = write_checkpoint(folder.parent / "other", 501, random_tensors(random.Random(5)), 2, 1)
    for name in files:
        shutil.copy(other / name, folder / name)


def manifest_with(folder: Path, **changed: Any) -> None:
    made = json.loads((folder / "manifest.json").read_text())
    seal_with(folder, json.dumps({**made, **changed}))


def files_with(folder: Path, **files: Any) -> None:
    manifest_with(folder, files={**json.loads((folder / "manifest.json").read_text())["files"], **files})


EMPTY = {"size": 0, "sha256": "0" * 64}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / FIRST, (f / FIRST).stat().st_size - 1), rf"{FIRST}: has \d+ of \d+ bytes"),
    "emptied": (lambda f: os.truncate(f / "state.json", 0), r"state.json: has 0 of \d+ bytes"),
    "longer": (lambda f: os.truncate(f / FIRST, (f / FIRST).stat().st_size + 1), rf"{FIRST}: has \d+ bytes, not \d+"),
    "missing": (lambda f: (f / SECOND).unlink(), f"{SECOND}: missing"),
    "swapped": (swapped, FIRST),
    "extra": (lambda f: (f / "notes.txt").write_text(""), "notes.txt: not in the manifest"),
    "extra folder": (lambda f: (f / "more").mkdir(), "more: not in the manifest"),
    "symlink": (lambda f: moved_out(f / SECOND), f"{SECOND}: a symbolic link, not a file"),
    "symlink of the manifest": (lambda f: moved_out(f / "manifest.json"), "manifest.json: a symbolic link, not a file"),
    "folder": (lambda f: replaced(f / FIRST, Path.mkdir), f"{FIRST}: not a plain file"),
    "pipe": (lambda f: replaced(f / FIRST, os.mkfifo), f"{FIRST}: not a plain file"),
    "of another checkpoint": (lambda f: of_another(f, FIRST), FIRST),
    "manifest of another": (lambda f: of_another(f, "manifest.json", "manifest.json.sha256"), "of step 501"),
    "manifest and state of another": (
        lambda f: of_another(f, "manifest.json", "manifest.json.sha256", "state.json"), "of step 501",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
    "no hash of the manifest": (lambda f: (f / "manifest.json.sha256").unlink(), "manifest.json.sha256: missing"),
    "huge manifest": (lambda f: os.truncate(f / "manifest.json", 1 << 40), "more than it may"),
    "no JSON": (lambda f: seal_with(f, "{"), "manifest.json: it is damaged"),
    "no object": (lambda f: seal_with(f, "[]"), "manifest.json: it is damaged"),
    "deep": (lambda f: seal_with(f, "[" * 1_000_000), "manifest.json: it is damaged"),
    "twice": (lambda f: seal_with(f, '{"format": 1, "step": 1, "step": 500, "files": {}}'), "'step' is there twice"),
    "format": (lambda f: manifest_with(f, format=2), "format 2 is not known to this version"),
    "step": (lambda f: manifest_with(f, step=499), "of step 499, in a folder that says step 500"),
    "no state": (lambda f: manifest_with(f, files={}), "does not name state.json"),
    **{
        f"names {name}": (lambda f, name=name: files_with(f, **{name: EMPTY}), "which is no file of a checkpoint")
        for name in ("../x", "/x", "..", ".", "", "a/b", "manifest.json")
    },
    "size": (lambda f: files_with(f, x={"size": -1, "sha256": "0" * 64}), "not described by size and sha256"),
    "hash": (lambda f: files_with(f, x={"size": 1, "sha256": "0" * 63}), "has no SHA-256"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, whole: Path) -> None:
    assert problems(whole) == []
    act, words = DAMAGES[damage]
    act(whole)
    assert re.search(words, "\n".join(problems(whole)))


def test_all_damage_is_named(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(whole / FIRST, 100)
    (whole / SECOND).unlink()
    (whole / "more.txt").write_text("")
    assert main(["verify", "--checkpoint", str(whole)]) == 4
    said = capsys.readouterr().err
    assert f"{whole}/{FIRST}: its SHA-256 is not the one" in said
    assert f"{whole}/{SECOND}: missing" in said
    assert f"{whole}/more.txt: not in the manifest" in said


def test_a_manifest_made_here_is_what_sha256sum_takes(whole: Path) -> None:
    other = json.loads((whole / "manifest.json").read_text())
    manifest = Manifest(500, {name: Kept(**kept) for name, kept in other["files"].items()})
    assert json.loads(manifest.text()) == other
    (whole / "manifest.json").write_text(manifest.text())
    (whole / "manifest.json.sha256").write_text(hash_text(manifest.text().encode()))
    assert read_manifest(whole) == manifest
    done = run(["sh", "-c", f"cd {whole} && sha256sum --check --strict manifest.json.sha256"], whole.parent)
    assert done.code == 0, done.said


# ------------------------------------------------------------------------------------------------- hostile hands


def with_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def described(data: int = 8, pieces: Any = None, **tensor: Any) -> tuple[bytes, bytes]:
    """A header of one tensor of two floats, or what is said in its place, and data."""
    info = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}
    metadata = {"pieces": json.dumps({"weight": [0, [2]]} if pieces is None else pieces)}
    return json.dumps({"__metadata__": metadata, "weight": info}).encode(), bytes(data)


class Canary:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "short": lambda f: f.write_bytes(b"\1\0\0"),
    "no header": lambda f: f.write_bytes(bytes(8)),
    "enormous header": lambda f: with_header(f, *described(), length=(1 << 63) - 1),
    "negative header": lambda f: with_header(f, *described(), length=(1 << 64) - 1),
    "header beyond the format's limit": lambda f: (with_header(f, b"", length=1 << 40), os.truncate(f, 1 << 41)),
    "header is no JSON": lambda f: with_header(f, b"{'a': 1}"),
    "header is a list": lambda f: with_header(f, b"[]"),
    "header is deep": lambda f: with_header(f, b'{"a":' * 500_000),
    "header has long numbers": lambda f: with_header(f, b'{"a": ' + b"9" * 10_000 + b"}"),
    "header is not UTF-8": lambda f: with_header(f, b'{"\xff": 1}'),
    "no metadata": lambda f: save_file({"weight": torch.zeros(2)}, f),
    "metadata is no object": lambda f: with_header(f, b'{"__metadata__": 1}'),
    "metadata is no text": lambda f: with_header(f, b'{"__metadata__": {"pieces": {}}}'),
    "pieces are no JSON": lambda f: save_file({"weight": torch.zeros(2)}, f, {"pieces": "x"}),
    "pieces have half a character": lambda f: with_header(f, b'{"__metadata__": {"pieces": "{\\"\\ud800\\": 1}"}}'),
    "pieces are others": lambda f: with_header(f, *described(pieces={"other": [0, [2]]})),
    "pieces are more": lambda f: with_header(f, *described(pieces={"weight": [0, [2]], "other": [0, [2]]})),
    "a piece is a number": lambda f: with_header(f, *described(pieces={"weight": 0})),
    "a piece without start": lambda f: with_header(f, *described(pieces={"weight": [None, [2]]})),
    "a piece leaves its tensor": lambda f: with_header(f, *described(pieces={"weight": [1, [2]]})),
    "a piece begins before": lambda f: with_header(f, *described(pieces={"weight": [-1, [2]]})),
    "a piece begins far off": lambda f: with_header(f, *described(pieces={"weight": [1 << 70, [2]]})),
    "the whole is larger": lambda f: with_header(f, *described(pieces={"weight": [0, [3]]})),
    "the whole is huge": lambda f: with_header(f, *described(pieces={"weight": [0, [1 << 62, 1 << 62]]})),
    "the whole wraps around": lambda f: with_header(f, *described(pieces={"weight": [0, [1 << 32, 1 << 32, 2]]})),
    "the whole is negative": lambda f: with_header(f, *described(pieces={"weight": [0, [-1, -2]]})),
    "the whole has many dimensions": lambda f: with_header(f, *described(pieces={"weight": [0, [2] + [1] * 10**5]})),
    "the whole is boolean": lambda f: with_header(f, *described(pieces={"weight": [0, [True, 2]]})),
    "twice in one file": lambda f: with_header(f, described()[0][:-1] + b', "weight": {}}', bytes(8)),
    "unknown dtype": lambda f: with_header(f, *described(dtype="F128")),
    "dtype is a list": lambda f: with_header(f, *described(dtype=["F32"])),
    "a dtype that is not kept": lambda f: with_header(f, *described(dtype="F8_E4M3", data_offsets=[0, 2], data=2)),
    "wrong dtype": lambda f: with_header(f, *described(dtype="F64")),
    "two dimensions": lambda f: with_header(f, *described(shape=[2, 1])),
    "shape wraps around": lambda f: with_header(f, *described(shape=[1 << 62, 4, 2])),
    "shape is a text": lambda f: with_header(f, *described(shape="2")),
    "shape is a fraction": lambda f: with_header(f, *described(shape=[2.0])),
    "offsets outside of the file": lambda f: with_header(f, *described(data_offsets=[1 << 40, (1 << 40) + 8])),
    "offsets into the header": lambda f: with_header(f, *described(data_offsets=[-8, 0])),
    "offsets backwards": lambda f: with_header(f, *described(data_offsets=[8, 0])),
    "three offsets": lambda f: with_header(f, *described(data_offsets=[0, 8, 8])),
    "data is cut off": lambda f: with_header(f, *described(data=7)),
    "data goes on": lambda f: with_header(f, *described(data=9)),
    "a gap in the data": lambda f: with_header(f, *described(data_offsets=[8, 16], data=16)),
    "more keys": lambda f: with_header(f, *described(code="print(1)")),
    "a pickle": lambda f: f.write_bytes(pickle.dumps(Canary(f.parent / "trace"))),
    "a pickle of torch": lambda f: torch.save(Canary(f.parent / "trace"), f),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(what: str, tmp_path: Path) -> None:
    """Though the manifest is right, as a hostile hand would make it; and nothing in them is run."""
    path = write_checkpoint(tmp_path, 1, {"weight": torch.zeros(2)}, 1)
    assert open_checkpoint(path).names() == ["weight"]
    file = path / "rank-00000-of-00001.safetensors"
    HOSTILE[what](file)
    if file.stat().st_size < 1 << 30:
        seal(path)
        assert len(reasons_against(path)) == 1
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 1000
    assert not (path / "trace").exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    """It would be noticed if a pickle were loaded."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ({FIRST: [0, 4], SECOND: [3, 10]}, "elements 3 to 4 are there twice"),
        ({FIRST: [0, 4], SECOND: [5, 10]}, "elements 4 to 5 are missing"),
        ({FIRST: [1, 4], SECOND: [4, 10]}, "elements 0 to 1 are missing"),
        ({FIRST: [0, 4], SECOND: [4, 9]}, "elements 9 to 10 are missing"),
        ({FIRST: [0, 10], SECOND: [0, 10]}, "elements 0 to 10 are there twice"),
    ],
)
def test_pieces_must_be_the_whole(pieces: dict[str, list[int]], words: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"weight": torch.zeros(10)}, 2)
    for name, (start, stop) in pieces.items():
        save_file({"weight": torch.zeros(stop - start)}, path / name, {"pieces": json.dumps({"weight": [start, [10]]})})
    with pytest.raises(CheckpointError, match=f"the value of weight: {words}"):
        open_checkpoint(seal(path))


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"shape": [5, 2]}])
def test_pieces_must_be_of_one_tensor(other: dict[str, Any], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"weight": torch.zeros(10)}, 2)
    for name, start, kind in ((FIRST, 0, {}), (SECOND, 5, other)):
        save_file(
            {"weight": torch.zeros(5, dtype=kind.get("dtype", torch.float32))},
            path / name,
            {"pieces": json.dumps({"weight": [start, kind.get("shape", [10])]})},
        )
    with pytest.raises(CheckpointError, match=f"{SECOND}: the piece 'weight' is F.* in an earlier file F32"):
        open_checkpoint(seal(path))


@pytest.mark.parametrize(
    "state", ["{}", "[]", '{"step": 1, "ranks": 0, "tuning": {}}', '{"step": 1, "ranks": 1000000000, "tuning": {}}',
              '{"step": 2, "ranks": 1, "tuning": {}}', '{"step": 1, "ranks": 2, "tuning": {}}',
              '{"step": 1, "ranks": 1, "ranks": 1, "tuning": {}}', '{"step": "1", "ranks": 1, "tuning": {}}'],
)  # fmt: skip
def test_states_that_are_none_are_refused(state: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {"weight": torch.zeros(2)}, 1)
    (path / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=str(path)):
        open_checkpoint(seal(path))
    assert reasons_against(path)


# ------------------------------------------------------------------------------------------------- finding


@pytest.fixture
def three(tmp_path: Path, rng: random.Random) -> Path:
    """A folder of three checkpoints, and what a killed run leaves."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 9, 100_000_000):
        write_checkpoint(folder, step, random_tensors(rng, 1), 2, rng.randrange(2**31))
    (folder / ".step-100000010.partial-abc").mkdir()
    (folder / ".step-100000010.partial-abc" / FIRST).write_bytes(b"half")
    return folder


def test_the_newest_good_one_is_found(three: Path) -> None:
    said: list[str] = []
    before = sorted(three.iterdir())
    assert newest_good(three, ALONE, said.append) == three / "step-100000000"
    assert (said, sorted(three.iterdir())) == ([], before)


def test_damaged_ones_are_set_aside_and_older_ones_taken(three: Path) -> None:
    flip_bit(three / "step-100000000" / FIRST, 77)
    (three / "step-00000010" / "state.json").unlink()
    (three / "step-00000010.damaged").mkdir()
    said: list[str] = []
    assert newest_good(three, ALONE, said.append) == three / "step-00000009"
    assert len(said) == 2
    assert f"{three}/step-100000000/{FIRST}: its SHA-256 is not" in said[0]
    assert "set aside as step-100000000.damaged" in said[0]
    assert f"{three}/step-00000010/state.json: missing" in said[1]
    assert "set aside as step-00000010.damaged-2" in said[1]
    names = {path.name for path in three.iterdir()}
    assert names == {
        "step-00000009", "step-00000010.damaged", "step-00000010.damaged-2", "step-100000000.damaged",
        ".step-100000010.partial-abc",
    }  # fmt: skip


def test_never_a_silent_fresh_start(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in three.glob("step-*"):
        flip_bit(path / SECOND, 99)
    words = "no checkpoint there is whole, so the run does not go on; nothing was removed.*checkpoint.resume=never"
    for attempt in range(2):  # they are set aside in the first one
        said: list[str] = []
        with pytest.raises(CheckpointError, match=words) as caught:
            newest_good(three, ALONE, said.append)
        assert len(said) == (0 if attempt else 3)
        for name in ("step-00000009", "step-00000010", "step-100000000"):
            assert f"{three}/{name}.damaged/{SECOND}: its SHA-256 is not" in str(caught.value)
    flip_bit(three / "step-00000010.damaged" / SECOND, 99)
    with pytest.raises(CheckpointError, match=r"step-00000010\.damaged: is whole; take \.damaged out of its name"):
        newest_good(three, ALONE, said.append)


def test_what_cannot_be_renamed_is_passed_over(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(finding.Path, "rename", refuse)
    flip_bit(three / "step-100000000" / FIRST, 77)
    said: list[str] = []
    assert newest_good(three, ALONE, said.append) == three / "step-00000010"
    assert "could not be set aside (Read-only file system)" in said[0]
    for name in ("step-00000010", "step-00000009"):
        flip_bit(three / name / FIRST, 77)
    with pytest.raises(CheckpointError, match=f"{three}/step-00000009/{FIRST}: its SHA-256"):
        newest_good(three, ALONE, said.append)


def test_files_as_written_that_make_no_checkpoint_are_damaged(three: Path) -> None:
    path = three / "step-100000000"
    with_header(path / FIRST, *described(pieces={"weight": [0, [3]]}))
    seal(path)
    said: list[str] = []
    assert newest_good(three, ALONE, said.append) == three / "step-00000010"
    assert f"{path}/" in said[0] or f"{path}:" in said[0]


def test_none_where_there_has_never_been_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest_good(folder, ALONE, print) is None
    (folder / ".step-00000010.partial-abc").mkdir(parents=True)
    (folder / "notes").mkdir()
    assert newest_good(folder, ALONE, print) is None
    assert clear_partial(folder) == []
    assert [path.name for path in folder.iterdir()] == ["notes"]


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.parent / "step-00000009"), Path.mkdir])
def test_what_only_bears_the_name_of_a_checkpoint(make: Callable[[Path], object], three: Path) -> None:
    make(three / "step-200000000")
    assert newest_good(three, ALONE, print) == three / "step-100000000"
    assert os.path.lexists(three / "step-200000000.damaged")
    assert newest_good(three, ALONE, print) == three / "step-100000000"


def test_one_that_was_asked_for_is_left_as_it_is(whole: Path) -> None:
    check_whole(whole, ALONE)
    flip_bit(whole / FIRST, 9)
    with pytest.raises(CheckpointError, match=f"{FIRST}: its SHA-256(?s:.*)is not whole, so the run does not begin"):
        check_whole(whole, ALONE)
    assert whole.is_dir()


def test_ranks_find_the_same(three: Path, tmp_path: Path) -> None:
    folders = [three, tmp_path / "damaged", tmp_path / "none"]
    shutil.copytree(three, folders[1])
    flip_bit(three / "step-100000000" / FIRST, 77)
    flip_bit(three / "step-00000010" / SECOND, 77)
    for path in folders[1].glob("step-*"):
        (path / FIRST).unlink()
    script = REPOSITORY / "tests" / "ranks" / "newest_good.py"
    done = run([str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(script), *map(str, folders)], tmp_path)
    assert done.code == 0, done.said
    lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    found = {(line["rank"], line["folder"]): line for line in lines}
    assert len(found) == 6, done.said
    for rank in range(2):
        assert found[rank, str(three)]["name"] == "step-00000009"
        assert found[rank, str(folders[1])]["code"] == 4
        assert found[rank, str(folders[2])]["name"] is None
    assert len(found[0, str(three)]["said"]) == 2
    assert found[1, str(three)]["said"] == []
    assert found[0, str(folders[1])]["error"].count(f"{FIRST}: missing") == 3
    assert "checkpoint.resume=never" in found[0, str(folders[1])]["error"]
    assert "another rank" in found[1, str(folders[1])]["error"]


# ------------------------------------------------------------------------------------------------- for people


def shardtune(tmp_path: Path, *words: str | Path) -> Any:
    return run([str(BIN / "shardtune"), *map(str, words)], tmp_path, imports=True)


def test_verify_says_whether_one_is_whole(three: Path, tmp_path: Path) -> None:
    path = three / "step-00000010"
    size = sum(file.stat().st_size for file in path.iterdir())
    done = shardtune(tmp_path, "verify", "--checkpoint", path)
    assert (done.code, done.out) == (0, f"{path} is whole: step 10, 6 files, {size:,} bytes\n"), done.said
    assert "torch" not in done.modules
    assert "json" in done.modules
    flip_bit(path / FIRST, 12)
    done = shardtune(tmp_path, "verify", "--checkpoint", path)
    assert (done.code, done.out) == (4, ""), done.said
    assert f"{path}/{FIRST}: its SHA-256 is not the one that was written" in done.err
    assert "Traceback" not in done.err


def test_verify_names_what_may_have_been_meant(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in [
        (three, f"did you mean {three}/step-100000000?"), (three.parent, f"did you mean {three}/step-100000000?"),
        (three / "step-1", "there is nothing of that name"), (three.parent.parent, "RUN/checkpoints/step-"),
    ]:  # fmt: skip
        assert main(["verify", "--checkpoint", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_the_table_of_checkpoints(three: Path, tmp_path: Path) -> None:
    (three / "step-100000000" / SECOND).unlink()
    (three / "step-100000000" / "config.yaml").unlink()
    (three / "step-00000009").rename(three / "step-00000009.damaged")
    done = shardtune(tmp_path, "checkpoints", "--run", three.parent)
    assert done.code == 0, done.said
    assert "torch" not in done.modules
    header, _, *rows = done.out.splitlines()
    assert header.split() == ["step", "folder", "MB", "age", "whole", "why", "not"]
    assert len(rows) == 5
    assert rows[0].split()[:2] == ["9", "step-00000009.damaged"]
    assert "whole now" in rows[0]
    assert rows[1].split()[:3] == ["10", "step-00000010", "0.0"]
    assert rows[1].endswith("yes")
    assert rows[2].split()[0] == "100000000"
    assert rows[2].endswith("config.yaml: missing")
    assert rows[3].strip() == f"{SECOND}: missing"
    assert "unfinished" in rows[4]


def test_the_table_where_none_is_whole(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in three.glob("step-*"):
        (path / FIRST).unlink()
    assert main(["checkpoints", "--run", str(three.parent)]) == 4
    out, err = capsys.readouterr()
    assert out.count(f"{FIRST}: missing") == 3
    assert "none of them is whole" in err
    shutil.rmtree(three)
    (three.parent / "config.yaml").write_text("")
    assert main(["checkpoints", "--run", str(three.parent)]) == 4
    assert "there is no checkpoint yet" in capsys.readouterr().err
    assert main(["checkpoints", "--run", str(three)]) == 2
    assert f"{three} is no folder" in capsys.readouterr().err
