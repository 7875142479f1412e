"""SimCSE: the loss against a plain double loop, the cached gradients against the big batch's."""

import json
import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import multitask_classifier
import simcse
from bert import BertModel
from contrastive import (
    Contrast,
    alignment,
    contrastive_loss,
    false_negatives,
    figures,
    sentence_keys,
    uniformity,
)
from datasets import Mixture, Sentences, TaskData
from tasks import TASKS, MultitaskBERT
from tokenizer import BertTokenizer

COLUMNS = "sent0,sent1,hard_neg\n"


def cosine(a, b) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def double_loop(anchors, positives, negatives, excluded, temperature, weight) -> list[float]:
    """Equation (1) with h_j in the denominator, term by term."""
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
    expected = double_loop(vectors[0], vectors[1], negatives, excluded, temperature, weight)
    tensors = [torch.from_numpy(v) for v in vectors[: 3 if hard else 2]]
    mask = torch.from_numpy(excluded[:, : len(tensors[1]) * (len(tensors) - 1)])
    found = contrastive_loss(
        *tensors, excluded=mask, temperature=temperature, hard_negative_weight=weight
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_the_loss_does_not_see_the_length_of_a_vector():
    u, v, w = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrastive_loss(u, v, w), contrastive_loss(7 * u, v / 3, 2 * w))


def test_false_negatives_by_hand():
    """Rows: (a, b, c), (a, d, b), (e, a, f)."""
    keys = torch.tensor([[0, 0, 4], [1, 3, 0], [2, 1, 5]])
    found = false_negatives(keys)
    expected = [
        # b d a   c b f: row 0 is (a, b): its b, d (of an equal premise), a itself, b again
        [1, 1, 1, 0, 1, 0],
        # row 1 is (a, d): b (of an equal premise), d, a
        [1, 1, 1, 0, 0, 0],
        # row 2 is (e, a): a
        [0, 0, 1, 0, 0, 0],
    ]
    assert found.int().tolist() == expected


@pytest.fixture
def tokenizer(tiny):
    return BertTokenizer.from_pretrained(tiny)


def triples(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        a = sentence(rng) + " !" * (i % 5)
        made.append((a, f"{a} .", sentence(rng)))
    return made


def contrast(tiny, tokenizer, **settings):
    model = MultitaskBERT(BertModel.from_pretrained(tiny), [], tokenizer=tokenizer).train()
    args = Namespace(**{"pooling": "mean", "temperature": 0.1, "hard_negative_weight": 1.0})
    vars(args).update(settings)
    return Contrast(model, args)


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [(0.1, 1.0), (1.0, 3.0)])
def test_a_steps_loss_is_equation_1_on_its_embeddings(tiny, tokenizer, settings):
    """With the flags' temperature and weight, and equal sentences left out of the sum."""
    rows = triples(6)
    rows[4] = rows[1]
    data = Sentences("nli", tiny, list(zip(*rows, strict=True)), tokenizer)
    temperature, weight = settings
    engine = contrast(tiny, tokenizer, temperature=temperature, hard_negative_weight=weight)
    engine.model.eval()
    batch = data.batch(np.arange(6))
    vectors = [v.detach().double().numpy() for v in engine.embed(batch)]
    texts = list(zip(*rows, strict=True))
    excluded = [
        [
            c in (texts[0][i], texts[1][i]) or (j < 6 and texts[0][i] == texts[0][j])
            for j, c in enumerate([*texts[1], *texts[2]])
        ]
        for i in range(6)
    ]
    expected = double_loop(*vectors, excluded, temperature, weight)
    assert sum(map(sum, excluded)) > 6
    assert engine([batch]) == pytest.approx(np.mean(expected), abs=1e-5)


def test_no_row_is_alone_in_a_batch(tiny, tokenizer):
    """A last batch of one joins the one before; every row is there once; steps are counted so."""
    for count in range(2, 12):
        data = Sentences("nli", tiny, [["a film"] * count], tokenizer, least=2)
        batches = data.training_batches(3, seed=1, epoch=0)
        assert sorted(np.concatenate(batches).tolist()) == list(range(count))
        assert min(map(len, batches)) >= 2 and max(map(len, batches)) <= 4
        assert len(batches) == data.batch_count(3)
        mixture = Mixture([data], 3, 1, 1)
        assert len(list(mixture.steps(0))) == mixture.steps_in(0) == len(batches)


