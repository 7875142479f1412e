"""What we save loads in other software to the same numbers, and what it saves loads here.

sentence-transformers imports a library by the name of our datasets.py, so it runs in a process of
its own, elsewhere.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from model_files import edit_json, refused
from safetensors.torch import load_file, save_file

import classifier
import evaluation
import multitask_classifier
import simcse
from bert import BertModel
from engine.checkpoint import read_json, write_json
from hub.export import model_card, read_pooler
from model import POOLINGS, MultitaskBERT, SentenceEncoder
from tasks import TASKS
from tokenizer import BertTokenizer

TEXTS = ["the film is great", "a dull plot !", "", "the cat sees a dog " * 30, "zzz, 3?"]

# Encodes texts with each model folder, trains it a little, encodes again and saves it.
CLIENT = """
import json, sys
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

texts, folders = json.loads(sys.argv[1])
for folder in folders:
    model = SentenceTransformer(folder, device="cpu")
    np.save(folder + "-loaded.npy", model.encode(texts))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        features = model.tokenize(["the film is great", "a dull plot"])
        first, second = model(features)["sentence_embedding"]
        torch.nn.functional.cosine_similarity(first, second, dim=0).backward()
        optimizer.step()
    np.save(folder + "-trained.npy", model.eval().encode(texts))
    model.save(folder + "-trained")
"""


@pytest.fixture(scope="module")
def models(tiny):
    """A model of each pooling."""
    torch.manual_seed(5)
    options = {"tokenizer": BertTokenizer.from_pretrained(tiny)}
    bert, tasks = BertModel.from_pretrained(tiny), [TASKS["sst"]]
    return {how: MultitaskBERT(bert, tasks, pooling=how, **options).eval() for how in POOLINGS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The models saved, and what sentence-transformers made of each beside it (`CLIENT`)."""
    folder = tmp_path_factory.mktemp("exchanged")
    for how, model in models.items():
        model.save_pretrained(folder / how)
    (folder / "client.py").write_text(CLIENT, encoding="utf-8")
    texts_and_folders = json.dumps([TEXTS, [str(folder / how) for how in models]])
    command = [sys.executable, "-W", "error::FutureWarning", "client.py", texts_and_folders]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("how", POOLINGS)
def test_embeddings_equal_those_of_sentence_transformers(models, folders, how):
    """Before and after it trains the model, whose pooler is a module of its own to it."""
    folder, before = folders / f"{how}-trained", models[how].encode(TEXTS)
    loaded, trained = (np.load(folders / f"{how}-{when}.npy") for when in ("loaded", "trained"))
    np.testing.assert_allclose(loaded, before, rtol=0, atol=1e-5)
    assert np.abs(trained - before).max() > 1e-3
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = SentenceEncoder(BertModel.from_pretrained(folder), tokenizer, how)
    np.testing.assert_allclose(model.encode(TEXTS), trained, rtol=0, atol=1e-5)
    model.save_pretrained(folders / f"{how}-again")
    again = MultitaskBERT.from_pretrained(folders / f"{how}-again")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


@pytest.fixture
def dense(folders, tmp_path):
    """A copy of the folder whose pooler sentence-transformers trained."""
    return shutil.copytree(folders / "pooler-trained", tmp_path / "model")


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("1_Pooling", {"pooling_mode": "mean", "pooling_mode_cls_token": False}),
        ("2_Dense", {"activation_function": "torch.nn.modules.linear.Identity"}),
        ("2_Dense", {"out_features": 16}),
        ("2_Dense", {"in_features": [32]}),
        ("2_Dense", {"use_residual": True}),
        ("2_Dense", {"bias": False}),
    ],
)
def test_a_dense_module_of_another_kind_is_not_taken_for_the_pooler(dense, module, change):
    assert read_pooler(dense, 32)
    edit_json(dense / module / "config.json", **change)
    assert not read_pooler(dense, 32)
    stored = load_file(dense / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(BertModel.from_pretrained(dense).pooler_dense.weight, stored)


def test_a_damaged_dense_module_is_refused(dense):
    path, weight = dense / "2_Dense" / "model.safetensors", torch.zeros(32, 32)
    for bias, expected in (
        (torch.zeros(1), "linear.bias of shape (32,) is missing"),
        (torch.full((32,), torch.nan), "linear.bias contains NaN"),
    ):
        save_file({"linear.weight": weight, "linear.bias": bias}, path)
        refused(lambda: BertModel.from_pretrained(dense), path, expected)
    path.write_bytes(path.read_bytes()[:-10])
    refused(lambda: BertModel.from_pretrained(dense), path, "damaged")


@pytest.mark.parametrize(
    "kind", ["Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"]
)
def test_a_model_that_transformers_trained_loads_here(folders, tmp_path, kind):
    """With any of its heads, which are left out: the encoder is the same."""
    kind = getattr(transformers, f"Bert{kind}")
    theirs = kind.from_pretrained(folders / "cls", attn_implementation="eager")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folders / "cls")
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    theirs(**batch)[0].square().mean().backward()
    optimizer.step()
    theirs.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    ours, encoder = BertModel.from_pretrained(tmp_path), getattr(theirs, "bert", theirs)
    with torch.no_grad():
        expected, output = encoder(**batch), ours(**batch)
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(output["last_hidden_state"][tokens], expected[0][tokens])
    if encoder.pooler is not None:
        torch.testing.assert_close(output["pooler_output"], expected[1])
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert all(torch.equal(encoded[name], batch[name]) for name in encoded)


