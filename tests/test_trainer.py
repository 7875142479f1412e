"""The training loop on a model of four numbers: steps, evaluations, errors, signals, resuming."""

import math
import os
import re
import signal
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import read_log
from torch import Tensor, nn

from engine.checkpoint import read_state, read_tensors, write_state, write_tensors
from engine.errors import TrainingDiverged, UserError
from engine.gradients import sum_losses
from engine.interrupts import SaveTimer, StopSignals, TrainingInterrupted
from engine.run_dir import RunDir
from engine.trainer import Trainer
from optimizer import AdamW


class Linear(nn.Module):
    """y = w x + b with dropout, so that training draws random numbers."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3))
        self.b = nn.Parameter(torch.zeros(1))

    def loss(self, batch) -> Tensor:
        return (nn.functional.dropout(batch.x, 0.1, self.training) @ self.w + self.b - batch.y) ** 2

    def save_pretrained(self, folder) -> None:
        write_tensors(folder / "model.safetensors", self.state_dict())


@dataclass
class Rows:
    """A batch of a task, whose rows are the numbers `global_rows`."""

    task: str
    global_rows: np.ndarray

    def __post_init__(self):
        x = torch.from_numpy(np.sin(np.outer(self.global_rows + 1, [1, 2, 3]))).float()
        self.x, self.y, self.input_ids = x, x.sum(1), x

    def __len__(self):
        return len(self.global_rows)

    def __str__(self):
        return f"task {self.task}, rows {' '.join(map(str, self.global_rows))}"

    def to(self, device):
        return self


class Mixture:
    """Five steps an epoch, of tasks a and b in turn."""

    def epoch_steps(self, epoch):
        return 5

    def steps(self, epoch, first=0):
        for step in range(first, 5):
            rows = np.random.default_rng([epoch, step]).permutation(20)[:4]
            yield [Rows("ab"[step % 2], rows)]


def make_trainer(run_dir, *, resume=False, loss=None, scores=(), **options):
    """A trainer of `Linear` whose evaluations score `scores`, by default better each time."""
    defaults = {"epochs": 2, "clip": 1.0, "eval_every": 0, "patience": 0, "save_every": "0"}
    defaults["final_only"] = False
    args = Namespace(run_dir=run_dir, resume=resume, seed=3, **{**defaults, **options})
    model, scores = Linear(), iter(scores)
    torch.manual_seed(args.seed)
    loss_fn = partial(loss, model) if loss else model.loss
    return Trainer(
        model,
        {"bert": AdamW([model.w], lr=0.1), "head": AdamW([model.b], lr=0.3)},
        lambda step, total: 1 - step / total,
        Mixture(),
        lambda batches, step: sum_losses(loss_fn, batches, list(model.parameters())),
        lambda: {"score": next(scores, -model.w[0].item()), "summary": "scored"},
        RunDir.start_or_resume(args, data={}),
        args,
    )


# ---------------------------------------------------------------------------- one step


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(tmp_path, clip):
    """And the log has the norm before clipping; 0 means no clipping."""
    trainer, scaled = make_trainer(tmp_path / "run", clip=clip), []
    for p, optimizer in zip(trainer.parameters, trainer.optimizers.values(), strict=True):
        optimizer.step = lambda grad_scale, p=p, **_: scaled.append(p.grad / (grad_scale or 1))
    w, b = parameters = [nn.Parameter(p.detach().clone()) for p in trainer.parameters]
    trainer.model.eval()
    trainer.bar = Mock()
    batch = next(Mixture().steps(0))[0]
    trainer.train_step(1, [batch])
    trainer.run.flush()
    ((batch.x @ w + b - batch.y) ** 2).mean().backward()
    norm = torch.cat([w.grad, b.grad]).norm().item()
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    torch.testing.assert_close(scaled, [w.grad, b.grad])
    assert read_log(tmp_path / "run", "train")[0]["grad_norm"] == pytest.approx(norm)


def test_a_gradient_of_zero_is_not_divided_by(tmp_path):
    trainer = make_trainer(tmp_path / "run", loss=lambda model, batch: 0 * model.loss(batch))
    trainer.fit()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient norm"])
@pytest.mark.parametrize("step", [7, 9])
def test_a_loss_that_is_not_finite_stops_with_the_state_before_that_step(
    tmp_path, bad, place, step
):
    """It is read within the next step, or before the evaluation after the last one.

    Resumed without the fault, the run leaves what one without it leaves.
    """
    seen = []

    def loss(model, batch):
        seen.append({f"model.{name}": p.clone() for name, p in model.state_dict().items()})
        losses = model.loss(batch)
        if len(seen) == step + 1:
            if place == "loss":
                return losses * bad
            losses.register_hook(lambda gradient: gradient * bad)
        return losses

    trainer = make_trainer(tmp_path / "run", loss=loss)
    with pytest.raises(TrainingDiverged, match=f"^step {step}: {place} is .*--lr") as caught:
        trainer.fit()
    trainer.run.close()
    (batch,) = next(Mixture().steps(1, step - 5))
    assert str(batch) in str(caught.value) and caught.value.exit_code == 3
    tensors, facts = read_state(tmp_path / "run/last/state.safetensors")
    assert facts["step"] == step
    assert all(torch.equal(tensors[name], value) for name, value in seen[-1].items())
    whole, again = make_trainer(tmp_path / "whole"), make_trainer(tmp_path / "run", resume=True)
    whole.fit()
    again.fit()
    assert final(again)[0] == final(whole)[0]


def test_a_step_that_spoils_the_weights_leaves_no_last_state(tmp_path):
    """Its own loss is finite and the next one's is not: there is no good state before that."""

    def loss(model, batch):
        if batch.task == "b":
            model.b.data.fill_(math.inf)
        return model.loss(batch)

    trainer = make_trainer(tmp_path / "run", loss=loss)
    with pytest.raises(TrainingDiverged, match=r"step 1: loss is .*best/?") as caught:
        trainer.fit()
    assert "last" not in str(caught.value) and not (tmp_path / "run/last").exists()


