"""Predictions, metrics, baselines and the format of leaderboard files."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_multitask
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss

from engine.errors import TrainingDiverged
from prediction import (
    EmbeddingCache,
    baseline,
    embed_batch,
    evaluate,
    format_predictions,
    predict,
    summarize,
    task_metrics,
)


@pytest.fixture(scope="module")
def multitask(tiny, data):
    """A model with mean pooling, and its dev sets."""
    return load_multitask(tiny, data, "dev", pooling="mean")


LEADERBOARD_FILES = [
    (0, [[0.0, 9, 0, 0, 0], [0, 0, 0, 0, 1]], "id \t Predicted_Sentiment \n{} , 1 \n{} , 4 \n"),
    (1, [[0.5], [-0.5]], "id \t Predicted_Is_Paraphrase \n{} , 1.0 \n{} , 0.0 \n"),
    (2, [[3.25], [-0.125]], "id \t Predicted_Similiary \n{} , 3.25 \n{} , -0.125 \n"),
]


@pytest.mark.parametrize(("task", "logits", "expected"), LEADERBOARD_FILES)
def test_leaderboard_files_byte_for_byte(multitask, monkeypatch, task, logits, expected):
    dataset = multitask[1][task]
    monkeypatch.setattr(dataset, "examples", dataset.examples[:2])
    expected = expected.format(*(example.id for example in dataset.examples))
    assert format_predictions(dataset, torch.tensor(logits)) == expected


def test_cached_embeddings_equal_fresh_ones_and_are_computed_once(multitask):
    """Each needed row exactly once, however batches are drawn later."""
    model, (sst, _, sts) = multitask
    cache, sequences = EmbeddingCache(model, batch_size=5), []
    hook = model.bert.register_forward_hook(lambda *given: sequences.append(len(given[1][0])))
    cache.add(sts, np.array([9, 2, 5, 11]))
    cache.add(sst)
    assert sum(sequences) == 2 * 4 + 16
    for rows in ([5, 2, 9], [9, 5], [2, 11]):
        batch = sts.batch(np.array(rows))
        sequences.clear()
        vectors = cache(batch)
        assert not sequences
        with torch.no_grad():
            torch.testing.assert_close(vectors, embed_batch(model, batch), atol=1e-6, rtol=1e-5)
    hook.remove()


def test_outputs_and_losses_that_are_not_finite_are_refused(multitask):
    model, (sst, _, sts) = multitask

    def embed(batch):
        vectors = embed_batch(model, batch)
        vectors[torch.from_numpy(np.isin(batch.rows, [3, 7]))] = math.nan
        return vectors

    with pytest.raises(TrainingDiverged, match=r"2 rows are not finite \(.*ids-sst-dev\.csv-3,"):
        predict(model, sst, 5, embed)
    with pytest.raises(TrainingDiverged, match=r"sts-dev\.csv: the mean loss is inf"):
        task_metrics(sts, torch.full((16, 1), 1e30))


def test_metrics_are_of_all_rows_at_once(multitask):
    """Not means over batches, and in file order; the overall score is the course's."""
    model, datasets = multitask
    logits = [predict(model, dataset, 7, partial(embed_batch, model)) for dataset in datasets]
    gold = [[example.label for example in dataset.examples] for dataset in datasets]
    result = evaluate(zip(datasets, logits, strict=True))
    sst, para, sts = result["tasks"].values()
    assert sst["rows"] == 16 and sst["accuracy"] == accuracy_score(gold[0], logits[0].argmax(1))
    loss = log_loss(gold[0], logits[0].double().softmax(1), labels=range(5))
    assert sst["loss"] == pytest.approx(loss, rel=1e-5)
    assert sts["pearson"] == pytest.approx(np.corrcoef(gold[2], logits[2][:, 0])[0, 1], abs=1e-4)
    score = (sst["accuracy"] + para["accuracy"] + (sts["pearson"] + 1) / 2) / 3
    assert result["score"] == pytest.approx(score)
    assert result["summary"] == summarize(result["tasks"])


def test_predictions_of_a_single_class_get_a_note():
    notes = {" (majority class)": [[5, 0], [2, 0]], " (one class only)": [[0, 5], [0, 2]]}
    for note, confusion in {**notes, "": [[4, 1], [1, 1]]}.items():
        metrics = {"accuracy": 5 / 7, "confusion": confusion}
        assert summarize({"sst": metrics}) == f"sst accuracy 0.714{note}, overall 0.714"
    assert summarize({"sts": {"pearson": 0.0}}) == "sts pearson 0.000, overall 0.500"


def test_baselines_are_the_majority_class_and_the_untouched_encoder(multitask, monkeypatch):
    """Whatever the model's own pooling, pairs are compared by mean pooling."""
    model, (sst, para, sts) = multitask
    labels = sst.labels.tolist()
    assert baseline(model, sst, 4) == ("majority class", max(map(labels.count, labels)) / 16)
    assert baseline(model, para, 4)[0] == "majority class"
    u, v = (model.encode([example.texts[i] for example in sts.examples]) for i in (0, 1))
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    monkeypatch.setattr(model, "pooling", "pooler")
    r = stats.pearsonr(cosines, sts.labels).statistic
    assert baseline(model, sts, 4) == ("untouched encoder", pytest.approx(r, abs=1e-5))
