"""The manifest of a checkpoint: what makes any change of any byte of it noticed. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardtune.checkpoint.names import MANIFEST, MANIFEST_HASH, STATE, step_of
from shardtune.checkpoint.plain_files import open_plain, read_object, read_small, unreadable
from shardtune.errors import CheckpointError
from shardtune.tensor_files import NotWhole, is_count, parse_object

FORMAT = 1
READ_AT_ONCE = 16 << 20
"""Bytes of a file that is hashed."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Kept:
    """What a manifest says of a file."""

    size: int
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint; all its files by name but the manifest itself and its hash."""

    step: int
    files: Mapping[str, Kept]

    def text(self) -> str:
        """What manifest.json holds."""
        files = {name: {"size": kept.size, "sha256": kept.sha256} for name, kept in sorted(self.files.items())}
        return json.dumps({"format": FORMAT, "step": self.step, "files": files}, indent=1) + "\n"


def hash_text(manifest: bytes) -> str:
    """What manifest.json.sha256 holds, as `sha256sum manifest.json` prints it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n"


def kept_of(path: Path) -> Kept:
    """Size and SHA-256 of a plain file, read once from end to end. Raises NotWhole."""
    with open_plain(path) as file:
        try:
            return Kept(os.fstat(file.fileno()).st_size, _digest(file.fileno()))
        except OSError as error:
            raise unreadable(error) from None


def _digest(descriptor: int) -> str:
    """SHA-256 of an open file; the next bytes are read while the ones before are hashed."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # or reading takes longer than hashing
    digest, buffers = hashlib.sha256(), [memoryview(bytearray(READ_AT_ONCE)) for _ in range(2)]
    with ThreadPoolExecutor(1) as reader:
        at, count = 0, os.preadv(descriptor, [buffers[0]], 0)
        while count:
            at += count
            coming = reader.submit(os.preadv, descriptor, [buffers[1]], at)
            digest.update(buffers[0][:count])
            count = coming.result()
            buffers.reverse()
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, checked by its own hash. Raises CheckpointError."""
    try:
        return _read_manifest(folder)
    except NotWhole as error:
        raise CheckpointError(f"{folder}: {error}") from None


def problems(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, `FILE: what` each; nothing if it is whole.

    `share`: (rank, ranks) that look at it together: each reads about as many bytes, every file is read by one of them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [f"{folder.name}: {'a symbolic link, not a folder' if folder.is_symlink() else 'not a folder'}"]
    try:
        manifest, names = _read_manifest(folder), set(os.listdir(folder))
    except NotWhole as error:
        return [str(error)]
    except OSError as error:
        return [f"{folder.name}: {unreadable(error)}"]
    expected = {*manifest.files, MANIFEST, MANIFEST_HASH}
    found = [f"{name}: not in the manifest" for name in sorted(names - expected)]
    of_folder = step_of(folder)
    if of_folder is not None and of_folder != manifest.step:
        found.append(f"{MANIFEST}: of step {manifest.step}, in a folder that says step {of_folder}")
    own = _share(manifest.files, *share)
    for name, kept in manifest.files.items():
        problem = _difference(folder / name, kept, read=name in own)
        if problem is not None:
            found.append(f"{name}: {problem}")
    return found or _other_state(folder, manifest)


def _read_manifest(folder: Path) -> Manifest:
    """Raises NotWhole that names the file."""
    name = MANIFEST
    try:
        data = read_small(folder / MANIFEST)
        name = MANIFEST_HASH
        if read_small(folder / MANIFEST_HASH) != hash_text(data).encode():
            raise NotWhole(f"not the SHA-256 of {MANIFEST}; one of the two was changed")
        name = MANIFEST
        return _parsed(parse_object(data, "it"))
    except NotWhole as error:
        raise NotWhole(f"{name}: {error}") from None


def _parsed(value: dict[str, Any]) -> Manifest:
    if value.get("format") != FORMAT:
        raise NotWhole(f"format {value.get('format')!r:.40} is not known to this version, which reads {FORMAT}")
    step, files = value.get("step"), value.get("files")
    if value.keys() != {"format", "step", "files"} or not is_count(step) or not isinstance(files, dict):
        raise NotWhole("it is damaged: it does not consist of format, step and files")
    made: dict[str, Kept] = {}
    for name, kept in files.items():
        if name in ("", ".", "..", MANIFEST, MANIFEST_HASH) or "/" in name or "\0" in name:
            raise NotWhole(f"it names {name!r:.200}, which is no file of a checkpoint")
        if not isinstance(kept, dict) or kept.keys() != {"size", "sha256"} or not is_count(kept["size"]):
            raise NotWhole(f"it is damaged: {name!r:.200} is not described by size and sha256")
        if not isinstance(kept["sha256"], str) or not _SHA256.fullmatch(kept["sha256"]):
            raise NotWhole(f"it is damaged: {name!r:.200} has no SHA-256")
        made[name] = Kept(kept["size"], kept["sha256"])
    if STATE not in made:
        raise NotWhole(f"it does not name {STATE}")
    return Manifest(value["step"], made)


def _other_state(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong where the manifest is of another step than the state beside it."""
    try:
        step = read_object(folder / STATE).get("step")
    except NotWhole as error:
        return [f"{STATE}: {error}"]
    return [f"{MANIFEST}: of step {manifest.step}, beside a {STATE} of step {step}"] if step != manifest.step else []


def _share(files: Mapping[str, Kept], rank: int, ranks: int) -> set[str]:
    """Files that one of several ranks reads: the largest first, each to whom has the least so far."""
    loads, own = [0] * ranks, set[str]()
    for name, kept in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += kept.size
        if least == rank:
            own.add(name)
    return own


def _difference(path: Path, kept: Kept, read: bool) -> str | None:
    """How a file differs from what was written; its bytes are compared only where it is to be `read`."""
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size < kept.size:
            return f"has {size} of {kept.size} bytes"
        if size > kept.size:
            return f"has {size} bytes, not {kept.size}"
        if read and kept_of(path) != kept:
            return "its SHA-256 is not the one that was written: its bytes were changed"
    except NotWhole as error:
        return str(error)
    return None
