"""AdamW against the formulas in float64 numpy and against `torch.optim`; groups and schedules.

Tolerances after 1,000 steps, relative: 1e-12 in float64, 1e-6 in float32 (of the length of the
difference to the length of the parameter: one rounding a step to 24 bits adds up to about 8e-7).
In bfloat16 the reference rounds the parameter at every step as the optimizer does; a float32
moment can tip such a rounding, so 99 in 100 numbers must be equal and none may be further away than
two steps of bfloat16 at the largest size that the number ever had.
"""

import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bert import BertConfig, BertModel
from optimizer import (
    PIECE,
    AdamW,
    fast_updates,
    parameter_groups,
    schedule,
    written_update,
)

ROOT = Path(__file__).resolve().parent.parent
STEPS = 1000
DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}


class Reference:
    """One parameter, by the papers: Kingma & Ba, end of section 2; Loshchilov & Hutter's decay."""

    def __init__(self, value, rounding=lambda p: p, correct_bias=True, **options):
        self.p = np.array(value, dtype=np.float64)
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)
        self.t = 0
        self.largest = np.abs(self.p)
        self.rounding, self.correct_bias = rounding, correct_bias
        self.options = {**DEFAULTS, **options}

    def step(self, gradient):
        """p <- p - a m / (sqrt(v) + eps), then p <- p - lr weight_decay p."""
        (b1, b2), lr = self.options["betas"], self.options["lr"]
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        rate = lr
        if self.correct_bias:
            rate = lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        p = self.p - rate * self.m / (np.sqrt(self.v) + self.options["eps"])
        p = p - lr * self.options["weight_decay"] * p
        self.p = self.rounding(p)
        self.largest = np.maximum(self.largest, np.abs(self.p))


def to_bfloat16(values):
    """The nearest bfloat16 of each, as float64 (by way of bits; ties to even)."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def numbers(tensor):
    """A tensor as float64 numpy, exactly."""
    return tensor.detach().double().numpy()


def leaf(tensor):
    """A parameter with its own memory and the tensor's strides."""
    return tensor.detach().clone().requires_grad_()


def relative(tensor, expected):
    """|difference| / |expected|, lengths of vectors."""
    return np.linalg.norm(numbers(tensor) - expected) / np.linalg.norm(expected)


def gradient(shape, generator, dtype):
    """Gradients of scales from 1e-3 to 1, with a drift, as float64 of the given dtype."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = 10 ** (-3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return ((noise + 0.3) * scale).to(dtype)


def drawn(generator, *shape, dtype=torch.float64):
    """Random parameter values."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


GROUPS = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True},
    {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1, "correct_bias": True},
    {"lr": 1e-4, "betas": (0.0, 0.95), "eps": 1e-8, "weight_decay": 0.01, "correct_bias": False},
    {"lr": 1e-2, "betas": (0.95, 0.0), "eps": 0.1, "weight_decay": 0.0, "correct_bias": False},
    # Fine-tuning's own: the factor 1 - lr weight_decay is 1 in float32, but 1,000 of them are not.
    {"lr": 2e-6, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "correct_bias": True},
    {"lr": 0.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.5, "correct_bias": True},
]


