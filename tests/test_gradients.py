"""Task gradients: PCGrad by hand and by property, what is measured of conflicts, leaving out."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import Toy, files_of, job, log_of, result_of

import multitask_classifier
import supervised
from bert import BertConfig, BertModel
from gradients import Surgery, bundles, conflict, dot, layer_group, negative, pcgrad, project, total
from scoring import embed
from tasks import TASKS, MultitaskBERT
from train import summed


def vectors(*rows) -> list[list[torch.Tensor]]:
    """Each row as a gradient of two parameters, the first number and the others."""
    made = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return [[row[:1], row[1:].reshape(1, -1)] for row in made]


def flat(gradient) -> list[float]:
    return torch.cat([g.flatten() for g in gradient]).tolist()


# ---------------------------------------------------------------------------- PCGrad


def test_projection_by_hand():
    """(1, 0, 0) against (-1, 1, 0): minus half of it, with a sign. Then nothing is left to mend."""
    one, other = vectors([1, 0, 0], [-1, 1, 0])
    assert flat(project(one, [other])) == [0.5, 0.5, 0]
    assert flat(project(other, [one])) == [0, 1, 0]
    assert flat(pcgrad([one, other])) == [0.5, 1.5, 0]
    assert flat(one) == [1, 0, 0]  # the inputs stay


def test_agreeing_orthogonal_and_zero_gradients_are_left_alone():
    for rows in ([[1, 0, 0], [0, 2, 0]], [[1, 1, 0], [1, 0, 3]], [[1, 0, 0], [0, 0, 0]]):
        gradients = vectors(*rows)
        assert flat(pcgrad(gradients)) == np.sum(rows, axis=0).tolist()
        assert flat(total(gradients)) == np.sum(rows, axis=0).tolist()


def test_sizes_beyond_float32_do_no_harm():
    """Squares of such numbers are 0 or infinite in float32."""
    for size in (1e-23, 1e23):
        one, other = [torch.tensor([1.0, 0.0])], [torch.tensor([-size, 0.0])]
        torch.testing.assert_close(pcgrad([one, other])[0], torch.zeros(2))
    big = torch.nn.Parameter(torch.zeros(2))
    loss = lambda: (big * 1e20).sum()  # noqa: E731
    found = conflict({"a": [[loss], [loss]]}, [("pooler.a", big)])
    expected = {"cosine": 1, "product": 2e40, "magnitude": 1}
    assert found["overall"]["a|a"] == pytest.approx(expected)


def test_the_share_of_negative_cosines_is_over_parts():
    cosines = {"overall": -1.0, "embeddings": -0.5, "pooler": 0.5, "layer 0 attention": None}
    parts = {part: {"a|b": {"cosine": c}} for part, c in cosines.items()}
    assert negative(parts) == {"a|b": 1 / 3}


def test_the_order_is_random_and_matters():
    """Three tasks, each against the next: what comes out is one of the results of the orders."""
    gradients = vectors([1, 0, 0], [-1, 1, 0], [0.2, -1, 0.3])
    results = set()
    for seed in range(40):
        torch.manual_seed(seed)
        results.add(tuple(np.round(flat(pcgrad(gradients)), 9)))
    expected = set()
    for picks in np.ndindex(2, 2, 2):
        parts = []
        for i, pick in enumerate(picks):
            others = [gradients[j] for j in range(3) if j != i]
            parts.append(project(gradients[i], others if pick else others[::-1]))
        expected.add(tuple(np.round(flat(total(parts)), 9)))
    assert 1 < len(results) <= len(expected)
    assert results <= expected


numbers = st.floats(-3, 3).map(lambda x: round(x, 3))


@settings(max_examples=150)
@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=2, max_size=5))
def test_no_conflict_is_left_with_the_gradient_just_projected_against(rows):
    own, *others = vectors(*rows)
    for i in range(1, len(others) + 1):
        before, after = project(own, others[: i - 1]), project(own, others[:i])
        assert dot(after, others[i - 1]) >= -1e-9
        assert dot(after, after) <= dot(before, before) + 1e-9  # a projection never lengthens
        if dot(before, others[i - 1]) >= 0:
            assert flat(after) == flat(before)


def losses_of(toy):
    def losses(batch):
        return TASKS[batch.task].loss(
            toy.model.decode(batch.task, embed(toy.model, batch)), batch.labels
        )

    return losses


def test_surgery_gives_bert_the_combination_and_heads_their_own(tiny, data, tmp_path):
    """Against gradients taken task by task with autograd; the pooler's too, which mean leaves."""
    for pooling in ("pooler", "mean"):
        toy = Toy(tiny, data, tmp_path / pooling)
        toy.model.pooling = pooling
        toy.model.eval()
        losses = losses_of(toy)
        batches = [s.batch(np.arange(k, k + 3)) for s in toy.sets for k in (0, 3)]
        shared = list(toy.model.bert.parameters())
        expected, means = [], []
        for i in (0, 2, 4):
            loss = torch.cat([losses(batches[i]), losses(batches[i + 1])]).mean()
            means.append(loss.item())
            found = torch.autograd.grad(loss, shared, allow_unused=True)
            expected.append([g for g in found if g is not None])
        loss = Surgery(summed(losses), shared, total)(batches)
        assert loss == pytest.approx(sum(means))
        found = [p.grad for p in shared if p.grad is not None]
        assert (toy.model.bert.pooler.weight.grad is None) == (pooling == "mean")
        for ours, parts in zip(found, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(ours, sum(parts), atol=1e-5, rtol=1e-4)
        for name, head in toy.model.heads.items():
            own = [losses(b) for b in batches if b.task == name]
            wanted = torch.autograd.grad(torch.cat(own).mean(), list(head.parameters()))
            for parameter, gradient in zip(head.parameters(), wanted, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)


# ---------------------------------------------------------------------------- conflict


def test_every_parameter_has_its_part():
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    parts: dict[str, list[str]] = {}
    for name, _ in BertModel(config).named_parameters():
        parts.setdefault(layer_group(name), []).append(name)
    layers = [f"layer {i} {part}" for i in (0, 1) for part in ("attention", "feed-forward")]
    assert list(parts) == ["embeddings", *layers, "pooler"]
    assert len(parts["layer 1 attention"]) == 10  # query, key, value, output, LayerNorm
    assert len(parts["layer 0 feed-forward"]) == 6
    assert len(parts["embeddings"]) == 5


@given(st.dictionaries(st.text(), st.integers(1, 99), min_size=1))
def test_bundles_are_no_larger_than_the_largest_and_as_few_as_their_order_allows(sizes):
    found = bundles(sizes)
    assert [name for bundle in found for name in bundle] == list(sizes)
    weights = [sum(sizes[name] for name in bundle) for bundle in found]
    assert max(weights) <= max(sizes.values())
    for weight, following in zip(weights, found[1:], strict=False):
        assert weight + sizes[following[0]] > max(sizes.values())


def test_conflict_by_hand():
    """loss = g . p has the gradient g, whatever p is; that of a batch is the sum of its parts'."""
    named = [(name, torch.nn.Parameter(torch.zeros(2))) for name in ("pooler.a", "word_embedding")]

    def loss(*numbers):
        return lambda: sum(
            (torch.tensor(n) * p).sum() for n, (_, p) in zip(numbers, named, strict=True)
        )

    found = conflict(
        {
            "a": [
                [loss([1.0, 5.0], [0.0, 0.0]), loss([2.0, -5.0], [0.0, 0.0])],
                [loss([0.0, 1.0], [1.0, 0.0])],
            ],
            "b": [[loss([-4.0, 4.0], [1.0, 1.0])], [loss([-4.0, 4.0], [2.0, 2.0])]],
        },
        named,
    )
    assert list(found) == ["pooler", "embeddings", "overall"]
    assert list(found["pooler"]) == ["a|b", "a|a", "b|b"]
    root = 32**0.5
    assert found["pooler"]["a|b"] == pytest.approx(
        {"cosine": -12 / (3 * root), "product": -12, "magnitude": 2 * 3 * root / (9 + 32)}
    )
    assert found["pooler"]["a|a"]["cosine"] == 0
    assert found["embeddings"]["a|b"] == dict.fromkeys(("cosine", "product", "magnitude"))
    expected = {"cosine": 1, "product": 4, "magnitude": 0.8}
    assert found["embeddings"]["b|b"] == pytest.approx(expected)
    assert found["overall"]["a|b"]["cosine"] == pytest.approx(-12 / (3 * 34**0.5))


def test_conflict_against_whole_gradients(tiny, data, tmp_path):
    """Part by part it finds what the whole gradients, held at once, have."""
    toy = Toy(tiny, data, tmp_path / "run")
    toy.model.eval()
    losses = losses_of(toy)
    batches = {s.name: [s.batch(np.arange(k, k + 4)) for k in (0, 4)] for s in toy.sets}
    found = conflict(
        {name: [[lambda b=b: losses(b).mean()] for b in two] for name, two in batches.items()},
        list(toy.model.bert.named_parameters()),
    )
    whole = {}
    for name, two in batches.items():
        for k, batch in enumerate(two):
            parameters = dict(toy.model.bert.named_parameters())
            grads = torch.autograd.grad(losses(batch).mean(), list(parameters.values()))
            whole[name, k] = dict(zip(parameters, grads, strict=True))
    for part, pairs in found.items():
        names = [n for n in whole["sst", 0] if part in ("overall", layer_group(n))]
        assert list(pairs) == ["sst|para", "sst|sts", "para|sts", "sst|sst", "para|para", "sts|sts"]
        for pair, figures in pairs.items():
            a, b = pair.split("|")
            one = torch.cat([whole[a, 0][n].flatten() for n in names]).double()
            two = torch.cat([whole[b, int(a == b)][n].flatten() for n in names]).double()
            cosine = torch.nn.functional.cosine_similarity(one, two, dim=0).item()
            assert figures["cosine"] == pytest.approx(cosine, abs=1e-5)
            lengths = one.norm().item(), two.norm().item()
            magnitude = 2 * lengths[0] * lengths[1] / (lengths[0] ** 2 + lengths[1] ** 2)
            assert figures["magnitude"] == pytest.approx(magnitude, abs=1e-5)


def test_measuring_changes_no_bit_of_the_run(tiny, data, tmp_path, run_script):
    measuring = ["--measure_conflict", 4, "--conflict_rows", 13]
    for name, more in (("plain", []), ("measured", measuring)):
        flags = job(
            tiny, data, tmp_path / name, "--option", "finetune", "--precision", "bf16", *more
        )
        code, _, err = run_script(multitask_classifier, *flags)
        assert code == 0, err
    plain, measured = files_of(tmp_path / "plain"), files_of(tmp_path / "measured")
    lines = measured.pop("log.jsonl").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] != "conflict"]
    records = [json.loads(line) for line in lines if line not in kept]
    assert [r["step"] for r in records] == [0, 4, 8, 12, 16]
    assert records[0]["rows"] == {"sst": 13, "para": 13, "sts": 10}  # STS has 20
    assert records[0]["parts"]["overall"]["sst|sts"]["cosine"] is not None
    assert records[0]["negative"].keys() == records[0]["parts"]["overall"].keys()
    assert b"".join(kept) == plain.pop("log.jsonl")
    for found in (plain, measured):
        found["last/state.safetensors"][1].pop("log")  # its length
    assert plain == measured


