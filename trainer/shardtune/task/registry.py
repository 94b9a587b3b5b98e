"""The kinds of tasks, by the name of `task.kind`. Each is one file of this folder, whose `Config` has its keys."""

from __future__ import annotations

import functools
import operator
from importlib import import_module
from typing import Annotated, Any

from pydantic import Field

KINDS = (
    "seq2seq",
    "causal",
    "classification",
    "token_classification",
    "question_answering",
)

SECTIONS = {kind: import_module(f"shardtune.task.{kind}").Config for kind in KINDS}
"""The keys of each kind."""

AnyTask: Any = Annotated[functools.reduce(operator.or_, SECTIONS.values()), Field(discriminator="kind")]
"""The section `task` of a config."""