@pytest.mark.parametrize("save_every", ["0", "1"])
def test_infinite_weights_do_not_replace_the_last_finite_state(tmp_path, save_every):
    """Found at the next save, be it before an evaluation or by --save_every."""
    trainer = make_trainer(tmp_path / "run", save_every=save_every)
    head = trainer.optimizers["head"]
    step, head.calls = head.step, 0

    def spoil(**options):
        step(**options)
        head.calls += 1
        if head.calls == 10:  # the last step of the second epoch
            trainer.model.w.data[0] = math.inf

    head.step = spoil
    with pytest.raises(TrainingDiverged, match="step 10: weights are not finite"):
        trainer.fit()
    tensors, facts = read_state(tmp_path / "run/last/state.safetensors")
    assert facts["step"] == (9 if save_every == "1" else 5)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_no_model_is_kept_of_a_score_that_is_not_finite(tmp_path):
    with pytest.raises(TrainingDiverged, match="step 5: dev score is nan"):
        make_trainer(tmp_path / "run", scores=[math.nan]).fit()
    assert not (tmp_path / "run/best").exists()


# ---------------------------------------------------------------------------- the loop


def test_the_best_evaluation_is_kept_and_patience_ends_the_run(tmp_path):
    """Evaluations are every few steps and at the end of an epoch."""
    options = {"epochs": 9, "patience": 2, "eval_every": 3, "scores": [0.1, 0.5, 0.4, 0.5, 0.9]}
    trainer = make_trainer(tmp_path / "run", **options)
    w, state = trainer.model.w, trainer.state
    saved, save = [], trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda to: (save(to), saved.append((state.step, w.tolist())))
    best = trainer.fit()
    assert (best["score"], best["epoch"], best["step"]) == (0.5, 1, 5)
    assert [step for step, _ in saved] == [3, 5]
    assert read_tensors(tmp_path / "run/best/model.safetensors")["w"].tolist() == saved[1][1]
    dev = read_log(tmp_path / "run", "dev")
    assert [e["score"] for e in dev] == [0.1, 0.5, 0.4, 0.5]
    expected = [(3, 1, 12), (5, 1, 20), (6, 2, 24), (9, 2, 36)]
    assert [(e["step"], e["epoch"], e["rows"]) for e in dev] == expected


def test_with_final_only_the_last_weights_are_the_only_ones_that_are_evaluated(tmp_path):
    trainer = make_trainer(tmp_path / "run", final_only=True, scores=[0.1, 0.9])
    best = trainer.fit()
    assert (best["score"], best["epoch"], best["step"]) == (0.1, 2, 10)
    assert len(read_log(tmp_path / "run", "dev")) == 1
    saved = read_tensors(tmp_path / "run/best/model.safetensors")
    assert torch.equal(saved["w"], trainer.model.w)


