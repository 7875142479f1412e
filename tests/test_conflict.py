"""Gradient conflict: by hand, against autograd, and without a trace in training."""

import copy
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_multitask, read_log, run_contents
from torch import nn

import multitask_classifier
from bert import BertModel, layer_group
from engine.conflict import (
    PREDICTED_FALL,
    GradientConflictLogger,
    inner_products,
    moved,
    similarity,
)
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
    parts = ["pooler", "embeddings"]
    a, b, large = torch.tensor([[[3.0, 0], [0, 1]], [[-4, 4], [0, 0]], [[1e20, 1e20], [0, 1]]])
    products = inner_products(a, b, parts)
    assert {part: figures.tolist() for part, figures in products.items()} == {
        "pooler": [-12, 9, 32],
        "embeddings": [0, 1, 0],
        "overall": [-12, 10, 32],
    }
    root = 32**0.5
    expected = {"cosine": -12 / (3 * root), "product": -12}
    assert similarity(*products["pooler"].tolist()) == pytest.approx(expected)
    missing = {"cosine": None, "product": None}
    assert similarity(*products["embeddings"].tolist()) == missing
    expected = {"cosine": 1, "product": 2e40}  # squares leave float32
    products = inner_products(large, large, parts)
    assert similarity(*products["overall"].tolist()) == pytest.approx(expected)


@dataclass(eq=False)
class Quadratic:
    """Row i has the loss (theta - center_i)' H (theta - center_i) / 2; a batch is itself a set."""

    name: str
    centers: torch.Tensor  # (N, D)
    hessian: torch.Tensor  # (D, D), symmetric

    def __post_init__(self):
        self.lengths = np.ones(len(self.centers))

    def __len__(self):
        return len(self.centers)

    def batch(self, rows):
        return Quadratic(self.name, self.centers[rows], self.hessian)

    def to(self, device):
        return self

    def gradient(self, theta):
        """Of the mean loss."""
        return self.hessian @ (theta - self.centers.mean(0))

    def losses(self, theta):
        """Of each row."""
        x = theta - self.centers
        return (x @ self.hessian * x).sum(1) / 2


def test_the_change_of_a_quadratic_loss_is_known_exactly():
    """First order -eta <g_a, g_b>, to which the second adds eta^2 g_a' H_b g_a / 2."""
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    model = nn.Module()
    model.bert, model.dtype, model.device = nn.Module(), torch.float32, "cpu"
    model.bert.theta = nn.Parameter(draw(5))
    theta = model.bert.theta.detach().clone()
    datasets, seen, logged = [], [], []
    for name in "ab":
        root = draw(5, 5)
        datasets.append(Quadratic(name, draw(8, 5), 9 * root @ root.T))

    def loss_fn(batch):
        seen.append(batch)
        return batch.losses(model.bert.theta)

    args = Namespace(measure_conflict=1, conflict_rows=4, batch_size=4, seed=1)
    run = Namespace(log=lambda *_, **entry: logged.append(entry))
    GradientConflictLogger(lambda *_: 0.0, loss_fn, model, str, datasets, run, args)([], 0)
    a, b, second_a, *_, second_b, _, _ = seen  # after each second batch, a loss of a and of b
    assert "".join(batch.name for batch in seen) == "ab" + "aab" + "bab"
    rows = {"a>b": (a, b), "b>a": (b, a), "a>a": (a, second_a), "b>b": (b, second_b)}
    for step, (own, other) in rows.items():
        g = own.gradient(theta)
        eta = PREDICTED_FALL * own.losses(theta).mean() / (g @ g)
        first = -eta * (g @ other.gradient(theta))
        second = eta**2 * (g @ other.hessian @ g) / 2
        figures = logged[0]["changes"][step]
        assert figures["loss"] == pytest.approx(other.losses(theta).mean().item())
        assert figures["predicted"] == pytest.approx(first.item())
        assert figures["measured"] == pytest.approx((first + second).item(), rel=1e-8)
        assert abs(second / first) > 1e-7  # it is seen
    assert torch.equal(model.bert.theta, theta)