@pytest.mark.parametrize("views", [3, 1])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_accumulated_batches_have_the_gradient_of_the_big_batch(tiny, tokenizer, views, pooling):
    """To 1e-6 in the loss and every gradient, dropout off; uneven parts, repeated sentences."""
    rows = triples(11)
    rows[7] = rows[2]
    columns = list(zip(*rows, strict=True))[:views]
    data = Sentences("nli", tiny, columns, tokenizer)
    for split in ([5, 6], [4, 4, 3], [1] * 11):
        found = []
        for parts in ([11], split):
            engine = contrast(tiny, tokenizer, pooling=pooling)
            engine.model.eval()
            ends = np.cumsum(parts)
            batches = [data.batch(np.arange(e - n, e)) for n, e in zip(parts, ends, strict=True)]
            found.append((engine(batches), gradients(engine.model)))
        (loss, whole), (cached_loss, cached) = found
        assert cached_loss == pytest.approx(loss, abs=1e-6)
        assert whole.keys() == cached.keys()
        scale = max(g.abs().max() for g in whole.values())
        for name, gradient in whole.items():
            assert (cached[name] - gradient).abs().max() <= 1e-6 * max(1, scale), name


def test_the_second_encoding_has_the_dropout_of_the_first(tiny, tokenizer):
    """And the generator goes on as if every batch had been encoded once."""
    data = Sentences("nli", tiny, list(zip(*triples(6), strict=True)), tokenizer)
    engine = contrast(tiny, tokenizer)
    seen = []
    embed = engine.embed
    engine.embed = lambda batch: seen.append(embed(batch)) or seen[-1]
    torch.manual_seed(4)
    engine([data.batch(np.arange(3)), data.batch(np.arange(3, 6))])
    after = torch.rand(1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    torch.manual_seed(4)
    for rows in (np.arange(3), np.arange(3, 6)):
        embed(data.batch(rows))
    assert torch.equal(after, torch.rand(1))


def test_accumulation_holds_one_small_batch_at_a_time(tiny, tokenizer):
    """The graph of a batch is freed before the next is made: no more tensors are saved at once."""
    data = Sentences("nli", tiny, list(zip(*triples(32), strict=True)), tokenizer)
    peaks = {}
    for parts in (1, 8):
        engine = contrast(tiny, tokenizer)
        held, peak = 0, 0

        class Held:
            """A saved tensor; its numbers count as held while it lives."""

            def __init__(self, tensor):
                nonlocal held, peak
                self.tensor = tensor
                held += tensor.numel()
                peak = max(peak, held)

            def __del__(self):
                nonlocal held
                held -= self.tensor.numel()

        size = 32 // parts
        batches = [data.batch(np.arange(i, i + size)) for i in range(0, 32, size)]
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda saved: saved.tensor):
            engine(batches)
        peaks[parts] = peak
    assert peaks[8] < peaks[1] / 3


def test_unsupervised_views_differ_by_dropout_alone(tiny, tokenizer):
    data = Sentences("nli", tiny, [[row[0] for row in triples(4)]], tokenizer)
    engine = contrast(tiny, tokenizer)
    first, second = engine.embed(data.batch(np.arange(4)))
    assert first.shape == (4, 32) and not torch.allclose(first, second)
    engine.model.eval()
    first, second = engine.embed(data.batch(np.arange(4)))
    torch.testing.assert_close(first, second)


def test_sentence_keys_see_padding_as_nothing(tiny, tokenizer):
    """The same sentence beside a short and beside a long one, in two batches."""
    data = Sentences("nli", tiny, [["a film", "a film", "the dog sees a cat !"]], tokenizer)
    keys = sentence_keys([data.batch(np.array([0])), data.batch(np.array([1, 2]))])
    assert keys.shape == (2, 3)
    assert keys[0, 0] == keys[0, 1] == keys[1, 0] != keys[0, 2]


# ---------------------------------------------------------------------------- figures


