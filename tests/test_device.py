"""The machine: device, precision, freed memory, out of memory."""

import ctypes
import os
import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.device import catch_out_of_memory, keep_freed_memory, setup_device
from engine.errors import OutOfMemory, UserError


def test_device_and_precision():
    device, dtype = setup_device(1, "auto", "fp32")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype == torch.float32
    assert setup_device(1, "cpu", "bf16")[1] == torch.bfloat16


def test_a_recorded_run_goes_on_with_its_device_precision_and_threads():
    threads, cores = torch.get_num_threads(), os.cpu_count()
    recorded = {"device": "cpu", "precision": "bfloat16", "hardware": {"threads": cores}}
    try:
        device, dtype = setup_device(1, "auto", "fp32", recorded)
        assert (device.type, dtype, torch.get_num_threads()) == ("cpu", torch.bfloat16, cores)
    finally:
        torch.set_num_threads(threads)


def test_seeds_reach_every_generator():
    drawn = []
    for seed in (1, 1, 2**63 - 1):
        setup_device(seed, "cpu", "fp32")
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"--device cuda .*finds no such device"):
        setup_device(1, "cuda", "fp32")


@pytest.mark.parametrize("amx", [True, False])
def test_auto_precision_on_a_cpu_is_bf16_with_matrix_units(monkeypatch, amx):
    capabilities = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert setup_device(1, "cpu", "auto")[1] == (torch.bfloat16 if amx else torch.float32)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_freed_memory_is_reused():
    """Blocks as large as the gradient of a word embedding: without new pages, after some tries."""
    keep_freed_memory()

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert any(new_pages() < 1000 for _ in range(30))  # of 12,288


@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_out_of_memory_names_the_batch(kind):
    """The CPU's error is PyTorch's own RuntimeError; a GPU's has a class."""
    batch = SimpleNamespace(input_ids=torch.zeros(4, 3))
    with (
        pytest.raises(OutOfMemory, match=r"on cpu with 4 sequences of 3 .*--batch_size"),
        catch_out_of_memory(batch),
    ):
        if kind == "cpu":
            torch.empty(2**50)
        raise torch.OutOfMemoryError("CUDA out of memory.") if kind == "gpu" else MemoryError


def test_another_runtime_error_is_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shapes"), catch_out_of_memory(None):
        torch.ones(2, 3) @ torch.ones(2, 3)
