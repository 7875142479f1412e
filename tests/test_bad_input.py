"""Bad input: broken csv files, damaged and hostile model folders. Each is one line, or harmless."""

import csv
import io
import json
import math
import os
import pickle
import pickletools
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import hub, local_hub, names, saved_files  # noqa: F401
from tokenizers import AddedToken
from transformers import BertTokenizerFast

import classifier
import multitask_classifier
import simcse
from bert import BertConfig, BertModel
from checkpoint import (
    LARGEST_TEXT,
    TOKENIZER_FILES,
    UserError,
    read_json,
    read_tensors,
    write_json,
)
from datasets import NLI_COLUMNS, read, read_triples
from tasks import TASKS, MultitaskBERT
from tokenizer import LARGEST_ADDED, LARGEST_VOCABULARY, BertTokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def no_sync():
    """Waiting for the disk, a thousand times over, would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@contextmanager
def within(seconds: int):
    """Fails a block that takes longer: what waits for a pipe would wait for ever."""

    def stop(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def within_memory(mebibytes: int):
    """Lets a block reserve only so much more memory than the process has."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(load, *expected) -> str:
    """`load()` is a UserError of one line that holds what is expected; the message."""
    with within(20), pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1100
    for part in expected:
        assert str(part) in message
    return message


# ------------------------------------------------------------------ csv files: the corpus

# Each format of the course and SimCSE: delimiter, header, a few good rows.
PAIRS = [["A b .", 'He said "no" , twice'], ["caf\u00e9 \u4e2d\u6587", ""], ["x", "y"]]
FORMATS = {
    "sst": ("\t", ["", "id", "sentence", "sentiment"], [["a", "3"], ['"b" c', "0"], ["d", "4"]]),
    "cfimdb": ("\t", ["", "id", "sentence", "sentiment"], [["a", "1"], ['"b"', "0"], ["d", "1"]]),
    "para": (
        "\t",
        ["", "id", "sentence1", "sentence2", "is_duplicate"],
        [[*pair, label] for pair, label in zip(PAIRS, ["1.0", "0.0", "1.0"], strict=True)],
    ),
    "sts": (
        "\t",
        ["", "id", "sentence1", "sentence2", "similarity"],
        [[*pair, label] for pair, label in zip(PAIRS, ["2.6", "0.0", "5.0"], strict=True)],
    ),
    "nli": (",", list(NLI_COLUMNS), [["a, b", 'say "b"', "c"], ["d", "e", "f"], ["g", "h", "i"]]),
}


class Table:
    """A file of one format as rows of fields, for faults to be put in. Row 0 is the header."""

    def __init__(self, name: str):
        self.name = name
        self.delimiter, header, rows = FORMATS[name]
        if name != "nli":
            rows = [[str(i), f"id{i}", *row] for i, row in enumerate(rows)]
        self.rows = [list(row) for row in [header, *rows]]

    def place(self, column: str) -> int:
        """Where a column is; "text" is the first of sentences, "label" the label."""
        if column == "text":
            return 0 if self.name == "nli" else 2
        return -1 if column == "label" else self.rows[0].index(column)

    def put(self, row: int, column: str, value: str) -> "Table":
        """Change a field."""
        self.rows[row][self.place(column)] = value
        return self

    def text(self, end: str = "\n", **options) -> str:
        """As csv."""
        out = io.StringIO()
        csv.writer(out, delimiter=self.delimiter, lineterminator=end, **options).writerows(
            self.rows
        )
        return out.getvalue()

    def marked(self, **pieces: str) -> str:
        """As csv, but with other text in the place of some fields, whatever csv says of it."""
        text = self.text()
        for mark, piece in pieces.items():
            assert text.count(mark) == 1
            text = text.replace(mark, piece)
        return text

    def raw(self, row: int, old: str, new: str) -> str:
        """As csv, but with a piece of one line changed."""
        lines = self.text().split("\n")
        lines[row] = lines[row].replace(old, new, 1)
        return "\n".join(lines)


def load(name: str, path: Path, labelled: bool = True) -> list:
    """The rows of a file, by the reader of its format."""
    if name == "nli":
        return read_triples(path)
    return read(path, TASKS[name], labelled)[0]


