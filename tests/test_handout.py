"""The handout and its grader: solved, blank, with one function missing, with students' mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from student import MISTAKES, SOLUTIONS, TESTS, solve
from test_layers import imported

from course import make_handout
from engine.checkpoint import read_text
from engine.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {file: (ROOT / file).read_text(encoding="utf-8") for file in SOLUTIONS}
FILE = {function: file for file, functions in SOLUTIONS.items() for function in functions}
UNWRITTEN = r"not implemented yet \((\w+\.py), line \d+\): (.+)"
# Grades folders, each in a process forked from one that has imported PyTorch.
GRADER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from grade import TESTS, outcome
torch.set_num_threads(1)
for folder in sys.stdin.read().split():
    if os.fork() == 0:
        sys.path[0] = folder
        scored = [test for test in TESTS if test.points]
        print(json.dumps({test.name: outcome(test) for test in scored}), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="session")
def handout(tmp_path_factory) -> Path:
    """The assignment as students get it."""
    out = tmp_path_factory.mktemp("course") / "handout"
    make_handout.main([str(out)])
    return out


@pytest.fixture(scope="session")
def solved(handout, tmp_path_factory) -> Path:
    """The same with a student's solutions."""
    folder = tmp_path_factory.mktemp("course") / "solved"
    shutil.copytree(handout, folder)
    for file in SOLUTIONS:
        (folder / file).write_text(solve((handout / file).read_text(), file))
    return folder


def variant(solved: Path, folder: Path, files: dict[str, str]) -> Path:
    """A solved handout in which these files differ; an empty one is missing."""
    folder.mkdir()
    for path in solved.iterdir():
        if path.name not in files and path.name != "__pycache__":
            (folder / path.name).symlink_to(path)
    for name, text in files.items():
        if text:
            (folder / name).write_text(text)
    return folder


def grade_all(handout: Path, folders: list[Path]) -> list[dict[str, str]]:
    """For each folder the tests that cost points, with their sentences."""
    command = [sys.executable, "-c", GRADER, str(handout)]
    names = "\n".join(map(str, folders))
    printed = subprocess.run(
        command, input=names, capture_output=True, text=True, check=True, timeout=240
    )
    outcomes = [json.loads(line) for line in printed.stdout.splitlines()]
    return [{n: text for n, text in o.items() if text != "passed"} for o in outcomes]


def grade(folder: Path, *flags: object) -> tuple[int, dict[str, dict], str]:
    """`python grade.py` as a student runs it: the score, the tests by name, what it prints."""
    out = folder / "results.json"
    command = [sys.executable, "grade.py", ".", "--json", str(out), *map(str, flags)]
    printed = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=240
    )
    assert printed.stderr == ""
    results = json.loads(out.read_text())
    out.unlink()
    return results["score"], {test["name"]: test for test in results["tests"]}, printed.stdout


# ---------------------------------------------------------------------------- points


def test_a_fresh_handout_has_no_points_and_gives_every_hint(handout):
    score, tests, printed = grade(handout)
    assert score == 0 and all(test["score"] == 0 for test in tests.values())
    for test in tests.values():
        assert test["status"] == "failed"
        file, hint = re.fullmatch(UNWRITTEN, test["output"]).groups()
        assert f"# SOLUTION: {hint}\n" in SOURCES[file]
    assert sum(test["max_score"] for test in tests.values()) == 100
    assert printed.endswith("  0 / 100 points\n")


def test_a_students_solutions_and_our_own_get_all_points(solved, handout):
    score, tests, printed = grade(solved)
    assert score == 100, printed
    assert {test["output"] for test in tests.values()} == {"passed"}
    assert set(tests) == {name for names in TESTS.values() for name in names} | {"the whole model"}
    assert grade_all(handout, [ROOT]) == [{}]


def test_a_missing_function_costs_exactly_its_own_points(solved, handout, tmp_path):
    folders = []
    for function, file in FILE.items():
        text = solve((handout / file).read_text(), file, blank=function)
        folders.append(variant(solved, tmp_path / function, {file: text}))
    for function, lost in zip(FILE, grade_all(handout, folders), strict=True):
        assert set(lost) == TESTS[function]
        assert {re.fullmatch(UNWRITTEN, text)[1] for text in lost.values()} == {FILE[function]}