# ---------------------------------------------------------------------------- whole runs


def test_the_loss_of_a_task_left_out_never_reaches_bert(
    tiny, data, tmp_path, run_script, monkeypatch
):
    """After its steps no parameter of BERT has a gradient; after the others' steps all do."""
    models, seen = [], []
    learn, add_up = supervised.learn, supervised.summed

    def watched(loss_fn):
        gradients = add_up(loss_fn)

        def step(batches):
            loss = gradients(batches)
            none = [p.grad is None for p in models[0].bert.parameters()]
            seen.append((batches[0].task, none))
            return loss

        return step

    def remembered(model, *rest, **named):
        models.append(model)
        return learn(model, *rest, **named)

    monkeypatch.setattr(supervised, "summed", watched)
    monkeypatch.setattr(supervised, "learn", remembered)
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--leave_out", "sts")
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    assert {task for task, _ in seen} == {"sst", "para", "sts"}
    for task, none in seen:
        assert all(none) if task == "sts" else not any(none)


def test_the_head_of_a_task_left_out_learns(tiny, data, tmp_path, run_script):
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--leave_out", "sst")
    assert run_script(multitask_classifier, *flags)[0] == 0
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    torch.manual_seed(0)
    assert model.heads["sst"].dense.bias.abs().max() > 1e-3  # it starts at 0


