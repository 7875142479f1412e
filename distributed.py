"""Several processes that train as one: who they are, whose rows are whose, what they share.

    torchrun --nproc_per_node=2 multitask_classifier.py ...

Every process holds the whole model and reads all data; of each batch it takes a share of the rows.
PyTorch's collectives are called here by hand rather than by its DistributedDataParallel, whose
hooks reduce a gradient while it is made: here some heads sit a step out, a process may have no row
of a short batch, PCGrad needs each task's gradient by itself, and a cached contrastive gradient is
made in two goes. So a gradient is reduced once it is finished.

A process on its own (no torchrun) is rank 0 of 1, and everything here then does nothing.
"""

import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from checkpoint import UserError

BUCKET = 1 << 24  # numbers reduced at a time, but for a larger parameter; bounds the memory
PATIENCE = timedelta(minutes=5)  # for the other processes to start

_rank, _size = 0, 1
_store: Any = None  # where all processes can leave a word


class Lost(UserError):
    """Another process of the run has ended, and this one cannot go on without it."""

    exit_code = 1


def rank() -> int:
    """This process's number, from 0. The process 0 alone writes and prints."""
    return _rank


def size() -> int:
    """The number of processes."""
    return _size


# ---------------------------------------------------------------------------- coming and going


@contextmanager
def joined(args: Namespace) -> Iterator[None]:
    """In the block this process is one of those that torchrun started, if it started any.

    Args:
        args: the command line; its `run_dir`, which may hold the time, becomes the first process's.

    Raises:
        UserError: torchrun's variables are incomplete, the others do not come, or were given
            another command line.
    """
    global _rank, _size, _store
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            _store, _rank, _size = next(rendezvous("env://", timeout=PATIENCE))
            nccl = torch.cuda.is_available() and distributed.is_nccl_available()
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", store=_store, rank=_rank, world_size=_size
            )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(
            f"the processes of this run cannot meet ({reason}): start them with torchrun"
        ) from None
    if world <= 1:
        yield
        return
    if _rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    given = first(lambda: vars(args))
    args.run_dir = given["run_dir"]
    apart = sorted(name for name in given if given[name] != vars(args)[name])
    if apart:
        raise UserError(f"process {_rank} was given another --{apart[0]} than the first one")
    yield
    meet()
    distributed.destroy_process_group()
    _rank, _size, _store = 0, 1, None


def use_gpu() -> None:
    """Give each process a GPU of its own, as the current one; UserError where there is none."""
    if _size == 1:
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    there = torch.cuda.device_count()
    if local >= there:
        raise UserError(f"--nproc_per_node is above the number of GPUs here, {there}: lower it")
    torch.cuda.set_device(local)


def launcher() -> list[str]:
    """The words of a command that starts these processes, up to the script; none for one."""
    if _size == 1:
        return []
    env = os.environ.get
    words = [str(Path(sys.executable).with_name("torchrun"))]
    if int(env("GROUP_WORLD_SIZE", "1")) > 1:
        words += [f"--nnodes={env('GROUP_WORLD_SIZE')}", f"--node_rank={env('GROUP_RANK')}"]
        words += [f"--master_addr={env('MASTER_ADDR')}", f"--master_port={env('MASTER_PORT')}"]
    return [*words, f"--nproc_per_node={env('LOCAL_WORLD_SIZE', str(_size))}"]


def said(message: str) -> bool:
    """Whether another process has said this already; else it counts as said by this one."""
    with suppress(Exception):  # who keeps the words may have gone: better twice than never
        key = hashlib.sha256(message.encode()).hexdigest()
        return _store is not None and _store.add(f"said/{key}", 1) > 1
    return False


# ---------------------------------------------------------------------------- words and numbers


