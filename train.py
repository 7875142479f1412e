"""The training loop that every script shares. It knows nothing of tasks.

A step is a list of batches, and a function that makes gradients of them; scripts differ in those.
"""

import ctypes
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from checkpoint import Follower, Run, UserError
from optimizer import AdamW, schedule


class Diverged(UserError):
    """A loss or gradient that is not finite: the run ends, but its last good state is kept."""

    exit_code = 1


class TooLittleMemory(UserError):
    """A batch did not fit."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has. Its message says how to go on."""


# ---------------------------------------------------------------------------- the machine


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def prepare(
    seed: int, device: str, precision: str, recorded: dict[str, Any] | None = None
) -> tuple[torch.device, torch.dtype]:
    """Seed every generator, ask for deterministic kernels, choose the device and the precision.

    All of that is the process's, as are the libraries and the memory that its CPU then uses.

    Args:
        seed: of Python, numpy and PyTorch.
        device: auto (a GPU where there is one), cpu, cuda or mps.
        precision: auto (bf16 where the hardware multiplies matrices faster in it), fp32 or bf16.
        recorded: the `config.json` of a run to go on with, whose choices stand.

    Returns:
        The device, and torch.float32 or torch.bfloat16.

    Raises:
        UserError: a device that this machine does not have.
    """
    if recorded is not None:
        device, precision = recorded["device"], recorded["precision"]
        if recorded.get("processes", 1) == distributed.size():
            # With another number of threads PyTorch adds in another order.
            torch.set_num_threads(min(recorded["hardware"]["threads"], os.cpu_count() or 1))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so
    # Determinism needs no NaN fill of new memory, which would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        device = distributed.first(lambda: "cuda" if available["cuda"] else "cpu")
    # Strict on a GPU, where a warning would let attention's backward pass differ between runs. (The
    # same by torch.use_deterministic_algorithms would import PyTorch's compiler.)
    torch.set_deterministic_debug_mode("error" if device == "cuda" else "warn")
    if not available[device]:
        raise UserError(
            f"--device {device} (--use_gpu means cuda): PyTorch {torch.__version__} finds no such"
            " device here; give --device cpu, or install a PyTorch built for your GPU"
        )
    if device == "mps" and distributed.size() > 1:
        raise UserError("--device mps: its tensors cannot be sent to other processes; start one")
    if device == "cuda":
        distributed.use_gpu()
    if precision == "auto":
        torch.backends.mkldnn.enabled = True  # which an earlier call may have changed
        fast = {"cpu": cpu_gains_by_bf16, "cuda": gpu_gains_by_bf16, "mps": lambda: False}
        precision = distributed.first(lambda: "bf16" if fast[device]() else "fp32")
    dtype = getattr(torch, PRECISIONS.get(precision, precision))
    # Where MKL multiplies, all that oneDNN would do in fp32 is GELU, and what it keeps of that for
    # each number of tokens lies scattered over memory that the next step could have had.
    torch.backends.mkldnn.enabled = dtype != torch.float32 or not torch.backends.mkl.is_available()
    if device == "cpu":
        keep_memory()
    return torch.device(device), dtype


