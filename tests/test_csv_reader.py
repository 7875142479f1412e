"""Reading csv files: harmless variants are accepted, faults are named by file and line."""

import csv
import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import classifier
import multitask_classifier
import simcse
from engine.csv_reader import read_rows
from engine.errors import UserError

HEADER = ["", "id", "text", "label"]
ROWS = [["0", "a", 'He said "no" , twice', "1"], ["1", "b", "café 中文", ""], ["2", "c", "", "3"]]
COLUMNS = ["id", "text", "label"]
DELIMITERS = {"\t": "tab", ",": "comma"}
both_delimiters = pytest.mark.parametrize("delimiter", DELIMITERS, ids=DELIMITERS.values())


def table(delimiter, *, header=HEADER, rows=ROWS, end="\n", **options) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, **options)
    writer.writerows([header, *rows])
    return out.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, delimiter: str = "\t") -> list[tuple[int, dict[str, str]]]:
    return read_rows(path, COLUMNS, delimiter)[0]


def refused(path: Path, delimiter: str, *parts: str) -> None:
    """Reading raises a UserError of one line that names the file and contains every part."""
    with pytest.raises(UserError) as caught:
        read(path, delimiter)
    message = str(caught.value)
    assert message.isprintable()
    for part in (str(path), *parts):
        assert part in message


# ---------------------------------------------------------------------------- what is accepted

HARMLESS = {
    "byte-order mark": lambda d: (
        "\ufeff" + table(d, header=HEADER[1:], rows=[row[1:] for row in ROWS])
    ),
    "CRLF": lambda d: table(d, end="\r\n"),
    "CR": lambda d: table(d, end="\r"),
    "column order": lambda d: table(d, header=HEADER[::-1], rows=[row[::-1] for row in ROWS]),
    "more columns": lambda d: table(
        d, header=["note", "", *HEADER, "note"], rows=[["x", "", *row, "y"] for row in ROWS]
    ),
    "all fields quoted": lambda d: table(d, quoting=csv.QUOTE_ALL),
    "blank lines": lambda d: "\n" + table(d).replace("\n", "\n\n"),
    "no line end at the end": lambda d: table(d).removesuffix("\n"),
}


@both_delimiters
@pytest.mark.parametrize("variant", HARMLESS.values(), ids=HARMLESS)
def test_harmless_variants_give_the_same_rows(tmp_path, delimiter, variant):
    path = write(tmp_path / "f.csv", variant(delimiter))
    rows = [row for _, row in read(path, delimiter)]
    assert rows == [dict(zip(COLUMNS, row[1:], strict=True)) for row in ROWS]


def test_line_numbers_checksum_and_optional_columns(tmp_path):
    """A row is named by the line where it starts; optional columns are there if the file's are."""
    rows = [["0", "a", "one\ntwo\nthree", "1"], ["1", "b", "x", "2"]]
    path = write(tmp_path / "f.csv", table("\t", rows=rows) + "\n2\tc\ty\t3\n")
    found, checksum = read_rows(path, ["id"], "\t", ["label", "weight"])
    assert found == [
        (2, {"id": "a", "label": "1"}),
        (5, {"id": "b", "label": "2"}),
        (7, {"id": "c", "label": "3"}),
    ]
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()


word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t"), max_size=12)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(word, word, word), min_size=1, max_size=8))
def test_every_good_file_reads_as_by_the_standard_library(tmp_path, rows):
    """Quotes, line ends inside quotes, any letters."""
    path = tmp_path / "f.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([COLUMNS, *rows])
    with open(path, encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file, delimiter="\t"))
    assert [row for _, row in read(path)] == expected


# ---------------------------------------------------------------------------- what is refused


def in_row(number: int, old: str, new: str, delimiter: str) -> str:
    """The table with a piece of its row `number` (0: the header) changed."""
    lines = table(delimiter).split("\n")
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new, 1)
    return "\n".join(lines)