def assert_follows(tensor, reference):
    """The parameter is where the reference is, to its dtype's tolerance (see the top)."""
    if tensor.dtype == torch.bfloat16:
        spacing = 2.0 ** (np.floor(np.log2(reference.largest)) - 7)
        apart = np.abs(numbers(tensor) - reference.p) / spacing
        assert (apart == 0).mean() >= 0.99
        assert apart.max() <= 2
    else:
        allowed = {torch.float64: 1e-12, torch.float32: 1e-6}[tensor.dtype]
        assert relative(tensor, reference.p) <= allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_thousand_steps_in_several_groups(dtype):
    """Each group with its own hyperparameters, three parameters a group, some gradients None."""
    generator = torch.Generator().manual_seed(0)
    rounding = to_bfloat16 if dtype == torch.bfloat16 else lambda p: p
    groups, tracked = [], []
    for options in GROUPS:
        base = drawn(generator, 40, 20, dtype=dtype)
        parameters = [leaf(base), leaf(base.t()), leaf(drawn(generator, 600, dtype=dtype))]
        assert not parameters[1].is_contiguous()
        groups.append({"params": parameters, **options})
        tracked += [(p, Reference(numbers(p), rounding, **options)) for p in parameters]
    starts = [reference.p for _, reference in tracked]

    adam = AdamW(groups)
    for step in range(STEPS):
        for index, (parameter, reference) in enumerate(tracked):
            if (step + index) % 7 == 3 or (index == 4 and step < 500):
                parameter.grad = None
                continue
            parameter.grad = gradient(parameter.shape, generator, dtype)
            reference.step(numbers(parameter.grad))
        adam.step()

    for (parameter, reference), start in zip(tracked, starts, strict=True):
        assert_follows(parameter, reference)
        assert adam.state[parameter]["step"] == reference.t < STEPS
        lr = reference.options["lr"]
        if lr > (1e-5 if dtype == torch.bfloat16 else 0):
            assert np.abs(reference.p - start).max() > 50 * lr
        elif lr == 0:
            assert np.array_equal(numbers(parameter), start)
    for parameter, _ in tracked:
        moments = [adam.state[parameter][key].dtype for key in ("exp_avg", "exp_avg_sq")]
        assert moments == [torch.float32 if dtype == torch.bfloat16 else dtype] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2 * PIECE + 3,), (37, 41), (3, 5, 7), (), (0, 4)])
def test_fast_update_is_the_written_one(dtype, shape):
    """To rounding, parameter and moments, over 50 steps; where no number is lost by cancelling."""
    generator = torch.Generator().manual_seed(1)
    start = drawn(generator, *shape, dtype=dtype)
    sets = [[start.clone(), *torch.zeros(2, *shape, dtype=dtype)] for _ in range(2)]
    for step in range(50):
        grad = gradient(shape, generator, dtype)
        numbers = (0.7, 0.9, 0.999, 1e-2 / (step + 1), 1e-6, 1e-4)
        (p, m, v), (q, n, w) = sets
        fast_updates([((p, grad, m, v), numbers)])
        written_update(q, grad, n, w, *numbers)
    assert not shape or not start.numel() or not torch.equal(start, sets[0][0])
    bound = 100 * torch.finfo(dtype).eps
    for fast, written in zip(*sets, strict=True):
        torch.testing.assert_close(fast, written, rtol=bound, atol=bound)


def test_the_number_of_threads_changes_no_bit():
    """Each number is updated by one thread, and no number depends on another."""
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(2)
        parameter = leaf(drawn(generator, 4 * PIECE + 1, dtype=torch.float32))
        adam = AdamW([parameter], lr=0.01, weight_decay=0.1)
        for _ in range(5):
            parameter.grad = gradient((4 * PIECE + 1,), generator, torch.float32)
            adam.step()
        assert torch.get_num_threads() == threads  # nothing here has changed it
        torch.set_num_threads(before)
        results.append(parameter.detach())
    assert torch.equal(*results)


MEMORY = """
import sys, torch
from optimizer import AdamW
assert torch.get_num_threads() == 1
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
AdamW([parameter], lr=0.5).step()
print(round(parameter[0].item(), 3), torch.get_num_threads())
"""


@pytest.mark.parametrize("state", ["missing", "whole", "damaged", "a file"])
def test_machine_code_is_kept_and_where_it_cannot_be_made_anew(tmp_path, state):
    """A cache of numba's that is damaged or of no use stops nobody; PyTorch keeps its threads."""
    cache = tmp_path / "cache"
    if state == "a file":
        cache.touch()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "0.5 1\n"

    run()
    files = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert bool(files) == (state != "a file")
    if state == "whole":
        run()  # which adds nothing
        assert files == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    if state == "damaged":
        for path in files:
            path.write_bytes(b"")
        run()