def test_a_common_mistake_fails_its_own_test_with_its_own_sentence(solved, handout, tmp_path):
    """One mistake in each function at a time: the tests of other functions do not see it."""
    rounds: list[dict[str, tuple]] = []
    for function, *mistake in MISTAKES:
        unused = [made for made in rounds if function not in made]
        if not unused:
            unused = [{}]
            rounds += unused
        unused[0][function] = mistake
    folders = []
    for number, made in enumerate(rounds):
        edits = {function: (old, new) for function, (old, new, _, _) in made.items()}
        files = {f: solve((handout / f).read_text(), f, edits=edits) for f in SOLUTIONS}
        folders.append(variant(solved, tmp_path / str(number), files))
    sentences = set()
    for made, lost in zip(rounds, grade_all(handout, folders), strict=True):
        assert set(lost) == {test for *_, test, _ in made.values()}
        for *_, test, part in made.values():
            assert part in lost[test]
        sentences |= set(lost.values())
    assert len(sentences) == len(MISTAKES)


def test_a_softmax_over_the_wrong_dimension_is_named(solved, handout, tmp_path):
    """It breaks the padding, too, so it costs both tests of attention."""
    edits = {"eager_attention": ("dim=3", "dim=2")}
    files = {"bert.py": solve((handout / "bert.py").read_text(), "bert.py", edits=edits)}
    [lost] = grade_all(handout, [variant(solved, tmp_path / "axis", files)])
    assert set(lost) == TESTS["eager_attention"] and "softmax over the queries" in lost["attention"]


HANG = "while True:\n    pass\n"
NONSENSE = """
import os, sys
for stream in (1, 2):
    os.write(stream, b"passed 100 / 100 \\xff\\x00" * 10000)
print('{"score": 100}')
"""


def test_a_broken_submission_loses_only_its_own_points(solved, tmp_path):
    """A file hangs when it is imported, another one is missing."""
    folder = variant(solved, tmp_path / "one", {"optimizer.py": HANG, "simcse.py": ""})
    score, tests, _ = grade(folder, "--time_limit", 8)
    lost = {name: test["output"] for name, test in tests.items() if test["status"] == "failed"}
    # multitask_classifier.py imports optimizer.py.
    hanging = TESTS["adamw_update"] | TESTS["row_losses"]
    assert {name for name, text in lost.items() if "not finished after 8 s" in text} == hanging
    assert set(lost) == hanging | TESTS["contrastive_loss"]
    assert {lost[name] for name in lost if name not in hanging} == {"simcse.py is missing"}
    assert score == sum(test["max_score"] for name, test in tests.items() if name not in lost)


def test_a_submission_that_raises_exits_or_prints_nonsense(solved, handout, tmp_path):
    files = {"tasks.py": NONSENSE + (solved / "tasks.py").read_text()}
    files["multitask_classifier.py"] = "import math\n\nmath.sqrt(-1)\n"
    edits = {
        "adamw_update": "import sys; sys.exit(0)",
        "contrastive_loss": "import os; os._exit(0)",
    }
    for function, code in edits.items():
        file = FILE[function]
        end = SOLUTIONS[file][function].strip().split("\n")[-1]
        files[file] = solve(
            (handout / file).read_text(), file, edits={function: (end.strip(), code)}
        )
    folder = variant(solved, tmp_path / "two", files)
    score, tests, printed = grade(folder)
    lost = {name: test["output"] for name, test in tests.items() if test["status"] == "failed"}
    assert set(lost) == {n for f in (*edits, "row_losses") for n in TESTS[f]}
    assert re.fullmatch(r"SystemExit \(optimizer.py, line \d+\): 0", lost["AdamW"])
    assert lost["contrastive loss"] == "the process ended in the middle of the test"
    assert lost["multitask step"].startswith("ValueError (multitask_classifier.py, line 3): ")
    assert "100 / 100" not in printed and 0 < score < 100


