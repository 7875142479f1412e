"""What the training loop and the job around it promise."""

import ctypes
import json
import resource
import shutil
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import classifier
import multitask_classifier
import supervised
import tasks
from bert import BertModel
from checkpoint import Run, UserError, read_state
from datasets import Mixture, TaskData
from optimizer import AdamW, parameter_groups
from scoring import embed, predict
from tasks import TASKS, MultitaskBERT
from tokenizer import BertTokenizer
from train import Diverged, prepare, summed, train


def job(tiny, data, run_dir, *more) -> list:
    """Flags of a quick run of the multitask script."""
    flags = ["--model", tiny, "--data_dir", data, "--run_dir", run_dir, "--epochs", 2]
    return [*flags, "--batch_size", 8, "--lr", "1e-3", "--precision", "fp32", *more]


def result_of(run_dir) -> dict:
    return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))


def log_of(run_dir, kind: str) -> list[dict]:
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


class Toy:
    """A small multitask model, its data and optimizers, for driving `train` itself."""

    def __init__(self, tiny, data, run_dir, *, frozen=False, **settings):
        prepare(3, "cpu", "fp32")
        tokenizer = BertTokenizer.from_pretrained(tiny)
        rows = [TASKS[name] for name in ("sst", "para", "sts")]
        self.model = MultitaskBERT(BertModel.from_pretrained(tiny), rows, tokenizer=tokenizer)
        if frozen:
            self.model.freeze()
        self.sets = [TaskData(data / t.files.format("train"), t, tokenizer) for t in rows]
        self.optimizers = {
            name: AdamW(parameter_groups(head, 0.01), lr=1e-2)
            for name, head in self.model.heads.items()
        }
        if not frozen:
            self.optimizers["bert"] = AdamW(parameter_groups(self.model.bert, 0.01), lr=1e-3)
        self.run = Run.begin(run_dir, {})
        defaults = {"epochs": 1, "schedule": "linear", "warmup": 0.1, "clip": 1.0}
        self.args = Namespace(
            **{**defaults, "eval_every": 0, "patience": 0, "save_every": "0", **settings}
        )

    def loss(self, batch):
        logits = self.model.decode(batch.task, embed(self.model, batch))
        return TASKS[batch.task].loss(logits, batch.labels)

    def train(self, plan, loss=None, scores=None):
        scores = iter(scores or range(10_000))
        return train(
            self.model,
            summed(loss or self.loss),
            plan,
            self.optimizers,
            lambda: {"score": next(scores), "summary": "-"},
            self.run,
            self.args,
        )


class OneTask:
    """A plan of a single step: the given batches."""

    def __init__(self, batches):
        self.batches = batches

    def steps_in(self, epoch):
        return 1

    def steps(self, epoch, first=0):
        yield from [self.batches][first:]


# ---------------------------------------------------------------------------- one step


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_moves_its_own_head_and_bert_and_nothing_else(tiny, data, tmp_path, name, frozen):
    toy = Toy(tiny, data, tmp_path / "run", frozen=frozen)
    source = next(s for s in toy.sets if s.task.name == name)
    # Moments that are not zero: a head that sits out must not move by its momentum either.
    toy.train(Mixture(toy.sets, 8, 1, epochs=1))
    before = {n: p.clone() for n, p in toy.model.state_dict().items()}
    toy.train(OneTask([source.batch(np.arange(6))]))
    for parameter, value in toy.model.state_dict().items():
        moved = not torch.equal(value, before[parameter])
        if parameter.startswith("heads."):
            assert moved == parameter.startswith(f"heads.{name}."), parameter
        elif frozen:
            assert not moved, parameter
    encoder = [n for n in before if n.startswith("bert.layers")]
    assert frozen or all(not torch.equal(toy.model.state_dict()[n], before[n]) for n in encoder)


