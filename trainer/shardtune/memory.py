"""Memory of the process while models are built and loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


@contextmanager
def pages_of_their_own() -> Iterator[None]:
    """Large tensors on the CPU get pages of their own meanwhile, which go back to the system when they are freed.

    In glibc's heap, which hands out its holes in turn, the short-lived tensors of building and loading a model make
    resident up to the model's size beside it. Afterwards large blocks come from the heap again, which saves the page
    faults of getting new ones in every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it, or the holes
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # where glibc itself begins; it adapts it from then on, up to 32 MiB
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * 1024**2)
        mallopt(M_TRIM_THRESHOLD, 64 * 1024**2)
