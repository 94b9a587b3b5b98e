"""Rows from every kind of source, texts, splits, token tables; and every fault named with its place."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shardtune
from shardtune.data import docs, tables
from shardtune.data.corpus import load_corpus
from shardtune.data.fields import Dropped, texts
from shardtune.data.publishing import published
from shardtune.data.sources import Row, rows
from shardtune.data.splits import Splits, read_splits
from shardtune.data.tables import TokenTable, fingerprint, open_table, write_table
from shardtune.errors import ConfigError, DataError, StorageError
from shardtune.examples import Encoded, Text
from shardtune.row_fields import Fields
from shardtune.task.classification import one_label

FIELDS = Fields(input="document", prompt=None, target="summary")
SHARES = [0.8, 0.1, 0.1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))


def python(code: str, *arguments: object, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    source_root = str(Path(shardtune.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": source_root, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, items: list[dict]) -> str:
    return write(path, "".join(json.dumps(item) + "\n" for item in items))


def read(spec: object, split: str = "train") -> list[Row]:
    return list(rows(str(spec), split))


def refusal(spec: object, split: str = "train") -> str:
    """The message with which a source is refused."""
    with pytest.raises(DataError) as caught:
        read(spec, split)
    return str(caught.value)


def examples(count: int, generator: random.Random) -> list[dict]:
    return [{"document": f"text {generator.random()}", "summary": f"sum {n}"} for n in range(count)]


# ------------------------------------------------------------------------------------------- files


ITEMS = [{"a": "ä\u2028x", "b": "1"}, {"a": "two\nlines", "b": "2,3"}, {"a": 'say "x"', "b": ""}]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl(tmp_path / "x.jsonl", ITEMS)
    write(tmp_path / "x.json", json.dumps(ITEMS))
    write(tmp_path / "data.json", json.dumps({"version": 1, "data": ITEMS}))
    with (tmp_path / "x.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b"])
        writer.writeheader()
        writer.writerows(ITEMS)
    pq.write_table(pa.Table.from_pylist(ITEMS), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "data.json", "x.csv", "x.parquet"):
        assert [row.fields for row in read(tmp_path / name)] == ITEMS, name
    assert [row.place for row in read(tmp_path / "x.jsonl")] == [f"{tmp_path}/x.jsonl:{n}" for n in (1, 2, 3)]
    assert [row.place for row in read(tmp_path / "x.csv")] == [f"{tmp_path}/x.csv:{n}" for n in (2, 3, 5)]
    for name in ("x.json", "x.parquet"):
        assert [row.place for row in read(tmp_path / name)] == [f"{tmp_path}/{name}:row {n}" for n in (1, 2, 3)]


def test_byte_order_marks_blank_lines_and_line_ends_are_tolerated(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    jsonl_file = write(tmp_path / "x.jsonl", mark + b'{"a": "1"}\r\n\r\n   \n{"a": "2"}')
    assert [(row.place, row.fields["a"]) for row in read(jsonl_file)] == [
        (f"{jsonl_file}:1", "1"),
        (f"{jsonl_file}:4", "2"),
    ]
    csv_file = write(tmp_path / "x.csv", mark + b"a,b\r\n1,2\r\n\r\n3,4\r\n")
    assert [row.fields for row in read(csv_file)] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert read(write(tmp_path / "x.json", mark + b'[{"a": 1}]'))[0].fields == {"a": 1}


def test_long_cells_and_upper_case_extensions_are_read(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert read(write(tmp_path / "x.CSV", f'a\n"{long}"\n'))[0].fields == {"a": long}


def test_a_glob_reads_its_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        jsonl(tmp_path / name, [{"a": name}])
    assert [row.fields["a"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(read(tmp_path / "**/*.jsonl")) == 3
    jsonl(tmp_path / "odd[1].jsonl", [{"a": "literal"}])
    assert read(tmp_path / "odd[1].jsonl")[0].fields == {"a": "literal"}
    write(tmp_path / "d.txt", "x")
    assert "d.txt: unknown extension '.txt'" in refusal(tmp_path / "*")
    assert refusal(tmp_path / "*.csv") == f"{tmp_path}/*.csv: no file matches"


def test_missing_files_are_named_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "data" / "train.jsonl", [{"a": 1}])
    monkeypatch.chdir(tmp_path)
    assert refusal("data/trian.jsonl") == "data/trian.jsonl: no such file; did you mean data/train.jsonl?"
    assert refusal("data/train.json") == "data/train.json: no such file; did you mean data/train.jsonl?"
    assert refusal("data/train") == "data/train: no such file; did you mean data/train.jsonl?"
    assert refusal("data/zzzzzz.csv") == "data/zzzzzz.csv: no such file"
    assert refusal("nowhere/x.csv") == "nowhere/x.csv: no such file; the folder nowhere does not exist"
    assert refusal("squad") == "squad: no such file"
    assert "give a glob such as data/*.jsonl" in refusal("data")
    assert "cannot be read" in refusal("x" * 5000 + ".jsonl")


def test_unknown_extensions_list_the_known(tmp_path: Path) -> None:
    known = "known are .jsonl, .json, .csv, .parquet"
    assert refusal(write(tmp_path / "x.txt", "a")) == f"{tmp_path}/x.txt: unknown extension '.txt'; {known}"
    assert refusal(write(tmp_path / "x", "a")) == f"{tmp_path}/x: no extension; {known}"
    assert "unknown extension '.pkl'" in refusal(write(tmp_path / "x.pkl", b"\x80\x04."))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_empty_files_are_refused(tmp_path: Path, suffix: str) -> None:
    assert refusal(write(tmp_path / f"x.{suffix}", "")) == f"{tmp_path}/x.{suffix}: the file is empty (0 bytes)"


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "x.parquet")
    files = [tmp_path / "x.parquet"]
    files += [
        write(tmp_path / name, text) for name, text in [("x.jsonl", "\n\n"), ("x.json", "[]"), ("x.csv", "a,b\n")]
    ]
    for file in files:
        assert refusal(file) == f"{file}: the file holds no rows"


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    lines = b'{"a": "x"}\n{"a": "\xc3\xa4"}\n{"a": "caf\xe9"}\n'
    for name, content in (("x.jsonl", lines), ("x.json", lines), ("x.csv", lines.replace(b'"', b""))):
        path = write(tmp_path / name, content)
        assert refusal(path) == f"{path}:3: not UTF-8: byte 0xe9 at offset {content.index(0xE9)} of the file"
    path = write(tmp_path / "wide.jsonl", '{"a": 1}\n'.encode("utf-16"))
    assert refusal(path).endswith("offset 0 of the file; it looks like UTF-16")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1', "not valid JSON: Expecting ',' delimiter at column 8"),
        ("{'a': 1}", "not valid JSON"),
        ("[1, 2]", "the row is a list, not an object"),
        ('"text"', "the row is a string, not an object"),
        ("null", "the row is null, not an object"),
        ("[" * 200_000, "not valid JSON: nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[", "a file that is one JSON list is named .json"),
    ],
)
def test_bad_json_lines_are_placed(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "x.jsonl", f'{{"a": 0}}\n\n{line}\n{{"a": 2}}\n')
    assert refusal(path).startswith(f"{path}:3: ")
    assert problem in refusal(path)


def test_bad_json_files_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, '[{"a": 1},\n {"a": }]')
    assert refusal(path) == f"{path}:2: not valid JSON: Expecting value at column 8"
    write(path, '{"a": 1}\n{"a": 2}\n')
    assert refusal(path).endswith("a file with one object a line is named .jsonl")
    write(path, '[{"a": 1}, 7]')
    assert refusal(path) == f"{path}:row 2: the row is a number, not an object with named fields"
    for text, kind in [('{"rows": []}', "an object"), ('"x"', "a string"), ('{"data": {}}', "an object")]:
        write(path, text)
        assert refusal(path) == f'{path}: {kind}, not a list of objects or an object with a list "data"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", ":1: no header"),
        (",\n1,2\n", ":1: no header"),
        ("x" * 300 + ",b\n1,2\n", ":1: no header"),
        ("no,no\n1,2\n", ":1: the header names 'no' twice"),
        ('a,b\n1,2\n"x\ny",2\n1,2,3\n', ":5: the row has 3 cells, the header only 2"),
        ('a,b\n1,2\n"never closed,3\n4,5\n', ":3: not valid CSV"),
        ("a,b\n1,2\n3,\0\n", ":3: holds a NUL character"),
    ],
)
def test_bad_csv_is_placed(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "x.csv", text)
    assert refusal(path).startswith(path + message)


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert "not a valid Parquet file" in refusal(write(tmp_path / "text.parquet", "hello " * 100))
    pq.write_table(pa.table({"a": [str(n) for n in range(5000)]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    assert "cut.parquet" in refusal(write(tmp_path / "cut.parquet", content[: len(content) // 2]))


# ------------------------------------------------------------------------- saved folders and the hub


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"a": ["x", "y", "z"]})
    # A selection is saved as indices, or as rows; either way its order is that of the selection.
    one.select([2, 0]).save_to_disk(str(tmp_path / "one"))
    assert [(row.place, row.fields) for row in read(tmp_path / "one")] == [
        (f"{tmp_path}/one:row 1", {"a": "z"}),
        (f"{tmp_path}/one:row 2", {"a": "x"}),
    ]
    assert "leave out :test" in refusal(f"{tmp_path}/one:test")
    both = datasets.DatasetDict({"train": one, "validation": one.select([1]), "dev": one.select([])})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(read(tmp_path / "both")) == 3
    assert read(tmp_path / "both", "validation") == [Row(f"{tmp_path}/both/validation:row 1", {"a": "y"})]
    assert read(f"{tmp_path}/both:validation") == read(tmp_path / "both", "validation")
    assert "no split 'test'; there are: train, validation, dev" in refusal(tmp_path / "both", "test")
    assert f"did you mean {tmp_path}/both:train?" in refusal(f"{tmp_path}/both:trian")
    assert refusal(f"{tmp_path}/both:dev") == f"{tmp_path}/both/dev: the dataset holds no rows"
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved dataset" in refusal(tmp_path / "one")


def test_a_dataset_that_cannot_be_reached_is_refused_with_the_reason(tmp_path: Path) -> None:
    code = """