def written(path: Path, content: str | bytes) -> Path:
    """A file of this content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def reordered(table: Table) -> str:
    table.rows = [row[::-1] for row in table.rows]
    return table.text()


def widened(table: Table) -> str:
    table.rows = [["note", "", *row, "note"] for row in table.rows]
    return table.text()


HARMLESS = {
    "byte-order mark": lambda t: b"\xef\xbb\xbf" + t.text().encode(),
    "CRLF": lambda t: t.text("\r\n"),
    "CR": lambda t: t.text("\r"),
    "byte-order mark and CRLF": lambda t: b"\xef\xbb\xbf" + t.text("\r\n").encode(),
    "column order": reordered,
    "extra columns": widened,
    "all quoted": lambda t: t.text(quoting=csv.QUOTE_ALL),
    "blank lines": lambda t: "\n" + t.text().replace("\n", "\n\n"),
    "no end of the last line": lambda t: t.text().removesuffix("\n"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", HARMLESS)
def test_harmless_variants_give_the_rows_of_the_plain_file(tmp_path, name, variant):
    plain = written(tmp_path / "plain.csv", Table(name).text())
    other = written(tmp_path / "other.csv", HARMLESS[variant](Table(name)))
    assert plain.read_bytes() != other.read_bytes()
    rows = load(name, plain)
    assert len(rows) == 3
    assert load(name, other) == rows


def other_delimiter(table: Table) -> str:
    table.delimiter = "," if table.delimiter == "\t" else "\t"
    return table.text()


def without(column: str, table: Table) -> str:
    place = table.place(column) % len(table.rows[0])
    table.rows = [row[:place] + row[place + 1 :] for row in table.rows]
    return table.text()


def in_capitals(table: Table) -> str:
    table.rows[0] = [column.upper() for column in table.rows[0]]
    return table.text()


def only(rows: int, table: Table) -> str:
    table.rows = table.rows[:rows]
    return table.text()


def doubled(column: str, table: Table) -> str:
    for row in table.rows:
        row.append(row[table.place(column)])
    return table.text()


# Fault -> what makes it, what the message says beside the file. {text} and {label} are columns.
FAULTS = {
    "wrong delimiter": (other_delimiter, "line 1: no {delimiter} in the header"),
    "semicolons": (
        lambda t: t.text().replace(t.delimiter, ";"),
        "line 1: no {delimiter} in the header",
    ),
    "header in capitals": (in_capitals, "line 1: no column '"),
    "missing column": (lambda t: without("text", t), "line 1: no column '{text}'; found '"),
    "column twice": (lambda t: doubled("text", t), "line 1: 2 columns '{text}'; found '"),
    "no header": (lambda t: t.text().split("\n", 1)[1], "line 1: no column '"),
    "header alone": (lambda t: only(1, t), "no rows; expected a header and at least one row"),
    "zero bytes": (lambda t: "", "empty; expected a header line and rows"),
    "blank lines alone": (lambda t: "\n\r\n\n", "empty; expected a header line and rows"),
    "Latin-1": (
        lambda t: t.put(2, "text", "caf\u00e9").text().encode("latin-1", "replace"),
        "line 3: not UTF-8 (byte 0xe9): save it as UTF-8 text",
    ),
    "UTF-16": (lambda t: t.text().encode("utf-16"), "line 1: not UTF-8 (byte 0xff): save it"),
    "UTF-16 without a mark": (lambda t: t.text().encode("utf-16-le"), "not UTF-8 (byte 0x00)"),
    "NUL": (
        lambda t: t.raw(3, t.delimiter, f"\0{t.delimiter}"),
        "line 4: not UTF-8 (byte 0x00): save it as UTF-8 text",
    ),
    "quote that swallows rows": (
        lambda t: t.put(2, "text", "OPEN").put(3, "text", "CLOSE").marked(OPEN='"x', CLOSE='x"'),
        "line 3: a quoted field swallows 2 lines; close its quote",
    ),
    "quote that is never closed": (
        lambda t: t.put(2, "text", "OPEN").marked(OPEN='"x'),
        "line 3: not csv (unexpected end of data); mend its quotes",
    ),
    "text after a quote": (
        lambda t: t.put(2, "text", "OPEN").marked(OPEN='"x" y'),
        "line 3: not csv (",
    ),
    "row too short": (
        lambda t: t.raw(2, t.delimiter, " "),
        "line 3: has not the {columns} columns of the header, but {fewer}; is a {delimiter} or a",
    ),
    "row too long": (
        lambda t: t.raw(2, t.delimiter, 2 * t.delimiter),
        "line 3: has not the {columns} columns of the header, but {more}; is a {delimiter} or a",
    ),
    "half a row at the end": (
        lambda t: t.text().rstrip("\n").rpartition(t.delimiter)[0],
        "line 4: has not the {columns} columns of the header, but {fewer}",
    ),
    "a line of 10 MB": (
        lambda t: t.put(2, "text", "film " * 2_000_000).text(),
        "line 3: longer than 1,000,000 characters; expected a csv file with a row a line",
    ),
    "a field of 10 MB over many lines": (
        lambda t: t.put(2, "text", "film\n" * 2_000_000).text(),
        "line 3: not csv (field larger than field limit (1000000)",
    ),
    "10 MB without a line end": (lambda t: "x" * 10_000_000, "line 1: longer than 1,000,000 char"),
    "a json file": (lambda t: json.dumps({"rows": t.rows}), "line 1: no"),
    "an archive": (lambda t: b"PK\x03\x04\x00\x00\xff" + bytes(200), "line 1: not UTF-8"),
}
LABEL = "line 3: {label} is '{value}'; expected a {kind} from 0 to {high}"
LABELS = {
    "too large": "6",
    "slightly too large": "5.0001",
    "negative": "-1",
    "text": "good",
    "nan": "nan",
    "beyond floating point": "1e400",
    "infinite": "-inf",
    "decimal comma": "2,5",
    "hexadecimal": "0x1",
}
FAULTS_OF_LABELLED = {
    **{
        f"label {what}": (lambda t, v=value: t.put(2, "label", v).text(), (LABEL, value))
        for what, value in LABELS.items()
    },
    "no label column": (lambda t: without("label", t), "line 1: no column '{label}'; found '"),
    "labels all empty": (
        lambda t: t.put(1, "label", " ").put(2, "label", "").put(3, "label", "").text(),
        "none of its 3 rows has a label",
    ),
    "id twice": (
        lambda t: t.put(3, "id", "id0").text(),
        "line 4: id 'id0' is line 2's; give each its own",
    ),
    "id empty": (lambda t: t.put(3, "id", "").text(), "line 4: id is ''; give the row a printable"),
    "id of two lines": (lambda t: t.put(2, "id", "a\nb").text(), "line 3: id is 'a\\nb'; give"),
    "no id column": (lambda t: without("id", t), "line 1: no column 'id'; found '"),
}
CROSSED = [(name, fault) for name in FORMATS for fault in FAULTS] + [
    (name, fault) for name in TASKS for fault in FAULTS_OF_LABELLED
]


@pytest.mark.parametrize(("name", "fault"), CROSSED)
def test_every_fault_of_every_format_is_named_with_file_and_row(tmp_path, name, fault):
    make, expected = {**FAULTS, **FAULTS_OF_LABELLED}[fault]
    table = Table(name)
    columns = len(table.rows[0])
    words = {
        "delimiter": {"\t": "tab", ",": "comma"}[table.delimiter],
        "text": table.rows[0][table.place("text")],
        "label": table.rows[0][-1],
        "columns": columns,
        "fewer": columns - 1,
        "more": columns + 1,
    }
    if isinstance(expected, tuple):
        expected, words["value"] = expected
        words["kind"] = "whole number" if TASKS[name].whole else "number"
        words["high"] = {"sst": 4, "cfimdb": 1, "para": 1, "sts": 5}[name]
    path = written(tmp_path / "broken.csv", make(table))
    with within_memory(400):
        refused(lambda: load(name, path), path, expected.format(**words))


def test_sentiment_and_paraphrase_are_whole_numbers(tmp_path):
    for name in ("sst", "cfimdb", "para"):
        path = written(tmp_path / f"{name}.csv", Table(name).put(2, "label", "0.5").text())
        refused(lambda n=name, p=path: load(n, p), path, "line 3", "'0.5'; expected a whole number")


@pytest.mark.parametrize("name", TASKS)
def test_a_row_with_an_empty_label_is_left_out_and_counted(tmp_path, name):
    path = written(tmp_path / "f.csv", Table(name).put(2, "label", "").text())
    examples, unlabelled = read(path, TASKS[name])
    assert [example.id for example in examples] == ["id0", "id2"]
    assert unlabelled == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_test_file_needs_no_label_column_but_ids(tmp_path, name):
    plain = load(name, written(tmp_path / "plain.csv", Table(name).text()))
    bare = load(name, written(tmp_path / "bare.csv", without("label", Table(name))), labelled=False)
    assert [(e.id, e.texts, e.label) for e in bare] == [(e.id, e.texts, None) for e in plain]
    table = Table(name).put(3, "id", "id1")
    path = written(tmp_path / "twice.csv", without("label", table))
    refused(lambda: load(name, path, labelled=False), path, "line 4: id 'id1' is line 3's")


# ------------------------------------------------------------------ csv files: no ordinary file


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    refused(lambda: load(name, tmp_path / "no.csv"), tmp_path / "no.csv", "no such file: fetch")
    refused(lambda: load(name, tmp_path), tmp_path, "a folder, pipe or device")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(lambda: load(name, tmp_path / "pipe.csv"), "pipe.csv", "a folder, pipe or device")
    (tmp_path / "link.csv").symlink_to("pipe.csv")
    refused(lambda: load(name, tmp_path / "link.csv"), "link.csv", "a folder, pipe or device")
    refused(lambda: load(name, Path("/dev/zero")), "/dev/zero", "a folder, pipe or device")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    refused(lambda: load(name, tmp_path / "loop.csv"), "loop.csv", "cannot be read")
    refused(lambda: load(name, tmp_path / ("n" * 300)), "cannot be read (File name too long)")
    below = written(tmp_path / "file", "x") / "below.csv"
    refused(lambda: load(name, below), below, "cannot be read (Not a directory)")


@contextmanager
def without_root(folder: Path):
    """Root may read everything: goes on as nobody, in a folder that nobody may enter."""
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


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_permission_is_refused(tmp_path, name):
    for file in ("closed.csv", "open.csv"):
        written(tmp_path / file, Table(name).text()).chmod(0o644 if file == "open.csv" else 0)
    with without_root(tmp_path):
        assert len(load(name, Path("open.csv"))) == 3
        refused(lambda: load(name, Path("closed.csv")), "closed.csv: cannot be read (Permission")


MILLION = """
import resource, sys
from pathlib import Path
from datasets import read
from tasks import TASKS