def test_weights_get_their_bits_back_whatever_happens():
    weights = nn.Parameter(torch.linspace(-1, 3, 999))
    before = weights.detach().clone()
    step = torch.linspace(0, 1, 999) ** 3
    with pytest.raises(MemoryError), moved([weights], [step], torch.tensor(0.1)):
        torch.testing.assert_close(weights.detach(), before - 0.1 * step)
        assert not (weights * 2).requires_grad
        raise MemoryError
    assert torch.equal(weights, before) and weights.requires_grad
    assert not torch.equal(before - 0.1 * step + 0.1 * step, before)


def make_logger(tiny, data, run_dir, seen, **options) -> GradientConflictLogger:
    """A logger of a tiny model in training; `seen` gets the batch, mode and losses of gradients."""
    model, datasets = load_multitask(tiny, data)

    def loss_fn(batch):
        losses = row_losses(model, partial(embed_batch, model), batch)
        if losses.requires_grad:
            seen.append((batch, model.training, losses.detach()))
        return losses

    defaults = {"measure_conflict": 1, "conflict_rows": None, "seed": 1, "batch_size": 4}
    args = Namespace(run_dir=run_dir, resume=True, **{**defaults, **options})
    run = RunDir.start_or_resume(args, data={})
    model.train()
    return GradientConflictLogger(lambda *_: 0.5, loss_fn, model, layer_group, datasets, run, args)


def test_what_is_logged_is_the_conflict_of_fp32_gradients_without_dropout(tiny, data, tmp_path):
    """In a bf16 run with dropout, which goes on as it was."""
    seen, gradients, batches = [], {}, {}
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
        batches.setdefault(batch.task, []).append((batch, losses.mean().item()))
    (entry,) = read_log(tmp_path / "run", "conflict")
    assert [len(entry["parts"]), len(entry["parts"]["overall"])] == [7, 6]
    for part, pairs in entry["parts"].items():
        members = [name for name in names if part in ("overall", layer_group(name))]
        for pair, figures in pairs.items():
            a, b = pair.split("|")
            compared = (gradients[a][0], gradients[b][int(a == b)])
            u, v = (torch.cat([g[n].flatten() for n in members]).double() for g in compared)
            cosine = torch.cosine_similarity(u, v, dim=0).item()
            assert figures["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert len(entry["changes"]) == 9
    for pair, figures in entry["changes"].items():
        a, b = pair.split(">")
        step, (batch, loss) = gradients[a][0], batches[b][int(a == b)]
        eta = (
            PREDICTED_FALL
            * batches[a][0][1]
            / sum(g.double().square().sum() for g in step.values())
        )
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.bert.named_parameters():
                parameter -= eta * step[name]
            after = row_losses(other, partial(embed_batch, other), batch).double().mean().item()
        assert figures["measured"] == pytest.approx(after - loss, abs=1e-6 * loss)
        assert figures["predicted"] == pytest.approx(after - loss, abs=1e-4 * loss)


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
    for pair, figures in divided["changes"].items():
        assert figures == pytest.approx(whole["changes"][pair], abs=1e-6)
    assert measure(4, 10**6)["rows"] == {"sst": 20, "para": 20, "sts": 10}
    used = Counter((batch.task, row) for batch, _, _ in seen for row in batch.rows)
    assert len(used) == 40 + 40 + 20 and set(used.values()) == {1}


def test_measuring_changes_no_bit_of_a_run_and_says_what_it_costs(train, tmp_path):
    more = ["--option", "finetune", "--precision", "bf16", "--keep_last"]
    train(multitask_classifier, tmp_path / "plain", *more)
    more += ["--measure_conflict", 4, "--conflict_rows", 13]
    out = train(multitask_classifier, tmp_path / "measured", *more)
    assert "5 measurements of up to 13 rows per batch, each taking about 14 training steps" in out
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