def test_alignment_and_uniformity_are_wang_and_isolas():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1500, 3))
    units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
    expected = np.mean(np.sum((units[0] - units[1]) ** 2, axis=1))
    assert alignment(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    from scipy.spatial.distance import pdist

    expected = np.log(np.mean(np.exp(-2 * pdist(units[0], "sqeuclidean"))))
    assert uniformity(torch.from_numpy(x)) == pytest.approx(expected)


def test_figures_are_of_the_plain_cosine(tiny, data, tokenizer):
    model = MultitaskBERT(BertModel.from_pretrained(tiny), [], pooling="mean", tokenizer=tokenizer)
    dev = TaskData(data / "sts-dev.csv", TASKS["sts"], tokenizer)
    found = figures(model, dev, 5)
    u, v = (model.encode([e.texts[i] for e in dev.examples]) for i in (0, 1))
    cosines = [cosine(a, b) for a, b in zip(u, v, strict=True)]
    gold = [e.label for e in dev.examples]
    expected = stats.spearmanr(np.round(cosines, 5), gold).statistic
    assert found["spearman"] == pytest.approx(expected, abs=0.02)
    near = [i for i, label in enumerate(gold) if label >= 4]
    assert found["alignment"] == pytest.approx(np.mean([2 - 2 * cosines[i] for i in near]), 1e-3)
    assert found["score"] == found["spearman"]


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture
def nli(tmp_path):
    path = tmp_path / "nli.csv"
    rows = "".join(f"{a},{b},{c}\n" for a, b, c in triples(30))
    path.write_text(COLUMNS + rows, encoding="utf-8")
    return path


def job(tiny, data, run_dir, nli, *more) -> list:
    flags = ["--model", tiny, "--data_dir", data, "--nli", nli, "--run_dir", run_dir]
    return [*flags, "--epochs", 2, "--batch_size", 8, "--lr", "1e-3", "--precision", "fp32", *more]


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
def test_a_run_starts_a_multitask_run(tiny, data, tmp_path, nli, run_script, mode):
    flags = ["--mode", mode, "--accumulate", 2, "--eval_every", 1]
    code, out, err = run_script(simcse, *job(tiny, data, tmp_path / "run", nli, *flags))
    assert code == 0, err
    assert "before training: sts spearman" in out
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open(encoding="utf-8")]
    dev = [record for record in log if record["kind"] == "dev"]
    assert {"spearman", "alignment", "uniformity"} <= dev[1].keys()
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["dev"]["sts"]["spearman"] == max(r["spearman"] for r in dev[1:])
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert model.pooling == ("pooler" if mode == "supervised" else "cls")
    sts = TaskData(data / "sts-dev.csv", TASKS["sts"], model.tokenizer)
    assert figures(model, sts, 8)["spearman"] == pytest.approx(result["dev"]["sts"]["spearman"])
    more = ["--model", tmp_path / "run/best", "--data_dir", data, "--run_dir", tmp_path / "next"]
    code, _, err = run_script(multitask_classifier, *more, "--epochs", 1)
    assert code == 0, err


def test_training_lowers_the_loss(tiny, data, tmp_path, nli, run_script):
    flags = job(tiny, data, tmp_path / "run", nli, "--epochs", 12, "--pooling", "mean")
    assert run_script(simcse, *flags)[0] == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open(encoding="utf-8")]
    losses = [record["loss"] for record in log if record["kind"] == "train"]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty; expected a header line"),
        (COLUMNS, "no rows"),
        ("sent0,sent1\na,b\n", "line 1: no column 'hard_neg'"),
        ("sent0\tsent1\thard_neg\na\tb\tc\n", "line 1: no comma in the header"),
        (COLUMNS + "a,b,c\na,,c\n", "line 3: sent1 is empty; a triple needs its three sentences"),
        (COLUMNS + "a,b\n", "line 2: has not the 3 columns"),
        (COLUMNS + 'x,y,"z\nd,e,f\ng,h,i"\nk,l,m\n', "line 2: a quoted field swallows 3 lines"),
        (COLUMNS + "a,b,c\n", "fewer than two rows; a contrastive loss needs at least two"),
    ],
)
def test_faults_of_the_triples(tiny, data, tmp_path, run_script, content, expected):
    path = tmp_path / "nli.csv"
    path.write_text(content, encoding="utf-8")
    code, _, err = run_script(simcse, *job(tiny, data, tmp_path / "run", path))
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert str(path) in err and expected in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temperature", "0"], "--temperature: 0 is out of range; expected a number above 0"),
        (["--hard_negative_weight", "-1"], "--hard_negative_weight"),
        (["--mode", "unsupervised", "--hard_negative_weight", "2"], "there are none with"),
        (["--batch_size", "1"], "a contrastive loss needs two rows in a batch"),
        (["--limit", "1"], "a contrastive loss needs two rows in a batch"),
        (["--mode", "both"], "--mode"),
        (["--nli", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_bad_flags(tiny, data, run_script, flags, expected):
    code, _, err = run_script(simcse, "--model", tiny, "--data_dir", data, *flags)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