def keep_memory() -> None:
    """Have glibc, where that is the C library, keep large blocks for the next step.

    It would give those of 32 MB back, and the word embedding's gradient would be new pages at each
    step: to get and clear them takes a twentieth of it, where the model is small. The price is a
    higher peak in some runs (LOG.md has both).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: blocks that are mappings of their own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: free bytes at the heap's end are kept, however many


def begin(args: Namespace, **facts: Any) -> Run:
    """`Run.begin`, of several processes in the first one; the others follow what it has begun.

    Args:
        args: the command line, with `run_dir`, `resume` and `seed`.
        facts: what else `config.json` records.

    Raises:
        UserError: as `Run.begin`; a process that has other data, or does not see the state to go on
            with.
    """
    run: Run | None = None
    if distributed.first(lambda: facts["data"]) != facts["data"]:
        raise UserError("the data files are not the same in all processes: copy the first one's")

    def make() -> None:
        nonlocal run
        facts["processes"] = distributed.size()
        run = Run.begin(args.run_dir, vars(args), args.resume, **facts)

    distributed.first(make)
    run = run or Follower(args.run_dir)
    run.launcher = distributed.launcher()
    reached = run.state[1]["log"] if run.state else None
    if distributed.first(lambda: reached) != reached:
        raise UserError(f"--resume: {run.path} is not the same here: put it where all machines see")
    distributed.meet()  # before the first saves a state that others are reading
    distributed.own_stream(args.seed)
    return run


def gpu_gains_by_bf16() -> bool:
    """Whether the GPU has bfloat16 tensor cores (compute capability 8.0, Ampere, and later)."""
    return torch.cuda.get_device_capability() >= (8, 0)


def cpu_gains_by_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions, and they multiply matrices clearly faster.

    Units for matrices (AMX) do. Of other instructions some run at twice the speed of float32's, and
    some at half of it: only trying tells.
    """
    known = torch.cpu.get_capabilities()
    if known.get("amx_bf16"):
        return True
    if not (known.get("avx512_bf16") or known.get("bf16")):
        return False

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        started = time.perf_counter()
        a @ a
        return time.perf_counter() - started

    seconds(torch.float32), seconds(torch.bfloat16)  # the first call prepares the library
    pairs = [(seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(9)]
    fp32, bf16 = map(min, zip(*pairs, strict=True))  # the least disturbed try of each
    return bf16 * 1.25 < fp32


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, in bytes: the GPU's, or RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def progress(total: int, what: str, done: int = 0, inner: bool = False) -> tqdm:
    """A progress bar on standard error, drawn rarely where that is a file; an `inner` one goes."""
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        leave=not inner,
        position=None if terminal else 0,  # no moving between lines in a file
        disable=distributed.rank() > 0,
    )


# ---------------------------------------------------------------------------- the loop


class Plan(Protocol):
    """The data of a run: `datasets.Mixture`, or anything else with these two methods."""

    def steps_in(self, epoch: int) -> int:
        """The number of steps in an epoch."""

    def steps(self, epoch: int, first: int = 0) -> Iterator[Sequence[Any]]:
        """The epoch's steps from the `first` on, each a list of batches."""


def summed(loss_fn: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], float]:
    """A step's gradients where each row has a loss of its own: those of the mean over all rows.

    Args:
        loss_fn: batch -> the loss of each of its rows, (B,), float32.

    Losses are summed over the rows of all batches and divided once by their number, so that
    accumulation, and the short last batch, weigh every row alike. Only one batch's activations are
    held at a time. Of several processes each makes its own rows' part of the gradients, which
    `distributed.reduced` adds up, and returns the loss of all.
    """

    def gradients(batches: Sequence[Any]) -> float:
        count = sum(len(batch.whole) for batch in batches)
        loss = 0.0
        for batch in filter(len, batches):
            part = loss_fn(batch).sum() / count
            part.backward()
            loss += part.item()
        return distributed.total(torch.tensor(loss, dtype=torch.float64)).item()

    return gradients


def out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on a GPU or a CPU, says so that there is too little memory."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


@contextmanager
def memory_for(batch: Any) -> Iterator[None]:
    """UserError naming the batch's size where memory does not suffice for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        rows, width = batch.input_ids.shape
        raise TooLittleMemory(
            f"out of memory on {batch.input_ids.device} with {rows} sentences of {width} tokens in"
            " a batch: try a smaller --batch_size, and --accumulate for as many rows a step"
        ) from None


class StopSignals:
    """While it is open, a first Ctrl-C or SIGTERM asks to stop, and a second stops at once.

    Where stopping at once loses nothing, `at_once` is set, and already the first does.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in self.NUMBERS}
        else:  # signals are the main thread's
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(self, *_: object) -> None:
        """A signal has come."""
        if self.asked or self.at_once:
            for number in self.NUMBERS:  # impatience is not to disturb the stopping
                signal.signal(number, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.asked = True
        if distributed.rank() == 0:
            os.write(2, b"\nstopping after this step; once more stops at once\n")


class Period:
    """How often: "500" is every 500 steps, "10m" every 10 minutes, "0" never."""

    def __init__(self, text: str):
        self.steps = 0 if text.endswith("m") else int(text)
        self.seconds = 60 * int(text[:-1]) if text.endswith("m") else 0

    def start(self, step: int) -> None:
        """It is from this step on that the next period counts."""
        self.step, self.time = step, time.perf_counter()

    def over(self, step: int) -> bool:
        """Whether it is time again."""
        if self.steps:
            return step - self.step >= self.steps
        return bool(self.seconds) and time.perf_counter() - self.time >= self.seconds


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that dropout may draw from: the CPU's, and the device's own."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


def state_tensors(
    model: nn.Module, optimizers: dict[str, AdamW], states: Sequence[Tensor]
) -> dict[str, Tensor]:
    """All that training has moved, by name: trained weights, moments, generators' states."""
    tensors = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"optimizer.{name}.{index}.{key}"] = torch.as_tensor(value)
    tensors.update({f"random.{i}": distributed.stacked(s) for i, s in enumerate(states)})
    return tensors