@pytest.mark.parametrize("script", [multitask_classifier, simcse])
def test_the_best_model_has_a_model_card(folders, tmp_path, train, script):
    """The hub's own reader understands it; the numbers are those of result.json.

    The base model is one that sentence-transformers trained: that can be trained on.
    """
    base, run, triples = tmp_path / "base: #1", tmp_path / "my run", tmp_path / "triples.csv"
    shutil.copytree(folders / "pooler-trained", base)
    triples.write_text("sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8)
    train(script, run, "--model", base, *(["--nli", triples] if script is simcse else []))
    card = ModelCard.load(run / "best" / "README.md")
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    assert (card.data.base_model, card.data.library_name) == (None, "sentence-transformers")
    files = ["triples.csv (8 rows)"]
    if script is multitask_classifier:
        files = ["ids-sst-train.csv (40 rows)", "quora-train.csv (40", "sts-train.csv (20 rows)"]
    for part in ("# my run", "`base: #1`", config["command"], *files):
        assert part in card.text
    table = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line[:2] == "| "]
    expected = [
        [Path(config["files"]["dev"][task]).name, name, f"{value:.4f}"]
        for task, metrics in result["dev"].items()
        for name, value in metrics.items()
        if name in ("accuracy", "macro_f1", "pearson", "spearman")
    ]
    assert table == [["dev set", "metric", "value"], *expected]
    assert len(expected) == (1 if script is simcse else 6)
    # The hub refuses a base_model that is not one of its ids.
    for name, hub_id in (
        ("org/tiny", "org/tiny"),
        ("all-MiniLM-L6-v2", "sentence-transformers/all"),
    ):
        config["arguments"]["model"] = name
        write_json(run / "config.json", config)
        assert ModelCard(model_card(run, result)).data.base_model.startswith(hub_id)


def test_the_courses_file_has_the_names_that_its_loader_renames(train, tmp_path, run_script):
    """Its `BertModel.from_pretrained` wants HuggingFace's names, each with the prefix `bert.`."""
    run = tmp_path / "run"
    train(classifier, run, "--limit", 8)
    path = run / "best" / "pytorch_model.bin"
    assert run_script(evaluation, run, "--export", "course")[:2] == (0, f"{path}\n")
    theirs = transformers.BertModel.from_pretrained(run / "best").state_dict()
    written = torch.load(path, weights_only=True)
    assert {name.removeprefix("bert.") for name in written} == set(theirs)
    for name, tensor in written.items():
        assert name.startswith("bert.") and torch.equal(tensor, theirs[name.removeprefix("bert.")])


def test_onnx_computes_the_same_outputs_for_any_batch_and_length(
    train, tmp_path, run_script, monkeypatch
):
    run, export = tmp_path / "run", [tmp_path / "run", "--export", "onnx"]
    train(classifier, run, "--limit", 8, "--pooling", "mean")
    path = run / "best" / "onnx" / "model.onnx"
    assert run_script(evaluation, *export)[:2] == (0, f"{path}\n")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    model, rng = MultitaskBERT.from_pretrained(run), np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 2), (2, 3), (7, 20), (3, 48)):
        ids = torch.from_numpy(rng.integers(5, 50, (rows, length)))
        tokens = torch.from_numpy(rng.integers(1, length + 1, (rows, 1)))
        mask = (torch.arange(length) < tokens).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        with torch.no_grad():
            expected = {**model.bert(**batch), "sentence_embedding": model.embed(**batch)}
        values = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        assert set(names) == set(expected)
        for name, value in zip(names, values, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=0, atol=1e-4)

    before = path.read_bytes()
    code, _, err = run_script(evaluation, *export)
    assert (code, path.read_bytes()) == (2, before)
    assert "model.onnx: exists and is not overwritten" in err
    monkeypatch.setattr("hub.export.util.find_spec", lambda name: None)
    code, _, err = run_script(evaluation, *export, "--out", tmp_path / "other.onnx")
    assert code == 2 and "the package onnx is missing: run ./setup.sh --dev" in err
    assert not (tmp_path / "other.onnx").exists()
