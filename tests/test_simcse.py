"""SimCSE: the loss against equation 1, cached gradients against those of the big batch, runs."""

import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import quick_run, read_log, sentence
from hypothesis import given, settings
from hypothesis import strategies as st

import multitask_classifier
import simcse
from bert import BertModel
from datasets import TaskDataset, TokenizedDataset
from engine.checkpoint import read_json
from model import MultitaskBERT, SentenceEncoder
from simcse import (
    ContrastiveBackward,
    contrastive_loss,
    evaluate_embeddings,
    false_negatives,
    sentence_keys,
)
from tasks import TASKS
from tokenizer import BertTokenizer

# ---------------------------------------------------------------------------- the loss


def cosine(a, b) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def equation_1(anchors, positives, negatives, excluded, temperature, weight) -> list[float]:
    """Equation 1 of the paper with h_j in the denominator, term by term."""
    losses = []
    for i, anchor in enumerate(anchors):
        total = 0.0
        for j in range(len(anchors)):
            if i == j or not excluded[i][j]:
                total += math.exp(cosine(anchor, positives[j]) / temperature)
            if negatives is not None and not excluded[i][len(anchors) + j]:
                factor = weight if i == j else 1.0
                total += factor * math.exp(cosine(anchor, negatives[j]) / temperature)
        losses.append(-math.log(math.exp(cosine(anchor, positives[i]) / temperature) / total))
    return losses


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    hard=st.booleans(),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_the_loss_is_equation_1(rows, width, hard, temperature, weight, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(3, rows, width))
    excluded = rng.random((rows, 2 * rows)) < 0.3
    negatives = vectors[2] if hard else None
    expected = equation_1(vectors[0], vectors[1], negatives, excluded, temperature, weight)
    found = contrastive_loss(
        *(torch.from_numpy(v) for v in vectors[: 3 if hard else 2]),
        excluded=torch.from_numpy(excluded[:, : rows * (1 + hard)]),
        temperature=temperature,
        hard_negative_weight=weight,
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_the_loss_does_not_depend_on_the_length_of_a_vector():
    u, v, w = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrastive_loss(u, v, w), contrastive_loss(7 * u, v / 3, 2 * w))


def test_false_negatives_by_hand():
    """Rows: (a, b, c), (a, d, b), (e, a, f); candidates: b d a, c b f."""
    keys = torch.tensor([[0, 0, 4], [1, 3, 0], [2, 1, 5]])
    expected = [
        [1, 1, 1, 0, 1, 0],  # (a, b): b, d (of an equal premise), a itself, b again
        [1, 1, 1, 0, 0, 0],  # (a, d): b (of an equal premise), d, a
        [0, 0, 1, 0, 0, 0],  # (e, a): a
    ]
    assert false_negatives(keys).int().tolist() == expected


# ---------------------------------------------------------------------------- a step


@pytest.fixture
def tokenizer(tiny):
    return BertTokenizer.from_pretrained(tiny)


def make_triples(count: int) -> list[tuple[str, str, str]]:
    rng = random.Random(0)
    anchors = [sentence(rng) + " !" * (i % 5) for i in range(count)]
    return [(anchor, f"{anchor} .", sentence(rng)) for anchor in anchors]


def make_dataset(tiny, tokenizer, rows) -> TokenizedDataset:
    return TokenizedDataset("nli", tiny, list(zip(*rows, strict=True)), tokenizer)


def make_backward(tiny, tokenizer, training=False, **changes) -> ContrastiveBackward:
    model = SentenceEncoder(BertModel.from_pretrained(tiny), tokenizer).train(training)
    options = {"pooling": "mean", "temperature": 0.1, "hard_negative_weight": 1.0, **changes}
    return ContrastiveBackward(model, Namespace(**options))


@pytest.mark.parametrize("options", [(0.1, 1.0), (1.0, 3.0)])
def test_the_loss_of_a_step_is_equation_1_of_its_embeddings(tiny, tokenizer, options):
    """With the flags' temperature and weight; equal sentences are left out of the sum."""
    temperature, weight = options
    rows = make_triples(6)
    rows[4] = rows[1]
    batch = make_dataset(tiny, tokenizer, rows).batch(np.arange(6))
    changes = {"temperature": temperature, "hard_negative_weight": weight}
    backward = make_backward(tiny, tokenizer, **changes)
    vectors = [v.detach().double().numpy() for v in backward.embed(batch)]
    first, second, third = zip(*rows, strict=True)
    excluded = [
        [
            text in (first[i], second[i]) or (j < 6 and first[i] == first[j])
            for j, text in enumerate([*second, *third])
        ]
        for i in range(6)
    ]
    assert sum(map(sum, excluded)) > 6
    expected = np.mean(equation_1(*vectors, excluded, temperature, weight))
    assert backward([batch], 0) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("views", [3, 1])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_gradient_caching_gives_the_gradient_of_the_big_batch(tiny, tokenizer, views, pooling):
    """In float64 and without dropout; with uneven parts and equal sentences."""
    rows = make_triples(11)
    rows[7] = rows[2]
    dataset = make_dataset(tiny, tokenizer, [row[:views] for row in rows])
    found = []
    for sizes in ([11], [5, 6], [1] * 11):
        backward = make_backward(tiny, tokenizer, pooling=pooling)
        backward.model.double()
        parts = np.split(np.arange(11), np.cumsum(sizes)[:-1])
        loss = backward([dataset.batch(rows) for rows in parts], 0)
        grads = {n: p.grad for n, p in backward.model.named_parameters() if p.grad is not None}
        found.append((loss, grads))
    (loss, whole), *others = found
    for cached_loss, cached in others:
        assert cached_loss == pytest.approx(loss, abs=1e-6)
        assert whole.keys() == cached.keys()
        for name, grad in whole.items():
            torch.testing.assert_close(cached[name], grad, atol=1e-9, rtol=1e-9, msg=name)


