"""Statistics and plots of gradient conflict, by hand and against scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log
from scipy import stats

import multitask_classifier
from bert import BertModel
from engine.checkpoint import read_json, read_text, write_text
from engine.conflict import GradientConflictLogger
from experiments import conflict


def measurement(step, cosines, products=None, changes=None):
    """What a run logs of one step, the same for both groups of parameters."""
    pairs = {pair: {"cosine": cosine} for pair, cosine in cosines.items()}
    for pair, product in (products or {}).items():
        pairs[pair]["product"] = product
    entry = {"step": step, "parts": {"pooler": pairs, "overall": pairs}}
    if changes:
        keys = ("loss", "predicted", "measured")
        entry["changes"] = {k: dict(zip(keys, v, strict=True)) for k, v in changes.items()}
    return entry


@pytest.mark.parametrize("angle", [-0.6, 0.0, 0.9])
def test_disattenuation_recovers_the_cosine_of_the_expected_gradients(angle):
    """Two tasks' gradients of known cosine; each seed measures them with noise of twice their norm.

    One mean, and an interval, over the figures of 40 seeds.
    """
    rng = np.random.default_rng(5)
    first, other = np.linalg.qr(rng.normal(size=(2000, 2)))[0].T
    tasks = {"a": 3 * first, "b": 0.2 * (angle * first + (1 - angle**2) ** 0.5 * other)}

    def measure(seed):
        def gradient(name):
            noise = rng.normal(size=2000) * 2 / 2000**0.5
            return tasks[name] + noise * np.linalg.norm(tasks[name])

        a, b, second_a, second_b = map(gradient, "abab")
        found = {"a|b": (a, b), "a|a": (a, second_a), "b|b": (b, second_b)}
        products = {pair: u @ v for pair, (u, v) in found.items()}
        cosines = {p: u @ v / np.linalg.norm(u) / np.linalg.norm(v) for p, (u, v) in found.items()}
        return [measurement(0, cosines, products)]

    rows = conflict.summarize_conflict([measure(seed) for seed in range(40)])["phases"]["step 0"]
    mean, low, high = rows["groups"]["overall"]["a|b, disattenuated"]
    assert mean == pytest.approx(angle, abs=0.06)
    assert low < angle < high and high - low < 0.15
    assert rows["groups"]["overall"]["a|b"][0] == pytest.approx(angle / 5, abs=0.02)  # noise 4 to 1


def test_the_unit_of_conflict_statistics_is_a_seed():
    """And a phase is a step that was measured with every seed."""
    runs = []
    for cosine, across, other in [(0.2, -3, 0.4), (0.0, -1, None), (-0.3, 4, 0.3)]:
        cosines, products = {"a|b": cosine, "a|a": 0.5, "b|b": other}, {"a|b": across, "b|b": 4}
        run = [measurement(0, cosines, {**products, "a|a": 9})]
        run += [measurement(step, cosines) for step in (10, 20, 30)]
        runs.append(run)
    del runs[1][3]  # its training stopped before step 30
    phases = conflict.summarize_conflict(runs)["phases"]
    assert list(phases) == ["step 0", "step 10", "step 20"]
    rows = phases["step 0"]["groups"]["pooler"]

    def by_scipy(values):
        interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        return pytest.approx([np.mean(values), *interval])

    assert rows["a|b"] == by_scipy([0.2, 0.0, -0.3])
    assert rows["a|b, disattenuated"] == by_scipy(np.array([-3, -1, 4]) / (9 * 4) ** 0.5)
    assert rows["a|a"] == [0.5, 0.5, 0.5]
    assert rows["b|b"] == [None, None, None]  # one seed has none
    alone = conflict.summarize_conflict(runs[:1])["phases"]["step 0"]["groups"]["pooler"]
    assert alone["a|b"] == [0.2, None, None]
    assert alone["a|b, disattenuated"] == [-0.5, None, None]
    missing = [None, None, None]  # without inner products, or a noise floor above 0 of every seed
    assert phases["step 10"]["groups"]["overall"]["a|b, disattenuated"] == missing
    runs[2][0]["parts"]["pooler"]["b|b"]["product"] = 0
    phases = conflict.summarize_conflict(runs)["phases"]
    assert phases["step 0"]["groups"]["pooler"]["a|b, disattenuated"] == missing


def test_predicted_and_measured_changes_are_compared_by_seed():
    """In millionths of the loss, whatever its unit; slopes through 0, of two tasks and of one."""
    cosines = {"a|b": 0.1, "a|a": 0.5, "b|b": 0.5}
    slopes, runs = [0.9, 1.1, 1.3], []
    for slope in slopes:
        predicted = {"a>a": -4e-6, "a>b": 3e-6, "b>a": -2e-6, "b>b": -5e-6}
        loss = {"a": 1.0, "b": 10.0}
        changes = {k: (loss[k[2]], v, slope * v) for k, v in predicted.items()}
        changes["b>b"] = (10.0, -5e-6, -2e-6 if slope > 1 else 2e-6)
        runs.append([measurement(0, cosines, changes=changes)])
    found = conflict.summarize_conflict(runs)["phases"]["step 0"]["changes"]
    interval = stats.t.interval(0.95, 2, 1.1, stats.sem(slopes))
    assert found["a>a, predicted"] == pytest.approx([-4, -4, -4])
    assert found["a>b, measured"] == pytest.approx(0.3 * np.array([1.1, *interval]))
    assert found["two tasks, slope"] == pytest.approx([1.1, *interval])
    assert found["two tasks, share with the predicted sign"] == [1, 1, 1]
    assert found["one task, share with the predicted sign"][0] == pytest.approx(5 / 6)
    by_hand = [
        (16 * slope + y * 0.5) / 16.25 for slope, y in zip(slopes, [-0.2, 0.2, 0.2], strict=True)
    ]
    assert found["one task, slope"][0] == pytest.approx(np.mean(by_hand))
    text = conflict.conflict_markdown(conflict.summarize_conflict(runs), [Path("x-layers.png")])
    assert r"| a\|b | +0.100 (+0.100 to +0.100) |" in text and "](x-layers.png)" in text
    assert "| a>a, predicted | -4.0 (-4.0 to -4.0) |" in text
    assert r"| a\|b, disattenuated | - |" in text


def test_conflict_of_one_run_and_of_several_seeds(train, command, tiny, tmp_path, monkeypatch):
    """Of --option lpft, which measures nothing while it probes: it begins at the untouched BERT."""
    untouched, call = [], GradientConflictLogger.__call__

    def watch(self, batches, step):
        pairs = zip(self.model.bert.parameters(), given.parameters(), strict=True)
        untouched.append((step, all(torch.equal(p, q) for p, q in pairs)))
        return call(self, batches, step)

    given = BertModel.from_pretrained(tiny)
    flags = ["--option", "lpft", "--epochs", 1, "--no_test", "--measure_conflict"]
    one, two, out = tmp_path / "1", tmp_path / "2", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(GradientConflictLogger, "__call__", watch)
        train(multitask_classifier, one, *flags, 4, "--seed", 1)
    assert untouched[:2] == [(0, True), (1, False)]
    train(multitask_classifier, two, *flags, 4, "--seed", 2)
    assert {entry["stage"] for entry in read_log(one, "conflict")} == {"finetune"}
    text = command("conflict", one)
    assert r"| cosine | finetune, step 0 | finetune, step 4 | finetune, step 8 |" in text
    assert "Seeds: 1." in text and " to +" not in text
    for name in ("conflict-layers.png", "conflict-changes.png"):
        assert (one / name).read_bytes().startswith(b"\x89PNG")
    text = command("conflict", one, two, "--out", out)
    assert "Seeds: 2." in text and " to +" in text
    assert text.split("![")[0] in read_text(out / "conflict.md")
    found = read_json(out / "conflict.json")["phases"]["finetune, step 4"]["groups"]["pooler"]
    logged = [read_log(run, "conflict")[1]["parts"]["pooler"]["sst|sts"] for run in (one, two)]
    assert found["sst|sts"][0] == pytest.approx(np.mean([row["cosine"] for row in logged]))
    command("conflict", one, two, "--out", out, error="not an empty folder")
    command("conflict", one, one, error="--seed 1 is that of another run")

    train(multitask_classifier, tmp_path / "3", *flags, 2, "--seed", 3)
    command("conflict", one, tmp_path / "3", error="has another --measure_conflict than")
    assert "conflict-steps.png" in command("conflict", tmp_path / "3")
    lines = read_text(two / "log.jsonl").splitlines(keepends=True)
    write_text(two / "log.jsonl", "".join(line for line in lines if '"conflict"' not in line))
    command("conflict", two, error="no measurements; train with --measure_conflict N")
    write_text(two / "log.jsonl", lines[0] + '{"kind": "conf')
    command("conflict", two, error="damaged or not the log of a run")
