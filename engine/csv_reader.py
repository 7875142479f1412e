"""A strict csv reader, whose error messages name the file and the line."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError, reading

DELIMITER_NAMES = {"\t": "tab", ",": "comma"}

csv.field_size_limit(10**6)  # characters


def read_rows(
    path: Path, columns: Sequence[str], delimiter: str, optional: Sequence[str] = ()
) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """The rows of a csv file, each with its line number, and the file's sha256.

    UTF-8, a header line, default csv quoting. A byte-order mark, any line endings, blank lines,
    other columns and any order of columns are accepted; `optional` columns may be missing.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such file: fetch the course's data with ./setup.sh --data, or try the"
            " sample with --data_dir data/sample"
        )
    with reading(path, "a csv file"):
        content = path.read_bytes()
    line = 1  # where the current row starts
    try:
        content.decode("utf-8")  # all of it, so that an error has its position in the file
        lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        rows: list[tuple[int, dict[str, str]]] = []
        # A quoted field may contain line breaks: rows and lines are not the same.
        for fields in reader:
            if fields and not header:
                header = fields
                _check_header(path, header, columns, delimiter)
            elif fields:  # not a blank line
                _check_row(f"{path}, line {line}", fields, len(header), delimiter)
                row = dict(zip(header, fields, strict=True))
                rows.append((line, {n: row[n] for n in (*columns, *optional) if n in row}))
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}): save as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; fix the quotes") from None
    if not rows:
        raise UserError(f"{path}: {'no rows' if header else 'empty'}; expected a header and rows")
    return rows, hashlib.sha256(content).hexdigest()


def _check_header(path: Path, header: list[str], columns: Sequence[str], delimiter: str) -> None:
    """UserError unless the header has each wanted column exactly once."""
    for column in columns:
        count = header.count(column)
        if count != 1:
            raise UserError(
                f"{path}, line 1: {count or 'no'} column{'s' * (count > 1)} {column!r}; found"
                f" {', '.join(map(repr, header))[:200]}; the header must name it once, and"
                f" {DELIMITER_NAMES[delimiter]}s separate the columns"
            )


def _check_row(where: str, fields: list[str], count: int, delimiter: str) -> None:
    """UserError unless a row has as many fields as the header, none of them whole rows."""
    # A quote that is never closed swallows whole lines. (A sentence may contain commas.)
    if delimiter == "\t" and any("\n" in field and "\t" in field for field in fields):
        raise UserError(
            f"{where}: a quoted field contains whole lines; close its quote, or remove its breaks"
        )
    if len(fields) != count:
        raise UserError(
            f"{where}: not the {count} columns of the header; is a {DELIMITER_NAMES[delimiter]} or"
            " a quote missing?"
        )
