"""The templates. All that a run says is escaped; nothing outside the page is asked for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **content: Any) -> str:
    """A page. Characters that no HTML may hold, such as NUL, are shown as �."""
    made = _environment().get_template(template).render(**content)
    return made.translate(_NOT_IN_HTML)


_NOT_IN_HTML = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)], "�"
)  # lone surrogates cannot be encoded
