"""AdamW against the formulas in float64 numpy and against torch.optim; groups and schedules.

Tolerances after 1,000 steps, as the length of the difference over the length of the parameter:
1e-12 in float64; 3e-5 in float32, where the update and the decay each round to 24 bits. In bfloat16
the reference rounds the parameter at every step as the optimizer does; a float32 moment can tip
such a rounding, so 99 of 100 numbers must be equal and none may be further away than two steps of
bfloat16 at the largest size that the number ever had.
"""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bert import BertConfig, BertModel
from optimizer import AdamW, lr_factor, parameter_groups

STEPS = 1000
DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
MOMENTS = ("exp_avg", "exp_avg_sq")
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


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
        self.p = self.rounding(p - lr * self.options["weight_decay"] * p)
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


def gradient(shape, generator, dtype=torch.float64):
    """Gradients of scales from 1e-3 to 1, with a drift."""
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
    # Fine-tuning's own: a decay below the spacing of float32, 2e-5 in all.
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
        allowed = {torch.float64: 1e-12, torch.float32: 3e-5}[tensor.dtype]
        assert relative(tensor, reference.p) <= allowed


# ---------------------------------------------------------------------------- the update


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [*itertools.product([torch.float64, torch.float32], [False, True]), (torch.bfloat16, False)],
)
def test_thousand_steps_in_several_groups(dtype, fused):
    """Each group has its own hyperparameters and two parameters, some gradients are None."""
    generator = torch.Generator().manual_seed(0)
    rounding = to_bfloat16 if dtype == torch.bfloat16 else lambda p: p
    groups, tracked = [], []
    for options in GROUPS:
        turned = leaf(drawn(generator, 20, 10, dtype=dtype).t())  # not contiguous, never fused
        parameters = [turned, leaf(drawn(generator, 600, dtype=dtype))]
        groups.append({"params": parameters, **options})
        tracked += [(p, Reference(numbers(p), rounding, **options)) for p in parameters]
    starts = [reference.p for _, reference in tracked]

    adam = AdamW(groups, fused=fused)
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
        state, lr = adam.state[parameter], reference.options["lr"]
        assert state["step"] == reference.t < STEPS
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        assert {state[key].dtype for key in MOMENTS} == {wide}
        if lr > (1e-5 if dtype == torch.bfloat16 else 0):
            assert np.abs(reference.p - start).max() > 50 * lr
        elif lr == 0:
            assert np.array_equal(numbers(parameter), start)


@settings(max_examples=60)
@given(
    st.sampled_from([(7,), (37, 41), (3, 5, 7), (), (0, 4)]),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(GROUPS),
    st.sampled_from([1.0, 0.25, 0.7, 3.0]),
    st.integers(0, 2**31),
)
def test_fused_update_is_the_eager_one(shape, dtype, options, scale, seed):
    """Parameter and moments to rounding, over 20 steps; in float64 the factor too is a float32."""
    generator = torch.Generator().manual_seed(seed)
    start = drawn(generator, *shape, dtype=dtype)
    eager, fused = leaf(start), leaf(start)
    optimizers = [AdamW([p], **options, fused=p is fused) for p in (eager, fused)]
    for _ in range(20):
        eager.grad = gradient(shape, generator, dtype)
        fused.grad = eager.grad.clone()
        for adam in optimizers:
            adam.step(scale=scale)
    rounding = torch.float32 if scale not in (1.0, 0.25) else dtype
    bound = 50 * torch.finfo(rounding).eps
    pairs = [(eager, fused)]
    pairs += [[a.state[a.param_groups[0]["params"][0]][m] for a in optimizers] for m in MOMENTS]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


UNFUSABLE = {
    "half precision": ("parameter", lambda p: p.bfloat16()),
    "transposed parameter": ("parameter", lambda p: p.t()),
    "transposed gradient": ("gradient", lambda p: p.t()),
    "sliced gradient": ("gradient", lambda p: p.repeat(1, 2)[:, ::2]),
    "negative view": ("gradient", torch._neg_view),  # its numbers in memory have the other sign
}


