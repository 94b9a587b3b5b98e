"""One file of a checkpoint: written past the page cache, flushed, and read back. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

from shardtune.checkpoint import files

CHUNK = 16 << 20
"""Bytes written or read at once: enough for a disk's full speed."""


def write_file(path: Path, image: memoryview, size: int, verify: bool) -> str:
    """Writes the first `size` bytes of `image`, which is whole pages, as a new file; then the disk has them.

    `verify`: they are read back from the disk. Returns their SHA-256. Raises OSError.
    """
    digest = hashlib.sha256()
    # Hashing takes about as long as writing does; both let go of the interpreter's lock.
    hashing = threading.Thread(target=digest.update, args=[image[:size]], daemon=True)
    hashing.start()
    descriptor = files.create(path)
    try:
        _write_past_cache(descriptor, image, size)
        files.cut(descriptor, size)
        files.flush(descriptor)
        hashing.join()
        if verify and _digest_on_disk(descriptor, size) != digest.hexdigest():
            raise OSError(errno.EIO, "what was read back is not what was written", str(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a small new file; when it returns, the disk has it. Raises OSError."""
    data = memoryview(text.encode())
    descriptor = files.create(path)
    try:
        _write(descriptor, data)
        files.flush(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _write_past_cache(descriptor: int, image: memoryview, size: int) -> None:
    """Whole pages, the last one with what stands after the end; through the page cache where there is no other way."""
    if _past_cache(descriptor, True):
        try:
            _write(descriptor, image[: size + -size % mmap.PAGESIZE])
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system's answer to what it cannot do
                raise
        else:
            return
        _past_cache(descriptor, False)
    _write(descriptor, image[:size])


def _write(descriptor: int, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += files.write(descriptor, data[at : at + CHUNK], at)


def _digest_on_disk(descriptor: int, size: int) -> str:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # where the cache cannot be passed by
    direct = _past_cache(descriptor, True)
    digest, at = hashlib.sha256(), 0
    with mmap.mmap(-1, CHUNK) as buffer:
        while at < size:
            try:
                count = os.preadv(descriptor, [buffer], at)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                direct = _past_cache(descriptor, False)
                continue
            if not count:
                break
            with memoryview(buffer)[:count] as data:
                digest.update(data)
            at += count
    return digest.hexdigest()


def _past_cache(descriptor: int, wanted: bool) -> bool:
    """Switches O_DIRECT; whether it is on now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT * wanted)
        return wanted
    return False
