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
from engine.checkpoint import read_json
from engine.export import read_pooler
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
    tokenizer = BertTokenizer.from_pretrained(tiny)
    bert = BertModel.from_pretrained(tiny)
    return {
        how: MultitaskBERT(bert, [TASKS["sst"]], pooling=how, tokenizer=tokenizer).eval()
        for how in POOLINGS
    }


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


# ---------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("how", POOLINGS)
def test_sentence_transformers_computes_the_same_embeddings(models, folders, how):
    found = np.load(folders / f"{how}-loaded.npy")
    np.testing.assert_allclose(found, models[how].encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", POOLINGS)
def test_a_model_that_sentence_transformers_trained_loads_here(models, folders, how):
    """The pooler too, which it trains as a module of its own; saved and loaded it stays so."""
    folder = folders / f"{how}-trained"
    theirs = np.load(folders / f"{how}-trained.npy")
    assert np.abs(theirs - models[how].encode(TEXTS)).max() > 1e-3
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = SentenceEncoder(BertModel.from_pretrained(folder), tokenizer, how)
    np.testing.assert_allclose(model.encode(TEXTS), theirs, rtol=0, atol=1e-5)
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
    path = dense / "2_Dense" / "model.safetensors"
    good = path.read_bytes()
    save_file({"linear.weight": torch.zeros(32, 32), "linear.bias": torch.zeros(1)}, path)
    refused(lambda: BertModel.from_pretrained(dense), path, "linear.bias of shape (32,) is missing")
    nan = {"linear.weight": torch.zeros(32, 32), "linear.bias": torch.full((32,), torch.nan)}
    save_file(nan, path)
    refused(lambda: BertModel.from_pretrained(dense), path, "linear.bias contains NaN")
    path.write_bytes(good[:-10])
    refused(lambda: BertModel.from_pretrained(dense), path, "damaged")


# ---------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("how", POOLINGS)
def test_transformers_loads_the_same_bits(models, folders, how):
    theirs = transformers.BertModel.from_pretrained(folders / how).state_dict()
    models[how].bert.save_pretrained(folders / f"{how}-bert")
    ours = load_file(folders / f"{how}-bert" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "kind",
    [
        transformers.BertModel,
        transformers.BertForSequenceClassification,
        transformers.BertForQuestionAnswering,
        transformers.BertForMaskedLM,
    ],
)
def test_a_model_that_transformers_trained_loads_here(folders, tmp_path, kind):
    """With any of its heads, which are left out: the encoder is the same."""
    theirs = kind.from_pretrained(folders / "cls", attn_implementation="eager")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folders / "cls")
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    theirs(**batch)[0].square().mean().backward()
    optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    ours = BertModel.from_pretrained(tmp_path / "model")
    encoder = getattr(theirs, "bert", theirs)
    with torch.no_grad():
        expected, found = encoder(**batch), ours(**batch)
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(found["last_hidden_state"][tokens], expected[0][tokens])
    if encoder.pooler is not None:
        torch.testing.assert_close(found["pooler_output"], expected[1])
    own = BertTokenizer.from_pretrained(tmp_path / "model")
    mine = own(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert all(torch.equal(mine[name], batch[name]) for name in mine)


# ---------------------------------------------------------------------------- model cards

METRICS = ("accuracy", "macro_f1", "pearson", "spearman")


@pytest.mark.parametrize("script", [multitask_classifier, simcse])
def test_the_best_model_has_a_model_card(folders, data, tmp_path, run_script, script):
    """The hub's own reader understands it; the numbers are those of result.json.

    The base model is one that sentence-transformers trained: that can be trained on.
    """
    base = shutil.copytree(folders / "pooler-trained", tmp_path / "base: model #1")
    run = tmp_path / "my run"
    nli = tmp_path / "triples.csv"
    nli.write_text("sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8, encoding="utf-8")
    flags = ["--model", base, "--data_dir", data, "--epochs", 1, "--run_dir", run]
    code, _, err = run_script(script, *flags, *(["--nli", nli] if script is simcse else []))
    assert code == 0, err
    card = ModelCard.load(run / "best" / "README.md")
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    assert card.data.base_model == str(base)
    assert card.data.library_name == "sentence-transformers"
    assert all(text in card.text for text in ("# my run", f"`{base}`", config["command"]))
    files = ["triples.csv (8 rows)"]
    if script is multitask_classifier:
        files = ["ids-sst-train.csv (40 rows)", "quora-train.csv (40", "sts-train.csv (20 rows)"]
    assert all(file in card.text for file in files)
    table = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line[:2] == "| "]
    expected = [
        [Path(config["files"]["dev"][task]).name, name, f"{value:.4f}"]
        for task, metrics in result["dev"].items()
        for name, value in metrics.items()
        if name in METRICS
    ]
    assert table == [["dev set", "metric", "value"], *expected]
    assert len(expected) == (1 if script is simcse else 6)


# ---------------------------------------------------------------------------- ONNX


def test_onnx_computes_the_same_outputs_for_any_batch_and_length(
    tiny, data, tmp_path, run_script, monkeypatch
):
    run = tmp_path / "run"
    flags = ["--model", tiny, "--data_dir", data, "--epochs", 1, "--limit", 8, "--run_dir", run]
    assert run_script(classifier, *flags, "--pooling", "mean")[0] == 0
    code, out, err = run_script(evaluation, run, "--export", "onnx")
    path = run / "best" / "onnx" / "model.onnx"
    assert (code, out) == (0, f"{path}\n"), err
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = MultitaskBERT.from_pretrained(run)
    rng = np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 2), (2, 3), (7, 20), (3, 48)):
        ids = torch.from_numpy(rng.integers(5, 50, (rows, length)))
        tokens = torch.from_numpy(rng.integers(1, length + 1, (rows, 1)))
        mask = (torch.arange(length) < tokens).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        with torch.no_grad():
            expected = {**model.bert(**batch), "sentence_embedding": model.embed(**batch)}
        names = [output.name for output in session.get_outputs()]
        found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        assert set(names) == set(expected)
        for name, value in zip(names, found, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=0, atol=1e-4)

    before = path.read_bytes()
    code, _, err = run_script(evaluation, run, "--export", "onnx")
    assert (code, path.read_bytes()) == (2, before)
    assert "model.onnx: exists and is not overwritten" in err
    monkeypatch.setattr("engine.export.util.find_spec", lambda name: None)
    code, _, err = run_script(evaluation, run, "--export", "onnx", "--out", tmp_path / "other.onnx")
    assert code == 2
    assert "the package onnx is missing: run ./setup.sh --dev" in err
    assert not (tmp_path / "other.onnx").exists()
