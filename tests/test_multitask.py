"""The training scripts as a whole: what a run leaves, which weights a step moves, the methods."""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_multitask, read_log
from safetensors.torch import load_file

import classifier
import multitask_classifier
from engine.checkpoint import read_json
from model import MultitaskBERT
from multitask_classifier import make_backward, row_losses
from optimizer import AdamW
from prediction import embed_batch
from tasks import TASKS

FINETUNE = ("--option", "finetune")


def test_another_seed_gives_other_heads(train, tmp_path):
    for seed in (5, 6):
        train(classifier, tmp_path / str(seed), "--seed", seed, "--lr", 1e-9)
    heads = [load_file(tmp_path / f"{seed}/best/heads.safetensors") for seed in (5, 6)]
    assert not torch.allclose(*(tensors["sst.dense.weight"] for tensors in heads))


def test_a_run_leaves_its_record_predictions_and_a_table(train, tmp_path):
    out = train(multitask_classifier, tmp_path / "run", *FINETUNE)
    config, result = (read_json(tmp_path / f"run/{name}.json") for name in ("config", "result"))
    assert config["arguments"]["epochs"] == 2 and config["device"] == "cpu"
    assert config["rows"]["train"] == {"sst": 40, "para": 40, "sts": 20}
    assert config["decoders"] == {"sst": "linear", "para": "dot", "sts": "dot"}
    dev = read_log(tmp_path / "run", "dev")
    assert [entry["epoch"] for entry in dev] == [1, 2]  # as on the screen
    best = max(dev, key=lambda entry: entry["score"])
    assert (result["best_step"], result["best_epoch"]) == (best["step"], best["epoch"])
    assert result["overall"] == best["score"] and result["dev"] == best["tasks"]
    for task in ("sst", "para", "sts"):
        for split, file, rows in (("dev", "dev", 16), ("test", "test-student", 8)):
            path = tmp_path / f"run/predictions/{task}-{split}-output.csv"
            ids = [line.split(" , ")[0] for line in path.read_text().splitlines()[1:]]
            assert ids == [f"{TASKS[task].files.format(file)}-{i}" for i in range(rows)]
    assert not (tmp_path / "run/last").exists()
    table = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert table[0] == ["task", "metric", "score", "baseline", "rows"]
    for line, (task, metrics) in zip(table[1:], result["dev"].items(), strict=False):
        metric = "pearson" if task == "sts" else "accuracy"
        ((name, value),) = result["baselines"][task].items()
        assert line[:3] == [task, metric, f"{metrics[metric]:.3f}"]
        assert f"{value:.3f} ({name}) 16" in " ".join(line)
    assert table[-1] == ["overall", f"{result['overall']:.3f}"]


