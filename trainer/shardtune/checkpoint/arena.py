"""Memory that this process copies to and the write process writes from."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from shardtune.checkpoint.layout import Layout

POPULATE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: gives every page its memory now, not when it is first written."""


class Arena:
    """An image of a rank's file in shared memory, kept for the next save: to copy there is all that training waits for.

    Memory used for the first time is slow, as the system clears it and enters page after page.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        """`device`: what is copied from; for a GPU the memory is pinned, or `say` is told that it cannot be."""
        self.descriptor = os.memfd_create("shardtune-checkpoint")
        self._device = device
        self._say = say
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._warming: threading.Thread | None = None

    def warm(self, size: int) -> None:
        """Makes room for `size` bytes, and has the memory ready soon, in a thread."""
        self._reserve(size)
        self._warming = threading.Thread(target=self._populate, daemon=True)
        self._warming.start()

    def copy(self, layout: Layout) -> None:
        """The file of `layout`, whole when this returns."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None
        if self._reserve(layout.size):
            self._populate()
        self._bytes[: len(layout.header)].copy_(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
        for place, piece in layout.places:
            if piece.values.numel():
                there = self._bytes[place : place + piece.values.nbytes].view(piece.values.dtype)
                there.copy_(piece.values.detach(), non_blocking=self._pinned)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Gives the memory back."""
        if self._warming is not None:
            self._warming.join()
        self._let_go()
        os.close(self.descriptor)

    def _reserve(self, size: int) -> bool:
        """Whether more memory was needed. Whole pages, as writing past the page cache takes no less."""
        size += -size % mmap.PAGESIZE
        if size <= self._bytes.numel():
            return False
        self._let_go()
        os.ftruncate(self.descriptor, size)
        self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        return True

    def _populate(self) -> None:
        address, size = ctypes.c_void_p(self._bytes.data_ptr()), ctypes.c_size_t(self._bytes.numel())
        ctypes.CDLL(None).madvise(address, size, POPULATE)  # where it is not known, the first copy is slower
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._pinned = int(_cuda().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)) == 0
            if not self._pinned:
                self._say("warning: memory for checkpoints cannot be pinned: training stops longer to copy to it")

    def _let_go(self) -> None:
        if self._pinned:
            _cuda().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False
        self._bytes = torch.empty(0, dtype=torch.uint8)


def _cuda() -> Any:
    return torch.cuda.cudart()