import sys
from shardtune.data.sources import rows
from shardtune.errors import DataError
try:
    list(rows("nobody/nothing@config:train", "train"))
except DataError as error:
    print(error)
assert "torch" not in sys.modules
"""
    printed = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert printed.startswith("nobody/nothing@config:train: no such file or folder, and no dataset of the hub")
    assert "reach" in printed


def test_unknown_corpora_and_odd_specs_are_refused() -> None:
    assert refusal("docs:rust") == "docs:rust: unknown; the built-in corpus is docs:python"
    assert "no such file" in refusal("owner/name/too/deep")
    assert "no such file" in refusal("../no-such-folder-here")


# ---------------------------------------------------------------------------------------- docs:python


MODULE = '''
"""Short words for long things to say.

{0} This body of the module has more than the fifteen words that a document needs,
and it stands here in {0} lines.
"""

def {0}_function(x):
    r"""Return the {0} of all the
    arguments that were given. It has a second sentence.

    Args:
        x: a value with an explanation of so many words that the {0} body is long enough to count.
    """

class {0}Class:
    def method(self):
        """Do the {0} thing once or twice.

        It does the {0} thing, and this explanation of how it does so goes on for a while, for fifteen words.
        """
    def short(self):
        """Too short."""
    def repeats(self):
        """Say the {0} words again here.

        One should say the {0} words again here, as the summary stands in this body, which is no use to learn.
        """
'''


def fake_tree(root: Path) -> Path:
    files = [
        "pkg/__init__",
        "pkg/zeta",
        "pkg/sub/beta",
        "alpha",
        "pkg/tests/hidden",
        "pkg/_vendor/hidden",
        "pip/cli",
    ]
    for name in random.Random().sample(files, len(files)):  # created in any order, as file systems list them
        write(root / f"{name}.py", MODULE.format("x" + name.replace("/", "").replace("_", "")))
    write(root / "pkg/broken.py", 'def f(:\n    """x"""')
    write(root / "pkg/warns.py", '"""A \\d escape that Python warns of. And ' + "word " * 20 + '"""\nx = "\\d"\n')
    write(root / "pkg/huge.py", '"""One two three four five.\n\n' + "word " * 300_000 + '"""')
    write(root / "not-a-package/x.py", MODULE.format("dash"))
    return root


def test_docs_are_extracted_in_a_fixed_order(tmp_path: Path) -> None:
    pairs = docs.extract([fake_tree(tmp_path / "one")])
    assert pairs == docs.extract([fake_tree(tmp_path / "two")])
    modules = list(dict.fromkeys(pair.module for pair in pairs))
    assert modules == ["alpha", "pkg", "pkg.sub.beta", "pkg.warns", "pkg.zeta"]
    first = [pair for pair in pairs if pair.module == "alpha"]
    assert [pair.place for pair in first] == ["alpha", "alpha:xalpha_function", "alpha:xalphaClass.method"]
    function = first[1].fields()
    assert function["summary"] == "Return the xalpha of all the arguments that were given."
    assert function["document"].startswith("It has a second sentence.\n\nArgs:\n    x: a value")
    assert (function["section"], function["name"]) == ("alpha", "alpha.xalpha_function")
    # The module summaries are all alike: only the first is kept.
    assert sum(pair.summary.startswith("Short words") for pair in pairs) == 1
    assert docs.extract([tmp_path / "one"], limit=2) == pairs[:2]
    assert len(docs.extract([tmp_path / "one"], limit_of_package=1)) == 2


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Four words are enough\n\n{}", "Four words are enough"),
        ("Wraps over\ntwo lines of it.\n\n{}", "Wraps over two lines of it."),
        ("Title of four words\n===================\n{}", "Title of four words"),
        ("Takes e.g. a list of Things. {}", "Takes e.g. a list of Things."),
        ("A heading follows at once\nArgs:\n    x: {}", "A heading follows at once"),
        ("Three words only\n\n{}", None),
        ("Copyright 2020 by the authors\n\n{}", None),
        ("Usage of this command is:\n\n{}", None),
        ("The body is too short here\n\nYes it is.", None),
        ("Said again in the body.\n\nThis was said again\nin the body, {}", None),
        ("Half of \ud800 a surrogate pair\n\n{}", None),
        ("word " * 41 + "\n\n{}", None),
    ],
)
def test_which_docstrings_make_a_pair(docstring: str, summary: str | None) -> None:
    parts = docs.split_docstring(docstring.replace("{}", "Body " + "word " * 14))
    assert (parts and parts[1]) == summary


def test_docs_do_not_depend_on_process_or_hash_seed() -> None:
    code = """
