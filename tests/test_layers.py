"""Files import downwards only, and the product never imports the libraries it is tested against."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # from the bottom up; files of one layer do not import each other
    {"engine"},
    {"tasks", "bert", "tokenizer", "optimizer"},
    {"datasets"},
    {"model"},
    {"evaluation"},
    {"classifier", "multitask_classifier", "simcse"},
    {"experiments"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# classifier.py is multitask_classifier.py with a single task.
ALLOWED = {("classifier", "multitask_classifier")}
# What requirements.txt installs, by import name.
RUN_TIME = {
    *("torch", "numpy", "scipy", "sklearn", "tokenizers", "safetensors", "huggingface_hub"),
    *("tqdm", "matplotlib"),
}
PACKAGES = ("engine", "experiments")
PRODUCT = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]
    + [path for package in PACKAGES for path in (ROOT / package).glob("**/*.py")]
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


def tops(path: Path) -> set[str]:
    """The top-level names of what the file imports."""
    return {name.split(".")[0] for name in imported(path)}


def test_every_file_has_a_layer():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files | set(PACKAGES) == set(LAYER)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_lower_layers_and_run_time_dependencies(path):
    """So transformers, sentence-transformers and other oracles are never imported."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = tops(path) & set(LAYER)
    upwards = {other for other in ours - {own} if LAYER[other] >= LAYER.get(own, -1)}
    assert {(own, other) for other in upwards} <= ALLOWED
    assert tops(path) - set(LAYER) <= RUN_TIME | sys.stdlib_module_names


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycle_within_a_package(package):
    files = {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    pending = {name: imported(path) & set(files) - {name} for name, path in files.items()}
    while pending:
        free = [name for name, needed in pending.items() if not needed & set(pending)]
        assert free, f"a cycle among {sorted(pending)}"
        for name in free:
            del pending[name]
