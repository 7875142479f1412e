"""The machine: device, precision, seeds and memory."""

import ctypes
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import distributed
from engine.errors import OutOfMemory, UserError

# In RuntimeErrors: of the CPU's allocator, of CUDA's own calls, of cuBLAS.
OUT_OF_MEMORY = ["can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"]


def setup_device(
    seed: int, device: str, precision: str, recorded: dict[str, Any] | None = None
) -> tuple[torch.device, torch.dtype]:
    """Seed all random generators, request deterministic kernels, choose device and precision.

    device: auto (a GPU if there is one), cpu, cuda or mps. precision: of matrix products: fp32,
    bf16, or auto (bf16 where the hardware is faster). recorded: the `config.json` of a run to
    resume, whose choices are used again.
    """
    if recorded is not None:
        device, precision = recorded["device"], recorded["precision"]
        if recorded.get("processes", 1) == distributed.world_size():
            # With another number of threads, PyTorch sums in another order.
            torch.set_num_threads(min(recorded["hardware"]["threads"], os.cpu_count() or 1))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    device = _choose_device(device)
    _use_deterministic_kernels(device)
    bf16 = precision in ("bf16", "bfloat16") or (precision == "auto" and prefers_bf16(device))
    if device == "cpu":
        # Only bf16 needs oneDNN: in fp32, MKL does the matrix products. oneDNN would only compute
        # GELU, and keep a compiled kernel in memory for every batch shape.
        torch.backends.mkldnn.enabled = bf16 or not torch.backends.mkl.is_available()
    return torch.device(device), torch.bfloat16 if bf16 else torch.float32


def _choose_device(device: str) -> str:
    """Resolve auto, check that the device exists, and give each process its own GPU."""
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if not {"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}[device]:
        raise UserError(
            f"--device {device} (--use_gpu means cuda): PyTorch {torch.__version__} finds no such"
            " device here; give --device cpu, or install a PyTorch built for your GPU"
        )
    if device == "mps" and distributed.world_size() > 1:
        raise UserError("--device mps: several processes cannot share it; start one")
    if device == "cuda" and distributed.world_size() > 1:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"--nproc_per_node is above the number of GPUs here, {gpus}: lower it")
        torch.cuda.set_device(local_rank)
    return device


def _use_deterministic_kernels(device: str) -> None:
    """Ask for kernels that give the same bits in every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    # Filling new memory with NaN takes time, and determinism does not need it.
    torch.utils.deterministic.fill_uninitialized_memory = False
    # An error on a GPU: with a warning, the backward pass of attention could differ from run to
    # run. (torch.use_deterministic_algorithms does the same, but imports PyTorch's compiler.)
    torch.set_deterministic_debug_mode("error" if device == "cuda" else "warn")


def prefers_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices clearly faster than float32 ones.

    CPUs with bfloat16 instructions but without matrix units (AMX) are sometimes slower with them.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)  # tensor cores, from Ampere on
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the system.

    Otherwise the gradient of the word embedding gets new, zeroed pages at every step, which costs a
    small model 5% of its step time. Call it after loading, whose memory may be returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has used: on the GPU, or RAM; None where unknown (not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # resource's ru_maxrss starts with the parent process's peak
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else None


def get_rng_states(device: torch.device) -> list[Tensor]:
    """States of the generators that dropout draws from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def set_rng_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Restore what `get_rng_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


def to_float64(x: Tensor) -> Tensor:
    """x in float64; on the CPU if x's device has no float64 (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def read_later(numbers: Tensor) -> Callable[[], list[float]]:
    """Start copying numbers to the CPU; returns a function that waits for them.

    It does not wait for GPU work queued after the copy, as `numbers.tolist()` would.
    """
    copy = numbers.to("cpu", non_blocking=True)  # from a GPU, into page-locked memory
    if numbers.device.type == "cpu":
        return copy.tolist
    copied = torch.get_device_module(numbers.device).Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


@contextmanager
def catch_out_of_memory(batch: Any = None, device: Any = None) -> Iterator[None]:
    """Turn out-of-memory errors into an OutOfMemory that names the size of the batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        expected = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not expected and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        if batch is None:  # such as while loading
            reason = str(error).split("\n")[0] or "no RAM is left"
            raise OutOfMemory(f"out of memory: {reason}") from None
        rows, tokens = batch.input_ids.shape
        raise OutOfMemory(
            f"out of memory on {device} with {rows} sequences of {tokens} tokens in a batch:"
            " try a smaller --batch_size, and --accumulate for as many rows per step"
        ) from None
