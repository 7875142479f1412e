"""AdamW against the formulas in float64 numpy and against torch.optim; groups and schedules."""

import copy
import io
import math
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bert import BertModel
from optimizer import AdamW, lr_factor, parameter_groups

STEPS = 1000
SCALE = 4.0  # a power of two: the product with it is exact
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


def numbers(tensor):
    """A tensor as float64 numpy, exactly."""
    return tensor.detach().double().numpy()


def leaf(tensor):
    """A parameter with its own memory and the tensor's strides."""
    return tensor.detach().clone().requires_grad_()


def relative(tensor, expected):
    """|difference| / |expected|, lengths of vectors."""
    return np.linalg.norm(numbers(tensor) - expected) / np.linalg.norm(expected)


def gradient(shape, dtype):
    """Gradients of scales from 1e-3 to 1, with a drift."""
    noise, scale = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    return ((noise + 0.3) * 10 ** (-3 * scale)).to(dtype)


# ---------------------------------------------------------------------------- the update


class Reference:
    """One parameter, by the papers: Kingma & Ba, end of section 2; Loshchilov & Hutter's decay."""

    def __init__(self, parameter, options):
        self.parameter, self.options, self.t = parameter, options, 0
        self.p = self.start = numbers(parameter).copy()
        self.m, self.v = 0 * self.p, 0 * self.p

    def step(self, lr):
        """p <- p - a m / (sqrt(v) + eps), then p <- p - lr weight_decay p."""
        (b1, b2), gradient = self.options["betas"], SCALE * numbers(self.parameter.grad)
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        rate = lr
        if self.options["correct_bias"]:
            rate = lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        p = self.p - rate * self.m / (np.sqrt(self.v) + self.options["eps"])
        self.p = p - lr * self.options["weight_decay"] * p


GROUPS = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True},
    {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1, "correct_bias": True},
    {"lr": 1e-4, "betas": (0.0, 0.95), "eps": 1e-8, "weight_decay": 0.01, "correct_bias": False},
    {"lr": 1e-2, "betas": (0.95, 0.0), "eps": 0.1, "weight_decay": 0.0, "correct_bias": False},
    # Fine-tuning's own: a decay below the spacing of float32, 2e-5 in all.
    {"lr": 2e-6, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "correct_bias": True},
    {"lr": 0.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.5, "correct_bias": True},
]


@BOTH
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_thousand_steps_in_several_groups(dtype, allowed, fused):
    """Groups have their own options, rates change, some gradients are None, all are scaled."""
    torch.manual_seed(0)
    groups, references = [], []
    for options in GROUPS:
        turned = leaf(torch.randn(20, 10, dtype=dtype).t())  # not contiguous, never fused
        parameters = [turned, leaf(torch.randn(600, dtype=dtype))]
        groups.append({"params": parameters, **options})
        references += [Reference(p, options) for p in parameters]

    adam = AdamW(groups, fused=fused)
    for step in range(STEPS):
        factor = 1 if step < 800 else 0.3
        for group, options in zip(adam.param_groups, GROUPS, strict=True):
            group["lr"] = factor * options["lr"]
        for index, reference in enumerate(references):
            p = reference.parameter
            skip = (step + index) % 7 == 3 or (index == 4 and step < 500)
            p.grad = None if skip else gradient(p.shape, dtype)
            if not skip:
                reference.step(factor * reference.options["lr"])
        adam.step(grad_scale=torch.tensor(1 / SCALE))

    for reference in references:
        p, lr = reference.parameter, reference.options["lr"]
        assert adam.state[p]["step"] == reference.t < STEPS
        if lr > 1e-5:
            assert np.abs(reference.p - reference.start).max() > 50 * lr
        assert relative(p, reference.p) <= allowed


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
    torch.manual_seed(seed)
    eager = leaf(torch.randn(shape, dtype=dtype))
    pair = [eager, leaf(eager)]
    optimizers = [AdamW([p], **options, fused=p is not eager) for p in pair]
    for _ in range(20):
        new = gradient(shape, dtype)
        for p, adam in zip(pair, optimizers, strict=True):
            p.grad = new.clone()
            adam.step(grad_scale=torch.tensor(1 / scale))
    bound = 50 * torch.finfo(torch.float32 if scale not in (1.0, 0.25) else dtype).eps
    one, other = ([p, *adam.state[p].values()] for p, adam in zip(pair, optimizers, strict=True))
    torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@BOTH
