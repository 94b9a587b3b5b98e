"""The docs:python corpus: what installed Python packages say about themselves, and their own summaries of it.

A docstring's first sentence summarises the rest of it, by convention (PEP 257). The pairs come from the
standard library and the installed packages; their sources are parsed and never imported or run. The corpus is
a function of the Python version and of the names and versions of the installed packages, wherever they are.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from shardtune.data.tables import cache_folder, fingerprint
from shardtune.errors import DataError, StorageError

log = logging.getLogger(__name__)

VERSION = 1
"""Of the extraction; a change of what is extracted needs another number, as results are cached."""

SUMMARY_WORDS = range(4, 41)
BODY_WORDS = 15
"""The fewest words of a document."""
PAIRS = 20_000
"""Reading stops here: the standard library comes first, then the packages in the order of their names."""
PAIRS_OF_PACKAGE = 1_000
"""So that no package makes up most of the corpus, nor of the time it takes."""
FILE_BYTES = 1_000_000
"""Larger files are generated ones."""

_SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "testing",
        "idlelib",
        "turtledemo",
        "lib2to3",
        "ensurepip",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_vendor",
        "_vendored",
        "vendor",
        "vendored",
        "extern",
        "_extern",
        "externals",
        "third_party",
        "thirdparty",
        "node_modules",
    ]
)
# Installers differ from one environment to the next (venv, virtualenv, uv); this program is not its own data.
_SKIPPED_PACKAGES = frozenset(
    [
        "pip",
        "setuptools",
        "wheel",
        "uv",
        "virtualenv",
        "_virtualenv",
        "pkg_resources",
        "_distutils_hack",
        "shardtune",
        "shardtune_kernels",
    ]
)


class Pair(NamedTuple):
    """A document and its summary."""

    module: str
    """Dotted name."""
    name: str
    """Dotted name of the class or function in the module; empty for the module itself."""
    document: str
    summary: str

    @property
    def place(self) -> str:
        """MODULE:NAME, or MODULE."""
        return f"{self.module}:{self.name}" if self.name else self.module

    def fields(self) -> dict[str, str]:
        """The row's fields; `section` is the top-level package or module."""
        return {
            "document": self.document,
            "summary": self.summary,
            "section": self.module.partition(".")[0],
            "name": f"{self.module}.{self.name}" if self.name else self.module,
        }


def python_docs() -> list[Pair]:
    """The pairs of this Python installation: half a minute the first time, then from the cache.

    Raises DataError where no documentation is installed, StorageError where the cache cannot be written.
    """
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    # Names and versions, but not files or places: a moved environment finds its cache again.
    installed = sorted({(d.name.lower(), d.version) for d in metadata.distributions(path=packages)})
    key = fingerprint(
        VERSION,
        [platform.python_implementation(), platform.python_version()],
        [(name, version) for name, version in installed if name.replace("-", "_") not in _SKIPPED_PACKAGES],
        [PAIRS, PAIRS_OF_PACKAGE, FILE_BYTES, BODY_WORDS, list(SUMMARY_WORDS)],
    )
    cached = cache_folder() / "docs-python" / f"{key[:32]}.jsonl"
    pairs = _read_cache(cached)
    if pairs is None:
        log.info("docs:python: reading the documentation of the installed packages; once, half a minute")
        pairs = extract([Path(sysconfig.get_path("stdlib")), *map(Path, packages)])
        if not pairs:
            raise DataError("docs:python: this Python installation comes without the sources of its packages")
        _write_cache(cached, pairs)
    return pairs


def extract(roots: Sequence[Path], limit: int = PAIRS, limit_of_package: int = PAIRS_OF_PACKAGE) -> list[Pair]:
    """The pairs found in these folders of packages and modules, in a fixed order, at most `limit`.

    Pairs that repeat the summary or the document of an earlier one are left out.
    """
    pairs: list[Pair] = []
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarnings of other people's sources
        for root in roots:
            for top in _children(root):
                found = _new_pairs(_modules(root, top), seen, min(limit_of_package, limit - len(pairs)))
                pairs.extend(found)
    return pairs