def test_linear_probing_leaves_bert_and_a_run_folder_is_a_model(train, tiny, tmp_path):
    train(classifier, tmp_path / "a", "--option", "pretrain")
    before, after = (load_file(f / "model.safetensors") for f in (tiny, tmp_path / "a/best"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(classifier, tmp_path / "b", "--model", tmp_path / "a")


@pytest.mark.parametrize("task", ["sst", "cfimdb"])
def test_the_classifier_learns(train, tmp_path, task):
    more = [*FINETUNE, "--task", task, "--epochs", 15, "--pooling", "mean", "--lr", "3e-3"]
    train(classifier, tmp_path / "run", *more)
    losses = [entry["loss"] for entry in read_log(tmp_path / "run", "train")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    result = read_json(tmp_path / "run/result.json")
    assert result["dev"][task]["accuracy"] > result["baselines"][task]["majority class"]


def test_sampling_accumulation_and_decoders_are_those_of_the_flags(train, tmp_path):
    more = [*FINETUNE, "--sampling", "proportional", "--accumulate", 2]
    more += ["--sts_decoder", "cosine", "--para_decoder", "concat"]
    train(multitask_classifier, tmp_path / "run", *more)
    decoders = read_json(tmp_path / "run/config.json")["decoders"]
    assert decoders == {"sst": "linear", "para": "concat", "sts": "cosine"}
    assert len(read_log(tmp_path / "run", "train")) == 2 * (3 + 3 + 2)


def test_hidden_dropout_reaches_bert_and_heads(train, tmp_path, monkeypatch):
    models, freeze = [], MultitaskBERT.freeze
    spy = lambda self, frozen: (models.append(self), freeze(self, frozen))  # noqa: E731
    monkeypatch.setattr(MultitaskBERT, "freeze", spy)
    train(multitask_classifier, tmp_path / "run", "--hidden_dropout_prob", "0.37")
    modules = dict(models[0].named_modules()).items()
    dropouts = [m.p for n, m in modules if n.endswith("dropout") and "self_attention" not in n]
    assert dropouts == [0.37] * (1 + 2 * 2 + 3)  # embeddings, two layers, three heads


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("left_out", [None, "sts"])
def test_a_step_moves_its_own_head_and_bert_and_nothing_else(tiny, data, frozen, left_out):
    """Not even by momentum; nothing reaches a frozen BERT, or BERT from a task left out."""
    model, datasets = load_multitask(tiny, data)
    model.freeze(frozen)
    modules = [*model.heads.values(), *([] if frozen else [model.bert])]
    optimizers = [AdamW(module.parameters(), lr=1e-2) for module in modules]
    args = Namespace(surgery="none", leave_out=left_out, rdrop=0.0)
    backward = make_backward(args, model, partial(embed_batch, model))

    def take_step(batch) -> set[str]:
        before = {name: p.clone() for name, p in model.state_dict().items()}
        backward([batch], 0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}

    for dataset in datasets:  # moments that are not zero
        take_step(dataset.batch(np.arange(4)))
    names = model.state_dict().keys()
    layers = {name for name in names if name.startswith("bert.bert_layers")}
    for dataset in datasets:
        moved = take_step(dataset.batch(np.arange(4, 10)))
        head = {name for name in names if name.startswith(f"heads.{dataset.name}.")}
        if frozen or dataset.name == left_out:
            assert moved == head
        else:  # softmax does not depend on the keys' bias
            assert {name for name in moved if name.startswith("heads.")} == head
            assert all("key.bias" in name for name in layers - moved)


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_rdrop_is_the_loss_of_two_passes_and_their_disagreement(tiny, data, task):
    """Under different dropout masks."""
    model, datasets = load_multitask(tiny, data)
    dataset = next(d for d in datasets if d.name == task)
    batch, labels = dataset.batch(np.arange(6)), TASKS[task].labels
    torch.manual_seed(1)
    losses = row_losses(model.train(), partial(embed_batch, model), batch, rdrop=3.0)
    torch.manual_seed(1)
    a, b = (model.decode(task, embed_batch(model, batch)) for _ in range(2))
    assert not torch.equal(a, b)
    expected = (labels.loss(a, batch.labels) + labels.loss(b, batch.labels)) / 2
    torch.testing.assert_close(losses, expected + 3 * labels.disagreement(a, b))
    with torch.no_grad():
        model.eval()  # without dropout two passes agree
        plain, rdrop = (
            row_losses(model, partial(embed_batch, model), batch, rdrop=r) for r in (0, 3)
        )
    torch.testing.assert_close(plain, rdrop)


def test_pcgrad_and_sum_train_on_all_tasks_in_a_step_and_differ(train, tmp_path):
    losses = {}
    for surgery in ("sum", "pcgrad"):
        more = [*FINETUNE, "--surgery", surgery, "--accumulate", 2, "--lr", "1e-2"]
        train(multitask_classifier, tmp_path / surgery, *more)
        entries = read_log(tmp_path / surgery, "train")
        assert [entry["task"] for entry in entries] == ["sst+para+sts"] * 4  # 2 steps of STS
        losses[surgery] = [entry["loss"] for entry in entries]
    assert losses["sum"][0] == losses["pcgrad"][0]
    assert losses["sum"][1:] != losses["pcgrad"][1:]


def test_lpft_probes_until_dev_is_best_and_goes_on_from_those_heads(train, tmp_path, monkeypatch):
    heads, fit = [], multitask_classifier.train

    def watched(args, model, *rest, **options):
        heads.append({name: p.clone() for name, p in model.heads.state_dict().items()})
        trainer = fit(args, model, *rest, **options)
        if len(heads) == 1:
            heads.append(load_file(tmp_path / "run/probe/heads.safetensors"))
        return trainer

    monkeypatch.setattr(multitask_classifier, "train", watched)
    out = train(multitask_classifier, tmp_path / "run", "--option", "lpft", "--epochs", 1)
    assert "linear probing is done" in out
    first, probed, second = heads
    assert all(torch.equal(second[name], probed[name]) for name in probed)
    assert any(not torch.equal(first[name], probed[name]) for name in probed)
    dev = read_log(tmp_path / "run", "dev")
    scores = [entry["score"] for entry in dev if entry["stage"] == "probe"]
    assert len(scores) in (int(np.argmax(scores)) + 4, 50)  # three evaluations without a better one
    assert [entry["stage"] for entry in dev[len(scores) :]] == ["finetune"]
    for entry in read_log(tmp_path / "run", "train"):
        names = {"sst", "para", "sts"} | ({"bert"} if entry["stage"] == "finetune" else set())
        assert set(entry["lr"]) == names and len(set(entry["lr"].values())) == 1
    assert read_json(tmp_path / "run/result.json")["best_epoch"] == 1
    assert not (tmp_path / "run/probe").exists()


def test_the_stages_of_lpft_may_have_fixed_lengths(train, tmp_path):
    flags = ["--option", "lpft", "--epochs", 1, "--probe_epochs", 5, "--final_only"]
    train(multitask_classifier, tmp_path / "run", *flags)
    dev = read_log(tmp_path / "run", "dev")
    assert [(entry["stage"], entry["epoch"]) for entry in dev] == [("probe", 5), ("finetune", 1)]
