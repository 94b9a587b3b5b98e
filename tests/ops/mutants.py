"""Kernels broken on purpose: a copy of the package with one place changed, which the op's own check must notice."""

from __future__ import annotations

import faulthandler
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import shardtune_kernels
from shardtune_kernels._launch import INTERPRETED

only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run only with TRITON_INTERPRET=1")
HUNG_SECONDS = 60
"""Many times what a check takes."""


class Mutant(NamedTuple):
    """A change of source text that stands once in a module."""

    what: str
    module: str
    old: str
    new: str


def is_noticed(mutant: Mutant, check: Callable[[Any], None], folder: Path) -> bool:
    """Whether `check(kernels)`, given the broken package, fails. In a process of its own: a shifted index may read
    where nothing is."""
    _broken_copy(mutant, folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            faulthandler.disable()  # a crash is one way to be noticed, and nothing to print
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HUNG_SECONDS)  # so is waiting for ever, in a heap that was written over
            check(_imported_from(folder))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return status != 0


def _broken_copy(mutant: Mutant, folder: Path) -> None:
    package = folder / "shardtune_kernels"
    shutil.copytree(Path(shardtune_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{mutant.module}.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.what}: {mutant.old!r} stands {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def _imported_from(folder: Path) -> ModuleType:
    for name in [name for name in sys.modules if name.partition(".")[0] == "shardtune_kernels"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    fresh = importlib.import_module("shardtune_kernels")
    assert Path(fresh.__file__ or "").is_relative_to(folder)
    return fresh