def test_autograd_notices_the_update():
    """A graph that needs the parameter's old value refuses to use the new one."""
    parameter = leaf(torch.ones(3))
    loss = (parameter**2).sum()
    parameter.grad = torch.ones(3)
    AdamW([parameter], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_is_a_negative_view():
    """Its numbers in memory have the other sign."""
    parameter = leaf(torch.ones(3))
    parameter.grad = torch._neg_view(torch.ones(3))
    AdamW([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1.5), rtol=1e-4, atol=0)


def test_non_contiguous_parameters():
    """Transposed parameter, transposed gradient, both: the same update as laid out plainly."""
    results = []
    for turn_parameter, turn_gradient in [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]:
        generator = torch.Generator().manual_seed(3)
        parameter = drawn(generator, 9, 11)
        parameter = leaf(parameter.t().contiguous().t() if turn_parameter else parameter)
        assert parameter.is_contiguous() != turn_parameter
        adam = AdamW([parameter], lr=0.01, weight_decay=0.1)
        for _ in range(10):
            grad = gradient((9, 11), generator, torch.float64)
            parameter.grad = grad.t().contiguous().t() if turn_gradient else grad
            adam.step()
        results.append(parameter.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_is_a_factor_on_the_gradients(dtype):
    """As if every gradient had been multiplied before (in the moments' precision)."""
    generator = torch.Generator().manual_seed(4)
    start = drawn(generator, 300, dtype=dtype)
    one, other = leaf(start), leaf(start)
    first, second = (AdamW([p], lr=0.01, weight_decay=0.1) for p in (one, other))
    for scale in (1.0, 0.25, 2.0, 0.5):  # powers of two: the product is exact
        one.grad = gradient((300,), generator, dtype)
        other.grad = one.grad * scale
        first.step(scale=scale)
        second.step()
    assert torch.equal(one, other)


# ------------------------------------------------------------------ torch.optim


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch_where_both_define_the_same(dtype):
    """No decay and eps = 0: the two formulas are one function."""
    generator = torch.Generator().manual_seed(4)
    ours = leaf(drawn(generator, 40, 3, dtype=dtype))
    theirs = leaf(ours)
    options = {"lr": 2e-3, "betas": (0.85, 0.995), "eps": 0.0, "weight_decay": 0.0}
    mine, other = AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(STEPS):
        ours.grad = gradient((40, 3), generator, dtype)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    assert relative(ours, numbers(theirs)) <= (1e-6 if dtype == torch.float32 else 1e-12)


def test_equals_torch_with_decay_and_eps_brought_in_line():
    """eps > 0 and decay, after undoing the two differences.

    Torch divides sqrt(v) by sqrt(1 - b2^t) before it adds eps, so its eps at step t is ours over
    that root. It decays before the update u, we after: p <- D (p - u) here and r <- D r - u there,
    with D = 1 - lr decay. Then p = D r at every step if torch starts at r = p / D.
    """
    generator = torch.Generator().manual_seed(6)
    lr, decay, eps, beta2 = 1e-2, 0.3, 1e-3, 0.99
    shrink = 1 - lr * decay
    ours = leaf(drawn(generator, 30, 4))
    theirs = leaf(ours / shrink)
    mine = AdamW([ours], lr=lr, betas=(0.9, beta2), eps=eps, weight_decay=decay)
    other = torch.optim.AdamW([theirs], lr=lr, betas=(0.9, beta2), weight_decay=decay)
    for step in range(1, STEPS + 1):
        ours.grad = gradient((30, 4), generator, torch.float64)
        theirs.grad = ours.grad.clone()
        other.param_groups[0]["eps"] = eps / math.sqrt(1 - beta2**step)
        mine.step()
        other.step()
    assert relative(ours, shrink * numbers(theirs)) <= 1e-12


# ------------------------------------------------------------------ step, state


def test_decay_comes_after_the_update_and_scales_with_the_learning_rate():
    """One step by hand: g = 1 makes the update lr; then all of it shrinks."""
    parameter = leaf(torch.tensor([2.0], dtype=torch.float64))
    parameter.grad = torch.ones(1, dtype=torch.float64)
    AdamW([parameter], lr=0.1, eps=0.0, weight_decay=0.5).step()
    assert parameter.item() == pytest.approx((2 - 0.1) * (1 - 0.1 * 0.5), rel=1e-14)


def test_without_bias_correction_the_first_step_is_larger():
    """By (1 - b1) / sqrt(1 - b2), as in the first BERT code."""
    parameter = leaf(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.full((1,), 7.0, dtype=torch.float64)
    AdamW([parameter], lr=0.1, betas=(0.9, 0.999), eps=0.0, correct_bias=False).step()
    assert parameter.item() == pytest.approx(-0.1 * 0.1 / math.sqrt(0.001), rel=1e-12)


def test_parameters_without_a_gradient_stay():
    """No update, no decay, no state."""
    still, moving = leaf(torch.ones(2)), leaf(torch.ones(2))
    moving.grad = torch.ones(2)
    adam = AdamW([still, moving], lr=0.1, weight_decay=0.5)
    adam.step()
    assert torch.equal(still.detach(), torch.ones(2))
    assert still not in adam.state
    assert (moving < 1).all()


def test_a_zero_gradient_still_decays():
    """Unlike None: the gradient is known, and 0."""
    parameter = leaf(torch.ones(1, dtype=torch.float64))
    parameter.grad = torch.zeros(1, dtype=torch.float64)
    AdamW([parameter], lr=0.1, weight_decay=0.5).step()
    assert parameter.item() == pytest.approx(0.95, rel=1e-14)


def test_step_leaves_the_gradient_alone():
    """The next micro-batch may add to it."""
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16):
        parameter = leaf(torch.ones(50, dtype=dtype))
        parameter.grad = gradient((50,), generator, dtype)
        before = parameter.grad.clone()
        AdamW([parameter], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(parameter.grad, before)


def test_closure_is_called_with_gradients_on():
    """`step(closure)` returns the closure's loss and uses its gradients."""
    parameter = leaf(torch.tensor([3.0]))
    adam = AdamW([parameter], lr=0.5)

    def closure():
        adam.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert adam.step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.5, abs=1e-5)


def test_learning_rate_of_the_moment_is_used():
    """A schedule writes group["lr"] between steps."""
    generator = torch.Generator().manual_seed(8)
    parameter = leaf(drawn(generator, 9))
    reference = Reference(numbers(parameter), weight_decay=0.2)
    adam = AdamW([parameter], lr=5.0, weight_decay=0.2)
    for step in range(50):
        rate = 0.01 * schedule("linear", step, 50, 10)
        adam.param_groups[0]["lr"] = reference.options["lr"] = rate
        parameter.grad = gradient((9,), generator, torch.float64)
        reference.step(numbers(parameter.grad))
        adam.step()
    assert relative(parameter, reference.p) <= 1e-13


def through_torch_save(state):
    """To bytes and back, without executing anything."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("carry", [through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resumed_run_continues_bit_for_bit(carry, dtype):
    """Two groups, one parameter that had no gradient yet; moments keep every bit."""

    def make(parameters):
        groups = [
            {"params": parameters[:2], "weight_decay": 0.1},
            {"params": parameters[2:], "lr": 0.02, "betas": (0.5, 0.9)},
        ]
        return AdamW(groups, lr=0.01, correct_bias=True)

    def advance(adam, parameters, first, last):
        for step in range(first, last):
            for index, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(100 * step + index)
                skip = (index == 1 and step < 15) or (step + index) % 4 == 0
                grad = gradient(parameter.shape, generator, dtype)
                parameter.grad = None if skip else grad
            adam.step()

    generator = torch.Generator().manual_seed(9)
    parameters = [leaf(drawn(generator, 6, 4, dtype=dtype)) for _ in range(3)]
    adam = make(parameters)
    advance(adam, parameters, 0, 10)
    assert parameters[1] not in adam.state
    state = carry(adam.state_dict())
    again_parameters = [leaf(p) for p in parameters]
    again = make(again_parameters)
    again.load_state_dict(state)
    assert again.param_groups[1]["lr"] == 0.02

    expected = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    for mine, other in zip(parameters, again_parameters, strict=True):
        for key, value in adam.state.get(mine, {}).items():
            restored = again.state[other][key]
            if key != "step":
                assert restored.dtype == expected
                assert restored.data_ptr() != value.data_ptr()
                assert torch.equal(restored, value)
    advance(adam, parameters, 10, 30)
    advance(again, again_parameters, 10, 30)
    for mine, other in zip(parameters, again_parameters, strict=True):
        assert torch.equal(mine.detach(), other.detach())
        assert again.state[other]["step"] == adam.state[mine]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[other][key], adam.state[mine][key])


def test_loading_does_not_tie_two_optimizers_together():
    """`b.load_state_dict(a.state_dict())`: a goes on, and b's moments stay."""
    one, two = leaf(torch.ones(4)), leaf(torch.ones(4))
    first, second = AdamW([one], lr=0.1), AdamW([two], lr=0.1)
    one.grad = torch.ones(4)
    first.step()
    second.load_state_dict(first.state_dict())
    before = second.state[two]["exp_avg"].clone()
    first.step()
    assert torch.equal(second.state[two]["exp_avg"], before)
    assert not torch.equal(first.state[one]["exp_avg"], before)


# ------------------------------------------------------------------ refusals


BAD = [
    ("lr", {"lr": -1e-5}),
    ("lr", {"lr": float("nan")}),
    ("lr", {"lr": math.inf}),
    ("betas[0]", {"betas": (1.0, 0.999)}),
    ("betas[0]", {"betas": (-0.1, 0.999)}),
    ("betas[0]", {"betas": (float("nan"), 0.999)}),
    ("betas[1]", {"betas": (0.9, 1.0)}),
    ("betas[1]", {"betas": (0.9, -0.1)}),
    ("betas[1]", {"betas": (0.9, 1.5)}),
    ("eps", {"eps": -1e-8}),
    ("eps", {"eps": math.inf}),
    ("weight_decay", {"weight_decay": -0.01}),
    ("weight_decay", {"weight_decay": float("nan")}),
]


@pytest.mark.parametrize(("name", "options"), BAD)
@pytest.mark.parametrize("where", ["arguments", "group", "added group"])
def test_bad_hyperparameter_is_refused_by_name(name, options, where):
    """As an argument, in a group, and in a group added later."""
    parameter, other = leaf(torch.ones(1)), leaf(torch.ones(1))
    good = AdamW([other])
    makes = {
        "arguments": lambda: AdamW([parameter], **options),
        "group": lambda: AdamW([{"params": [other]}, {"params": [parameter], **options}]),
        "added group": lambda: good.add_param_group({"params": [parameter], **options}),
    }
    with pytest.raises(ValueError) as caught:
        makes[where]()
    assert f"AdamW: {name} is " in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": 1}, {"betas": (0.0, 0.0)}, {"eps": 0.0}, {"weight_decay": 2.0}],
)
def test_hyperparameters_at_their_limits_are_accepted(options):
    """Each limit is inside, and the group holds the value."""
    adam = AdamW([leaf(torch.ones(1))], **options)
    assert adam.param_groups[0].items() >= options.items()


def test_sparse_gradient_is_refused_with_the_name_of_its_parameter():
    """By its name where the optimizer was given names, else by its shape."""
    model = nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=True)})
    model["words"](torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"words\.weight.*sparse"):
        AdamW(model.named_parameters()).step()
    with pytest.raises(ValueError, match=r"shape \(9, 4\).*sparse"):
        AdamW(model.parameters()).step()


