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
from simcse import ContrastiveBackward, contrastive_loss, false_negatives, sentence_keys
from tasks import TASKS
from tokenizer import BertTokenizer


def equation_1(anchors, positives, negatives, excluded, temperature, weight) -> list[float]:
    """Equation 1 of the paper with h_j in the denominator, term by term."""

    def e(a, b) -> float:
        cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        return math.exp(cosine / temperature)

    losses = []
    for i, anchor in enumerate(anchors):
        total = 0.0
        for j in range(len(anchors)):
            if i == j or not excluded[i][j]:
                total += e(anchor, positives[j])
            if negatives is not None and not excluded[i][len(anchors) + j]:
                total += (weight if i == j else 1.0) * e(anchor, negatives[j])
        losses.append(-math.log(e(anchor, positives[i]) / total))
    return losses


OPTIONS = st.tuples(st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([0.5, 1.0, 3.0]))


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.booleans(), OPTIONS, st.integers(0, 999))
def test_the_loss_is_equation_1(rows, width, hard, options, seed):
    (temperature, weight), rng = options, np.random.default_rng(seed)
    vectors = rng.normal(size=(3, rows, width))
    excluded = rng.random((rows, 2 * rows)) < 0.3
    negatives = vectors[2] if hard else None
    expected = equation_1(vectors[0], vectors[1], negatives, excluded, temperature, weight)
    losses = contrastive_loss(
        *(torch.from_numpy(v) for v in vectors[: 3 if hard else 2]),
        excluded=torch.from_numpy(excluded[:, : rows * (1 + hard)]),
        temperature=temperature,
        hard_negative_weight=weight,
    )
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_false_negatives_by_hand():
    """Rows: (a, b, c), (a, d, b), (e, a, f); candidates: b d a, c b f."""
    keys = torch.tensor([[0, 0, 4], [1, 3, 0], [2, 1, 5]])
    expected = [
        [1, 1, 1, 0, 1, 0],  # (a, b): b, d (of an equal premise), a itself, b again
        [1, 1, 1, 0, 0, 0],  # (a, d): b (of an equal premise), d, a
        [0, 0, 1, 0, 0, 0],  # (e, a): a
    ]
    assert false_negatives(keys).int().tolist() == expected


def make_triples(count: int) -> list[tuple[str, str, str]]:
    rng = random.Random(0)
    anchors = [sentence(rng) + " !" * (i % 5) for i in range(count)]
    return [(anchor, f"{anchor} .", sentence(rng)) for anchor in anchors]


@pytest.fixture
def make_dataset(tiny):
    tokenizer = BertTokenizer.from_pretrained(tiny)
    return lambda rows: TokenizedDataset("nli", tiny, list(zip(*rows, strict=True)), tokenizer)


def make_backward(tiny, training=False, **changes) -> ContrastiveBackward:
    model = SentenceEncoder(BertModel.from_pretrained(tiny), BertTokenizer.from_pretrained(tiny))
    options = {"pooling": "mean", "temperature": 0.1, "hard_negative_weight": 1.0, **changes}
    return ContrastiveBackward(model.train(training), Namespace(**options))


