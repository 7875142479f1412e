"""Heads, losses and metrics against independent formulas; the model's interface; a new task."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import NOUNS, VERBS, write_csv
from scipy import stats
from sklearn import metrics
from torch import nn

import multitask_classifier
from bert import BertModel
from checkpoint import UserError
from optimizer import AdamW
from tasks import HEADS, TASKS, MultitaskBERT, Task, find_tasks
from tokenizer import BertTokenizer

ALL = [TASKS[name] for name in ("sst", "para", "sts")]


def model_of(tiny, **settings) -> MultitaskBERT:
    """A tiny model with heads for the paper's three tasks, in evaluation mode."""
    torch.manual_seed(1)
    bert = BertModel.from_pretrained(tiny)
    return MultitaskBERT(
        bert, ALL, tokenizer=BertTokenizer.from_pretrained(tiny), **settings
    ).eval()


# ---------------------------------------------------------------------------- heads and losses


def test_heads_against_their_formulas():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 6, 8)).astype(np.float32)
    for name, task in [("linear", "sst"), ("concat", "sts"), ("dot", "para"), ("cosine", "sts")]:
        head = HEADS[name](8, TASKS[task], 0.5).eval()
        w, b = (p.detach().numpy() for p in head.dense.parameters())
        cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
        features = {
            "linear": u,
            "concat": np.concatenate([u, v], axis=1),
            "dot": u * v,
            "cosine": cosine[:, None],
        }[name]
        logits = head(torch.from_numpy(u), torch.from_numpy(v)).detach().numpy()
        assert logits.shape == (6, TASKS[task].outputs)
        np.testing.assert_allclose(logits, features @ w.T + b, atol=1e-5)


def test_the_confusion_matrix_has_every_class():
    """Rows are gold and columns predicted, whether or not a class occurs."""
    found = TASKS["sst"].report(np.array([0, 4, 4]), np.array([0, 4, 0]))
    assert np.array(found["confusion"]).shape == (5, 5)
    assert found["confusion"][0] == [1, 0, 0, 0, 1] and found["confusion"][4] == [0, 0, 0, 0, 1]
    assert TASKS["para"].report(np.ones(2), np.ones(2))["confusion"] == [[0, 0], [0, 2]]


def test_saving_leaves_a_folder_of_something_else_alone(tiny, tmp_path):
    tokenizer = BertTokenizer.from_pretrained(tiny)
    model = MultitaskBERT(BertModel.from_pretrained(tiny), [TASKS["sst"]], tokenizer=tokenizer)
    (tmp_path / "mine").mkdir()
    model.save_pretrained(tmp_path / "mine")  # empty: it may be used
    model.save_pretrained(tmp_path / "mine")  # and what was written so, replaced
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="holds something other than a model"):
        model.save_pretrained(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("task", "low", "high"), [("sts", 0, 5), ("para", -5, 5)])
def test_cosine_starts_with_the_span_of_the_task(task, low, high):
    head = HEADS["cosine"](3, TASKS[task], 0.1)
    u = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    v = torch.tensor([[0.0, 1, 0], [2.0, 0, 0]])
    assert head(u, v).flatten().tolist() == pytest.approx([low, high])


def test_losses_are_those_of_each_row():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(9, 5))
    labels = rng.integers(0, 5, size=9)
    loss = TASKS["sst"].loss(torch.tensor(logits), torch.tensor(labels)).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(probabilities[np.arange(9), labels]))

    logit, label = rng.normal(size=(9, 1)), rng.integers(0, 2, size=9).astype(float)
    loss = TASKS["para"].loss(torch.tensor(logit), torch.tensor(label)).numpy()
    sigmoid = 1 / (1 + np.exp(-logit[:, 0]))
    assert loss.mean() == pytest.approx(metrics.log_loss(label, sigmoid))

    score = rng.uniform(0, 5, size=9)
    loss = TASKS["sts"].loss(torch.tensor(logit), torch.tensor(score)).numpy()
    np.testing.assert_allclose(loss, (logit[:, 0] - score) ** 2)


def test_predictions_in_the_units_of_the_labels():
    assert TASKS["sst"].decode(torch.tensor([[0.0, 3, 1, 1, 2], [5.0, 0, 0, 0, 0]])).tolist() == [
        1,
        0,
    ]
    assert TASKS["para"].decode(torch.tensor([[-0.1], [0.1], [9.0]])).tolist() == [0.0, 1.0, 1.0]
    assert TASKS["sts"].decode(torch.tensor([[2.75], [-0.5]])).tolist() == [2.75, -0.5]


