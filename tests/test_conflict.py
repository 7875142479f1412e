"""Gradient conflict: by hand, against autograd, and without a trace in training."""

from argparse import Namespace
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import load_multitask, read_log, run_contents

import multitask_classifier
from bert import BertModel
from engine.conflict import GradientConflictLogger, gradient_conflict, layer_group
from engine.run_dir import RunDir
from multitask_classifier import row_losses
from prediction import embed_batch


def test_every_parameter_of_bert_belongs_to_a_part(tiny):
    model = BertModel.from_pretrained(tiny)
    expected = {"embeddings": 5, "pooler": 2}
    for i in (0, 1):  # attention: query, key, value, output, LayerNorm
        expected |= {f"layer {i} attention": 10, f"layer {i} feed-forward": 6}
    assert Counter(layer_group(name) for name, _ in model.named_parameters()) == expected


def test_conflict_by_hand():
    first_a, second_a, first_b, second_b = torch.tensor(
        [[[3.0, 0], [0, 0]], [[0, 1], [1, 0]], [[-4, 4], [1, 1]], [[-4, 4], [2, 2]]]
    )
    gradients = {"a": (first_a, lambda: second_a), "b": (first_b, lambda: second_b)}
    parts = gradient_conflict(gradients, ["pooler.a", "word_embedding"])
    assert list(parts) == ["pooler", "embeddings", "overall"]
    assert list(parts["pooler"]) == ["a|b", "a|a", "b|b"]
    root = 32**0.5
    expected = {"cosine": -12 / (3 * root), "product": -12, "magnitude": 2 * 3 * root / (9 + 32)}
    assert parts["pooler"]["a|b"] == pytest.approx(expected)
    assert parts["pooler"]["a|a"]["cosine"] == 0
    assert parts["embeddings"]["a|b"] == {"cosine": None, "product": None, "magnitude": None}
    expected = {"cosine": 1, "product": 4, "magnitude": 0.8}
    assert parts["embeddings"]["b|b"] == pytest.approx(expected)
    assert parts["overall"]["a|b"]["cosine"] == pytest.approx(-12 / (3 * 34**0.5))
    large = [torch.full((2,), 1e20)]  # whose squares leave float32
    expected = {"cosine": 1, "product": 2e40, "magnitude": 1}
    parts = gradient_conflict({"a": (large, lambda: large)}, ["pooler.a"])
    assert parts["overall"]["a|a"] == pytest.approx(expected)


def make_logger(tiny, data, run_dir, seen, **options) -> GradientConflictLogger:
    """A logger of a tiny model in training; `seen` gets each batch, mode and losses."""
    model, datasets = load_multitask(tiny, data)

    def loss_fn(batch):
        losses = row_losses(model, partial(embed_batch, model), batch)
        seen.append((batch, model.training, losses.detach()))
        return losses

    defaults = {"measure_conflict": 1, "conflict_rows": None, "seed": 1, "batch_size": 4}
    args = Namespace(run_dir=run_dir, resume=True, **{**defaults, **options})
    run = RunDir.start_or_resume(args, data={})
    return GradientConflictLogger(lambda *_: 0.5, loss_fn, model.train(), datasets, run, args)


def test_what_is_logged_is_the_conflict_of_fp32_gradients_without_dropout(tiny, data, tmp_path):
    """In a bf16 run with dropout, which goes on as it was."""
    seen, gradients = [], {}
    logger = make_logger(tiny, data, tmp_path / "run", seen)
    model = logger.model
    model.dtype = torch.bfloat16
    assert logger([], 0) == 0.5
    assert model.training and model.dtype == torch.bfloat16
    model.eval().dtype = torch.float32
    names, parameters = zip(*model.bert.named_parameters(), strict=True)
    for batch, training, logged in seen:
        losses = row_losses(model, partial(embed_batch, model), batch)
        assert not training and torch.equal(logged, losses.detach())
        grads = torch.autograd.grad(losses.mean(), parameters)
        gradients.setdefault(batch.task, []).append(dict(zip(names, grads, strict=True)))
    (entry,) = read_log(tmp_path / "run", "conflict")
    assert [len(entry["parts"]), len(entry["parts"]["overall"])] == [7, 6]
    for part, pairs in entry["parts"].items():
        members = [name for name in names if part in ("overall", layer_group(name))]
        for pair, figures in pairs.items():
            a, b = pair.split("|")
            compared = (gradients[a][0], gradients[b][int(a == b)])
            u, v = (torch.cat([g[n].flatten() for n in members]).double() for g in compared)
            cosine = torch.cosine_similarity(u, v, dim=0).item()
            magnitude = (2 * u.norm() * v.norm() / (u.norm() ** 2 + v.norm() ** 2)).item()
            assert figures["cosine"] == pytest.approx(cosine, abs=1e-5)
            assert figures["magnitude"] == pytest.approx(magnitude, abs=1e-5)


def test_more_rows_than_a_step_has_are_measured_in_parts(tiny, data, tmp_path):
    """To the same figures, on two batches without common rows, of at most half the set each."""
    seen = []

    def measure(size, rows):
        seen.clear()
        run_dir = tmp_path / f"{size}-{rows}"
        make_logger(tiny, data, run_dir, seen, batch_size=size, conflict_rows=rows)([], 0)
        return read_log(run_dir, "conflict")[0]

    whole, divided = measure(10, None), measure(4, 10)
    assert {len(batch) for batch, _, _ in seen} == {4, 2}
    assert divided["rows"] == whole["rows"] == {"sst": 10, "para": 10, "sts": 10}
    for part, pairs in divided["parts"].items():
        for pair, figures in pairs.items():
            assert figures == pytest.approx(whole["parts"][part][pair], abs=1e-5)
    assert measure(4, 10**6)["rows"] == {"sst": 20, "para": 20, "sts": 10}
    used = Counter((batch.task, row) for batch, _, _ in seen for row in batch.rows)
    assert len(used) == 40 + 40 + 20 and set(used.values()) == {1}


def test_measuring_changes_no_bit_of_a_run_and_says_what_it_costs(train, tmp_path):
    more = ["--option", "finetune", "--precision", "bf16", "--keep_last"]
    train(multitask_classifier, tmp_path / "plain", *more)
    more += ["--measure_conflict", 4, "--conflict_rows", 13]
    out = train(multitask_classifier, tmp_path / "measured", *more)
    assert "5 measurements, each as long as about 9 training steps in fp32, in a run of 18" in out
    entries = read_log(tmp_path / "measured", "conflict")
    assert [entry["step"] for entry in entries] == [0, 4, 8, 12, 16]
    assert entries[0]["rows"] == {"sst": 13, "para": 13, "sts": 10}  # STS has 20
    plain, measured = (run_contents(tmp_path / name) for name in ("plain", "measured"))
    lines = measured.pop("log.jsonl").splitlines(keepends=True)
    kept = [line for line in lines if b'"kind": "conflict"' not in line]
    assert b"".join(kept) == plain.pop("log.jsonl")
    for contents in (plain, measured):
        del contents["last/state.safetensors"][1]["log"]  # the log's length
    assert plain == measured
