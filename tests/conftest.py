"""Before anything is imported: models this small are computed by one thread, more of them only wait for each other."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    "test_layouts", "test_fused_training", "test_launchers", "test_errors", "test_methods", "test_chaos",
    "test_stopping", "test_evaluation", "test_heads", "test_trackers", "test_loading_quantized", "test_bench_small",
)  # fmt: skip
"""Files that take a minute or more. They come first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files are dealt to the processes in this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