# ------------------------------------------------------------------ parameter groups


def small_bert():
    """Two layers, random."""
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=9,
        )
    )


def names_of(groups):
    """The set of names of each group."""
    return [{name for name, _ in group["params"]} for group in groups]


def test_biases_and_layer_norms_are_not_decayed():
    """Exactly they, by module type; every parameter is in one group, once."""
    model = small_bert()
    undecayed = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm)
    }
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = names_of([decayed, plain])
    assert names[1] == undecayed
    assert names[0] == {name for name, _ in model.named_parameters()} - undecayed
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    """A frozen encoder with a trainable pooler: the pooler alone; nothing trainable: no group."""
    model = small_bert()
    model.requires_grad_(False)
    assert parameter_groups(model, 0.3) == []
    model.pooler.requires_grad_(True)
    assert names_of(parameter_groups(model, 0.3)) == [{"pooler.weight"}, {"pooler.bias"}]
    model.pooler.bias.requires_grad_(False)
    (only,) = parameter_groups(model, 0.3)
    assert names_of([only]) == [{"pooler.weight"}]
    assert only["weight_decay"] == 0.3


def test_groups_of_a_model_decay_as_they_say():
    """Gradients of 0: matrices shrink by lr times the decay, biases and LayerNorms stay."""
    model = small_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
    assert {g["weight_decay"] for g in adam.param_groups} == {0.5, 0.0}