import hashlib, sys, sysconfig
from pathlib import Path
from shardtune.data.docs import extract
pairs = extract([Path(sysconfig.get_path("stdlib"))], limit=300)
print(len(pairs), hashlib.sha256(repr(pairs).encode()).hexdigest())
assert not {"torch", "transformers", "antigravity"} & set(sys.modules)
"""
    first, second = (python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first == second
    assert first.startswith("300 ")


def test_the_installed_documentation_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read("docs:python")
    monkeypatch.setattr(docs, "extract", lambda *_: pytest.fail("the documentation was read a second time"))
    second = read("docs:python")
    assert first == second
    assert len(first) > 2000
    assert all(row.place.startswith("docs:python:") for row in first)
    assert {"document", "summary", "section", "name"} == set(first[0].fields)
    assert len({row.fields["summary"].casefold() for row in first}) == len(first)
    # A cut cache file is noticed, and made anew.
    (cached,) = (tmp_path / "cache" / "docs-python").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1000])
    monkeypatch.setattr(docs, "extract", lambda roots: [docs.Pair("m", "f", "document", "summary")])
    assert read("docs:python") == [Row("docs:python:m:f", docs.Pair("m", "f", "document", "summary").fields())]
    monkeypatch.setenv("SHARDTUNE_CACHE", str(cached))
    with pytest.raises(StorageError, match="SHARDTUNE_CACHE"):
        read("docs:python")


# --------------------------------------------------------------------------------------------- fields


def one_text(fields: dict, input: str | None, target: str | None = None, labels: bool = False) -> Text | None:
    found = list(
        texts(
            [Row("x.jsonl:1", fields)], Fields(input, None, target, labels_of=one_label if labels else None), Counter()
        )
    )
    return found[0] if found else None


def source_of(fields: dict, name: str) -> str:
    text = one_text(fields, name)
    assert text is not None
    return text.source


def wrong_text(fields: dict, name: str, labels: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        one_text({"ok": "ok", **fields}, "ok", name, labels)
    return str(caught.value)


def test_names_reach_inside() -> None:
    row = {
        "translation": {"de": "ja"},
        "answers": {"text": ["a", "b"]},
        "a.b": "literal",
        "a": {"b": "inside"},
    }
    assert source_of(row, "translation.de") == "ja"
    assert source_of(row, "answers.text.1") == "b"
    assert source_of(row, "a.b") == "literal"
    assert source_of({"x": {"y.z": {"w": "deep"}}}, "x.y.z.w") == "deep"
    assert source_of({"a.b": {}, "a": {"b": {"c": "other way"}}}, "a.b.c") == "other way"


def test_an_absent_field_names_the_line_and_those_present(tmp_path: Path) -> None:
    items: list[dict] = [{"id": n, "document": f"d {n}", "summary": "s"} for n in range(500)]
    items[411] = {"id": 411, "document": "d", "sumary": "s", "note": "n"}
    path = jsonl(tmp_path / "train.jsonl", items)
    with pytest.raises(DataError) as caught:
        read_splits(path, None, None, SHARES, FIELDS)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        f"{path}:412 field `summary`: absent; the row has: id, document, sumary, note; did you mean `sumary`?"
    )


def test_absent_fields_inside_others() -> None:
    row = {"translation": {"de": "ja", "en": "yes"}, "answers": {"text": []}, "text": "t"}
    where = "x.jsonl:1 field"
    assert wrong_text(row, "translation.fr") == (
        f"{where} `translation.fr`: absent; `translation` has: de, en; did you mean `translation.en`?"
    )
    assert wrong_text(row, "answers.text.0") == f"{where} `answers.text.0`: absent; `answers.text` is a list of 0"
    assert wrong_text(row, "text.0") == f"{where} `text.0`: absent; `text` is a string"
    assert "did you mean `translation.de`?" in wrong_text(row, "de")
    assert wrong_text({str(n): "" for n in range(30)}, "zz").endswith("ok, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …")


def test_values_that_are_no_texts() -> None:
    assert source_of({"n": 7}, "n") == "7"
    assert source_of({"n": 0.5}, "n") == "0.5"
    assert wrong_text({"v": None}, "v") == "x.jsonl:1 field `v`: null, not a text"
    assert wrong_text({"v": ["a"]}, "v") == "x.jsonl:1 field `v`: a list, not a text; a dot reaches inside, as in `v.0`"
    assert wrong_text({"v": {"k": 1}}, "v").endswith("an object, not a text; a dot reaches inside, as in `v.k`")
    assert wrong_text({"v": b"x"}, "v").endswith("bytes, not a text")
    assert wrong_text({"v": float("nan")}, "v").endswith("not a number (NaN), not a text")
    assert wrong_text({"v": None}, "v", labels=True).endswith("null, not a string, a number or a boolean")
    assert wrong_text({"v": "ab\ud800"}, "v").endswith("character 2 is half of a surrogate pair (\\ud800)")


@pytest.mark.parametrize(
    ("value", "label"),
    [("yes", "yes"), (" kept ", " kept "), (3, "3"), (0, "0"), (True, "true"), (False, "false")],
)
def test_labels_are_kept_as_they_are(value: object, label: str) -> None:
    text = one_text({"t": "x", "l": value}, "t", "l", labels=True)
    assert text is not None
    assert text.target == label


def test_blank_sources_and_targets_are_counted() -> None:
    pairs = [("a", "b"), ("", "b"), (" \n\t", ""), ("a", " "), ("a", ""), (" a ", " b ")]
    dropped: Dropped = Counter()
    table = [Row(f"x:{n}", {"s": source, "t": target}) for n, (source, target) in enumerate(pairs)]
    assert list(texts(table, Fields("s", None, "t"), dropped)) == [
        Text("x:0", "a", "b"),
        Text("x:5", " a ", " b "),
    ]
    assert dropped == {"empty source": 2, "empty target": 2}
    assert next(texts(table, Fields("s", None, None), Counter())) == Text("x:0", "a", "")


def prompted(prompt: str, fields: dict) -> list[Text]:
    return list(texts([Row("x:1", fields)], Fields(None, prompt, None), Counter()))


def test_prompts() -> None:
    row = {"document": "Text {here}", "t": {"de": "ja"}, "year": 1999}
    assert prompted("Summarize: {document}", row)[0].source == "Summarize: Text {here}"
    assert prompted("{{x}} {t.de} {year}!\n", row)[0].source == "{x} ja 1999!\n"
    assert prompted("{ document }{document}", row)[0].source == "Text {here}Text {here}"
    assert prompted("Summarize: {document}", {"document": " \n"}) == []
    assert prompted("{a}{b}", {"a": "", "b": "x"})[0].source == "x"
    with pytest.raises(DataError, match=r"field `documnt`: absent; .* did you mean `document`"):
        prompted("Summarize: {documnt}", row)
    for prompt in ("{document", "document}", "{}", "{ }", "no field", "", "{a{b}}", "{{document}}"):
        with pytest.raises(ConfigError, match=r"task\.prompt"):
            prompted(prompt, row)


def test_prompts_run_nothing() -> None:
    for name in ("document.__class__", "document[0]", "document!r", "document:>1000000000", "0"):
        with pytest.raises(DataError, match="absent"):
            prompted("{document} {" + name + "}", {"document": "x"})


# --------------------------------------------------------------------------------------------- splits


def places(splits: Splits) -> dict[str, str]:
    """The split in which each source stands."""
    where: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        for text in getattr(splits, name):
            assert where.setdefault(text.source, name) == name, f"{text.source} stands in two splits"
    return where


def test_adding_removing_and_reordering_rows_moves_no_example(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    items = examples(2000, generator)
    items += [{**item, "summary": "another target"} for item in items[:50]]  # one document, two summaries
    path = tmp_path / "x.jsonl"
    before = places(read_splits(jsonl(path, items), None, None, SHARES, FIELDS))
    more = [*items[100:], *examples(500, generator)]
    generator.shuffle(more)
    after = places(read_splits(jsonl(path, more), None, None, SHARES, FIELDS))
    shared = before.keys() & after.keys()
    assert len(shared) == 1950
    assert {source: before[source] for source in shared} == {source: after[source] for source in shared}
    counts = Counter(before.values())
    assert abs(counts["train"] - 1600) < 100
    assert abs(counts["validation"] - 200) < 70


def test_splits_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", examples(200, random.Random(0)))
    splits = read_splits(path, None, None, SHARES, FIELDS)
    for part in (splits.train, splits.validation, splits.test):
        numbers = [int(text.place.rpartition(":")[2]) for text in part]
        assert numbers == sorted(numbers)
    assert splits.dropped == {}


def test_shares_of_zero_stay_empty(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", examples(300, random.Random(0)))
    splits = read_splits(path, None, None, [1.0, 0.0, 0.0], FIELDS)
    assert (len(splits.train), splits.validation, splits.test) == (300, [], [])
    splits = read_splits(path, None, None, [0.5, 0.0, 0.5], FIELDS)
    assert splits.validation == []
    assert len(splits.test) > 100


def test_given_splits_are_used_as_they_are(tmp_path: Path) -> None:
    items = examples(20, random.Random(0))
    train = jsonl(tmp_path / "train.jsonl", [*items[:10], items[0]])  # a row twice, as a weight: kept
    other = jsonl(tmp_path / "other.jsonl", items[8:])
    splits = read_splits(train, other, None, SHARES, FIELDS)
    assert [text.source for text in splits.train] == [item["document"] for item in [*items[:10], items[0]]]
    assert len(splits.validation) == 12
    assert splits.test == []
    assert splits.dropped == {"validation examples also in train": 2}
    splits = read_splits(train, None, other, SHARES, FIELDS)
    assert (len(splits.train), splits.validation, len(splits.test)) == (11, [], 12)
    assert splits.dropped == {"test examples also in train": 2}


def test_a_saved_dict_gives_each_split_its_own(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_dict({"document": [name], "summary": ["s"]}) for name in ("train", "test")}
    datasets.DatasetDict(**parts).save_to_disk(str(tmp_path / "d"))
    folder = str(tmp_path / "d")
    splits = read_splits(folder, f"{folder}:train", folder, SHARES, FIELDS)
    assert [text.source for text in splits.train + splits.validation + splits.test] == [
        "train",
        "train",
        "test",
    ]


def test_no_training_example_left_says_why(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"document": "d", "summary": " "}] * 7 + [{"document": "", "summary": "s"}] * 2)
    with pytest.raises(DataError) as caught:
        read_splits(path, None, None, SHARES, FIELDS)
    assert str(caught.value) == (
        f"{path}: no training example is left of 9 rows read (empty source: 2, empty target: 7)"
    )
    path = jsonl(tmp_path / "x.jsonl", [{"document": "d", "summary": "s"}])
    with pytest.raises(DataError, match=r"in validation or test by data\.splits: 1"):
        read_splits(path, None, None, [0.0, 0.5, 0.5], FIELDS)


def test_labels_that_train_has_not(tmp_path: Path) -> None:
    fields = Fields("t", None, "l", labels_of=one_label)
    train = jsonl(tmp_path / "train.jsonl", [{"t": f"t{n}", "l": n % 2 == 0} for n in range(10)])
    other = jsonl(tmp_path / "other.jsonl", [{"t": "x", "l": True}, {"t": "y", "l": "maybe"}])
    for validation, test in ((other, None), (None, other)):
        with pytest.raises(DataError) as caught:
            read_splits(train, validation, test, SHARES, fields)
        assert str(caught.value) == (
            f"{other}:2 field `l`: the label 'maybe' is not in the training data; known are: false, true"
        )
    assert read_splits(train, other, None, SHARES, Fields("t", None, "l")).validation[1].target == "maybe"
    ids = [{"t": f"t{n}", "l": n} for n in range(100)]
    with pytest.raises(DataError, match=r"training examples have \d+ different labels, and none of the \d+ valid"):
        read_splits(jsonl(tmp_path / "ids.jsonl", ids), None, None, SHARES, fields)
    # Where a hash divides the data, rare classes outside train are no fault of the user's.
    items = [{"t": f"t{n}", "l": "often"} for n in range(200)] + [{"t": f"u{n}", "l": f"rare {n}"} for n in range(100)]
    splits = read_splits(jsonl(tmp_path / "all.jsonl", items), None, None, SHARES, fields)
    known = {text.target for text in splits.train}
    assert {text.target for text in splits.validation + splits.test} <= known
    assert splits.dropped["label not in train"] == 300 - sum(map(len, (splits.train, splits.validation, splits.test)))


def test_duplicates_are_dropped_from_the_corpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [docs.Pair("m", f"f{n}", f"document {n // 2}", "summary") for n in range(100)]
    monkeypatch.setattr("shardtune.data.sources.python_docs", lambda: pairs)
    splits = read_splits("docs:python", None, None, SHARES, FIELDS)
    assert splits.dropped == {"duplicate": 50}
    assert {int(text.place.rpartition("f")[2]) % 2 for text in splits.train} == {0}  # the first of each
    path = jsonl(tmp_path / "x.jsonl", [pair.fields() for pair in pairs])
    assert read_splits(path, None, None, SHARES, FIELDS).dropped == {}


def test_fingerprints_tell_data_apart_and_not_places(tmp_path: Path) -> None:
    items = examples(50, random.Random(0))

    def of(name: str, items: list[dict], shares: list[float] = SHARES) -> str:
        path = jsonl(tmp_path / name, items)
        return read_splits(path, None, None, shares, FIELDS).fingerprint

    first = of("a.jsonl", items)
    assert first == of("b.jsonl", items)
    assert len(first) == 64
    moved = {"document": items[0]["document"] + "s", "summary": items[0]["summary"][1:]}
    different = [of("c.jsonl", items[::-1]), of("d.jsonl", items[1:]), of("e.jsonl", items, [0.5, 0.5, 0.0])]
    assert len({first, *different, of("f.jsonl", [moved, *items[1:]])}) == 5


def test_wrong_data_is_refused_without_importing_torch(tmp_path: Path) -> None:
    bad = jsonl(tmp_path / "x.jsonl", [{"document": "d"}])
    code = """