def test_learning_rates_follow_the_schedule_each_from_its_own_peak(tmp_path, capsys):
    """In the optimizer, in the log and, beside each task's loss, on the screen."""
    trainer = make_trainer(tmp_path / "run")
    used, optimizer = [], trainer.optimizers["bert"]
    step = optimizer.step
    optimizer.step = lambda **given: (used.append(optimizer.param_groups[0]["lr"]), step(**given))
    trainer.fit()
    factors, entries = 1 - np.arange(10) / 10, read_log(tmp_path / "run", "train")
    np.testing.assert_allclose(used, 0.1 * factors)
    np.testing.assert_allclose([e["lr"]["bert"] for e in entries], 0.1 * factors)
    np.testing.assert_allclose([e["lr"]["head"] for e in entries], 0.3 * factors)
    assert [e["epoch"] for e in entries] == [1] * 5 + [2] * 5
    assert "".join(e["task"] for e in entries) == "ababa" * 2
    out, err = capsys.readouterr()
    assert re.search(r"loss a \d\.\d+ b \d\.\d+, lr bert \S+ heads \S+", err)
    assert "epoch 1, step 5: scored (best so far)" in out


def test_save_intervals_in_steps_and_minutes(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    steps, minutes, never = (SaveTimer(text, 7) for text in ("5", "2m", "0"))
    assert [steps.is_due(11), steps.is_due(12)] == [False, True]
    now = 219.0
    assert not minutes.is_due(500)
    now = 220.0
    assert minutes.is_due(8) and not never.is_due(10**6)
    minutes.restart(8)
    assert not minutes.is_due(9)


# ---------------------------------------------------------------------------- stop and resume


def final(trainer) -> tuple:
    """What a finished trainer has: weights, moments, random numbers, the best, and the log."""
    moments = [m for o in trainer.optimizers.values() for m in o.state.values()]
    values = [p.tolist() for p in trainer.model.parameters()]
    values += [v.tolist() for m in moments for v in m.values() if isinstance(v, Tensor)]
    log = (trainer.run.path / "log.jsonl").read_bytes()
    return values, torch.get_rng_state().tolist(), trainer.state, log


def signalled(function, number: int):
    """`function`, with that signal in its first call."""
    signals = [number]

    def call(*args):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return function(*args)

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_in_every_step_and_evaluation_ends_with_the_same_bits(
    tmp_path, number, capsys
):
    """The signal lets the step finish; the next call goes on from there, and says where."""
    whole = make_trainer(tmp_path / "whole", eval_every=2)
    whole.fit()
    expected, message = final(whole), "starting a new run"
    for stops in range(30):
        trainer = make_trainer(tmp_path / "run", resume=True, eval_every=2)
        wrapped = "backward" if stops % 2 else "evaluate_model"
        setattr(trainer, wrapped, signalled(getattr(trainer, wrapped), number))
        try:
            trainer.fit()
            break
        except TrainingInterrupted as stopped:
            step = trainer.state.step
            assert f"stopped at step {step}; " in str(stopped)
            assert f"--run_dir {tmp_path / 'run'} --resume continues" in str(stopped)
            assert read_state(tmp_path / "run/last/state.safetensors")[1]["step"] == step
            assert message in capsys.readouterr().out
            message = f"resuming in epoch {1 + (step > 5)} after step {step} of 10"
        finally:
            trainer.run.close()
    assert stops >= 10
    assert final(trainer) == expected
    make_trainer(tmp_path / "run", resume=True, eval_every=2).fit()
    assert "training had finished" in capsys.readouterr().out


DAMAGE = [("random.0", None), ("optimizer.bert.0.exp_avg", None), ("model.w", None), ("step", None)]
DAMAGE += [("optimizer.bert.0.exp_avg", torch.zeros(1)), ("optimizer.bert.x.step", torch.tensor(1))]


@pytest.mark.parametrize(("name", "value"), [*DAMAGE, ("model.w", torch.zeros(4))])
def test_a_state_of_something_else_is_refused(tmp_path, name, value):
    """Well-formed, and not of this model: one line that names the file."""
    trainer = make_trainer(tmp_path / "run")
    trainer.fit()
    trainer.run.close()
    path = tmp_path / "run/last/state.safetensors"
    tensors, facts = read_state(path)
    (tensors if "." in name else facts).pop(name, None)
    write_state(path, tensors if value is None else {**tensors, name: value}, facts)
    with pytest.raises(UserError, match=r"last/state\.safetensors"):
        make_trainer(tmp_path / "run", resume=True).fit()


def test_the_first_signal_asks_and_the_second_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a third disturbs nothing
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignals() as stop:
        stop.immediate = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