def test_results_are_not_overwritten_and_debug_shows_the_traceback(handout, tmp_path):
    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "grade.py", *flags]
        return subprocess.run(command, cwd=handout, capture_output=True, text=True)

    (tmp_path / "mine.json").write_text("mine")
    refused = run("--json", str(tmp_path / "mine.json"))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "mine.json: exists and is not overwritten" in refused.stderr
    assert (tmp_path / "mine.json").read_text() == "mine"
    for limit in ("0", "-1", "nan"):
        refused = run("--time_limit", limit)
        assert refused.returncode == 2 and "not a number of seconds above 0" in refused.stderr
    assert re.search(r"bert.py.*, in eager_attention\n", run("--debug", "attention").stderr)


# ---------------------------------------------------------------------------- the folder


def test_a_handout_holds_no_solution_and_no_way_around_one(handout):
    """No line of a solution, none of PyTorch's fused kernels, nothing that tells of the results."""
    given = [path.read_text() for path in handout.rglob("*.py")]
    given += [(handout / "README.md").read_text()]
    everything = "".join(map(read_text, ROOT.glob("*.py")))
    for source in SOURCES.values():
        for block in re.findall(r"# SOLUTION.*\n((?:.*\n)+?) *# END SOLUTION", source):
            lines = [line.strip() for line in block.splitlines()]
            revealing = {line for line in lines if len(line) > 40 and not line.startswith("#")}
            # A line may stand elsewhere too, such as the padding of a batch.
            elsewhere = {line for line in revealing if everything.count(line) > 1}
            for line in revealing - elsewhere:
                assert not any(line in text for text in given), line
    for word in (
        "SOLUTION",
        "scaled_dot_product_attention",
        "_fused_adamw",
        "nn.MultiheadAttention",
    ):
        assert not any(word in text for text in given), word
    assert not [path for path in handout.rglob("*") if path.name in ("LOG.md", "results", "tests")]


def test_a_handout_is_a_whole_project(solved, tiny, data, tmp_path):
    """Everything that its files import is there, its scripts run, and it trains."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"engine", "experiments", "hub", "report"}
    there = {path.stem for path in solved.iterdir()}
    for path in solved.rglob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} & ours <= there, path
    assert os.access(solved / "setup.sh", os.X_OK)
    flags = ["--option", "finetune", "--epochs", "1", "--limit", "8", "--model", tiny]
    flags += ["--data_dir", data, "--run_dir", tmp_path / "run"]
    command = [sys.executable, "multitask_classifier.py", *map(str, flags)]
    subprocess.run(command, cwd=solved, check=True, capture_output=True)
    assert (tmp_path / "run" / "result.json").exists()


def test_a_handout_appears_whole_in_a_new_folder_or_not_at_all(tmp_path, run_script, monkeypatch):
    (tmp_path / "mine").mkdir()
    code, out, err = run_script(make_handout, tmp_path / "mine")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "mine: exists and is not overwritten" in err
    monkeypatch.setattr(make_handout, "COURSE", {"gone.md": "README.md"})  # the last to be copied
    code, out, err = run_script(make_handout, tmp_path / "new")
    assert (code, out) == (2, "") and "gone.md" in err
    monkeypatch.setattr(make_handout, "ROOT", tmp_path)
    code, out, err = run_script(make_handout, tmp_path / "new")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "use a clone" in err
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n# END SOLUTION\n", 2),
        ("# SOLUTION: a\nb\n", 1),
        ("a\n    #SOLUTION: b\n    c\n    # END SOLUTION\n", 2),
        ("# SOLUTION: a\nb\n# End solution\n", 3),
        ("# SOLUTION: a\nb\n  # SOLUTION: c\n# END SOLUTION\n", 3),
    ],
)
def test_a_marker_that_is_misspelt_or_has_no_partner_is_named(text, line):
    with pytest.raises(UserError, match=f"x.py, line {line}: "):
        make_handout.remove_solutions(text, Path("x.py"))


def test_stored_references_are_those_of_the_independent_libraries(tmp_path):
    command = [sys.executable, "course/make_references.py", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    stored = {path.name: path for path in (ROOT / "course/references").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == set(stored)
    for name, path in stored.items():
        with np.load(path) as old, np.load(tmp_path / name) as new:
            assert set(old.files) == set(new.files)
            for key in old.files:
                np.testing.assert_allclose(old[key], new[key], rtol=1e-5, atol=1e-5)
