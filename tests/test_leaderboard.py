"""The private leaderboard: scores, intervals and ties by hand; submissions that do not fit."""

import csv
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import PAIR, write_csv

from course import leaderboard

ROWS = 200
FILES = {  # task -> file, columns, header of the predictions
    "sst": ("ids-sst", ["sentence", "sentiment"], "Predicted_Sentiment"),
    "para": ("quora", [*PAIR, "is_duplicate"], "Predicted_Is_Paraphrase"),
    "sts": ("sts", [*PAIR, "similarity"], "Predicted_Similiary"),
}
rng = np.random.default_rng(0)
GOLD = {
    "sst": rng.integers(5, size=ROWS),
    "para": rng.integers(2, size=ROWS).astype(float),
    "sts": rng.uniform(0, 5, size=ROWS).round(2),
}
NOISE = rng.normal(size=ROWS)


@pytest.fixture(scope="module")
def gold(tmp_path_factory) -> Path:
    """Test files with labels."""
    folder = tmp_path_factory.mktemp("gold")
    for task, (name, columns, _) in FILES.items():
        texts = ["a film"] * (len(columns) - 1)
        rows = [[f"{task}-{i}", *texts, label] for i, label in enumerate(GOLD[task].tolist())]
        write_csv(folder / f"{name}-test-student.csv", ["id", *columns], rows)
    return folder


def predictions(sst_wrong: int, para_wrong: int, noise: float) -> dict[str, str]:
    """A submission's files, by name, with so many wrong answers, and noise on the scores."""
    answers = {task: values.copy() for task, values in GOLD.items()}
    answers["sst"][:sst_wrong] = (answers["sst"][:sst_wrong] + 1) % 5
    answers["para"][:para_wrong] = 1 - answers["para"][:para_wrong]
    answers["sts"] = answers["sts"] + noise * NOISE
    files = {}
    for task, values in answers.items():
        lines = [f"{task}-{i} , {value} \n" for i, value in enumerate(values.tolist())]
        files[f"{task}-test-output.csv"] = f"id \t {FILES[task][2]} \n" + "".join(lines)
    return files


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    """A submission as a folder."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def write_zip(path: Path, files: dict[str, str], inside: str = "predictions/") -> Path:
    """A submission as evaluation.py packs it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(inside + name, text)
    return path


@pytest.fixture
def ranking(run_script, gold, tmp_path):
    """`ranking(*submissions)`: exit code, rows of the csv file, standard error."""

    def run(*submissions: Path) -> tuple[int, list[dict[str, str]], str]:
        out = tmp_path / "ranking.csv"
        flags = [*submissions, "--data_dir", gold, "--csv", out]
        code, printed, err = run_script(leaderboard, *flags)
        with open(out, newline="") as file:
            rows = list(csv.DictReader(file))
        assert printed.startswith("rank") and len(printed.splitlines()) == len(rows) + 1
        return code, rows, err

    return run


def test_scores_and_intervals_are_those_computed_by_hand(ranking, tmp_path):
    """Accuracies 0.8 and 0.9 of 200 rows, Wilson's intervals; Fisher's for Pearson's r."""
    submission = write_zip(tmp_path / "a.zip", predictions(40, 20, 1.0))
    code, (row,), err = ranking(submission)
    assert (code, err) == (0, "")
    values = {name: float(text) for name, text in row.items() if name != "submission"}
    assert (values["sst"], values["para"]) == pytest.approx((0.8, 0.9))
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.959964
    assert (values["sst_low"], values["sst_high"]) == pytest.approx((0.7391, 0.8495), abs=1e-4)
    assert (values["para_low"], values["para_high"]) == pytest.approx((0.8506, 0.9343), abs=1e-4)
    r = np.corrcoef(GOLD["sts"], GOLD["sts"] + NOISE)[0, 1]
    low, high = (math.tanh(math.atanh(r) + sign * 1.959964 / math.sqrt(197)) for sign in (-1, 1))
    found = (values["sts"], values["sts_low"], values["sts_high"])
    assert found == pytest.approx((r, low, high), abs=1e-6)
    overall = (0.8 + 0.9 + (r + 1) / 2) / 3
    assert values["overall"] == pytest.approx(overall)
    below = math.hypot(0.8 - 0.7391, 0.9 - 0.8506, (r - low) / 2) / 3
    assert values["overall_low"] == pytest.approx(overall - below, abs=1e-4)


