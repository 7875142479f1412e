"""Data-parallel training over several processes, with torch.distributed.

    torchrun --nproc_per_node=2 multitask_classifier.py ...

Every process holds the whole model, reads all data and takes a slice of the rows of each batch.
Gradients are all-reduced after the backward pass, not by the hooks of DistributedDataParallel:
heads of other tasks have no gradient in a step, a process may have no row of a short batch, PCGrad
needs each task's gradient separately, and gradient caching takes two passes.

Without torchrun there is one process, rank 0, and every collective returns its input.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from engine.errors import UserError

JOIN_TIMEOUT = timedelta(minutes=5)  # for the other processes to start

_rank, _world_size = 0, 1
_store: Any = None  # key-value store shared by all processes


class PeerProcessDied(UserError):
    """Another process has ended, and this one cannot continue without it."""

    exit_code = 1


def rank() -> int:
    """This process's number, from 0. Only rank 0 writes files and prints results."""
    return _rank


def world_size() -> int:
    """The number of processes."""
    return _world_size


@contextmanager
def process_group(args: Namespace) -> Iterator[None]:
    """Join the processes that torchrun started, if any; leave them at the end.

    args: the command line, which must be the same everywhere. Its `run_dir`, which may contain the
    time, is taken from rank 0.
    """
    global _rank, _world_size, _store
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    # torchrun's environment variables say where rank 0 listens.
    try:
        _store, _rank, _world_size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        # NCCL for tensors on GPUs, gloo for objects and generator states on the CPU.
        nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        distributed.init_process_group(backend, store=_store, rank=_rank, world_size=_world_size)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(
            f"the processes of this run cannot connect ({reason}): start them with torchrun"
        ) from None
    # Results are printed once. Errors of any process still appear, on standard error.
    if _rank:  # rank 0 prints for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # The default --run_dir contains the time, which differs between processes by seconds.
    first = broadcast_from_rank_zero(lambda: vars(args))
    args.run_dir = first["run_dir"]
    different = sorted(name for name in first if first[name] != vars(args)[name])
    if different:
        raise UserError(f"process {_rank} was given another --{different[0]} than process 0")
    yield
    barrier()
    distributed.destroy_process_group()
    _rank, _world_size, _store = 0, 1, None


def already_reported(message: str) -> bool:
    """Whether another process has printed this message; if not, this one must."""
    # `add` returns the count: the first process to report gets 1.
    with suppress(Exception):  # the store may be gone: printing twice is better than never
        return _store is not None and _store.add(f"reported/{message}", 1) > 1
    return False


@contextmanager
def _collective() -> Iterator[None]:
    """Collectives fail with a RuntimeError when another process has died."""
    try:
        yield
    except RuntimeError as error:
        raise PeerProcessDied(
            "another process of this run has ended, so this one stops; the message of that process,"
            " or torchrun's, says why; the same command with --resume continues the run"
        ) from error


def broadcast_from_rank_zero(function: Callable[[], Any]) -> Any:
    """Call `function` in rank 0 only, and return its result (or raise its UserError) in all."""
    if _world_size == 1:
        return function()
    result: list[Any] = [None]
    if _rank == 0:
        try:
            result = [function()]
        except UserError as error:  # raised in every process, so that none waits
            result = [error]
    with _collective():
        distributed.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def broadcast_parameters(module: nn.Module) -> None:
    """Give all processes the weights of rank 0."""
    # Buffers too: a student's module may have some besides position_ids.
    if _world_size > 1:
        with _collective():
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; every process gets the same bits."""
    if _world_size > 1:
        with _collective():
            distributed.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process gets here."""
    all_reduce_sum(torch.zeros(1))


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process."""
    if _world_size == 1:
        return list(flags)
    return (all_reduce_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()  # logical or


def rank_slice(count: int) -> slice:
    """Which of `count` rows belong to this process; low ranks get the remainder."""
    # Contiguous slices of nearly equal size, as np.array_split makes them.
    each, remainder = divmod(count, _world_size)
    start = _rank * each + min(_rank, remainder)
    return slice(start, start + each + (_rank < remainder))


def all_gather_rows(part: Tensor, count: int) -> Tensor:
    """Each process's rows (V, b, ...) -> all `count` rows (V, count, ...), differentiable.

    Gradients reach only this process's own rows, because every process computes the loss over all
    rows.
    """
    if _world_size == 1:
        return part
    local = rank_slice(count)
    # Slices may differ in length, which all-gather does not allow, but a sum with zeros does.
    rows = part.new_zeros(part.size(0), count, *part.shape[2:])
    rows[:, local] = part.detach()
    all_reduce_sum(rows)
    rows[:, local] = part  # the same numbers, with their graph
    return rows


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes.

    `parameters` have the same order everywhere. A gradient that some processes lack counts as zero
    there; a parameter without any gradient keeps none.
    """
    if _world_size == 1:
        return
    # Which parameters have gradients may differ between processes, but all must take part.
    used = any_rank(*(p.grad is not None for p in parameters))
    for p in compress(parameters, used):
        p.grad = all_reduce_sum(torch.zeros_like(p) if p.grad is None else p.grad)


def seed_by_rank(*numbers: int) -> None:
    """Seed processes of rank above 0 by these numbers and their rank; rank 0 keeps its state.

    Each process then draws its own dropout masks; a single process draws the same numbers as
    without torchrun.
    """
    # A SeedSequence mixes its numbers well: neighbouring ranks share no stream.
    if _rank:
        sequence = np.random.SeedSequence([*numbers, _rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def all_gather_rng_states(state: Tensor) -> Tensor:
    """A generator's state (L,) -> the states of all processes (N, L); (L,) if there is one."""
    return state if _world_size == 1 else all_gather_rows(state[None, None], _world_size)[0]
