"""Ensembles of runs, the mean of their weights, and what a record says of a run."""

import json
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import quick_run, write_data
from model_files import edit_json
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score

import multitask_classifier
import simcse
from datasets import Example, read_examples
from engine.checkpoint import read_json, read_text
from model import MultitaskBERT
from saved_runs import run_facts
from tasks import TASKS


def test_a_record_names_the_kind_of_device_that_a_resumed_run_asks_for():
    """Weights are on "cuda:0", which is no value of --device."""
    model = Mock(device=torch.device("cuda", 0), dtype=torch.float32, bert=torch.nn.Linear(1, 1))
    assert run_facts(model, {})["device"] == "cuda"


# ---------------------------------------------------------------------------- several runs

RUNS = {
    "first": "--seed 1 --leave_out sts",
    "second": "--seed 2 --epochs 1",
    "joint": "--seed 3 --para_encoding joint",
    "sentiment": "--tasks sst",
    "limited": "--limit 10",
}


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory) -> Path:
    """A folder of finished runs, by name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        flags = ["--option", "finetune", "--pooling", "mean", *words.split()]
        multitask_classifier.main(quick_run(tiny, data, folder / name, *flags))
    return folder


def row_logits(folder: Path, examples: list[Example], task: str) -> np.ndarray:
    """The logits (N, C) of a run, through the course's interface, a row at a time."""
    model, rows = MultitaskBERT.from_pretrained(folder), []
    functions = (model.predict_sentiment, model.predict_paraphrase, model.predict_similarity)
    function = dict(zip(("sst", "para", "sts"), functions, strict=True))[task]
    for example in examples:
        encoded = [model.tokenizer([text], return_tensors="pt") for text in example.texts]
        tensors = [x for e in encoded for x in (e["input_ids"], e["attention_mask"])]
        with torch.no_grad():
            rows.append(function(*tensors)[0].numpy())
    return np.stack(rows)