@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 1.0), (1.0, 3.0)])
def test_the_loss_of_a_step_is_equation_1(tiny, make_dataset, temperature, weight):
    """Of its embeddings, without equal sentences, with the flags' temperature and weight."""
    rows = make_triples(6)
    rows[4] = rows[1]
    batch = make_dataset(rows).batch(np.arange(6))
    backward = make_backward(tiny, temperature=temperature, hard_negative_weight=weight)
    vectors = [v.detach().double().numpy() for v in backward.embed(batch)]
    excluded = false_negatives(sentence_keys([batch])).tolist()
    assert sum(map(sum, excluded)) > 6
    expected = np.mean(equation_1(*vectors, excluded, temperature, weight))
    assert backward([batch], 0) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("views", [3, 1])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_gradient_caching_gives_the_gradient_of_the_big_batch(tiny, make_dataset, views, pooling):
    """In float64 and without dropout; with uneven parts and equal sentences."""
    rows = make_triples(11)
    rows[7] = rows[2]
    dataset, results = make_dataset([row[:views] for row in rows]), []
    for sizes in ([11], [5, 6], [1] * 11):
        backward = make_backward(tiny, pooling=pooling)
        backward.model.double()
        parts = np.split(np.arange(11), np.cumsum(sizes)[:-1])
        loss = backward([dataset.batch(rows) for rows in parts], 0)
        grads = {n: p.grad for n, p in backward.model.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, whole), *others = results
    for cached_loss, cached in others:
        assert cached_loss.item() == pytest.approx(loss.item(), abs=1e-6)
        torch.testing.assert_close(cached, whole, atol=1e-9, rtol=1e-9)


def test_gradient_caching_repeats_the_dropout_of_the_first_pass(tiny, make_dataset):
    """And leaves the generator as if every batch had been embedded once."""
    dataset = make_dataset(make_triples(6))
    batches = [dataset.batch(np.arange(3)), dataset.batch(np.arange(3, 6))]
    backward = make_backward(tiny, training=True)
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


def test_gradient_caching_holds_the_activations_of_one_small_batch(tiny, make_dataset):
    """Counted in the tensors that autograd saves for the backward pass."""
    dataset, peaks = make_dataset(make_triples(32)), []
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

    for parts in (1, 8):
        peak = 0
        batches = [dataset.batch(rows) for rows in np.split(np.arange(32), parts)]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            make_backward(tiny, training=True)(batches, 0)
        peaks.append(peak)
    assert 0 < peaks[1] < peaks[0] / 3


def test_unsupervised_views_differ_by_dropout_only(tiny, make_dataset):
    batch = make_dataset([row[:1] for row in make_triples(4)]).batch(np.arange(4))
    first, second = make_backward(tiny, training=True).embed(batch)
    assert first.shape == (4, 32) and not torch.allclose(first, second)
    torch.testing.assert_close(*make_backward(tiny).embed(batch))


def test_sentence_keys_do_not_depend_on_padding(make_dataset):
    """The same sentence beside a short and beside a long one, in two batches."""
    dataset = make_dataset([("a film",), ("a film",), ("the dog sees a cat !",)])
    keys = sentence_keys([dataset.batch(np.array([0])), dataset.batch(np.array([1, 2]))])
    assert keys.shape == (2, 3)
    assert keys[0, 0] == keys[0, 1] == keys[1, 0] != keys[0, 2]


@pytest.fixture
def nli(tmp_path):
    rows = ["sent0,sent1,hard_neg", *map(",".join, make_triples(30))]
    (tmp_path / "nli.csv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path / "nli.csv"


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
    assert simcse.evaluate_embeddings(model, sts, 8)["metrics"] == result["dev"]["sts"]
    train(multitask_classifier, tmp_path / "next", "--model", tmp_path / "run/best")


def test_training_lowers_the_loss(train, tmp_path, nli):
    train(simcse, tmp_path / "run", "--nli", nli, "--epochs", 12, "--pooling", "mean")
    losses = [entry["loss"] for entry in read_log(tmp_path / "run", "train")]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_too_few_triples_are_refused(tiny, data, tmp_path, run_script):
    path = tmp_path / "nli.csv"
    path.write_text("sent0,sent1,hard_neg\na,a,a\n", encoding="utf-8")
    for unit, mode in {"rows": "supervised", "distinct sentences": "unsupervised"}.items():
        flags = quick_run(tiny, data, tmp_path / "run", "--nli", path, "--mode", mode)
        code, _, err = run_script(simcse, *flags)
        assert code == 2 and f"nli.csv: fewer than two {unit}" in err
    assert not (tmp_path / "run").exists()
