"""The training loop that every script shares. It knows nothing of tasks.

Scripts and training methods differ in one thing, `backward`: a function from a step's batches to
gradients in the parameters and the loss for the log.
"""

import math
import sys
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed
from engine.device import catch_out_of_memory, get_rng_states, set_rng_states
from engine.errors import TrainingDiverged, UserError, reading
from engine.interrupts import SaveTimer, StopSignals, TrainingInterrupted
from engine.run_dir import RunDir

ADVICE = "try a smaller --lr or --precision fp32"


class Mixture(Protocol):
    """The data of a run, such as `datasets.TaskMixture`."""

    def epoch_steps(self, epoch: int) -> int:
        """The number of steps in an epoch."""

    def steps(self, epoch: int, first: int = 0) -> Iterator[Sequence[Any]]:
        """The epoch's steps from number `first` on, each a list of batches."""


def progress_bar(total: int, description: str, initial: int = 0, leave: bool = True) -> tqdm:
    """A progress bar on standard error; updated rarely if that is a file."""
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        leave=leave,
        position=None if terminal else 0,  # no cursor movements in a file
        disable=distributed.rank() > 0,
    )


# ---------------------------------------------------------------------------- the loop


@dataclass
class TrainState:
    """Where training is, apart from weights, optimizer state and random generators.

    Attributes:
        step: optimizer steps taken.
        rows: training rows seen.
        best: the best evaluation so far, with "epoch" and "step".
        evals_since_best: evaluations since then.
        eval_due: the evaluation at this step is still to be done.
        finished: training is complete.
    """

    step: int = 0
    rows: int = 0
    best: dict[str, Any] | None = None
    evals_since_best: int = 0
    eval_due: bool = False
    finished: bool = False


