"""What we save loads in other people's software to the same embeddings, and theirs loads here.

sentence-transformers imports a library by the name of our datasets.py, so it runs in a process of
its own, elsewhere.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import classifier
import evaluation
import multitask_classifier
import simcse
from bert import POOLINGS, BertModel
from checkpoint import UserError, write_json
from exchange import read_pooler
from tasks import TASKS, MultitaskBERT
from tokenizer import BertTokenizer

TEXTS = ["the film is great", "a dull plot !", "", "the cat sees a dog " * 30, "zzz, 3?"]

# Encodes TEXTS with each model folder, trains it a little, encodes again and saves it.
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
        one, other = model(features)["sentence_embedding"]
        torch.nn.functional.cosine_similarity(one, other, dim=0).backward()
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
def exchanged(models, tmp_path_factory):
    """Folders of these models, and what sentence-transformers made of them beside (`CLIENT`)."""
    place = tmp_path_factory.mktemp("exchanged")
    for how, model in models.items():
        model.save_pretrained(place / how)
    (place / "client.py").write_text(CLIENT, encoding="utf-8")
    question = json.dumps([TEXTS, [str(place / how) for how in models]])
    command = [sys.executable, "-W", "error::FutureWarning", "client.py", question]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return place


# ---------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("how", POOLINGS)
def test_sentence_transformers_encodes_as_we_do(models, exchanged, how):
    found = np.load(exchanged / f"{how}-loaded.npy")
    np.testing.assert_allclose(found, models[how].encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", POOLINGS)
def test_what_sentence_transformers_trained_loads_here(models, exchanged, how):
    """The pooler too, which it trained as a module of its own; saved and loaded it stays so."""
    folder = exchanged / f"{how}-trained"
    theirs = np.load(exchanged / f"{how}-trained.npy")
    assert np.abs(theirs - models[how].encode(TEXTS)).max() > 1e-3
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = MultitaskBERT(BertModel.from_pretrained(folder), [], pooling=how, tokenizer=tokenizer)
    np.testing.assert_allclose(model.encode(TEXTS), theirs, rtol=0, atol=1e-5)
    model.save_pretrained(exchanged / f"{how}-again")
    again = MultitaskBERT.from_pretrained(exchanged / f"{how}-again")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_what_sentence_transformers_trained_is_a_model_to_train_from(
    exchanged, data, tmp_path, run_script
):
    flags = ["--model", exchanged / "pooler-trained", "--data_dir", data, "--epochs", 1]
    code, _, err = run_script(classifier, *flags, "--run_dir", tmp_path / "run", "--limit", 8)
    assert code == 0, err


@pytest.fixture
def dense(exchanged, tmp_path):
    """A copy of the folder whose pooler sentence-transformers trained."""
    shutil.copytree(exchanged / "pooler-trained", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("1_Pooling", {"pooling_mode": "mean"}),
        ("2_Dense", {"activation_function": "torch.nn.modules.linear.Identity"}),
        ("2_Dense", {"out_features": 16}),
        ("2_Dense", {"use_residual": True}),
        ("2_Dense", {"bias": False}),
        ("2_Dense", {"in_features": [32]}),
    ],
)
def test_another_dense_module_is_no_pooler(dense, file, change):
    assert read_pooler(dense, 32)
    path = dense / file / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **change})
    assert not read_pooler(dense, 32)
    stored = load_file(dense / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(BertModel.from_pretrained(dense).pooler.weight, stored)


def test_a_damaged_dense_module_is_refused_by_its_file(dense):
    path = dense / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.zeros(32, 32), "linear.bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"2_Dense.*linear\.bias of shape \(32,\) is missing"):
        BertModel.from_pretrained(dense)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"2_Dense.*not a whole weight file"):
        BertModel.from_pretrained(dense)


# ---------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("how", POOLINGS)
def test_transformers_loads_the_same_bits(models, exchanged, how):
    theirs = transformers.BertModel.from_pretrained(exchanged / how).state_dict()
    models[how].bert.save_pretrained(exchanged / f"{how}-bert")
    ours = load_file(exchanged / f"{how}-bert" / "model.safetensors")
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
def test_what_transformers_trained_loads_here(exchanged, tmp_path, data, run_script, kind, capsys):
    """With any of its heads, which are left out: the encoder is the same."""
    theirs = kind.from_pretrained(exchanged / "cls", attn_implementation="eager")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(exchanged / "cls")
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
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["last_hidden_state"][real], expected[0][real])
    if encoder.pooler is not None:
        torch.testing.assert_close(found["pooler_output"], expected[1])
    own = BertTokenizer.from_pretrained(tmp_path / "model")
    mine = own(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert all(torch.equal(mine[name], batch[name]) for name in mine)
    flags = ["--model", tmp_path / "model", "--data_dir", data, "--run_dir", tmp_path / "run"]
    code, _, err = run_script(classifier, *flags, "--epochs", 1, "--limit", 8)
    assert code == 0, err


# ---------------------------------------------------------------------------- model cards


@pytest.mark.parametrize("script", [multitask_classifier, simcse])
def test_best_has_a_model_card(tiny, data, tmp_path, run_script, script):
    """The hub's own reader finds base model, data, metrics and command."""
    nli = tmp_path / "triples.csv"
    nli.write_text("sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8, encoding="utf-8")
    flags = ["--model", tiny, "--data_dir", data, "--epochs", 1, "--run_dir", tmp_path / "my run"]
    if script is simcse:
        flags += ["--nli", nli]
    code, _, err = run_script(script, *flags)
    assert code == 0, err
    card = ModelCard.load(tmp_path / "my run" / "best" / "README.md")
    config = json.loads((tmp_path / "my run" / "config.json").read_text(encoding="utf-8"))
    result = json.loads((tmp_path / "my run" / "result.json").read_text(encoding="utf-8"))
    assert card.data.base_model == str(tiny)
    assert card.data.command == config["command"]
    assert config["command"] in card.text
    files = ["triples.csv"]
    if script is multitask_classifier:
        files = ["ids-sst-train.csv", "quora-train.csv", "sts-train.csv"]
    assert card.data.datasets == files
    assert all(file in card.text for file in files)
    names = {
        "accuracy": "accuracy",
        "f1": "macro_f1",
        "pearsonr": "pearson",
        "spearmanr": "spearman",
    }
    told = {(r.task_name, names[r.metric_type]): r.metric_value for r in card.data.eval_results}
    dev = {(task, key): value for task, of in result["dev"].items() for key, value in of.items()}
    assert told == {key: value for key, value in dev.items() if key[1] in names.values()}
    assert len(told) == (1 if script is simcse else 6)


# ---------------------------------------------------------------------------- ONNX


def test_onnx_gives_the_same_outputs_for_any_batch_and_length(
    tiny, data, tmp_path, run_script, monkeypatch
):
    flags = ["--task", "sst", "--model", tiny, "--data_dir", data, "--epochs", 1, "--limit", 8]
    run = tmp_path / "run"
    assert run_script(classifier, *flags, "--pooling", "mean", "--run_dir", run)[0] == 0
    code, out, err = run_script(evaluation, run, "--export", "onnx")
    path = run / "best" / "onnx" / "model.onnx"
    assert (code, out) == (0, f"{path}\n"), err
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = MultitaskBERT.from_pretrained(run)
    rng = np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 2), (2, 3), (7, 20), (3, 48)):
        ids = torch.from_numpy(rng.integers(5, 50, (rows, length)))
        mask = (
            torch.arange(length) < torch.from_numpy(rng.integers(1, length + 1, (rows, 1)))
        ).long()
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
    assert code == 2
    assert "model.onnx: exists, and is not overwritten" in err
    assert path.read_bytes() == before
    monkeypatch.setattr("exchange.util.find_spec", lambda name: None)
    code, _, err = run_script(evaluation, run, "--export", "onnx", "--out", tmp_path / "other.onnx")
    assert code == 2
    assert "the package onnx is missing: run ./setup.sh --dev" in err
    assert not (tmp_path / "other.onnx").exists()