def test_rank_and_ties_within_noise(ranking, tmp_path):
    """A row less is chance. So are three: a sample of 200 rows lacks all three with e^-3 > 2.5%.

    But not six: e^-6 < 2.5%.
    """
    wrong = {"worst": 40, "three more": 13, "best": 10, "six more": 19, "same": 10}
    names = [write_folder(tmp_path / n, predictions(k, 20, 0.5)) for n, k in wrong.items()]
    _, rows, _ = ranking(*names)
    found = [(Path(row["submission"]).name, row["tied_with_above"]) for row in rows]
    assert found[:2] in ([("best", "0"), ("same", "1")], [("same", "0"), ("best", "1")])
    assert found[2:] == [("three more", "1"), ("six more", "0"), ("worst", "0")]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]


def test_a_submission_that_does_not_fit_is_named_and_the_rest_is_ranked(ranking, tmp_path):
    good = predictions(10, 20, 0.5)
    lines = good["sst-test-output.csv"].splitlines(keepends=True)
    swapped = "".join([lines[0], lines[2], lines[1], *lines[3:]])
    renamed = good["sts-test-output.csv"].replace("sts-7 ", "x ")
    bad = {
        "order": ({**good, "sst-test-output.csv": swapped}, "line 2: 'sst-1 , "),
        "count": ({**good, "sst-test-output.csv": "".join(lines[:-1])}, "199 rows, but"),
        "id": ({**good, "sts-test-output.csv": renamed}, "line 9"),
        "binary": ({**good, "para-test-output.csv": "\x00\xff"}, "line 1: the header is '\\x00"),
        "missing": ({n: t for n, t in good.items() if "para" not in n}, "has no para-test"),
    }  # fmt: skip
    broken = [write_zip(tmp_path / f"{name}.zip", files) for name, (files, _) in bad.items()]
    (tmp_path / "text.zip").write_text("not a zip file")
    twice = write_folder(tmp_path / "twice", good)
    write_folder(twice / "copy", good)
    fine = [write_folder(tmp_path / "folder", good), write_zip(tmp_path / "b.zip", good, "b/x/")]
    more = [tmp_path / "text.zip", twice, tmp_path / "gone.zip"]
    code, rows, err = ranking(*broken, *fine, *more)
    assert code == 2 and [row["submission"] for row in rows] == list(map(str, fine))
    *named, last = err.splitlines()
    parts = [*(part for _, part in bad.values()), "text.zip", "has 2 sst-test", "gone.zip"]
    for line, path, part in zip(named, [*broken, *more], parts, strict=True):
        assert line.startswith(f"not ranked: {path}") and part in line
    assert "8 of 10 submissions were not ranked" in last


def test_every_gold_row_needs_a_label(run_script, gold, tmp_path):
    """Without this, each submission would seem to have a row too many."""
    folder = shutil.copytree(gold, tmp_path / "gold")
    path = folder / "sts-test-student.csv"
    path.write_text(path.read_text().rstrip("\n").rpartition("\t")[0] + "\t\n")
    submission = write_zip(tmp_path / "a.zip", predictions(1, 1, 0.1))
    code, out, err = run_script(leaderboard, submission, "--data_dir", folder)
    assert (code, out) == (2, "") and "sts-test-student.csv: 1 rows have no label" in err


def test_gold_files_without_labels_and_an_existing_csv_are_refused(run_script, data, tmp_path):
    submission = write_zip(tmp_path / "a.zip", predictions(1, 1, 0.1))
    code, out, err = run_script(leaderboard, submission, "--data_dir", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "ids-sst-test-student.csv, line 1: no column 'sentiment'" in err
    (tmp_path / "mine.csv").write_text("mine")
    flags = [submission, "--data_dir", data, "--csv", tmp_path / "mine.csv"]
    code, out, err = run_script(leaderboard, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mine.csv: exists and is not overwritten" in err
