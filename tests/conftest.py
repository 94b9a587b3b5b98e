"""Before anything is imported: models this small are computed by one thread, more of them only wait for each other."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

STARTING = {
    "chaos", "forked", "grid", "launching", "layouts", "method_runs", "peft_runs", "run_many", "slurm_cluster", "warm",
}  # fmt: skip
"""Modules by which tests start ranks and launchers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of files that start ranks: `make test` runs the others beside them."""
    for item in items:
        names = vars(item.module).values() if isinstance(item, pytest.Function) else ()
        used = {getattr(name, "__module__", None) or getattr(name, "__name__", None) for name in names}
        if used & STARTING:
            item.add_marker("ranks")