def test_accumulated_batches_give_the_gradient_of_the_big_batch(tiny, data, tmp_path, monkeypatch):
    """Uneven parts weigh by their rows; SGD with rate 1 makes the weights show the gradient."""

    weights = []
    for i, parts in enumerate(([range(10)], [range(7), range(7, 10)], [[r] for r in range(10)])):
        toy = Toy(tiny, data, tmp_path / f"run{i}", clip=0.0, warmup=0.0)
        for module in toy.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in toy.model.bert.layers:
            layer.attention.dropout = 0.0
        descent = torch.optim.SGD(toy.model.parameters(), lr=1.0)
        monkeypatch.setattr(descent, "step", lambda scale, step=descent.step: step())
        toy.optimizers = {"all": descent}
        toy.train(OneTask([toy.sets[2].batch(np.array(part)) for part in parts]))
        weights.append(toy.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(weights[2][name], value, atol=2e-5, rtol=1e-4)


def test_gradients_are_clipped_and_the_log_has_the_norm_before(tiny, data, tmp_path):
    toy = Toy(tiny, data, tmp_path / "run", clip=0.01, warmup=0.0)
    norms = []
    step = toy.optimizers["bert"].step

    def spy(scale):
        grads = [p.grad for p in toy.model.parameters() if p.grad is not None]
        norms.append(scale * torch.cat([g.flatten() for g in grads]).norm().item())
        step(scale=scale)

    toy.optimizers["bert"].step = spy
    toy.optimizers = {"bert": toy.optimizers.pop("bert"), **toy.optimizers}
    toy.train(OneTask([toy.sets[0].batch(np.arange(8))]))
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert log_of(tmp_path / "run", "train")[0]["grad_norm"] > 0.1


def test_without_clipping_the_whole_gradient_counts(tiny, data, tmp_path, monkeypatch):
    """And a gradient of 0 is no reason to divide by it."""
    scales = []
    monkeypatch.setattr(AdamW, "step", lambda self, *, scale: scales.append(scale))
    toy = Toy(tiny, data, tmp_path / "a", clip=0.0)
    toy.train(OneTask([toy.sets[0].batch(np.arange(8))]))
    toy = Toy(tiny, data, tmp_path / "b", clip=1.0)
    toy.train(OneTask([toy.sets[0].batch(np.arange(8))]), lambda batch: 0 * toy.loss(batch))
    assert scales and set(scales) == {1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(tiny, data, tmp_path, bad, where):
    toy = Toy(tiny, data, tmp_path / "run")
    count = 0
    good = {}

    def loss(batch):
        nonlocal count
        count += 1
        losses = toy.loss(batch)
        if count == 5:
            good.update({n: p.clone() for n, p in toy.model.state_dict().items()})
            if where == "loss":
                return losses * bad
            losses.register_hook(lambda gradient: gradient * bad)
        return losses

    with pytest.raises(Diverged) as error:
        toy.train(Mixture(toy.sets, 4, 1, epochs=1), loss)
    message = str(error.value)
    assert message.startswith("step 4: " + ("loss is" if where == "loss" else "gradient norm is"))
    assert "task para, rows with ids quora-train.csv-" in message  # sst para sts sst para
    assert "\n" not in message
    tensors, facts = read_state(tmp_path / "run/last/state.safetensors")
    assert facts["step"] == 4
    for name, value in good.items():
        assert torch.equal(tensors[f"model.{name}"], value), name
    assert error.value.exit_code == 1


def test_a_step_that_spoils_the_weights_leaves_no_last_state(tiny, data, tmp_path):
    """Its own loss is finite, and the next one's is not: there is no good state before that."""
    toy = Toy(tiny, data, tmp_path / "run", warmup=0.0)
    count = 0

    def loss(batch):
        nonlocal count
        count += 1
        if count == 3:
            with torch.no_grad():
                toy.model.bert.pooler.weight.fill_(float("inf"))
        return toy.loss(batch)

    with pytest.raises(Diverged, match=r"step 2: loss is .* the best state so far, if any, is in"):
        toy.train(Mixture(toy.sets, 4, 1, epochs=1), loss)
    assert not (tmp_path / "run/last").exists()


@pytest.mark.parametrize("tasks", ["sst", "para", "sts"])
def test_outputs_that_are_not_finite_at_an_evaluation_end_the_run(
    tiny, data, tmp_path, run_script, monkeypatch, tasks
):
    """Weights may be finite and too large: no figure and no model is made of what comes out."""
    decode = MultitaskBERT.decode
    monkeypatch.setattr(
        MultitaskBERT,
        "decode",
        lambda self, *given: decode(self, *given) * (1 if self.training else float("nan")),
    )
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--tasks", tasks)
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert "the outputs for 16 rows are not finite" in line and "--lr" in line
    assert not (tmp_path / "run/best").exists()
    assert not (tmp_path / "run/result.json").exists()


def test_a_dev_loss_that_overflows_ends_the_run(tiny, data, tmp_path, run_script, monkeypatch):
    """Predictions are finite, their squares are not."""
    decode = MultitaskBERT.decode
    monkeypatch.setattr(
        MultitaskBERT,
        "decode",
        lambda self, *given: decode(self, *given) * (1 if self.training else 1e30),
    )
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--tasks", "sts")
    code, _, err = run_script(multitask_classifier, *flags)
    assert code == 1
    assert "sts-dev.csv: the mean loss is inf" in err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------- the loop


def test_the_best_evaluation_is_kept_and_patience_ends_the_run(tiny, data, tmp_path):
    toy = Toy(tiny, data, tmp_path / "run", epochs=9, patience=2)
    seen = []
    save = toy.model.save_pretrained
    toy.model.save_pretrained = lambda folder: (seen.append(folder.name), save(folder))
    best = toy.train(Mixture(toy.sets, 8, 1, epochs=9), scores=[0.1, 0.5, 0.4, 0.5, 0.9])
    assert best["score"] == 0.5
    assert best["epoch"] == 1
    assert seen == ["best", "best"]
    assert [r["score"] for r in log_of(tmp_path / "run", "dev")] == [0.1, 0.5, 0.4, 0.5]


def test_evaluation_every_few_steps_and_at_the_end_of_an_epoch(tiny, data, tmp_path):
    toy = Toy(tiny, data, tmp_path / "run", epochs=2, eval_every=4)
    toy.train(Mixture(toy.sets, 8, 1, epochs=2))  # 9 steps an epoch
    assert [r["step"] for r in log_of(tmp_path / "run", "dev")] == [4, 8, 9, 12, 16, 18]


def test_learning_rates_follow_the_schedule_each_from_its_own_peak(tiny, data, tmp_path):
    toy = Toy(tiny, data, tmp_path / "run", epochs=2, warmup=0.25)
    toy.train(Mixture(toy.sets, 8, 1, epochs=2))
    records = log_of(tmp_path / "run", "train")
    bert, sst = ([r["lr"][name] for r in records] for name in ("bert", "sst"))
    factors = [1 / 4, 2 / 4, 3 / 4, 1] + [(18 - step) / 14 for step in range(4, 18)]
    np.testing.assert_allclose(bert, [1e-3 * f for f in factors])
    np.testing.assert_allclose(sst, [1e-2 * f for f in factors])


# ---------------------------------------------------------------------------- whole runs


def files_of(run_dir) -> dict:
    """All that a run leaves, without what tells the time or where it lies."""
    found = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }
    for name in ("config.json", "resumed.jsonl", "best/README.md"):
        found.pop(name, None)
    result = json.loads(found.pop("result.json"))
    for name in ("training_seconds", "saving_seconds", "peak_memory_bytes", "predictions"):
        result.pop(name, None)
    tensors, facts = read_state(run_dir / "last/state.safetensors")
    facts.pop("seconds")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return {**found, "result.json": result, "last/state.safetensors": (tensors, facts)}


@pytest.mark.parametrize("option", ["pretrain", "finetune"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits(tiny, data, tmp_path, run_script, option, precision):
    for name in ("a", "b"):
        flags = job(tiny, data, tmp_path / name, "--option", option, "--precision", precision)
        code, _, err = run_script(multitask_classifier, *flags)
        assert code == 0, err
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert first == second
    assert {"best/model.safetensors", "predictions/sts-test-output.csv"} <= set(first)
    flags = job(tiny, data, tmp_path / "c", "--option", option, "--seed", 1)
    assert run_script(multitask_classifier, *flags)[0] == 0
    assert files_of(tmp_path / "c")["best/heads.safetensors"] != first["best/heads.safetensors"]


def test_a_run_leaves_its_record(tiny, data, tmp_path, run_script):
    code, out, _ = run_script(
        multitask_classifier, *job(tiny, data, tmp_path / "run", "--option", "finetune")
    )
    assert code == 0
    assert "dev, best epoch" in out
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert config["arguments"]["epochs"] == 2
    assert config["rows"]["train"] == {"sst": 40, "para": 40, "sts": 20}
    assert config["device"] == "cpu"
    result = result_of(tmp_path / "run")
    best = max(log_of(tmp_path / "run", "dev"), key=lambda r: r["score"])
    assert result["best_step"] == best["step"]
    assert result["overall"] == pytest.approx(best["score"])
    assert result["dev"].keys() == {"sst", "para", "sts"}
    for task in ("sst", "para", "sts"):
        for split, rows in (("dev", 16), ("test", 8)):
            path = tmp_path / f"run/predictions/{task}-{split}-output.csv"
            lines = path.read_text(encoding="utf-8").splitlines()
            assert len(lines) == rows + 1
            name = TASKS[task].files.format("test-student" if split == "test" else split)
            assert [line.split(" , ")[0] for line in lines[1:]] == [
                f"{name}-{i}" for i in range(rows)
            ]


def test_predictions_come_from_the_best_checkpoint(tiny, data, tmp_path, run_script):
    """Learning rates that spoil the model after the first epoch: the last state is not the best."""
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--tasks", "sst")
    flags += ["--epochs", 6, "--lr", "0.02", "--schedule", "constant", "--seed", 5]
    assert run_script(multitask_classifier, *flags)[0] == 0
    model = MultitaskBERT.from_pretrained(tmp_path / "run")
    dev = TaskData(data / "ids-sst-dev.csv", TASKS["sst"], model.tokenizer)
    with torch.no_grad():
        batch = dev.batch(np.arange(len(dev)))
        predicted = model.predict_sentiment(batch.input_ids, batch.attention_mask).argmax(1)
    path = tmp_path / "run/predictions/sst-dev-output.csv"
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert [int(line.split(" , ")[1]) for line in lines] == predicted.tolist()


def test_what_was_predicted_of_dev_is_not_predicted_again(
    tiny, data, tmp_path, run_script, monkeypatch
):
    """Each set once an evaluation, and the test sets once more; the files are the same bits."""
    predicted = []

    def counting(model, data, *rest):
        predicted.append(data.path.name)
        return predict(model, data, *rest)

    monkeypatch.setattr(supervised, "predict", counting)
    flags = ["--option", "finetune", "--tasks", "sst,sts", "--epochs", 3]
    assert run_script(multitask_classifier, *job(tiny, data, tmp_path / "a", *flags))[0] == 0
    assert sorted(Counter(predicted).items()) == [
        ("ids-sst-dev.csv", 3),
        ("ids-sst-test-student.csv", 1),
        ("sts-dev.csv", 3),
        ("sts-test-student.csv", 1),
    ]
    monkeypatch.setattr(supervised.Judge, "logits", lambda self, data, step: self.predict(data))
    assert run_script(multitask_classifier, *job(tiny, data, tmp_path / "b", *flags))[0] == 0
    for path in (tmp_path / "a/predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "b/predictions" / path.name).read_bytes()


def test_a_run_folder_is_a_model_once_it_has_a_best_state(tiny, data, tmp_path, run_script):
    flags = ["--data_dir", data, "--epochs", 1]
    first = [*flags, "--model", tiny, "--run_dir", tmp_path / "a"]
    assert run_script(classifier, *first)[0] == 0
    second = [*flags, "--model", tmp_path / "a", "--run_dir", tmp_path / "b"]
    assert run_script(classifier, *second)[0] == 0
    shutil.rmtree(tmp_path / "a" / "best")
    code, _, err = run_script(classifier, *flags, "--model", tmp_path / "a")
    assert code == 2 and "a run that has no best/ yet" in err
    with pytest.raises(UserError, match="a run that has no best/ yet"):
        MultitaskBERT.from_pretrained(tmp_path / "a")


def test_linear_probing_leaves_bert_as_it_was(tiny, data, tmp_path, run_script):
    flags = ["--model", tiny, "--data_dir", data, "--run_dir", tmp_path / "run"]
    code, _, err = run_script(classifier, *flags, "--option", "pretrain", "--epochs", 3)
    assert code == 0, err
    before = load_file(tiny / "model.safetensors")
    after = load_file(tmp_path / "run/best/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("task", ["sst", "cfimdb"])
def test_the_classifier_learns(tiny, data, tmp_path, run_script, task):
    flags = ["--task", task, "--model", tiny, "--data_dir", data, "--run_dir", tmp_path / "run"]
    flags += ["--option", "finetune", "--epochs", 15, "--batch_size", 8, "--pooling", "mean"]
    code, _, err = run_script(classifier, *flags, "--lr", "3e-3", "--head_lr", "1e-2")
    assert code == 0, err
    losses = [record["loss"] for record in log_of(tmp_path / "run", "train")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    majority = {"sst": 0.45, "cfimdb": 0.8}[task]
    assert result_of(tmp_path / "run")["dev"][task]["accuracy"] > majority


@pytest.mark.parametrize("encoding", [("separate", "cosine"), ("joint", None)])
@pytest.mark.parametrize("sampling", ["proportional", "annealed"])
def test_other_encodings_samplings_and_accumulation_run(
    tiny, data, tmp_path, run_script, encoding, sampling
):
    pair_encoding, decoder = encoding
    flags = ["--pair_encoding", pair_encoding, "--sampling", sampling, "--accumulate", 2]
    if decoder:
        flags += ["--sts_decoder", decoder, "--para_decoder", "concat"]
    code, _, err = run_script(
        multitask_classifier, *job(tiny, data, tmp_path / "run", "--option", "finetune", *flags)
    )
    assert code == 0, err
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert config["decoders"]["sts"] == (decoder or "linear")
    assert len(log_of(tmp_path / "run", "train")) == 2 * (3 + 3 + 2)


def test_hidden_dropout_reaches_bert_and_its_record(tiny, data, tmp_path, run_script, monkeypatch):
    built = []
    original = tasks.MultitaskBERT.freeze
    monkeypatch.setattr(
        tasks.MultitaskBERT, "freeze", lambda self, on: (built.append(self), original(self, on))
    )
    flags = job(tiny, data, tmp_path / "run", "--hidden_dropout_prob", "0.37", "--epochs", 1)
    assert run_script(multitask_classifier, *flags)[0] == 0
    dropouts = [m.p for m in built[0].modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == 1 + 2 + 3  # embeddings, two layers, three heads
    assert set(dropouts) == {0.37}


def test_device_and_precision():
    device, dtype = prepare(1, "auto", "fp32")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype == torch.float32
    assert torch.backends.mkldnn.enabled != torch.backends.mkl.is_available()
    assert prepare(1, "cpu", "bf16")[1] == torch.bfloat16 and torch.backends.mkldnn.enabled


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_memory_that_is_freed_is_had_again():
    """Blocks as large as a gradient of all words: the kernel is not asked for pages each time."""
    prepare(1, "cpu", "fp32")

    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(new_pages() for _ in range(6)) < 1000  # of 12,288


@pytest.mark.parametrize(
    ("has_bf16", "bf16_takes", "expected"),
    [
        (True, 0.5, "bfloat16"),
        (True, 0.9, "float32"),
        (True, 2, "float32"),
        (False, 0.5, "float32"),
    ],
)
def test_auto_precision_is_bf16_where_it_is_clearly_faster(
    monkeypatch, has_bf16, bf16_takes, expected
):
    """The clock is played: a product in float32 takes one second, in bfloat16 `bf16_takes`."""
    now = [0.0]

    def product(self, other):
        now[0] += bf16_takes if self.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr("train.time.perf_counter", lambda: now[0])
    assert prepare(1, "cpu", "auto")[1] == getattr(torch, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_job_runs_on_a_gpu(tiny, data, tmp_path, run_script):
    flags = job(tiny, data, tmp_path / "run", "--option", "finetune", "--use_gpu")
    assert run_script(multitask_classifier, *flags)[0] == 0