def test_a_step_that_found_infinity_changes_nothing_and_can_be_uncounted(fused):
    """Also the first step of a parameter: the run goes on as one without the skipped steps."""
    pair = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    plain, skipping = (AdamW([p], lr=0.1, weight_decay=0.1, fused=fused) for p in pair)
    for step in range(4):
        before = pair[1].detach().clone()
        pair[1].grad = torch.full((3, 2), math.inf)
        skipping.step(grad_scale=torch.tensor(math.nan), found_inf=torch.tensor(1.0))
        skipping.uncount()
        assert torch.equal(pair[1], before)
        for p, adam in zip(pair, (plain, skipping), strict=True):
            p.grad = torch.full((3, 2), step - 1.5)
            adam.step(found_inf=torch.tensor(0.0))
    torch.testing.assert_close(skipping.state[pair[1]], plain.state[pair[0]], rtol=0, atol=0)
    assert torch.equal(*pair)


@pytest.mark.parametrize(
    "view", [lambda g: g.repeat(1, 2)[:, ::2], torch._neg_view], ids=["sliced", "negative view"]
)
def test_gradient_of_an_odd_memory_layout_counts_by_its_values(view):
    """The fused kernel reads raw memory: such a gradient is left to the eager update."""
    torch.manual_seed(3)
    start, results = torch.randn(8, 8), []
    for fused in (False, True):
        p = leaf(start)
        p.grad = view(start.sin())
        adam = AdamW([p], lr=0.1, weight_decay=0.1, fused=fused)
        for _ in range(3):
            adam.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert torch.equal((results[0] - start * 0.99**3).sign(), -p.grad.sign())


@BOTH
@pytest.mark.parametrize(("eps", "decay"), [(0.0, 0.0), (1e-3, 0.3)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch_where_both_define_the_same(eps, decay, dtype, allowed, fused):
    """Without decay and eps the two formulas are one function, else after undoing two differences.

    Torch divides sqrt(v) by sqrt(1 - b2^t) before it adds eps, so its eps at step t is ours over
    that root. It decays before the update u, we after: p <- D (p - u) here and r <- D r - u there,
    with D = 1 - lr decay. Then p = D r at every step if torch starts at r = p / D.
    """
    torch.manual_seed(6)
    shrink, shared = 1 - 1e-2 * decay, {"lr": 1e-2, "betas": (0.85, 0.99), "weight_decay": decay}
    ours = leaf(torch.randn(30, 4, dtype=dtype))
    theirs = leaf(ours / shrink)
    mine = AdamW([ours], eps=eps, fused=fused, **shared)
    other = torch.optim.AdamW([theirs], **shared)
    for step in range(1, STEPS + 1):
        ours.grad = gradient((30, 4), dtype)
        theirs.grad = ours.grad.clone()
        other.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.99**step)
        mine.step()
        other.step()
    assert relative(ours, shrink * numbers(theirs)) <= allowed


def test_closure_is_called_with_gradients_on():
    """`step(closure)` returns the closure's loss and uses its gradients."""
    parameter = leaf(torch.tensor([3.0]))

    def closure():
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert AdamW([parameter], lr=0.5).step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.5, abs=1e-5)