# ------------------------------------------------------------------ schedule


def test_linear_schedule_by_hand():
    """Four steps up, six down, never 0."""
    factors = [schedule("linear", step, 10, 4) for step in range(10)]
    expected = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx(expected, rel=1e-15)


def test_constant_schedule_by_hand():
    """The same way up, and there it stays."""
    factors = [schedule("constant", step, 8, 4) for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(["linear", "constant"]), st.integers(1, 300), st.data())
def test_schedule_has_its_shape_for_any_lengths(kind, total, data):
    """In (0, 1], reaching 1; up over the warm-up, then never up; no jump larger than its slope."""
    warmup = data.draw(st.integers(0, total))
    factors = [schedule(kind, step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    slopes = np.diff(factors)
    rise, fall = slopes[: max(0, warmup - 1)], slopes[max(0, warmup - 1) :]
    np.testing.assert_allclose(rise, 1 / warmup if warmup else 0, rtol=0, atol=1e-12)
    steepest = 1 / max(1, total - warmup) if kind == "linear" else 0
    assert (fall <= 1e-12).all()
    assert (fall >= -steepest - 1e-12).all()
    if kind == "linear" and warmup < total:
        assert factors[-1] == pytest.approx(1 / (total - warmup))


@pytest.mark.parametrize("kind", ["linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (2, 1)])
def test_schedule_at_the_edges(kind, total, warmup):
    """One step, no warm-up, all warm-up: the factor is 1 where both lines meet."""
    factors = [schedule(kind, step, total, warmup) for step in range(total)]
    assert factors[max(0, warmup - 1)] == 1
    assert min(factors) > 0


@pytest.mark.parametrize("step", [0, 3, 9])
def test_unknown_schedule_is_refused_from_the_first_step(step):
    """Not only once the warm-up is over."""
    with pytest.raises(ValueError, match=r"'cosine'.*linear or constant"):
        schedule("cosine", step, 10, 3)


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_over_several_modules(limit):
    """One norm over all the gradients; they are scaled by limit / norm where it is above."""
    generator = torch.Generator().manual_seed(10)
    modules = [small_bert(), nn.Linear(8, 3), nn.Linear(8, 1)]
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = gradient(parameter.shape, generator, torch.float32)
    parameters[3].grad = None
    having = [p for p in parameters if p.grad is not None]
    before = np.concatenate([numbers(p.grad).ravel() for p in having])
    expected = np.sqrt(np.sum(before**2))
    norm = nn.utils.clip_grad_norm_(parameters, limit).item()
    assert norm == pytest.approx(expected, rel=1e-5)
    assert 0.5 < norm < 1e6
    after = np.concatenate([numbers(p.grad).ravel() for p in having])
    np.testing.assert_allclose(after, before * min(1, limit / expected), rtol=1e-5, atol=0)
    assert parameters[3].grad is None


@pytest.mark.parametrize("size", [1e-3, 1e-18, 1e-20])
def test_tiny_gradients_without_eps_are_torchs(size):
    """Where eps is 0 the root of the second moment is exact down to the smallest numbers."""
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([parameter], lr=0.1, eps=0.0, weight_decay=0.0)
        for _ in range(3):
            parameter.grad = torch.full((3,), size)
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
