"""Pages of reports, as a test reads them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from shardtune.report import write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What is on a page: texts, tags, identifiers; fails where tags do not close each other."""

    def __init__(self, made: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(made)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def report_of(run: Path) -> Page:
    assert write_report(run) is None
    return Page((run / "report.html").read_text(encoding="utf-8"))


def check_self_contained(page: Page, made: str) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "embed", "base", "form"})
    for name in ("src", "srcset", "action", "xlink:href", "data", "poster", "background"):
        assert not page.of(name)
    assert all(value.startswith("#") or value == "data:," for value in page.of("href"))
    assert not re.search(r"url\(|@import|@font-face", made)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    identifiers = page.of("id")
    assert len(identifiers) == len(set(identifiers))
    wanted = [value[1:] for value in page.of("href") if value.startswith("#")]
    wanted += [one for value in page.of("aria-labelledby") for one in value.split()]
    assert set(wanted) <= set(identifiers)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(one["role"] == "img" and "aria-labelledby" in one for one in drawings)