# ---------------------------------------------------------------------------- state


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_continues_bit_for_bit(dtype, fused):
    """Two groups, and a parameter without a gradient so far, through a file."""

    def make(parameters):
        last = {"params": parameters[2:], "lr": 0.02, "betas": (0.5, 0.9)}
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, last]
        return AdamW(groups, lr=0.01, fused=fused)

    def advance(adam, parameters, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            for index, parameter in enumerate(parameters):
                skip = (index == 1 and step < 15) or (step + index) % 4 == 0
                parameter.grad = None if skip else gradient((6, 4), dtype)
            adam.step()

    parameters = [leaf(gradient((6, 4), dtype)) for _ in range(3)]
    adam = make(parameters)
    advance(adam, parameters, 0, 10)
    copies = [leaf(p) for p in parameters]
    resumed, file = make(copies), io.BytesIO()
    torch.save(adam.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    advance(resumed, copies, 10, 30)
    advance(adam, parameters, 10, 30)
    for p, other in zip(parameters, copies, strict=True):
        assert torch.equal(p, other)
        torch.testing.assert_close(adam.state[p], resumed.state[other], rtol=0, atol=0)


# ---------------------------------------------------------------------------- refusals

BAD = [("lr", {"lr": bad}) for bad in (-1e-5, math.nan, math.inf)]
BAD += [("eps", {"eps": -1e-8}), ("weight_decay", {"weight_decay": math.nan})]
BAD += [("betas[0]", {"betas": (bad, 0.999)}) for bad in (1.0, -0.1)]
BAD += [("betas[1]", {"betas": (0.9, bad)}) for bad in (1.5, math.nan)]


@pytest.mark.parametrize(("name", "options"), BAD)
def test_bad_hyperparameter_is_refused_by_name(name, options):
    """As an argument, in a group, and in a group added later."""
    one, other = leaf(torch.ones(1)), leaf(torch.ones(1))
    for make in (
        lambda: AdamW([one], **options),
        lambda: AdamW([{"params": [other]}, {"params": [one], **options}]),
        lambda: AdamW([other]).add_param_group({"params": [one], **options}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"AdamW: {name} is ")):
            make()


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


def test_a_copy_of_an_optimizer_steps_as_the_original():
    """As learning-rate finders and averaging of weights make it."""
    for fused in (False, True):
        optimizer = AdamW([nn.Parameter(torch.ones(3))], fused=fused)
        pair = [optimizer, copy.deepcopy(optimizer)]
        p, q = (o.param_groups[0]["params"][0] for o in pair)
        p.grad, q.grad = torch.arange(3.0), torch.arange(3.0)
        for o in pair:
            o.step()
        assert torch.equal(p, q) and pair[1].fused == fused and not torch.equal(p, torch.ones(3))


def test_biases_and_layer_norms_are_not_decayed(tiny):
    """A step with gradients of 0 shrinks exactly the other parameters, once."""
    model = BertModel.from_pretrained(tiny)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(model.state_dict())
    AdamW(parameter_groups(model, 0.5), lr=0.1).step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.endswith("bias") or "layer_norm" in name else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_frozen_parameters_are_left_out(tiny):
    """A frozen encoder with a trainable pooler: the pooler alone; nothing trainable: no group."""
    model = BertModel.from_pretrained(tiny).requires_grad_(False)
    assert parameter_groups(model, 0.3) == []
    dense = model.pooler_dense.requires_grad_(True)
    assert parameter_groups(model, 0.3) == [
        {"params": [("pooler_dense.weight", dense.weight)], "weight_decay": 0.3},
        {"params": [("pooler_dense.bias", dense.bias)], "weight_decay": 0.0},
    ]


# ---------------------------------------------------------------------------- schedule

SCHEDULES = [
    ("linear", 0.4, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("constant", 0.5, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ("linear", 0.1, [1, 0.75, 0.5, 0.25]),  # less than half a step of warm-up is none
    ("linear", 1.0, [0.25, 0.5, 0.75, 1]),
]


@pytest.mark.parametrize(("schedule", "warmup", "expected"), SCHEDULES)
def test_schedule_by_hand(schedule, warmup, expected):
    factors = [lr_factor(schedule, warmup, step, len(expected)) for step in range(len(expected))]
    assert factors == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", ["linear", "constant_with_warmup"])
@settings(max_examples=50)
@given(st.integers(1, 300), st.floats(0, 1))
def test_schedule_equals_transformers(name, total, warmup):
    """Which begins a step earlier, with a rate of 0."""
    steps, sgd = round(warmup * total), torch.optim.SGD([torch.ones(1)])
    assume(steps < total)
    [factor] = transformers.get_scheduler(name, sgd, steps, total).lr_lambdas
    for step in range(total):
        expected = factor(step + (step < steps))
        ours = lr_factor(name.split("_")[0], warmup, step, total)
        assert ours == pytest.approx(expected, rel=1e-12)