path = Path(sys.argv[1])
with open(path, "w", encoding="utf-8") as file:
    file.write("\\tid\\tsentence\\tsentiment\\n")
    file.writelines(f"{i}\\t{i:025}\\tA fine film .\\t3\\n" for i in range(10**6))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


before = peak()
assert len(read(path, TASKS["sst"], limit=1000)[0]) == 1000
few = peak() - before
examples, _ = read(path, TASKS["sst"])
assert (len(examples), examples[-1].id) == (10**6, f"{10**6 - 1:025}")
print(path.stat().st_size, few, peak() - before)
"""


def test_a_million_rows_take_memory_in_proportion(tmp_path):
    """Some hundred bytes a row; with --limit, only the ids of those that are left out."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path / "million.csv")],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    size, few, everything = map(int, done.stdout.split())
    assert size > 45 << 20
    assert few < 200 * 10**6
    assert everything < 500 * 10**6


# ------------------------------------------------------------------ csv files: through the scripts

THROUGH = [
    (classifier, "sst", "train", "header in capitals"),
    (classifier, "cfimdb", "dev", "label too large"),
    (multitask_classifier, "para", "train", "quote that swallows rows"),
    (multitask_classifier, "sts", "test", "id twice"),
    (multitask_classifier, "sst", "dev", "Latin-1"),
    (simcse, "sts", "dev", "a line of 10 MB"),
    (simcse, "nli", "train", "NUL"),
]


@pytest.mark.parametrize(("module", "name", "split", "fault"), THROUGH)
def test_scripts_end_with_code_2_and_one_line(
    tmp_path, run_script, tiny, data, module, name, split, fault
):
    folder = shutil.copytree(data, tmp_path / "data")
    written(folder / "nli_for_simcse.csv", Table("nli").text())
    file = "nli_for_simcse.csv"
    if name != "nli":
        file = TASKS[name].files.format("test-student" if split == "test" else split)
    make, _ = {**FAULTS, **FAULTS_OF_LABELLED}[fault]
    written(folder / file, make(Table(name)))
    flags = ["--model", tiny, "--data_dir", folder, "--run_dir", tmp_path / "run"]
    flags += ["--task", name] * (module is classifier)
    code, _, err = run_script(module, *flags)
    assert code == 2
    assert err.startswith(f"{module.__name__}.py: error: {folder / file}, line ")
    assert len(err.splitlines()) == 1
    assert names(tmp_path) == ["data"]