def test_an_ensemble_averages_the_logits_of_unlike_models(runs, data, tmp_path, ask):
    """Runs with other seeds, epochs and pair encodings: metrics on dev, and all six files."""
    names = ["first", "second", "joint"]
    folders = [runs / name for name in names]
    out, err = ask(*folders)
    answer = json.loads(out)
    ask(*folders, "--submit", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert len(files) == 6
    scores = []
    for task in ("sst", "para", "sts"):
        for split in ("test", "dev"):
            path, labelled = data / TASKS[task].file(split), split == "dev"
            examples = read_examples(path, TASKS[task], labelled)[0]
            logits = np.mean([row_logits(folder, examples, task) for folder in folders], axis=0)
            header, *lines = files[f"predictions/{task}-{split}-output.csv"].splitlines()
            ids, texts = zip(*(line.split(" , ") for line in lines), strict=True)
            assert header == f"id \t {TASKS[task].header} "
            assert list(ids) == [example.id for example in examples]
            rule = {"sst": logits.argmax(-1), "para": logits[:, 0] > 0, "sts": logits[:, 0]}
            predicted = rule[task].astype(float)
            assert [float(text) for text in texts] == pytest.approx(list(predicted), abs=1e-4)
        gold = [example.label for example in examples]
        if task == "sts":
            r = np.corrcoef(predicted, gold)[0, 1]
            assert answer["dev"]["sts"]["pearson"] == pytest.approx(r, abs=1e-4)
            scores.append((r + 1) / 2)
        else:
            scores.append(accuracy_score(gold, predicted))
            assert answer["dev"][task]["accuracy"] == scores[-1]
    assert answer["overall"] == pytest.approx(np.mean(scores), abs=1e-4)
    for name in names:  # the members' own scores beside
        own = read_json(runs / name / "result.json")["overall"]
        assert f"{runs / name}: sst accuracy " in err and f"overall {own:.3f}" in err


def test_a_run_of_mean_weights_is_a_run_like_any_other(runs, tmp_path, ask, refused):
    """Its weights are the means, and it is evaluated and submitted by itself."""
    mean = tmp_path / "mean"
    out, err = ask(runs / "first", runs / "second", "--average", mean)
    result = read_json(mean / "result.json")
    assert f"{mean} (mean of the weights): " in err and f"overall {result['overall']:.3f}" in err
    answer = json.loads(out)
    assert answer["average"] == {"dev": result["dev"], "overall": result["overall"]}
    assert answer["overall"] != result["overall"]  # the ensemble's
    for file in ("model.safetensors", "heads.safetensors"):
        a, b, both = (load_file(f / "best" / file) for f in (runs / "first", runs / "second", mean))
        assert a.keys() == both.keys()
        for name in a:
            np.testing.assert_allclose(both[name], (a[name] + b[name]) / 2, atol=1e-7)
    assert "the same metrics, bit for bit" in ask(mean)[1]
    assert ask(mean, "--submit", tmp_path / "mean.zip")[0] == f"{tmp_path / 'mean.zip'}\n"
    config = read_json(mean / "config.json")
    assert f"{result['dev']['sst']['accuracy']:.4f}" in read_text(mean / "best/README.md")
    assert config["average_of"] == [str(runs / "first"), str(runs / "second")]
    assert config["arguments"]["leave_out"] == "sts"  # as in the first run's record
    refused([runs / "first", runs / "second", "--average", mean], mean, "name a new folder")


def test_runs_that_make_no_ensemble_are_refused_by_name(tiny, runs, data, tmp_path, refused):
    first = runs / "first"
    submit = ["--submit", tmp_path / "x.zip"]
    refused([first, first], first, "name at least two runs, each once")
    refused([first, runs / "second" / ".." / "first"], first, "name at least two runs, each once")
    refused([first, "--average", tmp_path / "mean"], first, "name at least two runs, each once")
    refused([first, runs / "sentiment"], first, runs / "sentiment", "not sst and para, sst, sts")
    refused([first, runs / "limited"], first, runs / "limited", "not --limit 10 and all rows")
    refused([first, tmp_path / "gone", *submit], "gone: not a run folder")
    # The same file names, but other rows in one of the files.
    other = write_data(tmp_path / "data", {"train": 40, "dev": 16, "test": 8})
    text = (other / "sts-train.csv").read_text(encoding="utf-8")
    (other / "sts-train.csv").write_text(text.replace("the", "a"), encoding="utf-8")
    multitask_classifier.main(quick_run(tiny, other, tmp_path / "other"))
    refused([first, tmp_path / "other"], first, tmp_path / "other", "different train files of sts")
    nli = tmp_path / "nli.csv"
    rows = "".join(f"the film {i},a plot {i},the cat {i}\n" for i in range(12))
    nli.write_text("sent0,sent1,hard_neg\n" + rows, encoding="utf-8")
    simcse.main(quick_run(tiny, data, tmp_path / "simcse", "--nli", nli))
    refused([first, tmp_path / "simcse"], tmp_path / "simcse", "has no heads")
    # Models with different heads or starting points cannot be averaged.
    average = ["--average", tmp_path / "mean"]
    refused([first, runs / "joint", *average], runs / "joint", "needs the same heads")
    copy = shutil.copytree(runs / "second", tmp_path / "second")
    edit_json(copy / "config.json", model_checksum="0")
    refused([first, copy, *average], copy, "the same weights to start from (--model)")
    edit_json(
        copy / "config.json", model_checksum=read_json(first / "config.json")["model_checksum"]
    )
    edit_json(copy / "config.json", "arguments", pooling="cls")
    refused([first, copy, *average], copy, "needs the same --pooling")
    assert not (tmp_path / "mean").exists() and not (tmp_path / "x.zip").exists()
    refused([first, runs / "second", "--compare", runs / "joint"], "--compare takes one run")
    refused([first, runs / "second", *submit, *average], "not allowed with")
    # Runs that do, but whose predictions the leaderboard would not take.
    for name, expected in {"limited": "--limit 10, but", "sentiment": "the run has sst"}.items():
        copy = shutil.copytree(runs / name, tmp_path / name)
        refused([runs / name, copy, *submit], runs / name, expected)
