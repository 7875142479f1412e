"""AdamW by hand, and what goes with it: parameter groups and learning-rate schedules.

The algorithm is Adam (Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1 with the
"efficient" bias correction at the end of section 2) with decoupled weight decay (Loshchilov &
Hutter 2017, https://arxiv.org/abs/1711.05101), the decay applied after the update:

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    a  = lr sqrt(1 - b2^t) / (1 - b1^t)
    p <- p - a m / (sqrt(v) + eps)
    p <- p - lr weight_decay p

`torch.optim.AdamW` puts eps inside the bias correction and decays before the update; with eps = 0
and no decay the two are the same function.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PIECE = 1 << 21  # numbers that a thread updates at a time
# (p, g, m, v), and the numbers that `written_update` takes beside them.
Update = tuple[tuple[Tensor, ...], tuple[float, ...]]


def unmarked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PyTorch's optimizers without its mark for the compiler, to be left alone.

    The first call of a marked one imports the compiler, which takes as long as PyTorch itself.
    """
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as the formulas above.

    Args:
        params: parameters, named parameters, or groups of either as in `torch.optim`.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: decoupled weight decay, at least 0.
        correct_bias: False leaves out the bias correction (a = lr), as the first BERT code did.

    Half-precision parameters keep their moments in float32 and are rounded once a step.

    Raises:
        ValueError: a hyperparameter out of range, by name; in `step`, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    state_dict = unmarked(torch.optim.Optimizer.state_dict)
    zero_grad = unmarked(torch.optim.Optimizer.zero_grad)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its own hyperparameters win over the defaults."""
        check_hyperparameters({**self.defaults, **param_group})
        unmarked(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor] | None = None, *, scale: float = 1.0
    ) -> Tensor | None:
        """Update every parameter that has a gradient; the others and their moments stay.

        Args:
            closure: computes the loss and its gradients anew; what it returns is returned.
            scale: a factor on all gradients, such as clipping's, which costs nothing here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.is_sparse:
                    names = group.get("param_names")
                    name = names[index] if names else f"of shape {tuple(parameter.shape)}"
                    raise ValueError(
                        f"AdamW: parameter {name} has a sparse gradient, whose moments it cannot"
                        " keep: build its embedding with sparse=False"
                    )
        fast_updates(self._fast_ones(scale))
        return loss

    def _fast_ones(self, scale: float) -> Iterator[Update]:
        """What `fast_updates` can do; the other updates are done on the way."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._prepare(parameter, group, scale)
                if can_be_fast(update[0]):
                    yield update
                else:
                    written_update(*update[0], *update[1])

    def _prepare(self, parameter: Tensor, group: dict[str, Any], scale: float) -> Update:
        """What an update of `parameter` reads and writes, and with which numbers."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=moment_dtype(parameter))
        state["step"] += 1

        (beta1, beta2), lr = group["betas"], group["lr"]
        step_size = lr
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        decay = lr * group["weight_decay"]
        tensors = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        return tensors, (scale, beta1, beta2, step_size, group["eps"], decay)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly what `state_dict` saved.

        The base class casts moments to the parameter's dtype, which would round the float32
        moments of half-precision parameters; they are put back as saved.

        Raises:
            ValueError: groups, or a parameter's state, that are not of these parameters.
        """
        unmarked(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                state = state_dict["state"].get(index, {})
                if state:
                    check_state(index, state, parameter)
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, copy=True)


MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_dtype(parameter: Tensor) -> torch.dtype:
    """The moments of half-precision parameters are in float32."""
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else parameter.dtype


def check_state(index: int, state: dict[str, Any], parameter: Tensor) -> None:
    """ValueError where a saved state is not one of `parameter`: the update trusts its shapes."""
    if set(state) != {"step", *MOMENTS} or not 0 <= state["step"] < math.inf:
        raise ValueError(f"AdamW: the state of parameter {index} is not one of AdamW's")
    for moment in (state[name] for name in MOMENTS):
        if moment.shape != parameter.shape or moment.dtype != moment_dtype(parameter):
            raise ValueError(
                f"AdamW: the state of parameter {index} has moments {tuple(moment.shape)} of"
                f" {moment.dtype}, where the parameter is {tuple(parameter.shape)}"
            )


# Update and decay are one subtraction, so one rounding of the parameter: a factor
# 1 - lr weight_decay of its own would often be 1 in float32, and never decay.


def written_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    scale: float,
    beta1: float,
    beta2: float,
    step_size: float,
    eps: float,
    decay: float,
) -> None:
    """The formulas at the top, a = `step_size` and lr weight_decay = `decay`, tensor by tensor."""
    wide, g = p.to(m.dtype), g.to(m.dtype) * scale  # p is copied only from half precision
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    change = m / v.sqrt().add_(eps)
    wide.sub_(change.mul_(step_size * (1 - decay)).add_(wide, alpha=decay))
    if wide is not p:
        p.copy_(wide)


def can_be_fast(tensors: tuple[Tensor, ...]) -> bool:
    """Whether `fast_updates` takes these: plain single or double precision, in the CPU's memory."""
    return all(
        t.is_cpu
        and t.dtype in (torch.float32, torch.float64)
        and t.is_contiguous()
        and not t.is_neg()
        for t in tensors
    )


