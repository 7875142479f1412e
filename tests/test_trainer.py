"""The training loop on a model of three numbers: steps, evaluations, errors, signals, resuming."""

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


def make_trainer(run_dir, *, resume=False, loss=None, scores=(), optimizers=None, **options):
    """A trainer of `Linear` whose evaluations score `scores`, by default better each time."""
    defaults = {"epochs": 2, "clip": 1.0, "eval_every": 0, "patience": 0, "save_every": "0"}
    args = Namespace(run_dir=run_dir, resume=resume, seed=3, **{**defaults, **options})
    model, scores = Linear(), iter(scores)
    torch.manual_seed(args.seed)
    loss_fn = partial(loss, model) if loss else model.loss
    two = {"bert": AdamW([model.w], lr=0.1), "head": AdamW([model.b], lr=0.3)}
    return Trainer(
        model,
        optimizers(model) if optimizers else two,
        lambda step, total: 1 - step / total,
        Mixture(),
        lambda batches, step: sum_losses(loss_fn, batches, list(model.parameters())),
        lambda: {"score": next(scores, -model.w[0].item()), "summary": "found"},
        RunDir.start_or_resume(args, data={}),
        args,
    )


# ---------------------------------------------------------------------------- one step


class Descent(torch.optim.SGD):
    """Gradient descent at rate 1: the weights show the gradient and the factor it was scaled by."""

    def step(self, *, scale):
        self.param_groups[0]["lr"] = scale
        super().step()


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(tmp_path, clip):
    """And the log has the norm before clipping; 0 means no clipping."""
    descent = lambda model: {"all": Descent(model.parameters())}  # noqa: E731
    trained = make_trainer(tmp_path / "run", clip=clip, optimizers=descent)
    w, b = parameters = [nn.Parameter(p.detach().clone()) for p in trained.model.parameters()]
    trained.model.eval()
    trained.bar = Mock()
    batch = next(Mixture().steps(0))[0]
    trained.train_step(1, [batch])
    ((batch.x @ w + b - batch.y) ** 2).mean().backward()
    norm = torch.cat([w.grad, b.grad]).norm().item()
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    for p, new in zip(parameters, trained.model.parameters(), strict=True):
        torch.testing.assert_close(new, p - p.grad)
    assert read_log(tmp_path / "run", "train")[0]["grad_norm"] == pytest.approx(norm)


