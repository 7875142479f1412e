"""The training loop that every script shares.

Scripts and training methods differ in one function, `backward`: it takes the batches of a step,
leaves gradients in the parameters, and returns the loss for the log. The loop knows only the names
of tasks, to log them.
"""

import math
import shlex
import sys
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import device, distributed
from engine.checkpoint import write_text
from engine.errors import TrainingDiverged, reading
from engine.interrupts import SaveTimer, StopSignals, TrainingInterrupted
from engine.run_dir import RunDir

ADVICE = "try a smaller --lr or --precision fp32"


def progress_bar(total: int, description: str, initial: int = 0, leave: bool = True) -> tqdm:
    """A progress bar on standard error; updated rarely, and without cursor movements, in a file."""
    options = {"total": total, "desc": description, "initial": initial, "leave": leave}
    if not sys.stderr.isatty():
        options |= {"mininterval": 30.0, "maxinterval": 30.0, "position": 0}
    return tqdm(**options, disable=distributed.rank() > 0)


@dataclass
class TrainState:
    """The training progress, apart from weights, optimizer state and random generators."""

    step: int = 0  # optimizer steps taken
    rows: int = 0  # training rows seen
    best: dict[str, Any] | None = None  # the best evaluation so far, with "epoch" and "step"
    evals_since_best: int = 0
    eval_due: bool = False  # the evaluation at this step is still to be done
    finished: bool = False


@dataclass
class PendingStep:
    """A finished step whose loss may still be on its way from the GPU."""

    epoch: int
    batches: Sequence[Any]
    lrs: dict[str, float]
    before: TrainState
    rng_states: Sequence[Tensor]  # before it, too
    read: Callable[[], list[float]]  # waits for its loss and gradient norm


