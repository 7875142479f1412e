"""The sample data: reproducible to the byte, in the course's formats, without leaks."""

import csv
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from datasets import Example, read_examples
from tasks import TASKS, Regression

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
MIN_ROWS = {"train": 1500, "dev": 300, "test-student": 1}


def examples(name: str, split: str) -> list[Example]:
    """Read one file of the sample; a test file must have no labels."""
    path = SAMPLE / TASKS[name].files.format(split)
    rows = read_examples(path, TASKS[name], labelled=None)[0]
    assert all((row.label is None) == (split == "test-student") for row in rows)
    return rows


def normalize(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Remove case, punctuation and the order of the sentences."""
    return tuple(sorted(" ".join(re.findall(r"\w+", text.lower())) for text in texts))


def test_script_reproduces_the_files(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "make_sample.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in SAMPLE.iterdir()}
    assert len(files) == 13


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", MIN_ROWS)
def test_sizes_and_labels(name, split):
    task, rows = TASKS[name], examples(name, split)
    assert len(rows) >= MIN_ROWS[split]
    assert all(text.strip() for row in rows for text in row.texts)
    labels = Counter(row.label for row in rows if row.label is not None)
    assert max(labels.values(), default=0) <= 0.65 * len(rows)
    if labels and isinstance(task.labels, Regression):
        assert min(labels) < 0.5 and max(labels) > 4.5 and len(labels) > 30
    elif labels:
        assert set(labels) == set(range(len(task.class_names)))


@pytest.mark.parametrize("name", TASKS)
def test_no_row_occurs_twice_in_the_files_of_a_task(name):
    rows = [normalize(row.texts) for split in MIN_ROWS for row in examples(name, split)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    "words, polarity",
    [
        ("good decent enjoyable excellent wonderful brilliant superb treat gem", 1),
        ("dull boring weak flat awful terrible horrible mess bore", -1),
    ],
)
def test_labels_of_short_plain_sst_sentences(words, polarity):
    scores = []
    for row in examples("sst", "train"):
        tokens = normalize(row.texts)[0].split()
        if len(tokens) <= 4 and set(tokens) & set(words.split()) and "not" not in tokens:
            scores.append((row.label - 2) * polarity)
    assert min(scores) >= 0  # noise makes a few of them neutral
    assert sum(score > 0 for score in scores) >= max(30, 0.9 * len(scores))


def test_readme_example_is_learnt_from_other_sentences():
    texts = [normalize(row.texts)[0] for row in examples("sst", "train")]
    assert any(re.fullmatch(r"an? \w+ film", text) for text in texts)
    assert not any("fine" in text.split() for text in texts)  # "A fine film."


def test_nli_triples():
    with open(SAMPLE / "nli_for_simcse.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sent0", "sent1", "hard_neg"]
    assert len(rows) > 1500
    assert all(len(row) == 3 and len(set(row)) == 3 and all(row) for row in rows[1:])
    assert len(set(map(tuple, rows))) == len(rows)