def fast_updates(updates: Iterable[Update]) -> None:
    """`written_update` of each, in one pass over memory, on PyTorch's cores.

    The other threads begin with the first pieces while this one still prepares the next.
    """
    pieces: deque[tuple] = deque()
    written: list[Tensor] = []
    threads: list[threading.Thread] = []
    all_there = threading.Event()
    known: dict[Any, tuple] = {}  # as most parameters have the same numbers
    size = 0

    def work() -> None:
        while True:
            try:
                update, *piece = pieces.popleft()
            except IndexError:
                if all_there.is_set():
                    return
                time.sleep(1e-5)
            else:
                update(*piece)

    try:
        for tensors, numbers in updates:
            key = tensors[0].dtype, numbers
            if key not in known:
                known[key] = _compiled(*key)
            update, converted = known[key]
            arrays = [tensor.numpy().reshape(-1) for tensor in tensors]
            for start in range(0, arrays[0].size, PIECE):
                slices = [array[start : start + PIECE] for array in arrays]
                pieces.append((update, *slices, *converted))
            written += (tensors[0], *tensors[2:])
            size += arrays[0].size
            if len(threads) < min(torch.get_num_threads() - 1, size // PIECE):
                threads.append(threading.Thread(target=work))
                threads[-1].start()
    finally:
        all_there.set()
        work()
        for thread in threads:
            thread.join()
    if written:  # as PyTorch's own operations in place say
        torch.autograd.graph.increment_version(written)


def _compiled(dtype: torch.dtype, numbers: tuple[float, ...]) -> tuple[Callable, list[Any]]:
    """The compiled loop for a dtype, and its numbers in that dtype."""
    scale, beta1, beta2, step_size, eps, decay = numbers
    # Taken in double precision: 1 - 0.999 in single precision has four digits.
    given = scale, beta1, 1 - beta1, beta2, 1 - beta2, step_size * (1 - decay), eps, decay
    name = str(dtype).removeprefix("torch.")
    return compiled_update(name), [np.dtype(name).type(number) for number in given]


@cache
def compiled_update(dtype: str) -> Callable[..., None]:
    """`written_update` number by number, as machine code that leaves the interpreter free."""
    import numba  # half a second, of those only who train

    def update(p, g, m, v, scale, beta1, new1, beta2, new2, step_size, eps, decay):
        for i in range(p.size):
            x = g[i] * scale
            m[i] = beta1 * m[i] + new1 * x
            v[i] = beta2 * v[i] + new2 * x * x
            p[i] -= step_size * (m[i] / (np.sqrt(v[i]) + eps)) + decay * p[i]

    number = getattr(numba, dtype)
    signature = numba.void(*[number[::1]] * 4, *[number] * 8)
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, **options, cache=True)(update)
    except Exception:  # the machine code of last time is damaged, or there is no place to keep it
        return numba.njit(signature, **options)(update)


def check_hyperparameters(group: dict[str, Any]) -> None:
    """ValueError naming the first hyperparameter that is out of range."""
    ranges = {
        "lr": (group["lr"], "at least 0", lambda x: 0 <= x < math.inf),
        "betas[0]": (group["betas"][0], "in [0, 1)", lambda x: 0 <= x < 1),
        "betas[1]": (group["betas"][1], "in [0, 1)", lambda x: 0 <= x < 1),
        "eps": (group["eps"], "at least 0", lambda x: 0 <= x < math.inf),
        "weight_decay": (group["weight_decay"], "at least 0", lambda x: 0 <= x < math.inf),
    }
    for name, (value, expected, within) in ranges.items():
        if not within(value):
            raise ValueError(f"AdamW: {name} is {value}, expected {expected}")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `module` in two groups: decayed, and not.

    Biases and LayerNorm weights (the one-dimensional parameters) are not decayed, as in BERT.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def schedule(kind: str, step: int, total: int, warmup: int) -> float:
    """The factor on the learning rate at `step` (0, 1, ... total - 1).

    It rises linearly over `warmup` steps, from 1 / warmup to 1. Then `linear` falls in a line that
    would reach 0 at step `total`, and `constant` stays at 1.
    """
    if kind not in ("linear", "constant"):
        raise ValueError(f"schedule {kind!r}: expected linear or constant")
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if kind == "constant" else (total - step) / (total - warmup)