# ------------------------------------------------------------------ csv files: any bytes at all

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"]),
        # At the ends, too: that is where headers, pickles and directories are.
        st.floats(0, 1) | st.floats(0, 0.05) | st.floats(0.95, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, edits) -> bytes:
    """Flip a bit, set, insert, delete or repeat bytes, cut the end off: at these places."""
    changed = bytearray(data)
    for kind, where, number in edits:
        place = int(where * len(changed))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << number % 8
        elif kind == "set":
            changed[place : place + 1] = bytes([number])
        elif kind == "insert":
            changed[place:place] = bytes([number]) * (1 + number % 9)
        elif kind == "delete":
            del changed[place : place + 1 + number % 40]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + 1 + number % 40]
        elif kind == "cut":
            del changed[place:]
    return bytes(changed)


def harmless_or_refused(load, *mentions) -> bool:
    """Whether it loads; the only other end is a UserError of one line."""
    try:
        with within(30), within_memory(1500):
            load()
    except UserError as error:
        message = str(error)
        assert message.isprintable()
        for part in mentions:
            assert str(part) in message
        return False
    return True


PIECES = [b"id", b"sentence", b"sentence1", b"sentence2", b"sentiment", b"similarity", b"sent0"]
PIECES += [b"is_duplicate", b"sent1", b"hard_neg", b"\t", b"\t", b",", b"\n", b"\r", b'"', b"\0"]
PIECES += [b"a", b"1", b"1e400", b"nan", b"\xff", b"\xef\xbb\xbf", "\u2028".encode(), b" "]
soup = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | soup, name=st.sampled_from(list(FORMATS)))
def test_any_bytes_as_a_csv(tmp_path, content, name):
    path = written(tmp_path / "any.csv", content)
    for labelled in (True, False):
        harmless_or_refused(lambda labelled=labelled: load(name, path, labelled), path)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, name=st.sampled_from(list(FORMATS)))
def test_a_damaged_csv(tmp_path, edits, name):
    path = written(tmp_path / "any.csv", mutate(Table(name).text().encode(), edits))
    harmless_or_refused(lambda: load(name, path), path)