import sys
from shardtune.row_fields import Fields
from shardtune.data.splits import read_splits
from shardtune.data.tables import open_table
from shardtune.errors import DataError
for spec in sys.argv[1:]:
    try:
        read_splits(spec, None, None, [1.0, 0.0, 0.0], Fields("document", None, "summary"))
    except DataError as error:
        print(error)
print(sorted({"torch", "transformers", "datasets", "pyarrow"} & set(sys.modules)))
"""
    printed = python(code, bad, tmp_path / "missing.csv").splitlines()
    assert printed[-1] == "[]"
    assert [":1 field `summary`" in printed[0], "no such file" in printed[1]] == [True, True]


# --------------------------------------------------------------------------------------------- tables


def random_examples(generator: random.Random, count: int) -> list[Encoded]:
    def ids() -> list[int]:
        return [generator.randrange(-(2**31), 2**31) for _ in range(generator.choice([0, 1, 3, 50]))]

    return [Encoded(ids(), ids(), generator.random() < 0.3, generator.random() < 0.3) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_tables_give_back_what_was_written(tmp_path: Path, count: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    encoded = random_examples(random.Random(seed), count)
    folder = tmp_path / "deep" / "table"
    assert open_table(folder) is None
    write_table(folder, iter(encoded))
    table = open_table(folder)
    assert isinstance(table, TokenTable)
    assert len(table) == count
    assert [(list(t.source), list(t.target)) for t in table] == [(e.source, e.target) for e in encoded]
    assert table.lengths.dtype == np.int64
    assert table.lengths.shape == (count, 2)
    assert table.lengths.tolist() == [[len(e.source), len(e.target)] for e in encoded]
    assert table.source_cut == sum(e.source_cut for e in encoded)
    assert table.target_cut == sum(e.target_cut for e in encoded)
    assert [path.name for path in folder.parent.iterdir()] == ["table"]
    if count:
        assert table[0].source.dtype == table[0].target.dtype == np.int32
    if count > 1:
        with pytest.raises(ValueError, match="read-only"):
            table[int(table.lengths[:, 0].argmax())].source[0] = 0
    for position in (-1, count):
        with pytest.raises(IndexError):
            table[position]


def test_empty_columns_are_kept(tmp_path: Path) -> None:
    write_table(tmp_path / "t", [Encoded([1, 2], [], False, False)] * 3)
    table = open_table(tmp_path / "t")
    assert table is not None
    assert table.lengths.tolist() == [[2, 0]] * 3
    assert len(table[2].target) == 0


def test_damaged_tables_count_as_absent_and_are_replaced(tmp_path: Path) -> None:
    encoded = random_examples(random.Random(1), 40)
    folder = tmp_path / "t"
    for name in [
        "source_tokens.npy",
        "source_offsets.npy",
        "target_tokens.npy",
        "target_offsets.npy",
        "meta.json",
    ]:
        for damage in ("gone", "cut", "empty", "other"):
            write_table(folder, encoded)
            assert open_table(folder) is not None
            path = folder / name
            if damage == "gone":
                path.unlink()
            elif damage == "other":
                path.write_text("[1, 2]")
            else:
                path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"")
            assert open_table(folder) is None, (name, damage)
    np.save(folder / "source_tokens.npy", np.array([{"a": "pickle"}], dtype=object), allow_pickle=True)
    assert open_table(folder) is None
    write_table(folder, encoded)
    assert open_table(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"version": 1', '"version": 0'))
    assert open_table(folder) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Iterator[Encoded]:
        yield Encoded([1], [2], False, False)
        raise error

    with pytest.raises(DataError, match="bad"):
        write_table(tmp_path / "t", failing(DataError("bad")))
    with pytest.raises(StorageError, match="No space left"):
        write_table(tmp_path / "t", failing(OSError(28, "No space left on device")))
    assert list(tmp_path.iterdir()) == []
    file = Path(write(tmp_path / "file", "x"))
    with pytest.raises(StorageError):
        write_table(file / "t", [])
    with pytest.raises(StorageError):
        write_table(file, [])


def test_writers_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    encoded = random_examples(random.Random(2), 50)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for round_ in range(10):
                write_table(tmp_path / f"t{round_}", encoded)
                assert open_table(tmp_path / f"t{round_}") is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"t{n}" for n in range(10))


def test_of_two_that_make_a_folder_at_once_the_first_stays_and_a_damaged_one_goes(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "made"
    for damaged in (False, True):
        if damaged:
            (folder / "whole").unlink()
        with published(folder, "a test", (folder / "whole").exists) as slow:
            (slow / "whole").write_text("slow")
            with published(folder, "a test", (folder / "whole").exists) as fast:
                (fast / "whole").write_text("fast")
            assert (folder / "whole").read_text() == "fast"
            inode = folder.stat().st_ino
        assert folder.stat().st_ino == inode
        assert (folder / "whole").read_text() == "fast"
        assert [path.name for path in folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("damaged", ["facts.json", "validation.jsonl", "test.jsonl"])
def test_remembered_texts_that_are_damaged_are_read_again_once(tmp_path: Path, damaged: str) -> None:
    path, read = jsonl(tmp_path / "a.jsonl", [{"document": f"d {n}", "summary": "s"} for n in range(40)]), []

    def counted() -> Splits:
        read.append(path)
        return read_splits(path, None, None, SHARES, FIELDS)

    def judged() -> dict[str, list[Text]]:
        return load_corpus(lambda: "key", counted, None, judged=3).judged

    first = judged()
    assert judged() == first
    assert len(read) == 1
    (tmp_path / "cache" / "texts" / "key" / damaged).write_text("{")
    assert judged() == judged() == first
    assert len(read) == 2


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SHARDTUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.cache_folder() == tmp_path / ".cache" / "shardtune"


def test_fingerprints_of_settings() -> None:
    assert fingerprint({"a": 1, "b": [2, "ä"]}, None) == fingerprint({"b": (2, "ä"), "a": 1}, None)
    assert len({fingerprint(1), fingerprint("1"), fingerprint(1, None), fingerprint([1]), fingerprint()}) == 5
    with pytest.raises(TypeError):
        fingerprint(object())