@dataclass
class Trainer:
    """Trains a model, evaluates it, keeps the best weights, and can stop and resume anywhere."""

    model: Any  # has `save_pretrained(folder)` and `device`
    # "bert", and one per head: `optimizer.AdamW`, which leaves parameters without a gradient alone.
    optimizers: dict[str, Any]
    lr_factor: Callable[[int, int], float]  # (step, total steps) -> the factor on learning rates
    mixture: Any  # the steps of each epoch, such as `engine.mixture.TaskMixture`
    # (A step's batches on `model.device`, its number) -> the loss, a tensor, leaving gradients in
    # the parameters, the same in all processes.
    backward: Callable[[Sequence[Any], int], Tensor]
    evaluate_model: Callable[[], dict[str, Any]]  # the largest "score" is the best
    run: RunDir  # gets the log, the best weights and the training state
    args: Namespace  # `epochs`, `clip`, `seed`, and the flags on evaluation and saving
    best_folder: str = "best"  # for the best weights, in the run folder

    def __post_init__(self) -> None:
        self.peak_lrs = [group["lr"] for group in self._param_groups()]
        self.parameters = [p for group in self._param_groups() for p in group["params"]]
        self.epoch_ends = list(accumulate(map(self.mixture.epoch_steps, range(self.args.epochs))))
        self.eval_steps = self.epoch_ends[-1:] if self.args.final_only else self.epoch_ends
        self.state = TrainState()
        self.losses: dict[str, float] = {}  # latest of each task, for the progress bar

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers.values() for group in o.param_groups]

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the start or where the run stopped; returns the best evaluation.

        TrainingDiverged: a loss, gradient, weight or score is not finite; the best weights and the
        last finite state are kept. TrainingInterrupted: by Ctrl-C or SIGTERM; the state is saved.
        """
        if self.run.state is not None:
            self.resume()
        self.model.train()
        if self.model.device.type == "cpu":
            device.keep_freed_memory()
        self.timer = SaveTimer(self.args.save_every, self.state.step)
        bar = progress_bar(self.epoch_ends[-1], "train", self.state.step)
        # Handle Ctrl-C and SIGTERM from here to the end, so that no step is cut short.
        with StopSignals() as self.stop, bar as self.bar:
            try:
                if not self.state.finished:
                    self._train()
            except KeyboardInterrupt:
                raise TrainingInterrupted(
                    f"stopped at step {self.state.step}; the same command with --run_dir"
                    f" {self.run.path} --resume continues"
                ) from None
        self.seconds = self.run.seconds()
        return self.state.best

    def finish(self, model_card: Callable[..., str], **metrics: Any) -> dict[str, Any]:
        """Write the model card and result.json: these metrics, and training time and memory.

        model_card: (run folder, result) -> the text of README.md.
        """
        run, best = self.run, self.state.best
        result = {
            **metrics,
            "best_epoch": best["epoch"],
            "best_step": best["step"],
            "training_seconds": round(self.seconds, 1),
            "peak_memory_bytes": device.peak_memory_bytes(self.model.device),  # of rank 0
            "processes": distributed.world_size(),
        }
        if run.writes:
            write_text(run.path / "best" / "README.md", model_card(run.path, result))
        run.finish(result, self.args.keep_last)
        print(f"{run.path}: best/, result.json; trained for {self.seconds:.0f} s")
        print(f"for its report: python evaluation.py {shlex.quote(str(run.path))} --report")
        return result

    def _train(self) -> None:
        """Take all remaining steps, with their evaluations, and save the final state."""
        if self.state.eval_due:
            self.evaluate()
        for epoch, batches in self._remaining_steps():
            self.train_step(epoch, batches)
            # All processes must agree on what to do next, or they would wait for each other.
            step, every = self.state.step, self.args.eval_every
            save_due, stop = distributed.any_rank(self.timer.is_due(step), self.stop.requested)
            if step in self.eval_steps or (every and step % every == 0):
                self.evaluate()
            elif save_due or stop:
                self.save()
            if stop:
                raise KeyboardInterrupt
        self.state.finished = True
        self.save()
        self._stop_if_requested()

    def _remaining_steps(self) -> Iterator[tuple[int, Sequence[Any]]]:
        """(epoch from 1, batches) of each remaining step."""
        for epoch, end in enumerate(self.epoch_ends):
            if self.state.step < end:
                # The order of batches is a function of the seed: a resumed run skips to its step.
                first = self.state.step - (end - self.mixture.epoch_steps(epoch))
                for batches in self.mixture.steps(epoch, first):
                    if self.state.finished:  # early stopping
                        return
                    yield epoch + 1, batches

    def _stop_if_requested(self) -> None:
        if any(distributed.any_rank(self.stop.requested)):
            raise KeyboardInterrupt

    def train_step(self, epoch: int, batches: Sequence[Any]) -> None:
        """One optimizer step.

        Its loss is read, checked and logged during the next step: the CPU never waits for the GPU.
        """
        # 1. Learning rates of this step. Keep the state on the CPU in case the step diverges.
        step, before = self.state.step, replace(self.state)
        factor = self.lr_factor(step, self.epoch_ends[-1])
        for group, peak_lr in zip(self._param_groups(), self.peak_lrs, strict=True):
            group["lr"] = peak_lr * factor
        rng_states = device.get_rng_states(self.model.device)
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        with device.catch_out_of_memory(largest, self.model.device):
            # 2. Gradients.
            loss = self.backward([batch.to(self.model.device) for batch in batches], step)
            grads = [p.grad for p in self.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            loss, norm = values = torch.stack([device.to_float64(loss), device.to_float64(norm)])
            read = device.read_later(values)
            self.run.flush()  # logs the step before
            # 3. Update, with gradient clipping (Pascanu et al. 2013) as a factor on the gradients;
            # weights do not change if the loss or the norm is not finite.
            scale = (norm / self.args.clip).clamp(min=1).float() if self.args.clip else None
            found_inf = 1 - values.isfinite().all().float()
            for optimizer in self.optimizers.values():
                optimizer.step(grad_scale=scale, found_inf=found_inf)
                optimizer.zero_grad(set_to_none=True)
        # 4. Record.
        lrs = {name: o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
        self.state.step += 1
        self.state.rows += sum(len(batch.global_rows) for batch in batches)
        last = PendingStep(epoch, batches, lrs, before, rng_states, read)
        self.run.pending = partial(self._record, last)

    def _record(self, last: PendingStep) -> None:
        """Log the last step; TrainingDiverged if its loss or gradient norm is not finite."""
        loss, norm = last.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(last, loss, norm)
        tasks = "+".join(dict.fromkeys(batch.task for batch in last.batches))
        values = {"epoch": last.epoch, "loss": loss, "grad_norm": norm, "lr": last.lrs}
        self.run.log("train", last.before.step, **values, task=tasks)
        self._show_progress(tasks, loss, last.lrs)

    def _show_progress(self, tasks: str, loss: float, lrs: dict[str, float]) -> None:
        """Show each task's latest loss, and the learning rates of BERT and heads."""
        self.losses[tasks] = loss
        losses = " ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        rates = {"bert" if name == "bert" else "heads": f"{lr:.1e}" for name, lr in lrs.items()}
        shown = " ".join(f"{name} {rate}" for name, rate in rates.items())
        self.bar.set_postfix_str(f"loss {losses}, lr {shown}", refresh=False)
        self.bar.update()

    def _diverged(self, last: PendingStep, loss: float, norm: float) -> None:
        """Save the state before the last step if it is finite, and raise TrainingDiverged."""
        self.state = last.before  # weights and moments are from before it, too
        for optimizer in self.optimizers.values():
            optimizer.uncount()
        step, names = self.state.step, "; ".join(map(str, last.batches))
        problem = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        self.run.log("diverged", step, loss=str(loss), grad_norm=str(norm), rows=names)
        kept = f"the best weights so far, if any, are in {self.run.path / self.best_folder}"
        with suppress(TrainingDiverged):  # the update before may have made the weights infinite
            self.save(last.rng_states)
            kept += f", the state before this step in {self.run.path / 'last'}"
        raise TrainingDiverged(f"step {step}: {problem} at {names}: {kept}; {ADVICE}")

    @property
    def epoch(self) -> int:
        """The current epoch, from 1."""
        return bisect_left(self.epoch_ends, self.state.step) + 1

    def evaluate(self) -> None:
        """Evaluate, log, and keep the weights if they are the best."""
        state = self.state
        # Save before evaluating: a run that is killed during the evaluation repeats only that, so
        # from here on stopping at once loses nothing.
        state.eval_due = True
        self.save()
        self.stop.immediate = True
        self._stop_if_requested()
        result = {**self.evaluate_model(), "epoch": self.epoch}
        if not math.isfinite(result["score"]):
            raise TrainingDiverged(f"step {state.step}: dev score is {result['score']}; {ADVICE}")
        self.model.train()
        self.run.log("dev", state.step, rows=state.rows, **result)
        state.evals_since_best += 1
        mark = f"best was {state.best['score']:.4f}" if state.best else ""
        if state.best is None or result["score"] > state.best["score"]:
            state.best, state.evals_since_best = {**result, "step": state.step}, 0
            mark = "best so far"
            if self.run.writes:
                self.model.save_pretrained(self.run.path / self.best_folder)
        message = f"epoch {self.epoch}, step {state.step}: {result['summary']} ({mark})"
        self.bar.write(message, file=sys.stdout)
        state.eval_due = self.stop.immediate = False
        state.finished = 0 < self.args.patience <= state.evals_since_best

    def save(self, rng_states: Sequence[Tensor] | None = None) -> None:
        """Save everything that training has changed, with these or the current generator states.

        TrainingDiverged if a weight is not finite: the last finite state stays.
        """
        self.run.flush()
        if not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            raise TrainingDiverged(f"step {self.state.step}: weights are not finite; {ADVICE}")
        states = rng_states or device.get_rng_states(self.model.device)
        gathered = [distributed.all_gather_rng_states(state) for state in states]
        tensors = {f"random.{i}": state for i, state in enumerate(gathered)}
        # Frozen weights are not saved: they come from --model again.
        if self.run.writes:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            tensors |= {f"model.{name}": p for name, p in trained}
            for name, optimizer in self.optimizers.items():
                for index, moments in optimizer.state_dict()["state"].items():
                    for key, value in moments.items():
                        tensors[f"optimizer.{name}.{index}.{key}"] = torch.as_tensor(value)
        self.run.save_state(tensors, asdict(self.state))
        self.timer.restart(self.state.step)

    def resume(self) -> None:
        """Restore `run.state`, which `save` wrote; UserError if it does not fit."""
        tensors, facts = self.run.state
        with reading(self.run.path / "last/state.safetensors", "the training state of this run"):
            self.state = TrainState(**{name: facts[name] for name in asdict(self.state)})
            self._restore_weights(tensors)
            self._restore_rng(tensors)
        self.run.state = None
        if self.state.finished:
            print("training had finished; continuing with its best weights")
        else:
            step, total = self.state.step, self.epoch_ends[-1]
            print(f"resuming in epoch {self.epoch} after step {step} of {total}")

    @torch.no_grad()
    def _restore_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                p.copy_(tensors[f"model.{name}"])
        for name, optimizer in self.optimizers.items():
            moments: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{name}."):
                    *_, index, moment = key.split(".")
                    value = value.item() if moment == "step" else value
                    moments.setdefault(int(index), {})[moment] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _restore_rng(self, tensors: dict[str, Tensor]) -> None:
        """Restore this process's generators; with another number of processes, seed them anew."""
        names = sorted(name for name in tensors if name.startswith("random."))
        states = [torch.atleast_2d(tensors[name]) for name in names]  # (processes, L) each
        same = len(states[0]) == distributed.world_size()
        rank = distributed.rank() if same else 0
        device.set_rng_states(self.model.device, [state[rank].clone() for state in states])
        if not same:
            distributed.seed_by_rank(self.args.seed, self.state.step)