word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t"), max_size=12)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(word, word, st.integers(0, 50)), min_size=1, max_size=8))
def test_every_good_file_reads_as_by_the_standard_library(tmp_path, rows):
    """Quotes, line ends inside quotes, any letters."""
    with open(tmp_path / "f.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "sentence1", "sentence2", "similarity"])
        writer.writerows([f"r{i}", a, b, n / 10] for i, (a, b, n) in enumerate(rows))
    with open(tmp_path / "f.csv", encoding="utf-8", newline="") as file:
        expected = [
            (row["id"], (row["sentence1"], row["sentence2"]), float(row["similarity"]))
            for row in csv.DictReader(file, delimiter="\t")
        ]
    examples, _ = read(tmp_path / "f.csv", TASKS["sts"])
    assert [(e.id, e.texts, e.label) for e in examples] == expected


REAL = os.environ.get("MINBERT_DATA")


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
@pytest.mark.parametrize("name", FORMATS)
def test_the_courses_files_read_as_by_the_standard_library(name):
    """Each row with its id and label; but for the two of Quora that have no label."""
    if name == "nli":
        path = Path(REAL) / "nli_for_simcse.csv"
        with open(path, encoding="utf-8", newline="") as file:
            assert load(name, path) == [tuple(row.values()) for row in csv.DictReader(file)]
        return
    task = TASKS[name]
    for split in ("train", "dev", "test-student"):
        path = Path(REAL) / task.files.format(split)
        with open(path, encoding="utf-8", newline="") as file:
            rows = [
                row for row in csv.DictReader(file, delimiter="\t") if row.get(task.label) != ""
            ]
        examples = load(name, path, labelled=split != "test-student")
        assert [e.id for e in examples] == [row["id"] for row in rows]
        assert [e.texts for e in examples] == [tuple(row[t] for t in task.texts) for row in rows]
        labels = [None if split == "test-student" else float(row[task.label]) for row in rows]
        assert [e.label for e in examples] == labels


# ------------------------------------------------------------------ model folders: any bytes at all

# File -> what to do to a folder that MultitaskBERT.save_pretrained wrote, so that it is read.
DECISIVE = {
    "config.json": lambda folder: None,
    "tokenizer_config.json": lambda folder: None,
    "tokenizer.json": lambda folder: None,
    "vocab.txt": lambda folder: (folder / "tokenizer.json").unlink(),
    "heads.json": lambda folder: None,
    "heads.safetensors": lambda folder: None,
    "model.safetensors": lambda folder: None,
    "pytorch_model.bin": lambda folder: repack(folder, zipped=True),
    "legacy/pytorch_model.bin": lambda folder: repack(folder, zipped=False),
    "model.safetensors.index.json": lambda folder: shard(folder, "model.safetensors"),
    "pytorch_model.bin.index.json": lambda folder: shard(folder, "pytorch_model.bin"),
}


def repack(folder: Path, zipped: bool) -> None:
    """Weights as a pickle, of today or of before PyTorch 1.6."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def shard(folder: Path, kind: str) -> None:
    """Weights in two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"shard-{i % 2}{Path(kind).suffix}" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        (save_file if kind.endswith(".safetensors") else torch.save)(part, folder / file)
    write_json(folder / f"{kind}.index.json", {"metadata": {}, "weight_map": places})


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """A small trained model with a head for each task, as `save_pretrained` writes it."""
    tokenizer = BertTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    model = MultitaskBERT(BertModel(config), list(TASKS.values()), tokenizer=tokenizer)
    model.save_pretrained(tmp_path_factory.mktemp("saved") / "best")
    return tmp_path_factory.getbasetemp() / "saved0" / "best"


@pytest.fixture(scope="module")
def decisive(saved, tmp_path_factory) -> dict[str, Path]:
    """Each file of `DECISIVE`, in a folder of its own in which it is read; all of them load."""
    files = {}
    for name, prepare in DECISIVE.items():
        folder = shutil.copytree(saved, tmp_path_factory.mktemp("decisive") / "model")
        prepare(folder)
        files[name] = folder / Path(name).name
        assert files[name].is_file()
        use(folder)
    return files


TEXTS = ["the film is not great ! " * 9, "caf\u00e9 [SEP] \u4e2d\u6587 $A \u200b", ""]


def use(folder: Path) -> None:
    """Load all that a model folder holds, and run it."""
    MultitaskBERT.from_pretrained(folder).encode(TEXTS)


def use_tokenizer(folder: Path) -> None:
    """Load the tokenizer alone, and run it; what loads must also save."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    for pairs in (None, TEXTS):
        lengths = map(len, tokenizer(TEXTS, pairs, truncation=True)["input_ids"])
        assert max(lengths) <= tokenizer.max_length
    tokenizer.save_pretrained(folder.parent / "again")


def changed(file: Path, content: bytes) -> bool:
    """Whether the folder of `file` loads with this content in its place."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        of_tokenizer = file.name in TOKENIZER_FILES
        return harmless_or_refused(
            lambda: (use_tokenizer if of_tokenizer else use)(file.parent), file.parent
        )
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", DECISIVE)
@settings(max_examples=12)
@given(content=st.binary(max_size=100))
def test_any_bytes_as_a_file_of_a_model(decisive, name, content):
    assert not changed(decisive[name], content) or name == "tokenizer_config.json"


@pytest.mark.parametrize("name", DECISIVE)
@settings(max_examples=25)
@given(edits=EDITS)
def test_a_damaged_file_of_a_model(decisive, name, edits):
    changed(decisive[name], mutate(decisive[name].read_bytes(), edits))


ODD = [None, True, -1, 0, 1, 2, 10**8, 10**8 + 1, 2**31, 2**64, 10**400, 0.5, 1e300, math.inf]
ODD += [math.nan, "", "a", "[PAD]", "$A", "$A:0", "a:0", "\0", "\u200b", "\ud800", "\n", "../a"]
ODD += [[], {}, [[]], {"": {}}, "BPE", "Replace", "cosine", "linear", "joint", "mean", "gelu_new"]
odd = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def graft(tree, picks, new):
    """A copy of a JSON value with `new` somewhere inside it: at each level, a pick of the keys."""
    if not picks or not isinstance(tree, dict | list) or not tree:
        return new
    tree = tree.copy()
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[picks[0] % len(keys)]
    tree[key] = graft(tree[key], picks[1:], new)
    return tree


@pytest.mark.parametrize("name", [name for name in DECISIVE if name.endswith(".json")])
@settings(max_examples=30)
@given(picks=st.lists(st.integers(0, 200), min_size=1, max_size=4), new=odd)
def test_odd_values_in_a_json_file_of_a_model(decisive, name, picks, new):
    tree = graft(read_json(decisive[name]), picks, new)
    changed(decisive[name], json.dumps(tree).encode())


# ------------------------------------------------------------------ model folders: by design


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the small trained model, to be broken."""
    return shutil.copytree(saved, tmp_path / "model")


def edit(file: Path, *path, **values) -> None:
    """Change values of an object inside a JSON file, at this path of keys."""
    tree = read_json(file)
    place = tree
    for key in path:
        place = place[key]
    place.update(values)
    written(file, json.dumps(tree))


def load_all(folder: Path, *expected, memory: int = 400) -> str:
    """Loading the folder must be refused, quickly and without much memory."""
    with within_memory(memory):
        return refused(lambda: use(folder), *expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**8),
        ("num_hidden_layers", 10**8),
        ("num_hidden_layers", 20),
        ("vocab_size", 10**8),
        ("intermediate_size", 10**8),
        ("max_position_embeddings", 10**8),
        ("type_vocab_size", 10**8),
        ("hidden_size", 10**30),
        ("layer_norm_eps", 10**400),
        ("layer_norm_eps", math.inf),
        ("initializer_range", math.nan),
        ("hidden_dropout_prob", 10**400),
        ("hidden_act", "\x1b[2J\n" * 10**5),
    ],
)
def test_a_config_may_promise_what_it_will(folder, key, value):
    """Before any memory is taken for it, or time for a hundred million layers."""
    edit(folder / "config.json", **{key: value})
    load_all(folder, folder)


JSON_FILES = [name for name in DECISIVE if name.endswith(".json")]


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_too_deep_or_too_large(decisive, name):
    file = decisive[name]
    before = file.read_bytes()
    deep = {}
    for _ in range(150):
        deep = {"a": deep, "b": [deep] if not deep else []}
    contents = [b"[" * 10**6, b'{"a":' * 10**5, json.dumps({**read_json(file), "x": deep}).encode()]
    for content in contents:
        written(file, content)
        load_all(file.parent, file)
    os.truncate(written(file, b"{"), 1 << 36)  # a file with a hole: it takes no room
    load_all(file.parent, file, f"larger than {LARGEST_TEXT:,} bytes")
    written(file, before)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, whatever it promises."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = {
    "header beyond the file": safetensors({}, length=1 << 40),
    "header beyond the address space": safetensors({}, length=(1 << 64) - 1),
    "numbers that are not there": safetensors({"a": entry([10**9], 4 * 10**9)}),
    "a shape beyond counting": safetensors({"a": entry([2**63, 2**63], 4)}, bytes(4)),
    "overlapping tensors": safetensors({"a": entry([2], 8), "b": entry([2], 8)}, bytes(8)),
    "a hole": safetensors({"a": entry([1], 8, start=4)}, bytes(8)),
    "an unknown type": safetensors({"a": entry([1], 4, "F31")}, bytes(4)),
    "deep nesting": safetensors({"__metadata__": {}})[:8] + b"[" * 10**5,
}


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors"])
@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_promise_what_they_do_not_hold(folder, name, content):
    written(folder / name, content)
    load_all(folder, folder / name)


def test_weights_of_no_weights_type(folder):
    """Whole numbers, truth values, complex and 4-bit numbers are no weights."""
    for name, weight in (("model", "pooler.dense.bias"), ("heads", "sst.dense.bias")):
        file = folder / f"{name}.safetensors"
        tensors = load_file(file)
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
            save_file({**tensors, weight: tensors[weight].to(dtype)}, file)
            load_all(folder, file, f"{weight} holds {dtype}, expected floating point")
        save_file(tensors, file)


class Rebuilt:
    """Pickled, it is a call of this function with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...]) -> Rebuilt:
    """A tensor of any size and stride over four numbers."""
    storage = torch.ones(4)._typed_storage()
    rest = (False, OrderedDict())
    return Rebuilt(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, *rest)