def test_a_gradient_of_zero_is_not_divided_by(tmp_path):
    trained = make_trainer(tmp_path / "run", loss=lambda model, batch: 0 * model.loss(batch))
    trained.fit()
    assert all(p.isfinite().all() for p in trained.model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_with_the_state_before_that_step(tmp_path, bad, where):
    """Resumed without the fault, the run leaves what one without it leaves."""
    seen = []

    def loss(model, batch):
        seen.append({f"model.{name}": p.clone() for name, p in model.state_dict().items()})
        losses = model.loss(batch)
        if len(seen) == 8:
            if where == "loss":
                return losses * bad
            losses.register_hook(lambda gradient: gradient * bad)
        return losses

    trained = make_trainer(tmp_path / "run", loss=loss)
    with pytest.raises(TrainingDiverged, match=f"^step 7: {where} is .*--lr") as caught:
        trained.fit()
    trained.run.close()
    (batch,) = next(Mixture().steps(1, 2))
    assert str(batch) in str(caught.value) and caught.value.exit_code == 1
    tensors, facts = read_state(tmp_path / "run/last/state.safetensors")
    assert facts["step"] == 7
    assert all(torch.equal(tensors[name], value) for name, value in seen[-1].items())
    whole, again = make_trainer(tmp_path / "whole"), make_trainer(tmp_path / "run", resume=True)
    whole.fit()
    again.fit()
    assert torch.equal(again.model.w, whole.model.w)


def test_a_step_that_spoils_the_weights_leaves_no_last_state(tmp_path):
    """Its own loss is finite and the next one's is not: there is no good state before that."""

    def loss(model, batch):
        if batch.task == "b":
            model.b.data.fill_(math.inf)
        return model.loss(batch)

    trained = make_trainer(tmp_path / "run", loss=loss)
    with pytest.raises(TrainingDiverged, match=r"step 1: loss is .*best/?") as caught:
        trained.fit()
    assert "last" not in str(caught.value) and not (tmp_path / "run/last").exists()


def test_no_model_is_kept_of_a_score_that_is_not_finite(tmp_path):
    trained = make_trainer(tmp_path / "run", scores=[math.nan])
    with pytest.raises(TrainingDiverged, match="step 5: dev score is nan"):
        trained.fit()
    assert not (tmp_path / "run/best").exists()


# ---------------------------------------------------------------------------- the loop


def test_the_best_evaluation_is_kept_and_patience_ends_the_run(tmp_path):
    """Evaluations are every few steps and at the end of an epoch."""
    options = {"epochs": 9, "patience": 2, "eval_every": 3, "scores": [0.1, 0.5, 0.4, 0.5, 0.9]}
    trained = make_trainer(tmp_path / "run", **options)
    w, state = trained.model.w, trained.state
    saved, save = [], trained.model.save_pretrained
    trained.model.save_pretrained = lambda to: (save(to), saved.append((state.step, w.tolist())))
    best = trained.fit()
    assert (best["score"], best["epoch"], best["step"]) == (0.5, 1, 5)
    assert [step for step, _ in saved] == [3, 5]
    assert read_tensors(tmp_path / "run/best/model.safetensors")["w"].tolist() == saved[1][1]
    dev = read_log(tmp_path / "run", "dev")
    assert [e["score"] for e in dev] == [0.1, 0.5, 0.4, 0.5]
    expected = [(3, 1, 12), (5, 1, 20), (6, 2, 24), (9, 2, 36)]
    assert [(e["step"], e["epoch"], e["rows"]) for e in dev] == expected


def test_learning_rates_follow_the_schedule_each_from_its_own_peak(tmp_path, capsys):
    """In the optimizer, in the log and, beside each task's loss, on the screen."""
    trained = make_trainer(tmp_path / "run")
    used, optimizer = [], trained.optimizers["bert"]
    step = optimizer.step
    optimizer.step = lambda **given: (used.append(optimizer.param_groups[0]["lr"]), step(**given))
    trained.fit()
    factors = 1 - np.arange(10) / 10
    entries = read_log(tmp_path / "run", "train")
    np.testing.assert_allclose(used, 0.1 * factors)
    np.testing.assert_allclose([e["lr"]["bert"] for e in entries], 0.1 * factors)
    np.testing.assert_allclose([e["lr"]["head"] for e in entries], 0.3 * factors)
    assert [e["epoch"] for e in entries] == [1] * 5 + [2] * 5
    assert "".join(e["of"] for e in entries) == "ababa" * 2
    out, err = capsys.readouterr()
    assert re.search(r"loss a \d\.\d+ b \d\.\d+, lr bert \S+ heads \S+", err)
    assert "epoch 1, step 5: found (best so far)" in out


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


def final(trained) -> tuple:
    """What a finished trainer has: weights, moments, random numbers, the best, and the log."""
    moments = [m for o in trained.optimizers.values() for m in o.state.values()]
    values = [p.tolist() for p in trained.model.parameters()]
    values += [v.tolist() for m in moments for v in m.values() if isinstance(v, Tensor)]
    log = (trained.run.path / "log.jsonl").read_bytes()
    return values, torch.get_rng_state().tolist(), trained.state, log


def signalled(function, number: int, step: int | None = None):
    """`function`, with that signal in its first call, or in its call for that step."""
    signals = [number]

    def call(*given):
        if signals and (step is None or step in given):
            os.kill(os.getpid(), signals.pop())
        return function(*given)

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_in_every_step_and_evaluation_ends_with_the_same_bits(tmp_path, number):
    """The signal lets the step finish; the next call goes on from there, even before a step."""
    whole = make_trainer(tmp_path / "whole", eval_every=2)
    whole.fit()
    expected = final(whole)
    for stops in range(30):
        trained = make_trainer(tmp_path / "run", resume=True, eval_every=2)
        wrapped = "backward" if stops % 2 else "evaluate_model"
        setattr(trained, wrapped, signalled(getattr(trained, wrapped), number))
        try:
            trained.fit()
            break
        except TrainingInterrupted as stopped:
            assert f"stopped at step {trained.state.step}; " in str(stopped)
            assert f"--run_dir {tmp_path / 'run'} --resume continues" in str(stopped)
            state = read_state(tmp_path / "run/last/state.safetensors")[1]
            assert state["step"] == trained.state.step
        finally:
            trained.run.close()
    assert stops >= 10
    assert final(trained) == expected


def interrupt_at(trained, step: int) -> None:
    """Train until Ctrl-C in the step with that number."""
    trained.backward = signalled(trained.backward, signal.SIGINT, step)
    with pytest.raises(TrainingInterrupted):
        trained.fit()
    trained.run.close()


def test_resume_says_where_it_goes_on(tmp_path, capsys):
    interrupt_at(make_trainer(tmp_path / "run"), 3)
    for step, expected in ((6, "in epoch 1 after step 4 of 10"), (9, "2 after step 7 of 10")):
        interrupt_at(make_trainer(tmp_path / "run", resume=True), step)
        assert expected in capsys.readouterr().out
    for expected in ("in epoch 2 after step 10 of 10", "training had finished"):
        trained = make_trainer(tmp_path / "run", resume=True)
        trained.fit()
        trained.run.close()
        assert expected in capsys.readouterr().out


DAMAGE = [("random.0", None), ("optimizer.bert.0.exp_avg", None), ("model.w", None), ("step", None)]
DAMAGE += [("optimizer.bert.0.exp_avg", torch.zeros(1)), ("optimizer.bert.x.step", torch.tensor(1))]


@pytest.mark.parametrize(("name", "value"), [*DAMAGE, ("model.w", torch.zeros(4))])
def test_a_state_of_something_else_is_refused(tmp_path, name, value):
    """Well-formed, and not of this model: one line that names the file."""
    interrupt_at(make_trainer(tmp_path / "run"), 6)
    path = tmp_path / "run/last/state.safetensors"
    tensors, facts = read_state(path)
    owner = tensors if "." in name else facts
    owner.pop(name, None)
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