def _new_pairs(modules: Iterable[tuple[str, Path]], seen: set[str], limit: int) -> list[Pair]:
    pairs: list[Pair] = []
    for module, path in modules:
        for name, docstring in _docstrings(path):
            if len(pairs) >= limit:
                return pairs
            parts = split_docstring(docstring)
            if parts is None:
                continue
            document, summary = parts
            keys = {f"summary {summary.casefold()}", f"document {_essence(document)}"}
            if seen.isdisjoint(keys):
                pairs.append(Pair(module, name, document, summary))
            seen |= keys
    return pairs


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(document, summary) of a docstring without indentation; None where it does not make a good pair."""
    lines = [line.rstrip() for line in docstring.strip().splitlines()]
    end = 1
    while end < len(lines) and lines[end] and not _STARTS_BLOCK.match(lines[end]):
        end += 1
    paragraph = " ".join(" ".join(lines[:end]).split())
    if end < len(lines) and _UNDERLINE.fullmatch(lines[end]):
        end += 1
    first = _SENTENCE_END.search(paragraph)
    summary = paragraph[: first.start()] if first else paragraph
    rest = paragraph[first.end() :] if first else ""
    document = re.sub(r"\n{3,}", "\n\n", "\n".join([rest, *lines[end:]])).strip("\n")
    if len(summary.split()) not in SUMMARY_WORDS or len(document.split()) < BODY_WORDS:
        return None
    if not summary[0].isalnum() or summary.endswith(":") or summary.startswith(("Copyright", "Licensed")):
        return None
    if _plain(summary).rstrip(".") in _plain(document):
        return None
    try:
        f"{summary}{document}".encode()
    except UnicodeEncodeError:  # an escape in the docstring made half of a surrogate pair
        return None
    return document, summary


# What no longer belongs to the first paragraph though no blank line stands before it: an indented line, a
# list, a doctest, a parameter, a heading such as `Args:`, or the underline of a title.
_STARTS_BLOCK = re.compile(r"\s|>>>|[-*•+] |\d+[.)] |:\w+[^:]*:|@\w+|\.\. |[A-Z][\w ]*:$|([=\-~^#*_`])\1{2,}$")
_UNDERLINE = re.compile(r"([=\-~^#*_`])\1{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)(?<!etc\.) +(?=[A-Z`*])")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _essence(document: str) -> str:
    """What copies of a text share when only the names of classes and the numbers in it were changed."""
    return hashlib.sha256(" ".join(re.findall(r"\b[a-z]{2,}\b", document)).encode()).hexdigest()


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Dotted names in the file and their docstrings, the file's own first, under the empty name."""
    try:
        if path.stat().st_size > FILE_BYTES:
            return
        source = path.read_bytes()
        # Parsing is nearly all of the time, and docstrings of several paragraphs have triple quotes.
        if b'"""' not in source and b"'''" not in source:
            return
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # templates, and sources for another Python
    for name, node in [("", tree), *_definitions(tree, "")]:
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring


def _definitions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child, prefix)


def _modules(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Dotted names and files of the module or package `name`, sorted, the package's own file first."""
    path = folder / name
    if path.is_file():
        yield name.removesuffix(".py"), path
    elif path.is_dir():
        for child in _children(path):
            for module, file in _modules(path, child):
                yield name if module == "__init__" else f"{name}.{module}", file


def _children(folder: Path) -> list[str]:
    """Names of modules and packages in a folder, in an order that does not depend on the file system."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.is_symlink()
                and (entry.name.endswith(".py") if entry.is_file() else entry.name not in _SKIPPED_FOLDERS)
                and entry.name.removesuffix(".py").isidentifier()
                and entry.name.removesuffix(".py") not in _SKIPPED_PACKAGES
            ]
    except OSError:
        return []
    return sorted(names, key=lambda name: (name != "__init__.py", name.removesuffix(".py"), name))


def _read_cache(path: Path) -> list[Pair] | None:
    """The cached pairs; None where there are none, or the file is damaged."""
    try:
        count, *lines = path.read_text("utf-8").splitlines()
        pairs = [Pair(*json.loads(line)) for line in lines]
        return pairs if len(pairs) == json.loads(count)["pairs"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(path: Path, pairs: Sequence[Pair]) -> None:
    """Under a temporary name first, so that two processes at once do no harm."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(json.dumps({"pairs": len(pairs)}) + "\n")
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise StorageError(
            f"{path}: cannot write the cache: {error.strerror or error}; "
            "the environment variable SHARDTUNE_CACHE names another place"
        ) from error
