"""The sample data: made by its script to the byte, in the course's formats, without leaks."""

import csv
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from datasets import read
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
SPLITS = {"train": 1500, "dev": 300, "test-student": 1}


def examples(name: str, split: str) -> list:
    """The rows of one file."""
    path = SAMPLE / TASKS[name].files.format(split)
    return read(path, TASKS[name], labelled=split != "test-student")[0]


def normal(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences without case, punctuation and order."""
    return tuple(sorted(" ".join(re.findall(r"\w+", text.lower())) for text in texts))


def test_the_script_makes_these_very_files(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "make_sample.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in SAMPLE.iterdir()}
    assert len(made) == 13


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_sizes_ids_and_labels(name, split):
    rows = examples(name, split)
    assert len(rows) >= SPLITS[split]
    assert len({row.id for row in rows}) == len(rows)
    assert all(text.strip() for row in rows for text in row.texts)
    if split == "test-student":
        path = SAMPLE / TASKS[name].files.format(split)
        with open(path, encoding="utf-8", newline="") as file:
            assert TASKS[name].label not in next(csv.reader(file, delimiter="\t"))
    else:
        labels = Counter(row.label for row in rows)
        assert max(labels.values()) <= 0.65 * len(rows)
        if TASKS[name].whole:
            assert set(labels) == set(range(int(TASKS[name].high) + 1))
        else:
            assert min(labels) < 0.5
            assert max(labels) > 4.5
            assert len(labels) > 30


@pytest.mark.parametrize("name", TASKS)
def test_no_row_of_one_file_is_in_another(name):
    seen: dict[tuple[str, ...], str] = {}
    for split in SPLITS:
        for row in examples(name, split):
            key = normal(row.texts)
            assert key not in seen, f"{row} of {split} is in {seen.get(key)} too"
            seen[key] = split


def test_nli_triples():
    with open(SAMPLE / "nli_for_simcse.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sent0", "sent1", "hard_neg"]
    assert len(rows) > 1500
    assert all(len(row) == 3 and len(set(row)) == 3 and all(row) for row in rows[1:])
    assert len(set(map(tuple, rows))) == len(rows)