def test_what_is_measured_is_fp32_and_without_dropout(tiny, data, tmp_path, monkeypatch):
    """A bf16 run in training mode: the losses of the measurement are those of fp32 evaluation."""
    toy = Toy(tiny, data, tmp_path / "run")
    toy.model.precision = torch.bfloat16
    toy.model.train()
    seen = []

    def losses(batch):
        found = losses_of(toy)(batch)
        seen.append((batch, toy.model.training, found.detach()))
        return found

    args = Namespace(measure_conflict=1, conflict_rows=None, seed=1, batch_size=4)
    supervised.Measured(lambda batches: 0.0, losses, toy.model, toy.sets, toy.run, args)([])
    assert toy.model.training and toy.model.precision == torch.bfloat16
    toy.model.precision = torch.float32
    toy.model.eval()
    assert len({str(batch) for batch, _, _ in seen}) == 6
    for batch, training, found in seen:
        assert not training
        torch.testing.assert_close(found, losses_of(toy)(batch).detach(), rtol=0, atol=0)


def test_more_rows_than_a_step_has_are_measured_some_at_a_time(tiny, data, tmp_path):
    toy = Toy(tiny, data, tmp_path / "run")
    seen = []

    def losses(batch):
        seen.append(batch.rows)
        return losses_of(toy)(batch)

    def measured(batch_size, conflict_rows):
        seen.clear()
        args = Namespace(
            measure_conflict=1, conflict_rows=conflict_rows, seed=1, batch_size=batch_size
        )
        return supervised.Measured(None, losses, toy.model, toy.sets, toy.run, args).measure()

    expected = measured(10, None)
    found = measured(4, 10)
    assert {len(rows) for rows in seen} == {4, 2}
    few = [rows.tolist() for rows in seen[:3]]
    assert len({row for rows in few for row in rows}) == 10
    for part, pairs in found.items():
        for pair, figures in pairs.items():
            assert figures == pytest.approx(expected[part][pair], abs=1e-5)
    measured(4, 10**6)
    parts = [rows.tolist() for rows in seen]
    passes = parts.count(parts[0])
    assert sum(map(len, parts)) == passes * sum(map(len, toy.sets))


