"""The machine: device, precision, freed memory, out of memory."""

import ctypes
import random
import resource
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import quick_run
from torch import nn

import classifier
from engine.device import catch_out_of_memory, keep_freed_memory, setup_device
from engine.errors import OutOfMemory


def test_device_and_precision(monkeypatch):
    """On a CPU, auto is bf16 where matrix units multiply it."""
    device, dtype = setup_device(1, "auto", "fp32")
    assert device.type == "cpu"  # the tests hide a GPU
    assert dtype == torch.float32
    assert setup_device(1, "cpu", "bf16")[1] == torch.bfloat16
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert setup_device(1, "cpu", "auto")[1] == torch.float32
    capabilities["amx_bf16"] = True
    assert setup_device(1, "cpu", "auto")[1] == torch.bfloat16


def test_seeds_reach_every_generator():
    drawn = []
    for seed in (1, 1, 2**63 - 1):
        setup_device(seed, "cpu", "fp32")
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_freed_memory_is_reused():
    """Blocks as large as the gradient of a word embedding: without new pages, after some tries."""
    keep_freed_memory()

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert any(new_pages() < 1000 for _ in range(30))  # of 12,288


def allocate(error: Exception | None) -> None:
    """Raise this error, or PyTorch's own of a CPU without memory, which has no class."""
    if error is not None:
        raise error
    torch.empty(2**50)


CUDA = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
ERRORS = [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), CUDA, CUBLAS]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_names_the_batch_and_other_errors_pass(error):
    batch, device = SimpleNamespace(input_ids=torch.zeros(4, 3)), torch.device("cuda")
    expected = r"on cuda with 4 sequences of 3 .*--batch_size"
    with pytest.raises(OutOfMemory, match=expected), catch_out_of_memory(batch, device):
        allocate(error)
    with pytest.raises(RuntimeError, match="shapes"), catch_out_of_memory(batch, device):
        allocate(RuntimeError("shapes"))


PLACES = {"loading": (nn.Module, "to"), "the norm": (nn.utils, "get_total_norm")}
PLACES["AdamW's first step"] = (torch, "_fused_adamw_")


@pytest.mark.parametrize("error", [CUDA, CUBLAS])
@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_anywhere_is_one_line(place, error, tiny, data, tmp_path, run_script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*PLACES[place], Mock(side_effect=error))
        code, _, err = run_script(classifier, *quick_run(tiny, data, tmp_path / "run"))
    assert code == 1 and "error: out of memory" in err.strip().splitlines()[-1]