def packed(**tensors) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


def compressed(data: bytes, **more: bytes) -> bytes:
    """The same archive, its entries squeezed, and more in it."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name, content in more.items():
            new.writestr(f"archive/{name}", content)
    return out.getvalue()


PICKLES = {
    "zip bomb": (lambda: compressed(packed(a=torch.zeros(10**7))), "compressed"),
    "zip bomb beside the tensors": (
        lambda: compressed(packed(a=torch.ones(2)), more=bytes(4 * 10**7)),
        "compressed",
    ),
    "numbers repeated": (
        lambda: packed(a=torch.ones(1).expand(10**6, 10**6)),
        "its tensors 4,000,000,000,000",
    ),
    "numbers beyond the storage": (lambda: packed(a=rebuilt((10**7,), (1,))), "damaged"),
    "one storage, many tensors": (
        lambda: packed(**dict.fromkeys(map(str, range(100)), torch.ones(10**4))),
        "its tensors 4,000,000",
    ),
    "many bytes": (lambda: packed(a=Rebuilt(bytearray, 10**12)), "(__builtin__ bytearray)"),
    "an empty tensor": (lambda: packed(a=Rebuilt(torch.Tensor, 10**6, 10**6)), "(torch Tensor)"),
    "on no device": (lambda: packed(a=torch.ones(2, device="meta")), "more than tensors"),
    "sparse": (lambda: packed(a=torch.ones(2, 2).to_sparse()), "more than tensors"),
}


@pytest.mark.parametrize(("make", "expected"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_would_take_more_memory_than_it_has(folder, make, expected):
    (folder / "model.safetensors").unlink()
    file = written(folder / "pytorch_model.bin", make())
    assert file.stat().st_size < 10**5
    load_all(folder, file, expected)


def test_tied_weights_are_usual(tmp_path):
    """The decoder of a pre-trained BERT is its word embedding; saved once, it loads."""
    weight = torch.randn(50, 40)
    file = written(tmp_path / "m.bin", packed(a=weight, b=weight, c=torch.nn.Parameter(weight[:9])))
    assert torch.equal(read_tensors(file)["b"], weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "shard", "heads"])
def test_weights_that_are_not_finite_are_named(folder, value, name):
    file, weight = folder / "model.safetensors", "encoder.layer.0.output.dense.weight"
    if name == "heads":
        file, weight = folder / "heads.safetensors", "sts.dense.weight"
    tensors = load_file(file)
    tensors[weight][0, 3] = value
    save_file(tensors, file)
    source = file
    if name == "pytorch_model.bin":
        repack(folder, zipped=True)
        source = folder / name
    if name == "shard":
        shard(folder, "model.safetensors")
        source = folder / "model.safetensors.index.json"
    load_all(folder, source, f"{weight} holds NaN or infinity")


def test_double_weights_beyond_single_precision_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"].double().fill_(1e300)
    save_file(tensors, folder / "model.safetensors")
    load_all(folder, "pooler.dense.bias holds NaN or infinity")


def test_scripts_refuse_weights_that_are_not_finite(saved, data, tmp_path, run_script):
    model = shutil.copytree(saved, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["pooler.dense.weight"][0, 0] = math.nan
    save_file(tensors, model / "model.safetensors")
    flags = ["--model", model, "--data_dir", data, "--run_dir", tmp_path / "run"]
    code, _, err = run_script(classifier, *flags)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "model.safetensors: pooler.dense.weight holds NaN or infinity" in err
    assert names(tmp_path) == ["model"]


# ------------------------------------------------------------------ tokenizers by design


def added(content: str, number: int, **flags) -> dict:
    return {"added_tokens": [{"id": number, "content": content, **flags}]}


TOKENIZERS = {
    "replacing text": (["normalizer"], {"type": "Replace"}, "normalizer has type 'Replace'"),
    "doubling text": (["normalizer"], {"type": "Sequence"}, "normalizer has type 'Sequence'"),
    "a regular expression": (
        ["pre_tokenizer"],
        {"type": "Split"},
        "pre_tokenizer has type 'Split'",
    ),
    "another model": (["model"], {"type": "Unigram"}, "model has type 'Unigram'"),
    "other pieces": (
        ["model"],
        {"continuing_subword_prefix": "@"},
        "continuing_subword_prefix '@'",
    ),
    "endless words": (["model"], {"max_input_chars_per_word": 10**9}, "max_input_chars_per_word"),
    "no normalizer": ([], {"normalizer": None}, "normalizer is None"),
    "a list of tokens": (["model"], {"vocab": ["[PAD]"]}, "has no vocab"),
    "a negative number": (["model", "vocab"], {"film": -1}, "has no vocab"),
    "a huge number": (["model", "vocab"], {"film": 2**32 - 1}, "has no vocab"),
    "a broken number": (["model", "vocab"], {"film": 1.0}, "has no vocab"),
    "half a character": (["model", "vocab"], {"\ud800": 7}, "not a BERT's"),
    "flags that are none": (["normalizer"], {"lowercase": 1}, "lowercase is 1, not true or false"),
    "an added token that is nothing": ([], added("", 5), "'' is nothing"),
    "one that is cleaned away": ([], added("\u200b", 5, normalized=True), "'\\u200b' is nothing"),
    "one with another's number": ([], added("film", 1), "'film' is not number 1"),
    "one far away": ([], added("filmic", 10**6), "'filmic' is not number 1000000"),
    "one that is endless": ([], added("a" * (LARGEST_ADDED + 1), 5), "more than 1,000,000 char"),
    "added tokens that are none": ([], {"added_tokens": [3]}, "added_tokens is no list of tokens"),
    "an unknown flag": ([], added("film", 5, lstrip="yes"), "not a BERT's"),
}


@pytest.mark.parametrize(("path", "values", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_json_that_is_not_a_berts(folder, path, values, expected):
    """What the library would do without end, or die of, is never given to it."""
    edit(folder / "tokenizer.json", *path, **values)
    load_all(folder, folder / "tokenizer.json", expected)


def test_added_tokens_stay_what_they_were(saved, tmp_path):
    """Against transformers: with their numbers, and found in a text as their flags say."""
    oracle = BertTokenizerFast.from_pretrained(saved)
    oracle.add_tokens(["<e1>", AddedToken("hello", lstrip=True, single_word=True), "Caf\u00e9"])
    oracle.add_special_tokens({"additional_special_tokens": ["[E2]"]})
    oracle.save_pretrained(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(oracle) == len(BertTokenizerFast.from_pretrained(saved)) + 4
    texts = ["the <e1> film", "<E1> hello hellos", "a caf\u00e9 [E2][SEP]", "Caf\u00e9", "film[e2]"]
    for text in texts:
        assert ours(text)["input_ids"] == oracle(text)["input_ids"]
    ours.save_pretrained(tmp_path / "again")
    again = BertTokenizer.from_pretrained(tmp_path / "again")
    assert [again(text) for text in texts] == [ours(text) for text in texts]


@pytest.mark.parametrize("token", ["", "$A", "$B:1", "a:0", "a b", "\n", "\0", "[", "\u200b"])
def test_special_tokens_of_any_name(folder, token):
    """Part of the vocabulary or not: they work as such, or are refused."""
    edit(folder / "tokenizer_config.json", cls_token=token)
    load_all(folder, f"the vocabulary has no {token}" if token.isprintable() else folder)
    edit(folder / "tokenizer.json", "model", "vocab", **{token: 2})
    tree = read_json(folder / "tokenizer.json")
    del tree["model"]["vocab"]["[CLS]"]
    tree["added_tokens"] = []
    written(folder / "tokenizer.json", json.dumps(tree))
    harmless_or_refused(lambda: use_tokenizer(folder), folder)


def test_a_vocabulary_of_one_giant_line_or_of_too_many(folder):
    (folder / "tokenizer.json").unlink()
    file = folder / "vocab.txt"
    text = file.read_text(encoding="utf-8")
    written(file, "x" * 10**7)
    load_all(folder, file, "the vocabulary has no [PAD]")
    written(file, "\n" * (LARGEST_VOCABULARY + 1))
    load_all(folder, file, "more than 1,000,000 lines")
    os.truncate(written(file, text), 1 << 36)
    load_all(folder, file, "larger than")
    written(file, text.replace("film\n", "x" * 10**7 + "\n"))
    use(folder)


# ------------------------------------------------------------------ pipes, links, paths


@pytest.mark.parametrize("name", DECISIVE)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "loop"])
def test_a_model_file_that_is_no_file(decisive, name, kind):
    """Not waited for: the folder is refused at once."""
    file = decisive[name]
    before = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    else:
        pipe = file if kind == "pipe" else file.parent.parent / "pipe"
        os.mkfifo(pipe)
        if kind != "pipe":
            file.symlink_to(pipe)
    try:
        refused(lambda: use(file.parent), file.parent)
    finally:
        file.rmdir() if kind == "folder" else file.unlink()
        (file.parent.parent / "pipe").unlink(missing_ok=True)
        written(file, before)


@pytest.mark.parametrize("name", DECISIVE)
def test_a_link_out_of_a_model_folder_is_not_followed(decisive, name, tmp_path):
    """Though what it leads to is good; a link that stays inside is."""
    file = decisive[name]
    before = file.read_bytes()
    for target in (tmp_path / "secret", file.parent / "inside"):
        shutil.move(file, target)
        file.symlink_to(target if target.parent == tmp_path else "inside")
        try:
            if target.parent == tmp_path:
                refused(lambda: use(file.parent), file, target, "out of its folder")
            else:
                use(file.parent)
        finally:
            file.unlink()
            written(file, before)
            target.unlink()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_shard_that_links_out_of_the_folder_is_not_followed(folder, tmp_path, kind):
    shard(folder, kind)
    use(folder)
    file = next(folder.glob("shard-1*"))
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    refused(lambda: use(folder), file, tmp_path / "outside", "out of its folder")
    file.unlink()
    file.symlink_to("../outside")
    refused(lambda: use(folder), file, tmp_path / "outside", "out of its folder")


def test_the_hub_caches_own_links_are_followed(saved, tmp_path):
    """And no others: neither to another model's blobs nor out of the cache."""
    repo, other = tmp_path / "models--org--name", tmp_path / "models--org--other"
    snapshot = repo / "snapshots" / "0123abcd"
    for place in (snapshot, repo / "blobs", other / "blobs"):
        place.mkdir(parents=True)
    for i, file in enumerate(path for path in saved.iterdir() if path.is_file()):
        shutil.copy(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    use(snapshot)
    for target in (other / "blobs" / "x", tmp_path / "x", repo / "x"):
        shutil.copy(saved / "config.json", target)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        refused(lambda: use(snapshot), snapshot / "config.json", "out of its folder")


def test_saving_never_writes_through_a_link(saved, tmp_path):
    """A folder full of links gets files of its own; what they led to stays."""
    model = MultitaskBERT.from_pretrained(saved)
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    for name in names(saved):
        written(outside / name, "precious")
        (target / name).symlink_to(outside / name)
    model.bert.save_pretrained(target)
    model.tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    assert {file.read_text(encoding="utf-8") for file in outside.iterdir()} == {"precious"}
    assert not any(file.is_symlink() for file in target.iterdir())
    use(target)


TRICKS = [
    "..",
    "../evil",
    "../../../evil",
    "org/..",
    "org/../..",
    "org/../../evil",
    "./org/../evil",
]
TRICKS += ["/evil/evil", "~/evil", "org\\..\\evil", "%2e%2e/evil", "org/%2e%2e%2fevil", "org/a\0b"]
TRICKS += ["file:///etc/passwd", "org/evil?x=/../y", "org/evil#", "", ".", "org/", "/", "org//evil"]


def test_hub_ids_with_path_tricks_leave_no_trace(tmp_path, local_hub, monkeypatch):  # noqa: F811
    """Neither asked of the hub nor written anywhere, in the cache or out of it."""
    files, _ = saved_files(tmp_path / "tiny")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with hub({name: files for name in TRICKS}) as server:
        local_hub(server.endpoint)
        before = sorted(tmp_path.rglob("*"))
        for name in TRICKS:
            refused(lambda name=name: BertModel.from_pretrained(name))
        assert sorted(tmp_path.rglob("*")) == before
        assert not any(command == "GET" for command, _ in server.asked)


@pytest.mark.parametrize("trick", ["../../../../evil.bin", "/tmp/evil.bin", "a/../../evil.bin"])
def test_a_hubs_index_with_path_tricks_fetches_nothing_else(tmp_path, local_hub, trick):  # noqa: F811
    files, _ = saved_files(tmp_path / "tiny")
    del files["model.safetensors"]
    index = {"weight_map": {"pooler.dense.bias": trick}}
    files["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    with hub({"org/evil": {**files, trick: b"evil", trick.rpartition("/")[2]: b"evil"}}) as server:
        local_hub(server.endpoint)
        refused(lambda: BertModel.from_pretrained("org/evil"), "names the shard", repr(trick))
        assert not any("evil.bin" in path for _, path in server.asked)
    assert not list(tmp_path.rglob("*evil.bin"))
    assert not Path("/tmp/evil.bin").exists()


# ------------------------------------------------------------------ nothing is executed


def command(file: Path) -> str:
    return f"touch {file}"


def opcodes(file: Path) -> dict[str, bytes]:
    """Pickles that run a command when they are loaded, each by another instruction."""
    text = command(file).encode()
    return {
        "GLOBAL, REDUCE": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "STACK_GLOBAL": pickle.dumps(Rebuilt(os.system, command(file)), protocol=4),
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + text + b"'\no.",
        "protocol 2": pickle.dumps({"a": Rebuilt(os.system, command(file))}, protocol=2),
        "after the tensors": pickle.dumps({"a": 1}, 2) + b"cos\nsystem\n(S'" + text + b"'\ntR.",
    }


@pytest.mark.parametrize("kind", opcodes(Path("x")))
@pytest.mark.parametrize("place", ["zip", "legacy", "plain", "shard", "model.safetensors"])
def test_a_checkpoint_that_would_run_code_does_not(folder, tmp_path, kind, place):
    """A pickle that is shown to work is planted wherever one may be."""
    ran = tmp_path / "ran"
    content = opcodes(ran)[kind]
    if kind != "after the tensors":
        pickle.loads(content)
        ran.unlink()
    if place == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3\n")
        planted = archive.getvalue()
    elif place == "legacy":
        good = io.BytesIO()
        torch.save({"a": torch.ones(1)}, good, _use_new_zipfile_serialization=False)
        planted = b"".join([*header_of_legacy(good.getvalue()), content, pickle.dumps([], 2)])
    else:
        planted = content
    name = "model.safetensors" if place == "model.safetensors" else "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if place == "shard":
        write_json(folder / f"{name}.index.json", {"weight_map": {"a": "s.bin"}})
        name = "s.bin"
    written(folder / name, planted)
    load_all(folder, folder / name)
    assert not ran.exists()


def header_of_legacy(data: bytes) -> list[bytes]:
    """The first three pickles of a file of the old format: a number, a version, the machine."""
    parts = []
    file = io.BytesIO(data)
    for _ in range(3):
        start = file.tell()
        list(pickletools.genops(file))
        parts.append(data[start : file.tell()])
    return parts


PLANTS = ["modeling_evil", "tokenization_evil", "configuration_evil", "conftest", "sitecustomize"]
PLANTS += [
    "usercustomize",
    "setup",
    "torch",
    "numpy",
    "json",
    "csv",
    "tokenizers",
    "bert",
    "__init__",
]


def test_nothing_in_a_model_folder_is_imported(tiny, data, tmp_path):
    """Even from inside it, and by a whole run; the plants are shown to work first."""
    model = shutil.copytree(tiny, tmp_path / "model")
    ran = tmp_path / "ran"
    for name in PLANTS:
        written(model / f"{name}.py", f"open({str(ran)!r}, 'w').close()\n")
    subprocess.run([sys.executable, "-c", "import modeling_evil"], cwd=model, check=True)
    ran.unlink()
    auto = {"AutoModel": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    edit(model / "config.json", auto_map=auto, architectures=["Evil"], trust_remote_code=True)
    tokenizers = {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.F"]}}
    edit(model / "tokenizer_config.json", **tokenizers, trust_remote_code=True)
    flags = ["--task", "sst", "--epochs", "1", "--limit", "4", "--precision", "fp32"]
    flags += ["--model", ".", "--data_dir", str(data), "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "classifier.py"), *flags],
        cwd=model,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert not ran.exists()


# ------------------------------------------------------------------ one line, whatever is quoted


def test_a_message_is_one_line_whatever_it_quotes(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "bad\nname\x1b[31m\u202e" + "x" * 5000
    save_file({**tensors, name: torch.ones(1)}, folder / "model.safetensors")
    message = load_all(folder, folder / "model.safetensors", "bad\\nname\\x1b[31m\\u202exx")
    assert message.endswith("is no weight of the model in its config.json")
    assert str(UserError("caf\u00e9 \u4e2d\ud800")) == "caf\u00e9 \u4e2d\\ud800"
