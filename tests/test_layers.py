"""The files import only from lower layers, and no script imports a script."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"checkpoint", "gradients", "optimizer"},
    {"distributed", "exchange"},
    {"bert", "tokenizer", "train"},
    {"tasks"},
    {"datasets"},
    {"scoring"},
    {"supervised", "contrastive", "report", "options"},
    {"saved"},
    {"classifier", "evaluation", "multitask_classifier", "simcse"},
    {"experiments"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in sorted(names)}
LATE = {
    "torch",
    "numba",
    "numpy",
    "scipy",
    "sklearn",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "tqdm",
}


def imports(tree: ast.AST) -> set[str]:
    """The top-level names of all modules that the code imports, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_every_file_has_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LAYER)


@pytest.mark.parametrize("name", LAYER)
def test_imports_go_up_the_table(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for other in imports(tree) & set(LAYER):
        assert LAYER[other] < LAYER[name], f"{name}.py imports {other}.py"


@pytest.mark.parametrize("name", LAYER)
def test_oracles_are_never_imported(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert not imports(tree) & {"transformers", "sentence_transformers"}


@pytest.mark.parametrize("name", ["options", *sorted(LAYERS[-2]), "experiments"])
def test_scripts_parse_before_they_import_anything_heavy(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not imports(top) & (LATE | (set(LAYER) - {"options"}))