class Trainer:
    """Trains a model, evaluates it, keeps the best weights, and can stop and resume anywhere.

    Args:
        model: has `save_pretrained(folder)` and `device`.
        optimizers: by name; a step updates the parameters that have gradients. Their `step` takes
            `scale`, a factor on the gradients.
        lr_factor: (step, total steps) -> the factor on all learning rates.
        mixture: the steps of each epoch.
        backward: takes a step's batches on `model.device` and its number, leaves gradients in the
            parameters (the same in all processes), and returns the loss.
        evaluate: metrics of the model; the largest "score" is the best, "summary" is printed.
        run: gets the log, the best weights and the training state.
        args: `epochs`, `clip`, `eval_every`, `patience`, `save_every` and `seed`, as in
            `cli.add_training_flags`.
        best_folder: the folder in `run.path` for the best weights.
    """

    def __init__(
        self,
        model: Any,
        optimizers: dict[str, torch.optim.Optimizer],
        lr_factor: Callable[[int, int], float],
        mixture: Mixture,
        backward: Callable[[Sequence[Any], int], float],
        evaluate: Callable[[], dict[str, Any]],
        run: RunDir,
        args: Namespace,
        best_folder: str = "best",
    ):
        self.model = model
        self.optimizers = optimizers
        self.lr_factor = lr_factor
        self.mixture = mixture
        self.backward = backward
        self.evaluate_model = evaluate
        self.run = run
        self.args = args
        self.best_folder = run.path / best_folder
        self.peak_lrs = [group["lr"] for group in self._param_groups()]
        self.parameters = [p for group in self._param_groups() for p in group["params"]]
        self.epoch_ends = list(accumulate(map(mixture.epoch_steps, range(args.epochs))))
        self.state = TrainState()
        self.losses: dict[str, float] = {}  # latest of each task, for the progress bar

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers.values() for group in o.param_groups]

    def fit(self) -> dict[str, Any]:
        """Train to the end, or from where the run was interrupted; the best evaluation.

        Raises:
            TrainingDiverged: a loss, gradient, weight or score is not finite. The state before that
                step is saved if it was finite, and the best weights so far are kept.
            TrainingInterrupted: by Ctrl-C or SIGTERM; the state is saved.
        """
        if self.run.state is not None:
            self.resume()
        if self.state.finished:
            return self.state.best
        self.model.train()
        # Ctrl-C and SIGTERM are handled from here to the end, so that no step is lost half-way.
        total = self.epoch_ends[-1]
        self.timer = SaveTimer(self.args.save_every, self.state.step)
        with StopSignals() as self.stop, progress_bar(total, "train", self.state.step) as self.bar:
            try:
                self._train()
                self.state.finished = True
                self.save()
                self._stop_if_requested()
            except KeyboardInterrupt:
                raise TrainingInterrupted(
                    f"stopped at step {self.state.step}; the same command with --run_dir"
                    f" {self.run.path} --resume continues"
                ) from None
        return self.state.best

    def _train(self) -> None:
        """Take all remaining steps, with their evaluations."""
        if self.state.eval_due and not self.evaluate():
            return
        for epoch, batches in self._remaining_steps():
            self.train_step(epoch, batches)
            # All processes have to agree on what to do next, or they would wait for each other.
            step = self.state.step
            save_due, stop = distributed.any_rank(self.timer.is_due(step), self.stop.requested)
            every = self.args.eval_every
            if step in self.epoch_ends or (every and step % every == 0):
                if not self.evaluate():
                    return
            elif save_due or stop:
                self.save()
            if stop:
                raise KeyboardInterrupt

    def _remaining_steps(self) -> Iterator[tuple[int, Sequence[Any]]]:
        """(epoch from 1, batches) of each remaining step."""
        for epoch, end in enumerate(self.epoch_ends):
            if self.state.step < end:
                # The order of batches is a function of the seed: a resumed run skips to its step.
                first = self.state.step - (end - self.mixture.epoch_steps(epoch))
                for batches in self.mixture.steps(epoch, first):
                    yield epoch + 1, batches

    def _stop_if_requested(self) -> None:
        if any(distributed.any_rank(self.stop.requested)):
            raise KeyboardInterrupt

    def train_step(self, epoch: int, batches: Sequence[Any]) -> None:
        """One optimizer step, logged."""
        # 1. Learning rates of this step. The generators' states are kept in case it diverges.
        step = self.state.step
        factor = self.lr_factor(step, self.epoch_ends[-1])
        for group, peak_lr in zip(self._param_groups(), self.peak_lrs, strict=True):
            group["lr"] = peak_lr * factor
        rng_states = get_rng_states(self.model.device)
        # 2. Gradients.
        batches = [batch.to(self.model.device) for batch in batches]
        with catch_out_of_memory(max(batches, key=lambda batch: batch.input_ids.numel())):
            loss = self.backward(batches, step)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(loss, norm, batches, rng_states)
        # 3. Update, with gradient clipping (Pascanu et al. 2013) as a factor on the gradients.
        scale = min(1.0, self.args.clip / norm) if self.args.clip and norm else 1.0
        for optimizer in self.optimizers.values():
            optimizer.step(scale=scale)
            optimizer.zero_grad(set_to_none=True)
        # 4. Record.
        lrs = {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
        tasks = "+".join(dict.fromkeys(batch.task for batch in batches))
        self.run.log("train", step, epoch=epoch, loss=loss, grad_norm=norm, lr=lrs, of=tasks)
        self.state.step += 1
        self.state.rows += sum(len(batch.global_rows) for batch in batches)
        self._show_progress(tasks, loss, lrs)

    def _show_progress(self, tasks: str, loss: float, lrs: dict[str, float]) -> None:
        """Show each task's latest loss, and the learning rates of BERT and heads."""
        self.losses[tasks] = loss
        losses = " ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        rates = {"bert" if name == "bert" else "heads": f"{lr:.1e}" for name, lr in lrs.items()}
        shown = " ".join(f"{name} {rate}" for name, rate in rates.items())
        self.bar.set_postfix_str(f"loss {losses}, lr {shown}", refresh=False)
        self.bar.update()

    def _diverged(
        self, loss: float, norm: float, batches: Sequence[Any], rng_states: Sequence[Tensor]
    ) -> None:
        """Save the state before this step if it is finite, and raise TrainingDiverged."""
        step = self.state.step
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        names = "; ".join(map(str, batches))
        self.run.log("diverged", step, loss=str(loss), grad_norm=str(norm), rows=names)
        kept = f"the best weights so far, if any, are in {self.best_folder}"
        if self._weights_are_finite():
            self.save(rng_states)
            kept += f", the state before this step in {self.run.path / 'last'}"
        raise TrainingDiverged(f"step {step}: {what} at {names}: {kept}; {ADVICE}")

    def _weights_are_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters)

    def evaluate(self) -> bool:
        """Evaluate, log, and keep the weights if they are the best; whether to train on."""
        state = self.state
        # Saved before the evaluation: a run that is killed during it repeats only that, and from
        # here on stopping at once loses nothing.
        state.eval_due = True
        self.save()
        self.stop.immediate = True
        self._stop_if_requested()
        epoch = bisect_left(self.epoch_ends, state.step) + 1
        if not self._weights_are_finite():
            raise TrainingDiverged(f"step {state.step}: weights are not finite; {ADVICE}")
        found = {**self.evaluate_model(), "epoch": epoch}
        if not math.isfinite(found["score"]):
            raise TrainingDiverged(f"step {state.step}: dev score is {found['score']}; {ADVICE}")
        self.model.train()
        self.run.log("dev", state.step, rows=state.rows, **found)
        improved = state.best is None or found["score"] > state.best["score"]
        if improved:
            state.best, state.evals_since_best = {**found, "step": state.step}, 0
            if self.run.writes:
                self.model.save_pretrained(self.best_folder)
        else:
            state.evals_since_best += 1
        mark = "best so far" if improved else f"best was {state.best['score']:.4f}"
        message = f"epoch {epoch}, step {state.step}: {found['summary']} ({mark})"
        self.bar.write(message, file=sys.stdout)
        state.eval_due = self.stop.immediate = False
        return not self.args.patience or state.evals_since_best < self.args.patience

    def save(self, rng_states: Sequence[Tensor] | None = None) -> None:
        """Save everything that training has changed, with these generator states or the current."""
        states = rng_states or get_rng_states(self.model.device)
        gathered = [distributed.all_gather_rng_states(state) for state in states]
        tensors = {f"random.{i}": state for i, state in enumerate(gathered)}
        # Frozen weights are not saved: they come from --model again.
        if self.run.writes:
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    tensors[f"model.{name}"] = p
            for name, optimizer in self.optimizers.items():
                for index, moments in optimizer.state_dict()["state"].items():
                    for key, value in moments.items():
                        tensors[f"optimizer.{name}.{index}.{key}"] = torch.as_tensor(value)
        self.run.save_state(tensors, asdict(self.state))
        self.timer.restart(self.state.step)

    def resume(self) -> None:
        """Take over `run.state`, which `save` wrote; UserError if it does not fit."""
        tensors, facts = self.run.state
        with reading(self.run.path / "last/state.safetensors", "the training state of this run"):
            self.state = TrainState(**{name: facts[name] for name in asdict(self.state)})
            self._restore_weights(tensors)
            self._restore_rng(tensors)
        self.run.state = None
        total, epoch = self.epoch_ends[-1], bisect_left(self.epoch_ends, self.state.step) + 1
        if self.state.finished:
            print("training had finished; evaluating the best weights")
        else:
            print(f"resuming in epoch {epoch} after step {self.state.step} of {total}")

    @torch.no_grad()
    def _restore_weights(self, tensors: dict[str, Tensor]) -> None:
        own = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        saved = {name for name in tensors if name.startswith("model.")}
        if set(own) != saved or any(p.shape != tensors[name].shape for name, p in own.items()):
            raise UserError("--resume: last/state.safetensors is of another model; start again")
        for name, p in own.items():
            p.copy_(tensors[name])
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            moments: dict[int, dict[str, Any]] = {}
            for key in [key for key in tensors if key.startswith(prefix)]:
                index, what = key.removeprefix(prefix).split(".")
                value = tensors[key].item() if what == "step" else tensors[key]
                moments.setdefault(int(index), {})[what] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _restore_rng(self, tensors: dict[str, Tensor]) -> None:
        """Restore this process's generators; with another number of processes, seed them anew."""
        names = sorted(name for name in tensors if name.startswith("random."))
        states = [torch.atleast_2d(tensors[name]) for name in names]  # (processes, L) each
        if len(states[0]) == distributed.world_size():
            rank = distributed.rank()
            set_rng_states(self.model.device, [state[rank].clone() for state in states])
        else:
            set_rng_states(self.model.device, [state[0].clone() for state in states])
            distributed.seed_by_rank(self.args.seed, self.state.step)