@contextmanager
def _together() -> Iterator[None]:
    """Lost where what the processes do together fails, which it does when one of them has gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            "another process of this run has ended, and so does the run: that one's message, or"
            " torchrun's, says why; the same with --resume goes on"
        ) from error


def first(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, which alone calls it; so for a UserError."""
    if _size == 1:
        return function()
    answer: list[Any] = [None]
    if _rank == 0:
        try:
            answer = [function()]
        except UserError as error:
            answer = [error]
    with _together():
        distributed.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor that each has, in its place; the same bits in all."""
    if _size > 1:
        with _together():
            distributed.all_reduce(tensor)
    return tensor


def spread(module: nn.Module) -> None:
    """Give all processes the first one's weights."""
    if _size > 1:
        with _together():
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)


def meet() -> None:
    """Wait until every process is here."""
    total(torch.zeros(1))


def agree(*flags: bool) -> list[bool]:
    """Each flag, set where any process sets it."""
    if _size == 1:
        return list(flags)
    return (total(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()


# ---------------------------------------------------------------------------- rows


def own(count: int) -> slice:
    """Which of `count` rows are this process's: the first get the odd ones, the last maybe none."""
    each, odd = divmod(count, _size)
    start = _rank * each + min(_rank, odd)
    return slice(start, start + each + (_rank < odd))


class _AllRows(torch.autograd.Function):
    """All processes' rows from each one's own, along dimension 1."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, count: int) -> Tensor:
        ctx.own = own(count)
        rows = part.new_zeros(part.size(0), count, *part.shape[2:])
        rows[:, ctx.own] = part
        return total(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.own], None


def all_rows(part: Tensor, count: int) -> Tensor:
    """All processes' rows (V, count, ...) from each one's own (V, b, ...), with gradients.

    A gradient reaches a process's own rows alone: what is made of all rows is made in all.
    """
    return part if _size == 1 else _AllRows.apply(part, count)


# ---------------------------------------------------------------------------- gradients


def reduced(
    gradients: Callable[[Sequence[Any]], float], parameters: Sequence[nn.Parameter]
) -> Callable[[Sequence[Any]], float]:
    """The gradients of a step from those of each process's rows: their sum, the same bits in all.

    Args:
        gradients: batches -> gradients left in the parameters, and the loss. Gradients that were
            there before are another task's, reduced by then: they are added to.
        parameters: those that are trained, in the same order in all processes. One without a
            gradient in any process has none after it either.
    """
    if _size == 1:
        return gradients

    def everyones(batches: Sequence[Any]) -> float:
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss = gradients(batches)
        reached = agree(*(p.grad is not None for p in parameters))
        bucket: list[nn.Parameter] = []
        for parameter in compress(parameters, reached):
            if bucket and sum(p.numel() for p in [*bucket, parameter]) > BUCKET:
                _sum(bucket)
                bucket = []
            bucket.append(parameter)
        if bucket:
            _sum(bucket)
        for parameter, old in zip(parameters, before, strict=True):
            if old is not None:
                parameter.grad = old if parameter.grad is None else old + parameter.grad
        return loss

    return everyones


def _sum(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of these parameters by their sums over all processes."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = total(torch.cat([part.flatten() for part in parts]))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


# ---------------------------------------------------------------------------- chance


def own_stream(*numbers: int) -> None:
    """Seed this process's generators by these numbers and its rank; the first's stay as they are.

    So no two processes drop out the same units, and one process draws what it always has.
    """
    if _rank:
        sequence = np.random.SeedSequence([*numbers, _rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def stacked(state: Tensor) -> Tensor:
    """A generator's state (L,) as it is to be kept: of several processes all theirs, (N, L)."""
    return state if _size == 1 else all_rows(state[None, None], _size)[0]


@contextmanager
def same_draws() -> Iterator[None]:
    """In the block all processes draw on the CPU what the first draws; their own streams go on."""
    if _size == 1:
        yield
        return
    mine = torch.get_rng_state()
    torch.set_rng_state(first(torch.get_rng_state))
    yield
    if _rank:
        torch.set_rng_state(mine)
