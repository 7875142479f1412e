"""`python -m experiments compare`: any number of runs in one table and one plot."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import quick_run
from matplotlib import image
from model_files import edit_json

import evaluation
import experiments.__main__
import multitask_classifier
from engine.checkpoint import read_text
from tasks import TASKS

NUMBER = r"[-+]?\d\.\d{4}"


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory) -> Path:
    """A folder with three runs, the last of one task."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"first": "", "second": "--seed 5", "sst": "--tasks sst"}.items():
        flags = ["--option", "finetune", "--no_test", *flags.split()]
        multitask_classifier.main(quick_run(tiny, data, folder / name, *flags))
    return folder


def test_runs_are_compared_with_the_first(runs, run_script, tmp_path):
    """As `evaluation.py --compare` does; a run of one task is compared on that alone."""
    compare = ["compare", runs / "first", runs / "second", runs / "sst", "--out", tmp_path / "out"]
    code, out, err = run_script(experiments.__main__, *compare)
    assert code == 0, err
    out, where = out.rsplit("\n", 2)[:2]
    assert out in read_text(tmp_path / "out/compare.md") and where.endswith("compare.png")
    assert image.imread(tmp_path / "out/compare.png").std() > 0.01
    rows = [[cell.strip() for cell in line[1:-2].split("|")] for line in out.splitlines()[2:]]
    assert [row[1] for row in rows if row[0].startswith("SST")] == [
        str(runs / name) for name in ("first", "second", "sst")
    ]
    assert len(rows) == 3 + 2 + 2
    _, pairwise, _ = run_script(evaluation, runs / "second", "--compare", runs / "first")
    for line in pairwise.splitlines():
        task, (score, _, difference, low, high, _) = line.split()[0], re.findall(NUMBER, line)
        row = next(r for r in rows if r[0].startswith(TASKS[task].title) and "second" in r[1])
        assert float(row[3]) == pytest.approx(float(score), abs=6e-4)
        for cell, value in ((row[5], difference), *zip(row[6].split(" to "), (low, high))):  # noqa: B905
            assert float(cell) == pytest.approx(float(value), abs=6e-4)


def test_comparisons_that_make_no_sense(runs, run_script, tmp_path):
    copy = shutil.copytree(runs / "first", tmp_path / "copy")
    one, other, out = runs / "first", runs / "second", ["--out", copy / "new"]
    edit_json(copy / "config.json", "arguments", limit=7)
    for flags, expected in (
        ([one, *out], "name at least two runs, each once"),
        ([one, other, one, *out], "name at least two runs, each once"),
        ([one, other, "--out", copy], "not an empty folder"),
        ([one, copy, *out], "they predicted different rows"),
        ([one, copy / "best", *out], "not a run folder"),
    ):
        code, printed, err = run_script(experiments.__main__, "compare", *flags)
        assert (code, printed, err.count("\n")) == (2, "", 1) and expected in err
    assert not (copy / "new").exists()