@pytest.mark.parametrize("kind", UNFUSABLE)
def test_what_the_fused_kernel_cannot_take_is_updated_eagerly(kind):
    """To the bit, beside a parameter that it can take."""
    base = drawn(torch.Generator().manual_seed(3), 8, 8, dtype=torch.float32)
    where, change = UNFUSABLE[kind]
    start, grad = base, base.sin()
    if where == "parameter":
        start, grad = change(start), change(grad).contiguous()
    else:
        grad = change(grad)
    results = []
    for fused in (False, True):
        p, q = leaf(start), leaf(torch.ones(5))
        p.grad, q.grad = grad, torch.ones(5)
        adam = AdamW([p, q], lr=0.1, weight_decay=0.1, fused=fused)
        for _ in range(3):
            adam.step()
        results.append((p.detach(), q.detach()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert torch.equal((results[0][0] - start * 0.99**3).sign(), -grad.sign())


@BOTH
@DTYPES
def test_scale_is_a_factor_on_the_gradients(dtype, fused):
    """As if every gradient had been multiplied before (in the moments' precision)."""
    generator = torch.Generator().manual_seed(4)
    start = drawn(generator, 300, dtype=dtype)
    one, other = leaf(start), leaf(start)
    first, second = (AdamW([p], lr=0.01, weight_decay=0.1, fused=fused) for p in (one, other))
    for scale in (1.0, 0.25, 2.0, 0.5):  # powers of two: the product is exact
        one.grad = gradient((300,), generator, dtype)
        other.grad = one.grad * scale
        first.step(scale=scale)
        second.step()
    assert torch.equal(one, other)
    assert not torch.equal(one, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fused", "scale"), [(False, 1.0), (False, 0.5), (True, 1.0)])
def test_step_leaves_the_gradient_alone(dtype, scale, fused):
    """The next micro-batch may add to it (after a fused step with a scale, it is scaled)."""
    parameter = leaf(torch.ones(50, dtype=dtype))
    parameter.grad = gradient((50,), torch.Generator().manual_seed(7), dtype)
    before = parameter.grad.clone()
    AdamW([parameter], lr=0.1, weight_decay=0.5, fused=fused).step(scale=scale)
    assert torch.equal(parameter.grad, before)


# ---------------------------------------------------------------------------- torch.optim


@BOTH
@pytest.mark.parametrize(("eps", "decay"), [(0.0, 0.0), (1e-3, 0.3)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch_where_both_define_the_same(eps, decay, dtype, allowed, fused):
    """Without decay and eps the two formulas are one function, else after undoing two differences.

    Torch divides sqrt(v) by sqrt(1 - b2^t) before it adds eps, so its eps at step t is ours over
    that root. It decays before the update u, we after: p <- D (p - u) here and r <- D r - u there,
    with D = 1 - lr decay. Then p = D r at every step if torch starts at r = p / D.
    """
    generator = torch.Generator().manual_seed(6)
    lr, betas = 1e-2, (0.85, 0.99)
    shrink = 1 - lr * decay
    ours = leaf(drawn(generator, 30, 4, dtype=dtype))
    theirs = leaf(ours / shrink)
    mine = AdamW([ours], lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=fused)
    other = torch.optim.AdamW([theirs], lr=lr, betas=betas, weight_decay=decay)
    for step in range(1, STEPS + 1):
        ours.grad = gradient((30, 4), generator, dtype)
        theirs.grad = ours.grad.clone()
        other.param_groups[0]["eps"] = eps / math.sqrt(1 - betas[1] ** step)
        mine.step()
        other.step()
    assert relative(ours, shrink * numbers(theirs)) <= allowed


# ---------------------------------------------------------------------------- step, by hand

HAND = [
    # options, start, gradient, after one step; g > 0 makes the corrected update lr.
    ({"eps": 0.0, "weight_decay": 0.5}, 2.0, 1.0, (2 - 0.1) * (1 - 0.1 * 0.5)),
    ({"eps": 0.0, "correct_bias": False}, 0.0, 7.0, -0.1 * 0.1 / math.sqrt(0.001)),
    ({"weight_decay": 0.5}, 1.0, 0.0, 0.95),  # a gradient of 0 decays,
    ({"weight_decay": 0.5}, 1.0, None, 1.0),  # none does not
]


@BOTH
@pytest.mark.parametrize(("options", "start", "grad", "expected"), HAND)
def test_one_step_by_hand(options, start, grad, expected, fused):
    """The decay comes after the update and scales with the learning rate; no gradient, no state."""
    parameter, other = (leaf(torch.tensor([start], dtype=torch.float64)) for _ in range(2))
    parameter.grad = None if grad is None else torch.full_like(parameter, grad)
    other.grad = torch.ones_like(other)
    adam = AdamW([parameter, other], lr=0.1, fused=fused, **options)
    adam.step()
    assert parameter.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert (parameter in adam.state) == (grad is not None)


def test_closure_is_called_with_gradients_on():
    """`step(closure)` returns the closure's loss and uses its gradients."""
    parameter = leaf(torch.tensor([3.0]))

    def closure():
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert AdamW([parameter], lr=0.5).step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.5, abs=1e-5)


@BOTH
def test_current_learning_rate_of_the_group_is_used(fused):
    """A schedule writes group["lr"] between steps."""
    generator = torch.Generator().manual_seed(8)
    parameter = leaf(drawn(generator, 9))
    reference = Reference(numbers(parameter), weight_decay=0.2)
    adam = AdamW([parameter], lr=5.0, weight_decay=0.2, fused=fused)
    for step in range(50):
        rate = 0.01 * lr_factor("linear", 0.2, step, 50)
        adam.param_groups[0]["lr"] = reference.options["lr"] = rate
        parameter.grad = gradient((9,), generator)
        reference.step(numbers(parameter.grad))
        adam.step()
    assert relative(parameter, reference.p) <= 1e-13


# ---------------------------------------------------------------------------- state


def through_torch_save(state):
    """To bytes and back, without executing anything."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@BOTH
@pytest.mark.parametrize("carry", [through_torch_save, copy.deepcopy, lambda state: state])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resumed_run_continues_bit_for_bit(carry, dtype, fused):
    """Two groups, a parameter without a gradient so far; moments keep every bit, and are copies."""

    def make(parameters):
        last = {"params": parameters[2:], "lr": 0.02, "betas": (0.5, 0.9)}
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, last]
        return AdamW(groups, lr=0.01, fused=fused)

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
    copies = [leaf(p) for p in parameters]
    resumed = make(copies)
    resumed.load_state_dict(carry(adam.state_dict()))
    assert resumed.param_groups[1]["lr"] == 0.02
    advance(resumed, copies, 10, 30)
    advance(adam, parameters, 10, 30)
    wide = torch.promote_types(dtype, torch.float32)
    for parameter, other in zip(parameters, copies, strict=True):
        assert torch.equal(parameter, other)
        state, other_state = adam.state[parameter], resumed.state[other]
        assert state["step"] == other_state["step"]
        for key in MOMENTS:
            assert other_state[key].dtype == wide
            assert torch.equal(state[key], other_state[key])


def test_state_of_parameters_of_other_shapes_is_refused():
    parameter = leaf(torch.ones(4))
    parameter.grad = torch.ones(4)
    adam = AdamW([parameter])
    adam.step()
    with pytest.raises(ValueError, match=r"AdamW: .*parameter 0"):
        AdamW([leaf(torch.ones(5))]).load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="group"):
        AdamW([leaf(torch.ones(4)), leaf(torch.ones(4))]).load_state_dict(adam.state_dict())


# ---------------------------------------------------------------------------- refusals

BAD = [
    ("lr", {"lr": -1e-5}),
    ("lr", {"lr": math.nan}),
    ("lr", {"lr": math.inf}),
    ("betas[0]", {"betas": (1.0, 0.999)}),
    ("betas[0]", {"betas": (-0.1, 0.999)}),
    ("betas[1]", {"betas": (0.9, 1.5)}),
    ("betas[1]", {"betas": (0.9, math.nan)}),
    ("eps", {"eps": -1e-8}),
    ("eps", {"eps": math.inf}),
    ("weight_decay", {"weight_decay": -0.01}),
    ("weight_decay", {"weight_decay": math.nan}),
]


@pytest.mark.parametrize(("name", "options"), BAD)
def test_bad_hyperparameter_is_refused_by_name(name, options):
    """As an argument, in a group, and in a group added later."""
    one, other = leaf(torch.ones(1)), leaf(torch.ones(1))
    good = AdamW([other])
    for make in (
        lambda: AdamW([one], **options),
        lambda: AdamW([{"params": [other]}, {"params": [one], **options}]),
        lambda: good.add_param_group({"params": [one], **options}),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert f"AdamW: {name} is " in str(caught.value)


@BOTH
def test_sparse_gradient_is_refused_with_the_name_of_its_parameter(fused):
    """By its name where the optimizer was given names, else by its shape."""
    model = nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=True)})
    model["words"](torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"words\.weight.*sparse"):
        AdamW(model.named_parameters(), fused=fused).step()
    with pytest.raises(ValueError, match=r"\(9, 4\).*sparse"):
        AdamW(model.parameters(), fused=fused).step()


# ---------------------------------------------------------------------------- parameter groups


def small_bert():
    """Two layers, random."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, intermediate_size=12, max_position_embeddings=9))


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
    groups = parameter_groups(model, 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(groups) == [everything - undecayed, undecayed]
    assert sum(len(group["params"]) for group in groups) == len(everything)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name in undecayed else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_frozen_parameters_are_left_out():
    """A frozen encoder with a trainable pooler: the pooler alone; nothing trainable: no group."""
    model = small_bert()
    model.requires_grad_(False)
    assert parameter_groups(model, 0.3) == []
    dense = model.pooler_dense.requires_grad_(True)
    groups = parameter_groups(model, 0.3)
    assert names_of(groups) == [{"pooler_dense.weight"}, {"pooler_dense.bias"}]
    dense.bias.requires_grad_(False)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.3]


# ---------------------------------------------------------------------------- schedule

SCHEDULES = [
    # schedule, fraction of warm-up, total, factors
    ("linear", 0.4, 10, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("constant", 0.5, 8, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ("linear", 0.0, 4, [1, 0.75, 0.5, 0.25]),
    ("linear", 1.0, 4, [0.25, 0.5, 0.75, 1]),
    ("linear", 0.1, 4, [1, 0.75, 0.5, 0.25]),  # less than half a step of warm-up is none
    ("constant", 0.0, 1, [1]),
    ("linear", 1.0, 1, [1]),
]


@pytest.mark.parametrize(("schedule", "warmup", "total", "expected"), SCHEDULES)
def test_schedule_by_hand(schedule, warmup, total, expected):
    """Up to 1, then down to one step above 0, or staying."""
    factors = [lr_factor(schedule, warmup, step, total) for step in range(total)]
    assert factors == pytest.approx(expected, rel=1e-15)


@settings(max_examples=150)
@given(st.sampled_from(["linear", "constant"]), st.integers(1, 300), st.floats(0, 1))
def test_schedule_has_its_shape_for_any_lengths(schedule, total, warmup):
    """In (0, 1], reaching 1; up over the warm-up, then never up; no jump larger than its slope."""
    factors = [lr_factor(schedule, warmup, step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    steps = factors.index(1) + 1  # of warm-up, at least 1 here
    assert abs(max(steps, warmup * total) - max(1, warmup * total)) <= 1
    slopes = np.diff(factors)
    rise, fall = slopes[: steps - 1], slopes[steps - 1 :]
    np.testing.assert_allclose(rise, 1 / steps, rtol=0, atol=1e-12)
    steepest = 1 / max(1, total - steps) if schedule == "linear" else 0
    assert (fall <= 1e-12).all()
    assert (fall >= -steepest - 1e-12).all()
    if schedule == "linear" and len(fall):
        assert factors[-1] <= 1 / (total - steps)


@pytest.mark.parametrize("step", [0, 9])
def test_unknown_schedule_is_refused_from_the_first_step(step):
    """Not only once the warm-up is over."""
    with pytest.raises(ValueError, match=r"'cosine'.*linear or constant"):
        lr_factor("cosine", 0.3, step, 10)


# ---------------------------------------------------------------------------- clipping


@BOTH
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_scale_clips_as_clip_grad_norm_does(limit, fused):
    """One norm over all the gradients; scale = limit / norm where the norm is above, else 1."""
    generator = torch.Generator().manual_seed(10)
    scaled = [leaf(drawn(generator, *shape).float()) for shape in ((9, 5), (30,), (2, 3, 4), ())]
    clipped = [leaf(p) for p in scaled]
    for one, other in zip(scaled, clipped, strict=True):
        one.grad = gradient(one.shape, generator, torch.float32)
        other.grad = one.grad.clone()
    norm = nn.utils.clip_grad_norm_(clipped, limit).item()
    assert norm == pytest.approx(math.sqrt(sum(np.sum(numbers(p.grad) ** 2) for p in scaled)))
    assert 0.5 < norm < 1e6
    options = {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1, "fused": fused}
    AdamW(clipped, **options).step()
    AdamW(scaled, **options).step(scale=min(1.0, limit / norm))
    for one, other in zip(scaled, clipped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
