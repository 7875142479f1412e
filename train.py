"""The training loop that every script shares. It knows nothing of tasks.

A step is a list of batches, and a function that makes gradients of them; scripts differ in those.
"""

import math
import os
import random
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import Run, UserError
from optimizer import AdamW, schedule


class Diverged(UserError):
    """A loss or gradient that is not finite: the run ends, but its last good state is kept."""

    exit_code = 1


# ---------------------------------------------------------------------------- the machine


def prepare(seed: int, device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Seed every generator, ask for deterministic kernels, choose the device and the precision.

    Args:
        seed: of Python, numpy and PyTorch.
        device: auto (a GPU where there is one), cpu, cuda or mps.
        precision: auto (bf16 where the hardware multiplies matrices faster in it), fp32 or bf16.

    Returns:
        The device, and torch.float32 or torch.bfloat16.

    Raises:
        UserError: a device that this machine does not have.
    """
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
        device = "cuda" if available["cuda"] else "cpu"
    # Strict on a GPU, where a warning would let attention's backward pass differ between runs.
    torch.use_deterministic_algorithms(True, warn_only=device != "cuda")
    if not available[device]:
        raise UserError(
            f"--device {device} (--use_gpu means cuda): PyTorch {torch.__version__} finds no such"
            " device here; give --device cpu, or install a PyTorch built for your GPU"
        )
    if precision == "auto":
        fast = {"cpu": cpu_gains_by_bf16, "cuda": gpu_gains_by_bf16, "mps": lambda: False}
        precision = "bf16" if fast[device]() else "fp32"
    return torch.device(device), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


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


def progress(total: int, what: str, inner: bool = False) -> tqdm:
    """A progress bar on standard error, drawn rarely where that is a file; an `inner` one goes."""
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    return tqdm(
        total=total,
        desc=what,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        leave=not inner,
        position=None if terminal else 0,  # no moving between lines in a file
    )


# ---------------------------------------------------------------------------- the loop


class Plan(Protocol):
    """The data of a run: `datasets.Mixture`, or anything else with these two methods."""

    def steps_in(self, epoch: int) -> int:
        """The number of steps in an epoch."""

    def steps(self, epoch: int) -> Iterator[Sequence[Any]]:
        """The epoch's steps, each a list of batches."""


def summed(loss_fn: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], float]:
    """A step's gradients where each row has a loss of its own: those of the mean over all rows.

    Args:
        loss_fn: batch -> the loss of each of its rows, (B,), float32.

    Losses are summed over the rows of all batches and divided once by their number, so that
    accumulation, and the short last batch, weigh every row alike. Only one batch's activations are
    held at a time.
    """

    def gradients(batches: Sequence[Any]) -> float:
        count = sum(len(batch) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = loss_fn(batch).sum() / count
            part.backward()
            loss += part.item()
        return loss

    return gradients


def train(
    model: nn.Module,
    gradients: Callable[[Sequence[Any]], float],
    plan: Plan,
    optimizers: dict[str, AdamW],
    evaluate: Callable[[], dict[str, Any]],
    run: Run,
    args: Namespace,
    keep: str = "best",
) -> dict[str, Any]:
    """Train `model`, keeping the best state in `run.path / keep`.

    Args:
        model: has `save_pretrained(folder)` and `device`.
        gradients: takes a step's batches on `model.device`, leaves gradients in the parameters, and
            returns the loss for the log; `summed(loss_fn)` where rows' losses are added up.
        plan: the steps of each epoch.
        optimizers: by name; a step moves only those whose parameters have a gradient.
        evaluate: called after each epoch (and every `args.eval_every` steps), with the model in
            evaluation mode; its "score" decides what is best, larger being better.
        run: where the log and the best state go.
        args: `epochs`, `schedule`, `warmup` (fraction of the steps), `clip` (global norm, 0 for
            none), `eval_every` (0 for each epoch only), `patience` (evaluations without a better
            score before stopping, 0 for never).
        keep: the name of the folder for the best state.

    Returns:
        The best evaluation, with its "step" and "epoch".

    Raises:
        Diverged: a loss or gradient is not finite; `last/` then holds the state before that step,
            if that was still finite. Or a weight, a prediction or the score is not, at an
            evaluation. The best state so far, if any, is kept.
    """
    total = sum(plan.steps_in(epoch) for epoch in range(args.epochs))
    warmup = round(args.warmup * total)
    parameters = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    for group in (g for o in optimizers.values() for g in o.param_groups):
        group["initial_lr"] = group["lr"]
    best: dict[str, Any] = {"score": -math.inf}
    since_best = 0
    rows = 0
    step = 0
    started = time.perf_counter()

    def finite() -> bool:
        """Whether every weight still is."""
        return all(bool(p.isfinite().all()) for p in parameters)

    def check(epoch: int) -> None:
        """Evaluate, log, and save the model where it is the best so far."""
        nonlocal best, since_best
        model.eval()
        if not finite():
            raise Diverged(f"step {step}: weights are not finite; try a smaller --lr")
        found = {**evaluate(), "epoch": epoch, "step": step}
        if not math.isfinite(found["score"]):
            raise Diverged(f"step {step}: the dev score is {found['score']}; try a smaller --lr")
        model.train()
        seconds = time.perf_counter() - started
        run.log("dev", seconds=round(seconds, 3), rows=rows, **found)
        better = found["score"] > best["score"]
        if better:
            best, since_best = found, 0
            model.save_pretrained(run.path / keep)
        else:
            since_best += 1
        mark = "best so far" if better else f"best was {best['score']:.4f}"
        bar.write(f"epoch {epoch + 1}, step {step}: {found['summary']} ({mark})", file=sys.stdout)

    def take(batches: Sequence[Any]) -> tuple[float, float]:
        """One step: its loss, and the gradient's norm before clipping."""
        loss = gradients([batch.to(model.device) for batch in batches])
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
            rows = "; ".join(map(str, batches))
            run.log("diverged", step, loss=str(loss), grad_norm=str(norm), rows=rows)
            kept = f"the best state so far, if any, is in {run.path / keep}"
            if finite():
                model.save_pretrained(run.path / "last")
                kept = f"the state before it is in {run.path / 'last'}"
            advice = "try a smaller --lr or --precision fp32"
            raise Diverged(f"step {step}: {what} at {rows}: {kept}; {advice}")
        scale = min(1.0, args.clip / norm) if args.clip and norm else 1.0  # Pascanu et al. 2013
        for optimizer in optimizers.values():
            optimizer.step(scale=scale)
            optimizer.zero_grad(set_to_none=True)
        return loss, norm

    with progress(total, "train") as bar:
        for epoch in range(args.epochs):
            model.train()
            for batches in plan.steps(epoch):
                factor = schedule(args.schedule, step, total, warmup)
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * factor
                rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
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
                rows += sum(len(batch) for batch in batches)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{max(rates.values()):.1e}", refresh=False)
                bar.update()
                if args.eval_every and step % args.eval_every == 0:
                    check(epoch)
                    if args.patience and since_best >= args.patience:
                        return best
            if not (args.eval_every and step % args.eval_every == 0):
                check(epoch)
                if args.patience and since_best >= args.patience:
                    return best
    return best