# Fault -> what makes it, what the message says beside the file.
FAULTS = {
    "other delimiter": (lambda d: table({"\t": ",", ",": "\t"}[d]), "line 1: no column 'id'"),
    "capitals": (lambda d: in_row(0, "text", "TEXT", d), "line 1: no column 'text'; found "),
    "column twice": (lambda d: table(d, header=["text", *HEADER[1:]]), "line 1: 2 columns 'text'"),
    "no header": (lambda d: table(d).split("\n", 1)[1], "line 1: no column 'id'"),
    "zero bytes": (lambda d: "", "empty"),
    "Latin-1": (lambda d: table(d).replace("中文", "").encode("latin-1"), "line 3: not UTF-8"),
    "UTF-16": (lambda d: table(d).encode("utf-16"), "line 1: not UTF-8"),
    "quote that contains rows": (
        lambda d: in_row(2, "café", '"café', d).replace(f"{d}{d}3", f'"{d}{d}3'),
        "line 3: a quoted field contains whole lines up to line 4",
    ),
    "quote that is never closed": (
        lambda d: in_row(2, f"b{d}", f'b{d}"', d),
        "line 3: unexpected end",
    ),
    "text after a quote": (lambda d: in_row(1, f"a{d}", f'"a" b{d}', d), "line 2: "),
    "short row": (lambda d: in_row(2, f"b{d}", "b ", d), "line 3: not the 4 columns"),
    "long row": (lambda d: in_row(2, d, 2 * d, d), "line 3: not the 4 columns"),
    "field of 10 MB": (lambda d: in_row(2, "café", "film " * 2_000_000, d), "line 3: field larger"),
    "field of 10 MB in many lines": (
        lambda d: in_row(2, "café 中文", f'"{chr(10) * 2_000_000}"', d),
        "line 3: field larger",
    ),
    "an archive": (lambda d: b"PK\x03\x04\x00\x00\xff" + bytes(200), "line 1: not UTF-8"),
}


@both_delimiters
@pytest.mark.parametrize(("make", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_with_file_and_line(tmp_path, delimiter, make, expected):
    path = write(tmp_path / "broken.csv", make(delimiter))
    refused(path, delimiter, expected)


def test_messages_name_the_delimiter_that_is_missing(tmp_path):
    for delimiter, word in DELIMITERS.items():
        refused(write(tmp_path / "f.csv", "id;text;label\n"), delimiter, f"by {word}s")


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    """Opening a pipe would wait forever."""
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to("pipe.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    below = write(tmp_path / "file", "x") / "below.csv"
    special = "a folder, pipe or device"
    for path in (tmp_path, tmp_path / "pipe.csv", tmp_path / "link.csv", Path("/dev/zero")):
        refused(path, "\t", special)
    refused(tmp_path / "missing.csv", "\t", "no such file: fetch", "setup.sh")
    for path in (tmp_path / "loop.csv", below):
        refused(path, "\t")


@contextmanager
def without_root(folder: Path):
    """Run as nobody, since root may read everything, in `folder`."""
    before = Path.cwd()
    folder.chmod(0o755)
    os.chdir(folder)  # its parents are closed to nobody
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chdir(before)


def test_a_file_without_permission_is_refused(tmp_path):
    for name, mode in (("closed.csv", 0), ("open.csv", 0o644)):
        write(tmp_path / name, table("\t")).chmod(mode)
    with without_root(tmp_path):
        assert len(read(Path("open.csv"))) == 3
        refused(Path("closed.csv"), "\t", "cannot be read (Permission denied)")


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
        assert all(list(row) == COLUMNS and None not in row.values() for _, row in rows)


@pytest.mark.parametrize(
    ("module", "file"),
    [(classifier, "ids-sst-train.csv"), (multitask_classifier, "sts-dev.csv"), (simcse, "nli.csv")],
)
def test_scripts_report_one_line_and_leave_nothing(tiny, data, tmp_path, run_script, module, file):
    for path in [*data.iterdir(), write(tmp_path / "nli.csv", "sent0,sent1\na,b\n")]:
        write(tmp_path / path.name, path.read_bytes())
    write(tmp_path / file, (tmp_path / file).read_bytes().replace(b"sent", b'x"\xff', 1))
    flags = ["--model", tiny, "--data_dir", tmp_path, "--run_dir", tmp_path / "run"]
    flags += ["--nli", tmp_path / "nli.csv"] * (module is simcse)
    code, _, err = run_script(module, *flags)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert err.startswith(f"{module.__name__}.py: error: {tmp_path / file}, line 1: not UTF-8")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- real data

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