def test_gradient_caching_repeats_the_dropout_of_the_first_pass(tiny, tokenizer):
    """And leaves the generator as if every batch had been embedded once."""
    dataset = make_dataset(tiny, tokenizer, make_triples(6))
    batches = [dataset.batch(np.arange(3)), dataset.batch(np.arange(3, 6))]
    backward = make_backward(tiny, tokenizer, training=True)
    embed, seen = backward.embed, []
    backward.embed = lambda batch: seen.append(embed(batch)) or seen[-1]
    torch.manual_seed(4)
    backward(batches, 0)
    after = torch.rand(1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    torch.manual_seed(4)
    for batch in batches:
        embed(batch)
    assert torch.equal(after, torch.rand(1))


def test_gradient_caching_holds_the_activations_of_one_small_batch(tiny, tokenizer):
    """Counted in the tensors that autograd saves for the backward pass."""
    dataset = make_dataset(tiny, tokenizer, make_triples(32))
    held = peak = 0

    class Saved:
        """A saved tensor; its elements count as held while it lives."""

        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor = tensor
            held += tensor.numel()
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.numel()

    peaks = []
    for parts in (1, 8):
        peak = 0
        backward = make_backward(tiny, tokenizer, training=True)
        batches = [dataset.batch(rows) for rows in np.split(np.arange(32), parts)]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            backward(batches, 0)
        peaks.append(peak)
    assert 0 < peaks[1] < peaks[0] / 3


def test_unsupervised_views_differ_by_dropout_only(tiny, tokenizer):
    batch = make_dataset(tiny, tokenizer, [row[:1] for row in make_triples(4)]).batch(np.arange(4))
    first, second = make_backward(tiny, tokenizer, training=True).embed(batch)
    assert first.shape == (4, 32) and not torch.allclose(first, second)
    torch.testing.assert_close(*make_backward(tiny, tokenizer).embed(batch))


def test_sentence_keys_do_not_depend_on_padding(tiny, tokenizer):
    """The same sentence beside a short and beside a long one, in two batches."""
    rows = [("a film",), ("a film",), ("the dog sees a cat !",)]
    dataset = make_dataset(tiny, tokenizer, rows)
    keys = sentence_keys([dataset.batch(np.array([0])), dataset.batch(np.array([1, 2]))])
    assert keys.shape == (2, 3)
    assert keys[0, 0] == keys[0, 1] == keys[1, 0] != keys[0, 2]


# ---------------------------------------------------------------------------- whole runs

HEADER = "sent0,sent1,hard_neg\n"


@pytest.fixture
def nli(tmp_path):
    path = tmp_path / "nli.csv"
    rows = "".join(f"{','.join(row)}\n" for row in make_triples(30))
    path.write_text(HEADER + rows, encoding="utf-8")
    return path


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
def test_a_run_starts_a_multitask_run(train, data, tmp_path, nli, mode):
    more = ["--nli", nli, "--mode", mode, "--accumulate", 2, "--eval_every", 1]
    out = train(simcse, tmp_path / "run", *more)
    assert "before training: sts spearman" in out
    dev = read_log(tmp_path / "run", "dev")
    assert dev[0]["step"] == dev[0]["epoch"] == 0 and dev[1]["epoch"] == 1
    assert {"spearman", "alignment", "uniformity"} <= dev[1]["metrics"].keys()
    result = read_json(tmp_path / "run/result.json")
    assert result["before"]["sts"] == dev[0]["metrics"]
    assert result["dev"]["sts"]["spearman"] == max(entry["score"] for entry in dev[1:])
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert model.pooling == ("pooler" if mode == "supervised" else "cls")
    sts = TaskDataset(data / "sts-dev.csv", TASKS["sts"], model.tokenizer)
    assert evaluate_embeddings(model, sts, 8)["metrics"] == result["dev"]["sts"]
    train(multitask_classifier, tmp_path / "next", "--model", tmp_path / "run/best")


def test_training_lowers_the_loss(train, tmp_path, nli):
    train(simcse, tmp_path / "run", "--nli", nli, "--epochs", 12, "--pooling", "mean")
    losses = [entry["loss"] for entry in read_log(tmp_path / "run", "train")]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        ("sent0,sent1\na,b\n", [], "nli.csv"),
        (HEADER + "a,b,c\na,,c\n", [], "nli.csv, line 3: sent1 is empty"),
        (HEADER + "a,b,c\n", [], "nli.csv: fewer than two rows"),
        (HEADER, ["--nli", "nowhere.csv"], "nowhere.csv: no such file"),
        (HEADER, ["--temperature", "0"], "--temperature: 0 is out of range"),
        (HEADER, ["--mode", "unsupervised", "--hard_negative_weight", "2"], "no hard negatives"),
        (HEADER, ["--batch_size", "1"], "two rows per batch"),
        (HEADER, ["--limit", "1"], "two rows per batch"),
    ],
)
def test_bad_triples_and_flags_are_refused_in_one_line(
    tiny, data, tmp_path, run_script, content, flags, expected
):
    (tmp_path / "nli.csv").write_text(content, encoding="utf-8")
    more = ["--nli", tmp_path / "nli.csv", *flags]
    code, _, err = run_script(simcse, *quick_run(tiny, data, tmp_path / "run", *more))
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
