"""Reading csv files strictly: what cannot be read is named by file, line and column."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint import check_regular_file
from engine.errors import UserError, reading

DELIMITER_NAMES = {"\t": "tab", ",": "comma"}

csv.field_size_limit(10**6)  # characters


def read_rows(
    path: Path, columns: Sequence[str], delimiter: str, optional: Sequence[str] = ()
) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """Read a csv file: a header line, default csv quoting, UTF-8.

    A byte-order mark, any line endings, blank lines, and columns in another order or beside those
    wanted are accepted.

    Args:
        path: the file.
        columns: the names of the columns that must be there.
        delimiter: a tab or a comma.
        optional: names of columns that may be there.

    Returns:
        Each row with its line number, and the file's sha256.

    Raises:
        UserError: names file and line of what cannot be read.
    """
    check_regular_file(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file: fetch the course's data with ./setup.sh --data, or try the"
            " sample with --data_dir data/sample"
        )
    with reading(path, "a csv file"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}): save as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    start = 1  # the line where the next row starts
    try:
        while reader.fieldnames == []:  # a blank line before the header
            reader.fieldnames = None
        _check_header(path, reader.fieldnames, columns, delimiter)
        names = [*columns, *(name for name in optional if name in reader.fieldnames)]
        start = reader.line_num + 1
        for row in reader:
            line = _check_row(path, reader, row, delimiter)
            rows.append((line, {name: row[name] for name in names}))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: {error}; fix the quotes") from None
    return rows, hashlib.sha256(content).hexdigest()


def _check_header(
    path: Path, header: Sequence[str] | None, columns: Sequence[str], delimiter: str
) -> None:
    """UserError unless the header has each wanted column exactly once."""
    if header is None:
        raise UserError(f"{path}: empty; expected a header line and rows")
    for column in columns:
        count = list(header).count(column)
        if count != 1:
            found = ", ".join(map(repr, header))[:200]
            raise UserError(
                f"{path}, line 1: {count or 'no'} column{'s' * (count > 1)} {column!r}; found"
                f" {found}; name it so, once, and separate columns by"
                f" {DELIMITER_NAMES[delimiter]}s"
            )


def _check_row(path: Path, reader: csv.DictReader, row: dict, delimiter: str) -> int:
    """The line where a row starts; UserError unless it has the columns of the header."""
    fields = [field for field in row.values() if isinstance(field, str)]
    line = reader.line_num - sum(field.count("\n") for field in fields)
    if any("\n" in field and delimiter in field for field in fields):
        raise UserError(
            f"{path}, line {line}: a quoted field contains whole lines up to line"
            f" {reader.line_num}; close its quote, or remove its line breaks"
        )
    if None in row or None in row.values():
        raise UserError(
            f"{path}, line {line}: not the {len(reader.fieldnames)} columns of the header; is a"
            f" {DELIMITER_NAMES[delimiter]} or a quote missing?"
        )
    return line
