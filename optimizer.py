"""AdamW, parameter groups, and the learning-rate schedule.

Adam (Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1 with the "efficient" bias
correction at the end of section 2) with decoupled weight decay (Loshchilov & Hutter 2017,
https://arxiv.org/abs/1711.05101), the decay applied after the update as in the course:

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    a  = lr sqrt(1 - b2^t) / (1 - b1^t), or a = lr if correct_bias is False
    p <- p - a m / (sqrt(v) + eps)
    p <- p - lr weight_decay p
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
FUSED_DEVICES = ["cpu", "cuda"]  # those with the fused kernel
Update = tuple[tuple[Tensor, ...], int]  # (parameter, gradient, its two moments), step t


def _without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch.optim without its wrapper, which imports PyTorch's compiler (seconds)."""
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),  # decay rates of the two moments
        eps: float = 1e-6,  # added to the root of the second moment
        weight_decay: float = 0.0,
        correct_bias: bool = True,  # False: a = lr, as the first BERT code did
        fused: bool = False,  # use PyTorch's fused kernel where possible
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "correct_bias": correct_bias})
        self.fused = fused

    state_dict = _without_compiler(torch.optim.Optimizer.state_dict)
    zero_grad = _without_compiler(torch.optim.Optimizer.zero_grad)

    def __getstate__(self) -> dict[str, Any]:  # for copy.deepcopy and pickle
        return {**super().__getstate__(), "fused": self.fused}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose own hyperparameters override the defaults.

        ValueError names the first hyperparameter that is out of range.
        """
        group = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"AdamW: {name} is {group[name]}, expected at least 0")
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"AdamW: betas[{i}] is {beta}, expected in [0, 1)")
        _without_compiler(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient; all others keep their values and moments.

        closure: recomputes loss and gradients; its result is returned. grad_scale: gradients are
        divided by it (clipping); the fused kernel changes them in place. found_inf: 1 skips the
        update; then call `uncount`. Both are float32 numbers on the device.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.counted: list[dict[str, Any]] = []
        for group in self.param_groups:
            updates: list[Update] = []
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    name = group.get("param_names", {index: tuple(p.shape)})[index]
                    raise ValueError(f"AdamW: {name} has a sparse gradient: use sparse=False")
                state = self.state[p]
                if not state:  # a head has no gradient until the first step of its task
                    state |= {"step": 0, **{name: torch.zeros_like(p) for name in MOMENTS}}
                state["step"] += 1
                self.counted.append(state)
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                updates.append((tensors, state["step"]))
            # SOLUTION
            if self.fused:
                scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
                updates = fused_updates(updates, group, scaling)
            # END SOLUTION
            if updates and not found_inf:  # reading found_inf synchronizes with the GPU
                for tensors, t in updates:
                    adamw_update(*tensors, grad_scale, t=t, group=group)
        return loss

    def uncount(self) -> None:
        """Do not count the last step, which was skipped, in the bias correction."""
        for state in self.counted:
            state["step"] -= 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError if the shapes of parameters differ."""
        _without_compiler(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        for p, state in self.state.items():
            for name in MOMENTS:  # the fused kernel would read beyond the end of a shorter one
                if state[name].shape != p.shape:
                    raise ValueError(f"AdamW: {name} is not of shape {tuple(p.shape)}")


def adamw_update(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    grad_scale: Tensor | None = None,
    *,
    t: int,
    group: dict[str, Any],
) -> None:
    """Update one parameter and its moments in place: the formulas at the top of this file."""
    if grad_scale is not None:
        grad = grad / grad_scale
    # SOLUTION: change m, v and p in place, as mul_ and add_ do
    beta1, beta2 = group["betas"]
    # Running means of the gradient and of its square.
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # They start at 0; the bias correction compensates for that in the first steps.
    step_size = group["lr"]
    if group["correct_bias"]:
        step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
    p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
    # Rounded separately from the update, as in the course: its check of AdamW is that strict.
    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
    # END SOLUTION


# SOLUTION
def fused_updates(
    updates: Sequence[Update], group: dict[str, Any], scaling: dict[str, Tensor | None]
) -> list[Update]:
    """Apply the updates that PyTorch's fused kernel supports, and return the others."""
    # Parameters that can be updated together: usually all of a group.
    fused: dict[tuple, list[tuple[Tensor, ...]]] = {}
    others = []
    for tensors, t in updates:
        if _can_be_fused(tensors):
            fused.setdefault((tensors[0].device, tensors[0].dtype, t), []).append(tensors)
        else:
            others.append((tensors, t))
    for (_, _, t), together in fused.items():
        fused_adamw_update(together, t, group, **scaling)
    return others


def _can_be_fused(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the fused kernel, which reads raw memory, can update these tensors."""
    return tensors[0].device.type in FUSED_DEVICES and all(
        t.dtype in (torch.float32, torch.float64) and t.is_contiguous() and not t.is_neg()
        for t in tensors
    )


def fused_adamw_update(
    tensors: list[tuple[Tensor, ...]],
    t: int,
    group: dict[str, Any],
    **scaling: Tensor | None,  # grad_scale and found_inf
) -> None:
    """`adamw_update` for many parameters (p, grad, m, v) at once, by PyTorch's fused kernel.

    PyTorch's AdamW decays before the update and adds eps to the bias-corrected root:

        p <- (1 - lr' wd') p - lr' / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps')

    which is our update with lr' = lr (1 - lr wd), lr' wd' = lr wd, eps' = eps / sqrt(1 - b2^t).
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    root = math.sqrt(1 - beta2**t)
    decay = lr * group["weight_decay"]
    fused_lr = lr * (1 - decay)
    if not group["correct_bias"]:
        fused_lr *= (1 - beta1**t) / root  # cancels the correction that the kernel makes
    params, grads, exp_avgs, exp_avg_sqs = map(list, zip(*tensors, strict=True))
    # Filled on the device: copying a number to it would synchronize.
    steps = [params[0].new_full((), t, dtype=torch.float32)] * len(params)
    options = {"lr": fused_lr, "weight_decay": decay / fused_lr if fused_lr else 0.0}
    options |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"] / root}
    options |= {"amsgrad": False, "maximize": False, **scaling}
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **options)


# END SOLUTION
def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `module` in two groups: with weight decay, and without.

    Biases and LayerNorm weights, the one-dimensional parameters, are not decayed, as in BERT.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(schedule: str, warmup: float, step: int, total: int) -> float:
    """The factor on the learning rate at `step` (0, 1, ... total - 1).

    It rises linearly during the first steps, the fraction `warmup` of all. It starts at 1 / (their
    number), not at 0 as in transformers, where the first step changes nothing. Then "linear" falls
    linearly, to reach 0 at step `total`; "constant" stays at 1.
    """
    # Adam estimates its moments from few gradients at first: keep these steps small.
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1.0 if schedule == "constant" else (total - step) / (total - warmup_steps)
