"""Reading csv files: harmless variants are accepted, faults are named by file and line."""

import csv
import hashlib
import io
import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import refused

from engine.csv_reader import read_rows
from engine.errors import UserError

HEADER = ["", "id", "text", "label"]
ROWS = [["0", "a", 'He said "no" , twice', "1"], ["1", "b", "café 中文", ""], ["2", "c", "", "3"]]
COLUMNS = ["id", "text", "label"]
DELIMITERS = {"\t": "tab", ",": "comma"}
both_delimiters = pytest.mark.parametrize("delimiter", DELIMITERS, ids=DELIMITERS.values())


def table(delimiter, header=HEADER, rows=ROWS, end="\n", **options) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end, **options).writerows([header, *rows])
    return out.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    return [row for _, row in read_rows(path, COLUMNS, delimiter)[0]]


HARMLESS = {
    "CRLF": lambda d: table(d, end="\r\n"),
    "CR": lambda d: table(d, end="\r"),
    "byte-order mark": lambda d: "\ufeff" + table(d, COLUMNS, [row[1:] for row in ROWS]),
    "column order": lambda d: table(d, HEADER[::-1], [row[::-1] for row in ROWS]),
    "more columns": lambda d: table(d, ["x", *HEADER, "x"], [["", *row, "y"] for row in ROWS]),
    "all fields quoted": lambda d: table(d, quoting=csv.QUOTE_ALL),
    "blank lines": lambda d: "\n" + table(d).replace("\n", "\n\n"),
    "no line end at the end": lambda d: table(d).removesuffix("\n"),
}


@both_delimiters
@pytest.mark.parametrize("variant", HARMLESS.values(), ids=HARMLESS)
def test_harmless_variants_give_the_same_rows(tmp_path, delimiter, variant):
    expected = [dict(zip(COLUMNS, row[1:], strict=True)) for row in ROWS]
    assert read(write(tmp_path / "f.csv", variant(delimiter)), delimiter) == expected


def test_line_numbers_checksum_and_optional_columns(tmp_path):
    """A row is named by the line where it starts; optional columns are there if the file's are."""
    rows = [["0", "a", "one\ntwo\nthree", "1"], ["1", "b", "x", "2"]]
    path = write(tmp_path / "f.csv", table("\t", rows=rows) + "\n2\tc\ty\t3\n")
    expected = [(2, "a", "1"), (5, "b", "2"), (7, "c", "3")]
    expected = [(line, {"id": name, "label": label}) for line, name, label in expected]
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_rows(path, ["id"], "\t", ["label", "weight"]) == (expected, checksum)


word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t"), max_size=12)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(word, word, word), min_size=1, max_size=8))
def test_every_good_file_reads_as_by_the_standard_library(tmp_path, rows):
    """Quotes, line ends inside quotes, any letters."""
    text = table("\t", COLUMNS, rows, end="\r\n")
    expected = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    assert read(write(tmp_path / "f.csv", text)) == expected


def changed(old: str, new: str, delimiter: str) -> str:
    """The table with a piece of its second row, line 3, replaced ({}: the delimiter)."""
    old, new = (text.replace("{}", delimiter) for text in (old, new))
    assert table(delimiter).count(old) == 1
    return table(delimiter).replace(old, new)


# Fault -> what makes it, what the message says beside the file ({}: tab or comma).
FAULTS = {
    "other delimiter": (lambda d: table({"\t": ",", ",": "\t"}[d]), "{}s separate the columns"),
    "column twice": (lambda d: table(d, ["text", *HEADER[1:]]), "line 1: 2 columns 'text'"),
    "no header": (lambda d: table(d).split("\n", 1)[1], "line 1: no column 'id'"),
    "zero bytes": (lambda d: "", "empty"),
    "a header alone": (lambda d: table(d, rows=[]), "no rows"),
    "Latin-1": (lambda d: table(d).replace("中文", "").encode("latin-1"), "line 3: not UTF-8"),
    "open quote": (partial(changed, "b{}", 'b{}"'), "line 3: unexpected end"),
    "text after a quote": (partial(changed, "b{}", '"b" c{}'), "line 3: "),
    "short row": (partial(changed, "b{}", "b "), "line 3: not the 4 columns"),
    "long row": (partial(changed, "b{}", "b{}{}"), "line 3: not the 4 columns"),
    "huge field": (partial(changed, "café", f'"{chr(10) * 2_000_000}"'), "line 3: field larger"),
}


@both_delimiters
@pytest.mark.parametrize(("make", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_with_file_and_line(tmp_path, delimiter, make, expected):
    path = write(tmp_path / "broken.csv", make(delimiter))
    refused(lambda: read(path, delimiter), path, expected.format(DELIMITERS[delimiter]))


@both_delimiters
def test_a_quoted_field_may_contain_commas_and_line_breaks_but_no_whole_rows(tmp_path, delimiter):
    """A quote that is never closed swallows rows, and may leave the right number of columns."""
    path = write(tmp_path / "f.csv", 'id,text,label\na,"x,\nb,y",3\n'.replace(",", delimiter))
    if delimiter == ",":
        assert read(path, delimiter) == [{"id": "a", "text": "x,\nb,y", "label": "3"}]
    else:
        refused(lambda: read(path), f"{path}, line 2: a quoted field contains whole lines")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    missing, below = tmp_path / "missing.csv", write(tmp_path / "file", "x") / "below.csv"
    for path in (missing, below, tmp_path / "loop.csv"):
        refused(lambda path=path: read(path), f"{path}: no such file: fetch", "setup.sh")
    refused(lambda: read(tmp_path), f"{tmp_path}: cannot be read (Is a directory)")


PIECES = [b"id", b"text", b"label", b"\t", b"\t", b",", b"\n", b"\r", b'"', b"\0", b"a", b"1"]
PIECES += [b"\xff", b"\xef\xbb\xbf", "\u2028".encode(), b" ", b"id\ttext\tlabel\n"]
pieces = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)
damaged = st.tuples(st.integers(0, 60), st.integers(0, 20), st.binary(max_size=4) | pieces).map(
    lambda edit: table("\t").encode()[: edit[0]] + edit[2] + table("\t").encode()[sum(edit[:2]) :]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | pieces | damaged)
def test_any_bytes_are_rows_or_one_line(tmp_path, content):
    path = write(tmp_path / "any.csv", content)
    try:
        rows = read(path)
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
    else:
        assert all(list(row) == COLUMNS and None not in row.values() for row in rows)


DATA = os.environ.get("MINBERT_DATA")
FILES = sorted(Path(DATA).glob("*.csv")) if DATA else []


@pytest.mark.skipif(not FILES, reason="MINBERT_DATA names no folder with csv files")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_courses_files_read_as_by_the_standard_library(path):
    delimiter = "," if path.name.startswith("nli") else "\t"
    with open(path, encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file, delimiter=delimiter))
    rows, _ = read_rows(path, [name for name in expected[0] if name], delimiter)
    for (_, row), other in zip(rows, expected, strict=True):
        assert row.items() <= other.items()
