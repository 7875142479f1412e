"""Files import downwards only, and the product never imports the libraries it is tested against."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # from the bottom up; files of one layer do not import each other
    {"engine"},
    {"hub"},
    {"tasks", "bert", "tokenizer", "optimizer"},
    {"datasets"},
    {"model"},
    {"masked_lm"},
    {"prediction"},
    {"saved_runs"},
    {"report"},
    {"classifier", "multitask_classifier", "simcse", "mlm", "evaluation"},
    {"experiments"},
    {"course"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# classifier.py is multitask_classifier.py with a single task.
ALLOWED = {("classifier", "multitask_classifier")}
# What requirements.txt installs, by import name.
RUN_TIME = {
    *("torch", "numpy", "scipy", "sklearn", "tokenizers", "safetensors", "huggingface_hub"),
    *("tqdm", "matplotlib"),
}
PACKAGES = ("engine", "hub", "report", "experiments")
GRADER = {"checks"}  # beside grade.py, in course/ and in a handout
ORACLES = {"make_references.py": {"transformers"}}  # only instructors run it
PRODUCT = sorted(
    path
    for folder in ("", "course/", "data/", "engine/", "hub/", "report/", "experiments/")
    for path in ROOT.glob(f"{folder}*.py")
)


def imported(path: Path) -> set[str]:
    """Every module that the file imports anywhere, `from a import b` as both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import {node.module} by its full name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_file_has_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} | {*PACKAGES, "course"} == set(LAYER)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_lower_layers_and_run_time_dependencies(path):
    """So transformers, sentence-transformers and other oracles are never imported."""
    importer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    modules = {name.split(".")[0] for name in imported(path)} - {importer}
    upwards = {m for m in modules & set(LAYER) if LAYER[m] >= LAYER.get(importer, -1)}
    assert {(importer, module) for module in upwards} <= ALLOWED
    allowed = RUN_TIME | ORACLES.get(path.name, set()) | (GRADER if importer == "course" else set())
    assert modules - set(LAYER) <= allowed | sys.stdlib_module_names


def test_grading_needs_only_pytorch_and_numpy():
    """It starts quickly, and what cannot be imported is found in a child process."""
    for name in ("grade.py", "checks.py"):
        modules = {module.split(".")[0] for module in imported(ROOT / "course" / name)}
        assert modules - GRADER <= {"torch", "numpy"} | sys.stdlib_module_names


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycle_within_a_package(package):
    files = {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    graph = {name: imported(path) & set(files) - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # fails if there is a cycle, and names it
