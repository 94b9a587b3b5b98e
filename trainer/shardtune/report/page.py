"""The page of one run, made of its files."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shardtune.report import facts
from shardtune.report.curves import curves
from shardtune.report.examples import Group, examples
from shardtune.report.files import RunFiles
from shardtune.report.render import render
from shardtune.report.scores import compared, parts_of
from shardtune.report.words import cut

MOST_BYTES = 2_000_000
"""Of a page. Where texts make it larger, they are cut shorter."""
LIMITS = (4000, 1000, 200, 40)
"""Characters of a text, the first that keeps the page small enough."""
CONFIG_CHARACTERS = 60_000

Part = TypeVar("Part")


def page(run: RunFiles) -> str:
    """One self-contained page; sections whose files are not there say so."""
    made, odd = "", []
    content = _content(run, odd)
    for limit in LIMITS:
        groups = _of(odd, "Examples", lambda limit=limit: _examples(run, limit), [])
        made = render("run.html.jinja", **content, examples=groups, limit=limit)
        if len(made.encode("utf-8")) <= MOST_BYTES:
            break
    return made


def _of(odd: list[str], section: str, make: Callable[[], Part], otherwise: Part) -> Part:
    """A file that was written by hand or by another version costs a section, not the page."""
    try:
        return make()
    except Exception as error:
        said = f"{section} cannot be shown: the run's files are not as expected ({type(error).__name__}: {error})"
        odd += [cut(said, 500)[0]] if said not in odd else []
        return otherwise


def _content(run: RunFiles, odd: list[str]) -> dict[str, Any]:
    """All but the examples; `odd` is told what cannot be shown."""
    of = functools.partial(_of, odd)
    config, config_cut = cut(run.config_text, CONFIG_CHARACTERS)
    return {
        "name": cut(run.name, 200)[0],
        "subtitle": of("The line under the name", lambda: facts.subtitle(run), ""),
        "compared": of("Before and after", lambda: compared(run), []),
        "charts": of("Curves", lambda: curves(run), []),
        "data": of("Data", lambda: facts.data_of(run), None),
        "overlaps": of("Overlap of splits", lambda: facts.overlaps(run), []),
        "cost": of("Cost", lambda: facts.cost(run), []),
        "facts": of("What was run", lambda: facts.what_was_run(run), []),
        "versions": of("Versions", lambda: facts.versions(run), []),
        "fused": of("Fused operations", lambda: facts.fused(run), ([], [])),
        "command": of("The command line", lambda: facts.command_line(run), ""),
        "directory": str(run.environment.get("directory") or ""),
        "config": config,
        "config_cut": config_cut,
        "warnings": of("Warnings", lambda: facts.warnings(run), []),
        "missing": run.missing,
        "odd": odd,
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "folder": str(Path(run.folder).resolve()),
        "shardtune": str((run.environment.get("versions") or {}).get("shardtune") or ""),
    }


def _examples(run: RunFiles, limit: int) -> list[tuple[str, list[Group]]]:
    """Of each split that has some; test first."""
    found = [(split, examples(run, split, part, limit)) for split, part in parts_of(run).items()]
    return [(split, groups) for split, groups in found if groups]
