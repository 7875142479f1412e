"""A GPU that is not there: its tensors have a shape, a dtype and a device, but no numbers.

PyTorch calls such tensors FakeTensors; an operation on two devices raises on them as on a GPU. The
device is one that PyTorch lets Python define, for which nothing needs to be compiled; importing
this file defines it for the process. `Watch` sees every operation, and counts those for which the
host would have to wait.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _foreach_utils, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
NAME = "fakegpu"
KINDS = ("syncs", "reads", "refused", "launches")
# What CUDA refuses under torch.set_deterministic_debug_mode("error"), of what a model may use.
REFUSED = {"nll_loss2d_forward", "nll_loss2d_backward", "histc", "median", "kthvalue", "put_"}
REFUSED |= {"_embedding_bag_dense_backward", "scatter_reduce", "cumsum", "bincount"}
# The host needs to know a number, or how many there are.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operations that start no kernel.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split"}
VIEWS |= {"unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "unfold", "empty"}
VIEWS |= {"empty_like", "new_empty", "empty_strided", "_reshape_alias", "lift_fresh", "diagonal"}
VIEWS |= {"new_empty_strided", "split_with_sizes"}


class Event:
    """torch.cuda.Event; to wait for one is not counted: what it marks came a step earlier."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Backend(backend_registration._DummyBackendModule):
    """torch.cuda, as far as the project uses it."""

    Event = Event

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        assert state.device.type == "cpu"


def memory_efficient_attention(query, key, value, mask, dropout=0.0) -> Tensor:
    """What F.scaled_dot_product_attention does on CUDA with a mask, in a single kernel."""
    bias = mask.expand(*query.shape[:-1], key.size(-2))
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    return run(query, key, value, bias, query.requires_grad, dropout)[0]


backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
GPU = torch.device(NAME, 0)
# Autocast leaves its operations alone. (PyTorch forgets a library that nobody holds.)
LIBRARY = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
LIBRARY.fallback(torch.library.fallthrough_kernel)
_foreach_utils._foreach_supported_types.append(FakeTensor)  # for the norm of all gradients
F.scaled_dot_product_attention = memory_efficient_attention


def move(module: nn.Module) -> nn.Module:
    """`module.to(GPU)`; in a `Watch`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return module


def place() -> str:
    """The innermost line of the project in the stack, tests aside."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.parent.name != "tests" and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "backward"


class Watch(TorchDispatchMode):
    """Runs a block on the fake GPU; the CPU's own tensors keep their numbers.

    In sections, which are functions wrapped by `counting`, it counts

    - syncs, by line: where the host waits for the GPU,
    - reads, by line: copies to the CPU for which it does not wait,
    - refused, by line: what strict determinism refuses,
    - launches, by name: operations that start a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sections: dict[str, dict[str, Any]] = {}
        self.active: dict[str, Any] | None = None

    def __enter__(self) -> "Watch":
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, a section by its name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.active = self.sections.setdefault(
                function.__name__, {"calls": 0, **{kind: Counter() for kind in KINDS}}
            )
            self.active["calls"] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.active = None

        return call

    def count(self, kind: str, what: str) -> None:
        """Count something, if it happens in a section."""
        if self.active is not None:
            self.active[kind][what] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if not name.startswith("aten::"):  # a question about a tensor
            return function(*args, **kwargs)
        name = name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        if target.type != NAME and not any(isinstance(x, FakeTensor) for x in tensors):
            with _disable_current_modes():
                return function(*args, **kwargs)
        on_gpu = [x for x in tensors if x.device == GPU]
        if on_gpu or target.type == NAME:
            self.look_at(name, args, kwargs, tensors, on_gpu)
        if name == "_local_scalar_dense":  # a number that nobody has: any
            return 1.0 if args[0].is_floating_point() else 0
        if name == "_to_copy" and not on_gpu and target.type == NAME:
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.empty(args[0].shape, dtype=dtype, device=GPU)
        if name == "nonzero":
            return args[0].new_empty(3, args[0].ndim, dtype=torch.int64)
        return function(*args, **kwargs)

    def look_at(self, name: str, args: tuple, kwargs: dict, tensors: list, on_gpu: list) -> None:
        """Count an operation that has to do with the GPU."""
        waits = name in WAITING
        if name in INDEXING:  # an index on the CPU is moved
            waits = any(x.device.type == "cpu" and x.ndim for x in tensors)
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            to = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            deferred = kwargs.get("non_blocking") or args[2:] == (True,)
            waits = source.device.type != torch.device(to).type and not deferred
            if deferred and torch.device(to).type == "cpu":
                self.count("reads", place())
        if waits:
            self.count("syncs", f"{place()} {name}")
        if name in REFUSED and any(x.is_floating_point() for x in on_gpu):
            self.count("refused", f"{place()} {name}")
        if name not in VIEWS:
            self.count("launches", name)