def restore(model: nn.Module, optimizers: dict[str, AdamW], tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, but for the generators; UserError if it does not fit."""
    own = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    given = {name for name in tensors if name.startswith("model.")}
    if set(own) != given or any(p.shape != tensors[name].shape for name, p in own.items()):
        raise UserError("--resume: last/state.safetensors is of another model; start again")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    for name, optimizer in optimizers.items():
        moments: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer" and rest.rsplit(".", 2)[0] == name:
                _, index, what = rest.rsplit(".", 2)
                value = tensor.item() if what == "step" else tensor
                moments.setdefault(int(index), {})[what] = value
        whole = {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(whole)


def train(
    model: nn.Module,
    gradients: Callable[[Sequence[Any]], float],
    plan: Plan,
    optimizers: dict[str, AdamW],
    evaluate: Callable[[], dict[str, Any]],
    run: Run,
    args: Namespace,
    keep: str = "best",
    before_saving: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train `model`, keeping the best state in `run.path / keep`, or go on where `run.state` is.

    Args:
        model: has `save_pretrained(folder)` and `device`.
        gradients: takes a step's batches on `model.device`, leaves gradients in the parameters, and
            returns the loss for the log; `summed(loss_fn)` where rows' losses are added up.
        plan: the steps of each epoch.
        optimizers: by name; a step moves only those whose parameters have a gradient.
        evaluate: called after each epoch (and every `args.eval_every` steps), with the model in
            evaluation mode; its "score" decides what is best, larger being better.
        run: where the log, the best state and the last one go.
        args: `epochs`, `schedule`, `warmup` (fraction of the steps), `clip` (global norm, 0 for
            none), `eval_every` (0 for each epoch only), `patience` (evaluations without a better
            score before stopping, 0 for never), `save_every` (the `Period` between saved states;
            one is saved before each evaluation too).
        keep: the name of the folder for the best state.
        before_saving: called before each state is saved, to keep what the caller has to.

    Returns:
        The best evaluation, with its "step" and "epoch".

    Raises:
        Diverged: a loss or gradient is not finite; the state before that step is saved, if that was
            still finite. Or a weight, a prediction or the score is not, at an evaluation. The best
            state so far, if any, is kept.
        Stopped: by Ctrl-C or SIGTERM; the state is saved.
    """
    ends = list(accumulate(plan.steps_in(epoch) for epoch in range(args.epochs)))
    total = ends[-1]
    warmup = round(args.warmup * total)
    parameters = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    for group in (g for o in optimizers.values() for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    step = rows = since_best = 0
    best: dict[str, Any] | None = None
    due = False  # an evaluation

    if run.state is not None:
        tensors, facts = run.state
        try:
            restore(model, optimizers, tensors)
            kept = [tensors[name] for name in sorted(tensors) if name.startswith("random.")]
            kept = [torch.atleast_2d(states) for states in kept]  # by process
            same = len(kept[0]) == distributed.size()
            mine = distributed.rank() if same else 0
            # A copy: PyTorch takes a view for all that it is a view of.
            set_random_states(model.device, [states[mine].clone() for states in kept])
            step, rows, since_best = (int(facts[name]) for name in ("step", "rows", "since_best"))
            due, best, finished = bool(facts["due"]), facts["best"], bool(facts["finished"])
            if best is not None:
                best = {**best, "score": float(best["score"]), "step": int(best["step"])}
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
            raise UserError(
                f"--resume: {run.path / 'last/state.safetensors'}: damaged ({error!r}); start again"
            ) from None
        if not same:
            distributed.own_stream(args.seed, step)
        run.state = tensors = None
        if finished:
            return best

    def finite() -> bool:
        """Whether every weight still is."""
        return all(bool(p.isfinite().all()) for p in parameters)

    def save(states: Sequence[Tensor] | None = None, finished: bool = False) -> None:
        """Keep the state before step `step`, with these generators' states or the present ones."""
        before_saving()
        tensors = state_tensors(model, optimizers, states or random_states(model.device))
        facts = {"step": step, "rows": rows, "due": due, "finished": finished}
        run.save_state(tensors, {**facts, "best": best, "since_best": since_best})
        period.start(step)

    def check() -> bool:
        """Evaluate, log, and save the model where it is the best so far; whether to go on."""
        nonlocal best, since_best, due
        due = True
        run.step = step
        save()
        stop.at_once = True
        if any(distributed.agree(stop.asked)):
            raise KeyboardInterrupt
        epoch = bisect_left(ends, step)
        model.eval()
        if not finite():
            raise Diverged(f"step {step}: weights are not finite; try a smaller --lr")
        found = {**evaluate(), "epoch": epoch, "step": step}
        if not math.isfinite(found["score"]):
            raise Diverged(f"step {step}: the dev score is {found['score']}; try a smaller --lr")
        model.train()
        run.log("dev", step, rows=rows, **{k: v for k, v in found.items() if k != "step"})
        better = best is None or found["score"] > best["score"]
        if better:
            best, since_best = found, 0
            if run.writes:
                model.save_pretrained(run.path / keep)
        else:
            since_best += 1
        mark = "best so far" if better else f"best was {best['score']:.4f}"
        bar.write(f"epoch {epoch + 1}, step {step}: {found['summary']} ({mark})", file=sys.stdout)
        due = stop.at_once = False
        return not args.patience or since_best < args.patience

    def take(batches: Sequence[Any]) -> tuple[float, float]:
        """One step: its loss, and the gradient's norm before clipping."""
        states = random_states(model.device)
        batches = [batch.to(model.device) for batch in batches]
        with memory_for(max(batches, key=lambda batch: batch.input_ids.numel())):
            loss = gradients(batches)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
            names = "; ".join(map(str, batches))
            run.log("diverged", step, loss=str(loss), grad_norm=str(norm), rows=names)
            kept = f"the best state so far, if any, is in {run.path / keep}"
            if finite():
                save(states)
                kept += f", the one before this step in {run.path / 'last'}"
            advice = "try a smaller --lr or --precision fp32"
            raise Diverged(f"step {step}: {what} at {names}: {kept}; {advice}")
        scale = min(1.0, args.clip / norm) if args.clip and norm else 1.0  # Pascanu et al. 2013
        for optimizer in optimizers.values():
            optimizer.step(scale=scale)
            optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def remaining() -> Iterator[tuple[int, Sequence[Any]]]:
        """The epoch and the batches of each step that is left."""
        for epoch, end in enumerate(ends):
            if step < end:
                first = step - (end - plan.steps_in(epoch))
                yield from ((epoch, batches) for batches in plan.steps(epoch, first))

    def go() -> None:
        """Every step that is left."""
        nonlocal step, rows
        if due and not check():
            return
        for epoch, batches in remaining():
            factor = schedule(args.schedule, step, total, warmup)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
            rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
            run.step = step
            loss, norm = take(batches)
            run.log(
                "train",
                step,
                epoch=epoch,
                loss=loss,
                grad_norm=norm,
                lr=rates,
                of="+".join(dict.fromkeys(batch.task for batch in batches)),
            )
            step += 1
            rows += sum(len(batch.whole) for batch in batches)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{max(rates.values()):.1e}", refresh=False)
            bar.update()
            over, asked = distributed.agree(period.over(step), stop.asked)
            if step in ends or (args.eval_every and step % args.eval_every == 0):
                if not check():
                    return
            elif over or asked:
                save()
            if asked:
                raise KeyboardInterrupt

    model.train()
    period = Period(args.save_every)
    period.start(step)
    with StopSignals() as stop, progress(total, "train", step) as bar:
        try:
            go()
            save(finished=True)
            if any(distributed.agree(stop.asked)):  # and none reads before the first has written
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Stopped(f"stopped at step {step}; to go on: {run.command()}") from None
    return best