def test_reports_against_scikit_learn_and_scipy():
    rng = np.random.default_rng(2)
    gold, predicted = rng.integers(0, 5, size=(2, 200))
    report = TASKS["sst"].report(predicted, gold)
    assert next(iter(report)) == "accuracy"
    assert report["accuracy"] == np.mean(gold == predicted)
    f1 = [
        2 * np.sum((gold == c) & (predicted == c)) / (np.sum(gold == c) + np.sum(predicted == c))
        for c in range(5)
    ]
    assert report["macro_f1"] == pytest.approx(np.mean(f1))
    confusion = np.zeros((5, 5), dtype=int)
    np.add.at(confusion, (gold, predicted), 1)
    assert report["confusion"] == confusion.tolist()

    x, y = rng.normal(size=(2, 50)).astype(np.float32)
    report = TASKS["sts"].report(x, y)
    assert report["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    ranks = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert report["spearman"] == pytest.approx(ranks, abs=1e-9)
    assert TASKS["sts"].report(np.ones(50), y)["pearson"] == 0.0


# ---------------------------------------------------------------------------- the model


def test_the_courses_methods_agree_with_forward(tiny):
    model = model_of(tiny)
    a = model.tokenizer(["the film", "a dog sees the plot"], padding=True, return_tensors="pt")
    b = model.tokenizer(["the cat moves a car house", "a"], padding=True, return_tensors="pt")
    both = model.tokenizer(
        ["the film", "a dog sees the plot", "the cat moves a car house", "a"],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        sentiment = model.predict_sentiment(a["input_ids"], a["attention_mask"])
        pair = (a["input_ids"], a["attention_mask"], b["input_ids"], b["attention_mask"])
        paraphrase, similarity = model.predict_paraphrase(*pair), model.predict_similarity(*pair)
        assert sentiment.shape == (2, 5)
        for name, logits in (("para", paraphrase), ("sts", similarity)):
            expected = model(name, both["input_ids"], both["attention_mask"])
            assert logits.shape == (2, 1)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_joint_model_joins_what_was_tokenised_apart(tiny):
    model = model_of(tiny, pair_encoding="joint")
    first, second = ["the film", "a " * 60], ["the cat moves a car house", "a dog " * 20]
    a = model.tokenizer(first, padding=True, truncation=True, return_tensors="pt")
    b = model.tokenizer(second, padding=True, truncation=True, return_tensors="pt")
    expected = model.tokenizer(first, second, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.predict_similarity(
            a["input_ids"], a["attention_mask"], b["input_ids"], b["attention_mask"]
        )
        torch.testing.assert_close(logits, model("sts", **expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_encode_gives_each_sentence_its_embedding_in_order(tiny, pooling):
    model = model_of(tiny, pooling=pooling)
    texts = ["the film is great", "", "a", "the cat " * 100, "a dog sees a house"] * 3
    vectors = model.train().encode(texts, batch_size=4)
    assert model.training
    assert vectors.shape == (15, 32)
    assert vectors.dtype == np.float32
    oracle = transformers.BertModel.from_pretrained(tiny).eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            output = oracle(**model.tokenizer([text], truncation=True, return_tensors="pt"))
        hidden = output.last_hidden_state[0]
        expected = {"pooler": output.pooler_output[0], "cls": hidden[0], "mean": hidden.mean(0)}
        np.testing.assert_allclose(vector, expected[pooling].numpy(), atol=1e-5)
    assert model.encode([]).shape == (0, 32)
    with pytest.raises(TypeError, match="list of str"):
        model.encode("one sentence")


def test_saved_and_loaded_is_the_same_to_the_bit(tiny, tmp_path):
    model = model_of(tiny, pooling="mean", decoders={"para": "concat", "sts": "cosine"})
    model.save_pretrained(tmp_path / "run" / "best")
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        again = MultitaskBERT.from_pretrained(folder)
        assert (again.pooling, again.decoders) == (model.pooling, model.decoders)
        for (name, a), b in zip(
            model.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
    other = transformers.BertModel.from_pretrained(tmp_path / "run" / "best").eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        ours = model.bert(ids, torch.ones_like(ids))["last_hidden_state"]
        torch.testing.assert_close(ours, other(ids).last_hidden_state, atol=1e-5, rtol=0)


def test_heads_that_do_not_fit_are_refused(tiny, tmp_path):
    model_of(tiny).save_pretrained(tmp_path / "best")
    settings = json.loads((tmp_path / "best" / "heads.json").read_text(encoding="utf-8"))
    settings["decoders"]["sts"] = "concat"
    (tmp_path / "best" / "heads.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"heads.safetensors: does not fit"):
        MultitaskBERT.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"heads.json: missing"):
        MultitaskBERT.from_pretrained(tiny)
    with pytest.raises(UserError, match="no such run folder"):
        MultitaskBERT.from_pretrained(tmp_path / "nothing")
    (tmp_path / "best" / "heads.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"heads.json: has no decoders"):
        MultitaskBERT.from_pretrained(tmp_path)


def test_decoders_must_suit_the_pair_encoding(tiny):
    with pytest.raises(UserError, match="'linear' of sts"):
        model_of(tiny, decoders={"sts": "linear"})
    with pytest.raises(UserError, match="'dot' of para"):
        model_of(tiny, decoders={"para": "dot"}, pair_encoding="joint")
    with pytest.raises(UserError, match="expected linear, concat, dot, cosine"):
        model_of(tiny, decoders={"para": "bilinear"})
    with pytest.raises(UserError, match="pooling 'max'"):
        model_of(tiny, pooling="max")


def test_tasks_are_found_by_name():
    assert find_tasks(["sts", "sst"]) == [TASKS["sts"], TASKS["sst"]]
    for names in (["sts", "nli"], [""]):
        with pytest.raises(UserError, match="no such task; there are sst, cfimdb, para, sts"):
            find_tasks(names)


def test_multitask_bert_is_importable_as_in_the_course():
    assert multitask_classifier.MultitaskBERT is MultitaskBERT
    with pytest.raises(AttributeError):
        _ = multitask_classifier.nothing


def test_bf16_keeps_weights_embeddings_and_logits_in_fp32(tiny):
    model = model_of(tiny)
    batch = model.tokenizer(["the film is great", "a dog"], padding=True, return_tensors="pt")
    exact = model("sst", **batch)
    model.precision = torch.bfloat16
    seen = []
    model.bert.layers[0].intermediate.register_forward_hook(
        lambda m, i, out: seen.append(out.dtype)
    )
    logits = model("sst", **batch)
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(logits, exact)
    logits.sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_evaluation_in_bf16_takes_a_rounded_copy_until_a_weight_changes(tiny):
    model = model_of(tiny).eval()
    texts = ["the film is great", "a dog", "the film"]
    exact = model.encode(texts)
    model.precision = torch.bfloat16
    rounded = model.encode(texts)
    copy = model.rounded_bert()
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert rounded.dtype == np.float32 and not np.array_equal(rounded, exact)
    cosines = (rounded * exact).sum(1) / np.linalg.norm(rounded, axis=1)
    assert (cosines / np.linalg.norm(exact, axis=1) > 0.999).all()
    model.encode(texts)
    assert model.rounded_bert() is copy

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    AdamW(model.parameters(), lr=0.1).step()
    changed = model.encode(texts)
    assert model.rounded_bert() is not copy and not np.allclose(changed, rounded, atol=0.01)
    for p in model.parameters():
        p.data.neg_()  # as old optimizers write, which no counter notices
    model.train().eval()
    assert not np.allclose(model.encode(texts), changed, atol=0.01)
    changed = model.encode(texts)
    model.precision = torch.float32
    np.testing.assert_allclose(changed, model.encode(texts), atol=0.05)


@pytest.mark.parametrize(("training", "grad", "copied"), [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_what_trains_or_draws_dropout_keeps_its_weights(tiny, training, grad, copied):
    """Gradient caching embeds without gradients first, with the dropout that it will have."""
    model = model_of(tiny).train(bool(training))
    model.precision = torch.bfloat16
    batch = model.tokenizer(["the film is great"], return_tensors="pt")
    with torch.set_grad_enabled(bool(grad)):
        model.embed(batch["input_ids"], batch["attention_mask"])
    assert (model._rounded is not None) == copied


# ---------------------------------------------------------------------------- a fifth task


def test_a_fifth_task_is_one_row_and_trains(tiny, tmp_path, data, monkeypatch, run_script):
    """Which of two subjects a pair of sentences shares: three classes of a pair, a new header."""
    rng = np.random.default_rng(3)
    rows = {}
    for split, count in (("train", 48), ("dev", 24), ("test-student", 6)):
        rows[split] = []
        for i in range(count):
            label = int(rng.integers(3))
            a, b = ([NOUNS[0], NOUNS[0]], [NOUNS[6], NOUNS[6]], [NOUNS[0], NOUNS[6]])[label]
            verb = VERBS[int(rng.integers(5))]
            rows[split].append([f"t{split}{i}", f"the {a} {verb}", f"the {b} {verb}", label])
    for split, content in rows.items():
        test = split == "test-student"
        header = ["id", "left", "right"] + ([] if test else ["topic"])
        content = [row[:-1] for row in content] if test else content
        write_csv(tmp_path / f"topic-{split}.csv", header, content)
    sst = TASKS["sst"]
    topic = Task(
        name="topic",
        files="topic-{}.csv",
        texts=("left", "right"),
        label="topic",
        dtype=torch.int64,
        low=0,
        high=2,
        whole=True,
        outputs=3,
        loss=sst.loss,
        decode=sst.decode,
        report=sst.report,
        course_score=sst.course_score,
        header="Predicted_Topic",
        head="concat",
    )
    monkeypatch.setitem(TASKS, "topic", topic)
    for split in ("train", "dev", "test-student"):
        name = f"ids-sst-{split}.csv"
        (tmp_path / name).write_bytes((data / name).read_bytes())
    flags = ["--option", "finetune", "--model", tiny, "--data_dir", tmp_path, "--epochs", 12]
    flags += ["--tasks", "topic,sst", "--batch_size", 8, "--lr", "2e-3", "--head_lr", "1e-2"]
    flags += ["--pooling", "mean", "--run_dir", tmp_path / "run"]
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["dev"]["topic"]["accuracy"] >= 0.9
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    assert isinstance(model.heads["topic"].dense, nn.Linear)
    lines = (tmp_path / "run/predictions/topic-dev-output.csv").read_text(encoding="utf-8")
    assert lines.startswith("id \t Predicted_Topic \ntdev0 , ")
    assert math.isclose(
        result["overall"],
        (result["dev"]["topic"]["accuracy"] + result["dev"]["sst"]["accuracy"]) / 2,
    )