def test_pcgrad_and_sum_train_differently(tiny, data, tmp_path, run_script):
    for surgery in ("sum", "pcgrad"):
        flags = job(tiny, data, tmp_path / surgery, "--option", "finetune", "--surgery", surgery)
        assert run_script(multitask_classifier, *flags, "--lr", "1e-2")[0] == 0
    ours, theirs = (log_of(tmp_path / name, "train") for name in ("sum", "pcgrad"))
    assert ours[0]["loss"] == theirs[0]["loss"]
    assert [r["loss"] for r in ours] != [r["loss"] for r in theirs]


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_surgery_trains_on_all_tasks_in_a_step(tiny, data, tmp_path, run_script, surgery):
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--surgery", surgery)
    code, _, err = run_script(multitask_classifier, *flags, "--accumulate", 2)
    assert code == 0, err
    records = log_of(tmp_path / "run", "train")
    assert {r["of"] for r in records} == {"sst+para+sts"}
    assert len(records) == 2 * 2  # epochs; STS: 20 rows, 3 batches, 2 steps


def test_lpft_probes_first_and_goes_on_from_those_heads(
    tiny, data, tmp_path, run_script, monkeypatch
):
    begun = []
    learn = supervised.learn

    def watched(model, *rest, **named):
        begun.append({n: p.clone() for n, p in model.heads.state_dict().items()})
        return learn(model, *rest, **named)

    monkeypatch.setattr(supervised, "learn", watched)
    flags = job(tiny, data, tmp_path / "run", "--option", "lpft", "--epochs", 1)
    code, out, err = run_script(multitask_classifier, *flags)
    assert code == 0, err
    assert "the probe has converged" in out
    kept = load_file(tmp_path / "run/probe/heads.safetensors")
    assert all(torch.equal(begun[1][name], kept[name]) for name in kept)
    assert any(not torch.equal(begun[0][name], kept[name]) for name in kept)
    dev = log_of(tmp_path / "run", "dev")
    probe = [r for r in dev if r["stage"] == "probe"]
    assert len(probe) > 3 and [r["stage"] for r in dev[len(probe) :]] == ["finetune"]
    best = max(range(len(probe)), key=lambda i: probe[i]["score"])
    assert len(probe) in (best + 4, 50)  # three evaluations without a better score
    steps = log_of(tmp_path / "run", "train")
    assert {tuple(r["lr"]) for r in steps if r["stage"] == "probe"} == {("sst", "para", "sts")}
    assert {tuple(r["lr"]) for r in steps if r["stage"] == "finetune"} == {
        ("bert", "sst", "para", "sts")
    }
    first = next(r for r in steps if r["stage"] == "finetune")
    assert first["lr"]["bert"] == first["lr"]["sst"]
    assert result_of(tmp_path / "run")["best_epoch"] == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--option", "finetune", "--leave_out", "nli"], "--leave_out nli: not in --tasks"),
        (
            ["--option", "finetune", "--tasks", "sst,sts", "--leave_out", "para"],
            "--leave_out para: not in --tasks sst,sts",
        ),
        (["--leave_out", "sst"], "--leave_out is for training BERT"),
        (["--option", "finetune", "--tasks", "sst", "--leave_out", "sst"], "it is the only task"),
        (["--surgery", "pcgrad"], "--surgery is for training BERT"),
        (["--measure_conflict", "5"], "--measure_conflict is for training BERT"),
        (["--option", "finetune", "--measure_conflict", "-1"], "--measure_conflict"),
        (["--option", "finetune", "--conflict_rows", "9"], "is for --measure_conflict N"),
        (
            ["--option", "finetune", "--tasks", "sst", "--measure_conflict", "9"],
            "--measure_conflict needs two tasks or more",
        ),
        (["--option", "finetune", "--surgery", "vaccine"], "--surgery"),
        (["--option", "finetune", "--surgery", "sum", "--tasks", "sst"], "needs two tasks or more"),
        (
            ["--option", "finetune", "--surgery", "sum", "--sampling", "annealed"],
            "--surgery sum needs --sampling roundrobin",
        ),
    ],
)
def test_bad_flags(run_script, flags, expected):
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
