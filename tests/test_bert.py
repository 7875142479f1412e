"""BertModel against `transformers.BertModel`: outputs, gradients, files, and what it refuses.

Tolerances. Outputs in float32: 1e-5, absolute. Gradients: the largest difference within a tensor,
as a share of that tensor's largest gradient, plus a hundredth of that share of the largest
gradient of the whole model (the gradient of a key's bias is 0 but for rounding, so its own scale
says nothing). The share is 1e-4 in float32 and 1e-10 in float64.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bert import (
    NAMES,
    BertConfig,
    BertModel,
    BertSelfAttention,
    Dropout,
    Packing,
    common_size,
    dropout,
    fast_attention,
    hub_name,
    pool,
    written_attention,
)
from checkpoint import UserError, model_folder
from tokenizer import BertTokenizer

OUTPUTS = ("last_hidden_state", "pooler_output")
SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def oracle(config, seed=0):
    """A transformers.BertModel in eval mode, every weight random and of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.BertModel(
        transformers.BertConfig(**config, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model


def batch(config, rows, length, seed=0, segments=True):
    """Random ids (the padding id among the real tokens), scattered masks, segment ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config["vocab_size"], (rows, length), generator=generator)
    ids[0, length // 2] = config.get("pad_token_id", 0)
    mask = torch.randint(2, (rows, length), generator=generator)
    kept = torch.randint(length, (rows,), generator=generator)
    mask[torch.arange(rows), kept] = 1
    if not segments:
        return ids, mask, None
    kinds = config.get("type_vocab_size", 2)
    return ids, mask, torch.randint(kinds, (rows, length), generator=generator)


def run(model, inputs):
    """The two outputs of either implementation; transformers is called by keyword."""
    ids, mask, segments = inputs
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=segments)
    return [output[name] for name in OUTPUTS]


def gradients(model, inputs, seed=0):
    """Outputs, and the gradient of a random function of both, by parameter name."""
    model.zero_grad(set_to_none=True)
    outputs = run(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator).to(output.dtype)
        loss = loss + (weights * output * (1 + output)).mean()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [output.detach() for output in outputs], grads


def assert_same_gradients(ours, theirs, share):
    """Every parameter's gradient agrees; see the tolerances at the top."""
    ours = {hub_name(name): gradient for name, gradient in ours.items()}
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        allowed = share * (gradient.abs().max().item() + 1e-2 * largest)
        assert (ours[name] - gradient).abs().max().item() <= allowed, name


def assert_close(ours, theirs, tolerance=1e-5):
    """Both outputs, absolutely."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def saved(model, folder):
    """The folder, with the transformers model in it."""
    model.save_pretrained(folder)
    return Path(folder)


@pytest.fixture
def small_folder(tmp_path):
    """A folder that transformers wrote, with a small random model."""
    return saved(oracle(SMALL), tmp_path / "small")


@pytest.fixture(scope="module")
def embedded():
    """The embedded checkpoint, by both implementations."""
    folder = model_folder("all-MiniLM-L6-v2")
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    return BertModel.from_pretrained("all-MiniLM-L6-v2"), theirs


def assert_same_weights(model, state):
    """Our model's parameters are the given HuggingFace tensors, bit for bit."""
    ours = {hub_name(name): tensor for name, tensor in model.state_dict().items()}
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor), name


# ------------------------------------------------------------------ equal to transformers


@st.composite
def configurations(draw):
    """Small architectures of every kind that we support."""
    heads = draw(st.integers(1, 4))
    vocab = draw(st.integers(5, 40))
    return {
        "vocab_size": vocab,
        "hidden_size": heads * draw(st.sampled_from([8, 12, 16])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 80)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "max_position_embeddings": draw(st.integers(1, 24)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
        "pad_token_id": draw(st.integers(0, vocab - 1)),
    }


@settings(deadline=None, max_examples=40, derandomize=True)
@given(configurations(), st.data(), st.integers(0, 2**31))
def test_equals_transformers_for_any_configuration(config, data, seed):
    """Outputs and the gradient of every parameter, through a folder on disk."""
    rows = data.draw(st.integers(1, 4), label="rows")
    length = data.draw(st.integers(1, config["max_position_embeddings"]), label="length")
    inputs = batch(config, rows, length, seed, segments=data.draw(st.booleans()))
    theirs = oracle(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours = BertModel.from_pretrained(saved(theirs, folder))

    outputs, grads = gradients(ours, inputs, seed)
    expected, expected_grads = gradients(theirs, inputs, seed)
    assert_close(outputs, expected)
    assert_same_gradients(grads, expected_grads, share=1e-4)

    outputs, grads = gradients(ours.double(), inputs, seed)
    expected, expected_grads = gradients(theirs.double(), inputs, seed)
    assert_close(outputs, expected, tolerance=1e-11)
    assert_same_gradients(grads, expected_grads, share=1e-10)


SENTENCES = [
    "A quietly moving film whose last half hour is worth the wait.",
    "Dull.",
    "The committee's decision (announced on Tuesday) surprised nobody, least of all its author!",
    "How do I learn to cook rice without burning the bottom of the pan?",
]


def test_embedded_checkpoint_equals_transformers(embedded):
    """Real weights, real English, a padded batch, all the gradients."""
    ours, theirs = embedded
    tokenizer = BertTokenizer.from_pretrained("all-MiniLM-L6-v2")
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    inputs = (tokens["input_ids"], tokens["attention_mask"], tokens["token_type_ids"])
    outputs, grads = gradients(ours, inputs)
    expected, expected_grads = gradients(theirs, inputs)
    assert_close(outputs, expected)
    assert_same_gradients(grads, expected_grads, share=1e-4)


def test_embedded_checkpoint_on_sentence_pairs(embedded):
    """Segment ids 0 and 1, as a joint encoding of two sentences has them."""
    ours, theirs = embedded
    tokenizer = BertTokenizer.from_pretrained("all-MiniLM-L6-v2")
    tokens = tokenizer(SENTENCES, SENTENCES[::-1], padding=True, return_tensors="pt")
    inputs = (tokens["input_ids"], tokens["attention_mask"], tokens["token_type_ids"])
    assert tokens["token_type_ids"].max() == 1
    with torch.no_grad():
        assert_close(run(ours, inputs), run(theirs, inputs))


SIZES = {
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "medium": (8, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_the_names_and_shapes_of_transformers(size):
    """Our names map onto transformers' state_dict exactly; no memory is spent on weights."""
    layers, width, heads, inner = SIZES[size]
    config = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    with torch.device("meta"):
        ours = BertModel(BertConfig(**config))
        theirs = transformers.BertModel(transformers.BertConfig(**config)).state_dict()
    shapes = {hub_name(name): p.shape for name, p in ours.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}
    assert ours.state_dict().keys() == dict(ours.named_parameters()).keys()


def test_the_table_of_names_has_no_unused_row():
    """Each row of NAMES is some parameter's, and no two parameters share a name."""
    model = BertModel(BertConfig(**SMALL))
    names = [hub_name(name) for name, _ in model.named_parameters()]
    assert len(set(names)) == len(names)
    for row in NAMES.values():
        assert any(name.startswith(row.format(1) + ".") for name in names), row


# ------------------------------------------------------------------ attention


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99)
)
def test_written_attention_equals_fast_attention(rows, heads, length, size, seed):
    """The same outputs and the same gradients for any shape and mask, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, rows, heads, length, size)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.randint(2, (rows, 1, 1, length), generator=generator).double()
    mask[..., 0] = 1
    weights = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    results = []
    for attend in (written_attention, fast_attention):
        inputs = qkv.clone().requires_grad_()
        output = attend(*inputs, (1 - mask) * -1e9, 0.0)
        (output * weights).sum().backward()
        results.append((output.detach(), inputs.grad))
    assert_close(*results, tolerance=1e-12)
    assert results[0][1].abs().max() > 0


def test_written_attention_is_the_formula():
    """softmax(Q K^T / sqrt(K)) V, summed by hand over the tokens that the mask keeps."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn((3, 2, 1, 4, 5), generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    bias = (1.0 - mask[:, None, None, :].double()) * -1e9
    output = written_attention(query, key, value, bias, 0.0)
    for row in range(2):
        kept = [t for t in range(4) if mask[row, t]]
        for t in range(4):
            scores = [torch.dot(query[row, 0, t], key[row, 0, s]) / 5**0.5 for s in kept]
            shares = torch.stack(scores).exp()
            expected = (shares[:, None] * value[row, 0, kept]).sum(dim=0) / shares.sum()
            torch.testing.assert_close(output[row, 0, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [written_attention, fast_attention])
def test_attention_dropout_drops_weights_and_keeps_the_mean(attend):
    """One token, value 1: the output is 0, or 1 / (1 - p), with probability 1 - p."""
    torch.manual_seed(0)
    ones = torch.ones(4000, 1, 1, 1)
    output = attend(ones, ones, ones, torch.zeros(4000, 1, 1, 1), 0.25)
    assert output.unique().tolist() == pytest.approx([0, 4 / 3])
    assert output.mean().item() == pytest.approx(1, abs=0.05)  # seven standard deviations


def test_whole_model_runs_on_written_attention(small_folder, monkeypatch):
    """`BertSelfAttention.attend` is the one place that chooses; the function stays the same."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return written_attention(*arguments)

    model = BertModel.from_pretrained(small_folder).double()
    inputs = batch(SMALL, 3, 11)
    fast = gradients(model, inputs)
    monkeypatch.setattr(BertSelfAttention, "attend", staticmethod(counted))
    written = gradients(model, inputs)
    assert len(calls) == SMALL["num_hidden_layers"]
    assert_close(written[0], fast[0], tolerance=1e-12)
    theirs = {hub_name(name): gradient for name, gradient in fast[1].items()}
    assert_same_gradients(written[1], theirs, share=1e-10)


# ------------------------------------------------------------------ dropout


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
def test_dropout_zeroes_or_scales_and_its_gradient_is_the_same_mask(shape, rate, dtype, seed):
    """A number is 0 or x / (1 - rate), the rate rounded to 16 bits; equal seeds, equal masks."""
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(seed)
    y = dropout(x, rate)
    y.sum().backward()
    lost = min(round(rate * 2**16), 2**16 - 1)
    scale = torch.tensor(1 / (1 - lost / 2**16), dtype=torch.float64).to(dtype)
    assert y.shape == x.shape and y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, (scale * 2).item()}
    assert torch.equal(x.grad * 2, y)
    torch.manual_seed(seed)
    assert torch.equal(dropout(x, rate), y)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9])
def test_dropout_loses_the_share_it_says_each_number_by_itself(rate):
    """A million numbers: the share lost, in all and at each place of a word of random bits, and
    the share of neighbours lost together, lie within five standard deviations."""
    torch.manual_seed(0)
    lost = (dropout(torch.ones(250_000, 4), rate) == 0).double()
    deviation = (rate * (1 - rate) / 250_000) ** 0.5
    assert (lost.mean(dim=0) - rate).abs().max() < 5 * deviation
    for shift in (1, 2, 3):
        together = (lost * lost.roll(shift, dims=1)).mean().item()
        assert abs(together - rate**2) < 5 * rate * (1 - rate**2) ** 0.5 / 500


def test_the_dropout_module_works_in_training_only_and_rate_0_is_the_identity():
    """Nothing is drawn where nothing is dropped, so the random stream stays where it was."""
    x = torch.ones(100)
    before = torch.get_rng_state()
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert not torch.equal(Dropout(0.5).train()(x), x)


# ------------------------------------------------------------------ padding, lengths, modes


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_the_first_tokens_alone_come_out_the_same(layers, length, first, seed):
    """`first` saves work in the last layer; outputs and gradients are those of the whole."""
    torch.manual_seed(seed)
    config = BertConfig(**{**SMALL, "num_hidden_layers": layers}, initializer_range=0.15)
    model = BertModel(config).double().eval()
    inputs = batch(SMALL, 3, length, seed % 1000)
    found = []
    for limit in (None, first):
        model.zero_grad()
        output = model(*inputs, first=limit)
        states = output["last_hidden_state"][:, :first]
        assert states.shape[1] == min(first, length)
        (states.sin().sum() + output["pooler_output"].sum()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((states.detach(), output["pooler_output"].detach(), grads))
    (states, pooled, grads), (other_states, other_pooled, other_grads) = found
    torch.testing.assert_close(other_states, states, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_pooled, pooled, rtol=0, atol=1e-12)
    for name, gradient in grads.items():
        torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=1e-10, msg=name)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 2**31),
)
def test_without_padding_tokens_come_out_the_same(layers, lengths, first, seed):
    """`packed` leaves padding out: the tokens' outputs and all gradients are the padded batch's."""
    torch.manual_seed(seed)
    config = BertConfig(**{**SMALL, "num_hidden_layers": layers}, initializer_range=0.15)
    model = BertModel(config).double().eval()
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, SMALL["vocab_size"], mask.shape) * mask
    found = []
    for packed in (False, True):
        model.zero_grad()
        output = model(ids, mask, first=first, packed=packed)
        states = output["last_hidden_state"]
        assert states.shape[:2] == mask[:, :first].shape
        real = mask[:, :first, None] == 1
        if packed and first is None:
            assert (states[~real.squeeze(-1)] == 0).all()
        states = torch.where(real, states, 0)
        (states.sin().sum() + output["pooler_output"].sum()).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        found.append([states.detach(), output["pooler_output"].detach(), *grads])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)


@given(st.integers(0, 10**6))
def test_a_common_size_is_little_more_and_one_of_few(size):
    common = common_size(size)
    assert common % 16 == 0 and size <= common <= max(size + 15, size * 1.125)
    assert common_size(common) == common


def test_there_are_eight_common_sizes_an_octave():
    assert {common_size(n) for n in range(513, 1025)} == set(range(576, 1025, 64))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(0, 2**31))
def test_rows_are_filled_up_for_bf16_and_nothing_is_changed_by_them(lengths, seed):
    """Products see few numbers of rows; what fills them up reaches no output and no gradient."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    x = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(seed))
    whole = (x * mask[:, :, None]).requires_grad_()
    packing = Packing(mask, common=True)
    rows = packing.pack(whole)
    assert len(rows) == common_size(sum(lengths))
    assert torch.equal(packing.unpack(rows), whole)
    packing.unpack(rows.exp()).sum().backward()
    assert torch.equal(whole.grad, whole.detach().exp() * mask[:, :, None])


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bf16_multiplies_common_sizes(half, first, monkeypatch):
    model = BertModel(BertConfig(**SMALL)).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    rows, keys = [], []
    model.layers[0].intermediate.register_forward_hook(lambda m, i, out: rows.append(out.shape[0]))

    def attend(query, key, value, bias, rate):
        keys.append(key.shape[2])
        return written_attention(query, key, value, bias, rate)

    monkeypatch.setattr(BertSelfAttention, "attend", staticmethod(attend))
    expected = model(ids, ids.sign(), None, first, packed=True)["last_hidden_state"]
    model = model.bfloat16() if half == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        found = model(ids, ids.sign(), None, first, packed=True)["last_hidden_state"]
    assert keys == [3, 3, 16, 16] and rows == [5, 16]
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    if first is None:
        assert (found[1, 2] == 0).all()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.integers(0, 2**31))
def test_padding_changes_nothing(lengths, seed):
    """A sentence alone and the same sentence among longer ones give the same vectors."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**SMALL, initializer_range=0.15)).eval()
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, SMALL["vocab_size"], (length,))
        mask[row, :length] = 1
    with torch.no_grad():
        together = model(ids, mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
            assert_close(
                [together["last_hidden_state"][row, :length], together["pooler_output"][row]],
                [alone["last_hidden_state"][0], alone["pooler_output"][0]],
            )


def test_what_stands_in_the_padding_does_not_matter():
    """Other ids under a mask of 0 change no unmasked output."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, initializer_range=0.15)).eval()
    ids, mask, segments = batch(SMALL, 3, 10)
    other = torch.where(mask.bool(), ids, (ids + 7) % SMALL["vocab_size"])
    assert not torch.equal(ids, other)
    with torch.no_grad():
        one, two = (model(i, mask, segments)["last_hidden_state"] for i in (ids, other))
    kept = mask.bool()
    torch.testing.assert_close(one[kept], two[kept], rtol=0, atol=1e-6)
    assert not torch.allclose(one[~kept], two[~kept], atol=1e-3)


@pytest.mark.parametrize("attend", [written_attention, fast_attention])
def test_padding_gets_no_weight_however_well_it_matches(attend, monkeypatch):
    """Scores in the thousands: a masked token stays at a weight of exactly 0."""
    monkeypatch.setattr(BertSelfAttention, "attend", staticmethod(attend))
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, initializer_range=0.15)).eval()
    layer = model.layers[0].attention
    with torch.no_grad():
        layer.query.weight.mul_(300)
        layer.key.weight.mul_(300)
    x = torch.randn(1, 4, 16)
    scores = layer.split(layer.query(x)) @ layer.split(layer.key(x)).transpose(-1, -2)
    assert scores.abs().max() > 2000
    mask = torch.tensor([[1, 1, 0, 0]])
    other = torch.cat([x[:, :2], 5 * x[:, 2:].flip(1)], dim=1)
    with torch.no_grad():
        one, two = (model.encode(states, mask)[:, :2] for states in (x, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attend", [written_attention, fast_attention])
def test_a_row_of_padding_alone_is_finite(attend, dtype, monkeypatch):
    """Forward and backward, in the dtypes that training uses."""
    monkeypatch.setattr(BertSelfAttention, "attend", staticmethod(attend))
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval().to(dtype)
    ids, mask, segments = batch(SMALL, 3, 6)
    mask[1] = 0
    outputs, grads = gradients(model, (ids, mask, segments))
    assert all(output.isfinite().all() for output in outputs)
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_mask_may_have_any_dtype(dtype):
    """A boolean, integer or float mask means the same."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    ids, mask, segments = batch(SMALL, 2, 7)
    with torch.no_grad():
        assert_close(run(model, (ids, mask.to(dtype), segments)), run(model, (ids, mask, segments)))


def test_too_long_input_is_refused_by_its_limit():
    """20 positions take 20 tokens, and 21 raise a ValueError that says so."""
    model = BertModel(BertConfig(**SMALL))
    ids = torch.ones(1, 21, dtype=torch.long)
    assert model(ids[:, :20], ids[:, :20])["last_hidden_state"].shape == (1, 20, 16)
    with pytest.raises(ValueError, match=r"21 tokens.*limit is 20"):
        model(ids, ids)


def test_from_pretrained_is_in_eval_mode_and_repeats_itself(small_folder):
    """No dropout after loading: two passes are equal to the bit."""
    model = BertModel.from_pretrained(small_folder)
    assert not any(module.training for module in model.modules())
    inputs = batch(SMALL, 2, 8)
    assert all(map(torch.equal, run(model, inputs), run(model, inputs)))


def test_dropout_override_reaches_every_dropout(small_folder):
    """`hidden_dropout_prob=0.3`: each Dropout has it, and training outputs vary by it."""
    model = BertModel.from_pretrained(small_folder, hidden_dropout_prob=0.3)
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [0.3] * (1 + SMALL["num_hidden_layers"])
    assert model.config.hidden_dropout_prob == 0.3
    assert model.config.attention_probs_dropout_prob == 0.1
    inputs = batch(SMALL, 2, 8)
    evaluated = run(model, inputs)
    torch.manual_seed(0)
    model.train()
    assert not torch.allclose(run(model, inputs)[0], evaluated[0], atol=1e-3)
    model.eval()
    assert all(map(torch.equal, run(model, inputs), evaluated))


def test_attention_dropout_override_reaches_every_layer(small_folder):
    """It alone changes the outputs in train mode, and the hidden dropout at 0 does not."""
    none = BertModel.from_pretrained(
        small_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = BertModel.from_pretrained(
        small_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5
    )
    assert [layer.attention.dropout for layer in model.layers] == [0.5, 0.5]
    inputs = batch(SMALL, 2, 8)
    torch.manual_seed(0)
    evaluated = run(model, inputs)[0]
    assert torch.equal(run(none.train(), inputs)[0], evaluated)
    assert not torch.allclose(run(model.train(), inputs)[0], evaluated, atol=1e-3)


def test_hidden_dropout_is_applied_after_each_of_its_places(small_folder, monkeypatch):
    """Embeddings, attention output and feed-forward output: 1 + 2 a layer in one pass."""
    calls = []
    original = Dropout.forward

    def counted(self, x):
        calls.append(self.p)
        return original(self, x)

    monkeypatch.setattr(Dropout, "forward", counted)
    run(BertModel.from_pretrained(small_folder, hidden_dropout_prob=0.25), batch(SMALL, 1, 4))
    assert calls == [0.25] * 5


def test_override_is_checked_by_name(small_folder):
    """An impossible override is a UserError; an unknown one is a mistake in the code."""
    with pytest.raises(UserError, match=r"hidden_dropout_prob is 1\.5"):
        BertModel.from_pretrained(small_folder, hidden_dropout_prob=1.5)
    with pytest.raises(TypeError, match="hidden_dropout_probability"):
        BertModel.from_pretrained(small_folder, hidden_dropout_probability=0.3)


def test_fresh_weights_are_drawn_as_bert_drew_them():
    """Normal with `initializer_range`, biases 0, LayerNorm the identity, the padding row 0."""
    torch.manual_seed(0)
    config = BertConfig(**{**SMALL, "vocab_size": 4000, "pad_token_id": 3}, initializer_range=0.05)
    for name, parameter in BertModel(config).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.3), name
        if name == "word_embedding.weight":
            assert parameter.std().item() == pytest.approx(0.05, rel=0.02)
            assert (parameter[3] == 0).all()


# ------------------------------------------------------------------ files


def test_save_and_load_through_transformers_keeps_every_bit(tmp_path):
    """Ours -> file -> transformers -> file -> ours -> file: tensors and bytes stay the same."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, pad_token_id=2, hidden_act="gelu_new"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "ours")
    assert_same_weights(model, theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertModel.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert_same_weights(again, theirs.state_dict())
    again.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        first, last = ((tmp_path / folder / file).read_bytes() for folder in ("ours", "again"))
        assert first == last, file
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_transformers_reads_our_configuration(tmp_path):
    """Every field of ours means the same to transformers."""
    config = BertConfig(**SMALL, type_vocab_size=3, layer_norm_eps=1e-5, hidden_dropout_prob=0.2)
    BertModel(config).save_pretrained(tmp_path)
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    for name, value in vars(config).items():
        assert getattr(theirs, name) == value, name


def test_embedded_checkpoint_saves_the_tensors_it_loaded(embedded, tmp_path):
    """Real weights survive our save and transformers' load."""
    ours, theirs = embedded
    ours.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def refill(folder, tensors, kind="model.safetensors"):
    """Replace the folder's weights by `tensors` in a file, or two shards with an index."""
    (folder / "model.safetensors").unlink()
    write = save_file if "safetensors" in kind else torch.save
    if not kind.endswith(".index.json"):
        write(tensors, folder / kind)
        return
    stem, suffix = kind.removesuffix(".index.json").split(".")
    weight_map = {}
    for number in (0, 1):
        shard = f"{stem}-{number + 1:05d}-of-00002.{suffix}"
        part = dict(sorted(tensors.items())[number::2])
        write(part, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / kind).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    "kind",
    [
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ],
)
def test_every_weight_file_loads_to_the_same_bits(small_folder, kind):
    """One file or shards, safetensors or pickle."""
    tensors = load_file(small_folder / "model.safetensors")
    refill(small_folder, tensors, kind)
    assert_same_weights(BertModel.from_pretrained(small_folder), tensors)


def test_shards_that_transformers_wrote(tmp_path):
    """`save_pretrained(max_shard_size=...)` makes the index and the shards."""
    theirs = oracle(SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_weights(BertModel.from_pretrained(tmp_path), theirs.state_dict())


def test_a_plain_state_dict_loads_in_either_pickle_format(small_folder):
    """`torch.save(model.state_dict())`, as years of published models were written."""
    theirs = transformers.BertModel.from_pretrained(small_folder)
    (small_folder / "model.safetensors").unlink()
    for zipped in (True, False):
        file = small_folder / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=zipped)
        assert_same_weights(BertModel.from_pretrained(small_folder), theirs.state_dict())


def old_names(tensors):
    """The names of a pre-training checkpoint converted from TensorFlow, left-overs included."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    renamed["bert.embeddings.position_ids"] = torch.arange(20)[None]
    for name in ("bias", "decoder.weight", "transform.dense.weight", "transform.LayerNorm.gamma"):
        renamed[f"cls.predictions.{name}"] = torch.ones(3)
    renamed["cls.seq_relationship.weight"] = torch.ones(2, 16)
    return renamed


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_old_names_prefix_and_left_overs_are_understood(small_folder, kind):
    """`bert.`, gamma/beta, cls.* and position_ids, all in one file."""
    tensors = load_file(small_folder / "model.safetensors")
    renamed = old_names(tensors)
    assert "bert.encoder.layer.1.attention.output.LayerNorm.gamma" in renamed
    refill(small_folder, renamed, kind)
    assert_same_weights(BertModel.from_pretrained(small_folder), tensors)


def test_pretraining_checkpoint_of_transformers_loads(tmp_path):
    """A real `BertForPreTraining`: the encoder is taken, the heads are left."""
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SMALL))
    model = BertModel.from_pretrained(saved(theirs, tmp_path))
    assert_same_weights(model, theirs.bert.state_dict())


def test_unprefixed_position_ids_are_left_over(small_folder):
    """Checkpoints of some transformers versions carry the buffer."""
    tensors = load_file(small_folder / "model.safetensors")
    refill(small_folder, {**tensors, "embeddings.position_ids": torch.arange(20)[None]})
    assert_same_weights(BertModel.from_pretrained(small_folder), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_other_precisions_load_as_float32(small_folder, dtype, kind):
    """The values are those of the file, widened (or, from float64, rounded once)."""
    tensors = load_file(small_folder / "model.safetensors")
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    refill(small_folder, stored, kind)
    expected = {name: tensor.float() for name, tensor in stored.items()}
    assert_same_weights(BertModel.from_pretrained(small_folder), expected)


QUERY = "encoder.layer.1.attention.self.query.weight"


def refused(folder, tensors, name, kind="model.safetensors"):
    """Loading is a UserError of one line that names the tensor and the file; returns it."""
    refill(folder, tensors, kind)
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(folder)
    message = str(caught.value)
    assert name in message
    assert str(folder / kind) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", [QUERY, "embeddings.LayerNorm.bias", "pooler.dense.bias"])
def test_missing_weight_is_refused(small_folder, name, kind):
    """By the name of the tensor, half a pooler included."""
    tensors = load_file(small_folder / "model.safetensors")
    del tensors[name]
    assert "missing" in refused(small_folder, tensors, name, kind)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.2.output.dense.weight",
        "score.weight",
        "clsx",
        "embeddings.position_ids.more",
        "bert.bert.pooler.dense.weight",
    ],
)
def test_extra_weight_is_refused(small_folder, name):
    """A layer too many, somebody's head, and names that only look like left-overs."""
    tensors = load_file(small_folder / "model.safetensors")
    refused(small_folder, {**tensors, name: torch.zeros(2)}, name)


@pytest.mark.parametrize("shape", [(16, 15), (16, 17), (256,), (1, 16, 16)])
def test_misshapen_weight_is_refused(small_folder, shape):
    """Both shapes are told, and nothing is broadcast into place."""
    tensors = load_file(small_folder / "model.safetensors")
    message = refused(small_folder, {**tensors, QUERY: torch.zeros(shape)}, QUERY)
    assert str(shape) in message
    assert "(16, 16)" in message


def test_scalar_is_not_broadcast_into_a_bias(small_folder):
    """A tensor of one number would fill any shape if it were let."""
    tensors = load_file(small_folder / "model.safetensors")
    refused(small_folder, {**tensors, "pooler.dense.bias": torch.zeros(1)}, "pooler.dense.bias")


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        (QUERY, "bert." + QUERY),
        ("embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
        ("embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.beta"),
    ],
)
def test_weight_given_twice_is_refused(small_folder, name, twin):
    """Under two names that mean the same parameter."""
    tensors = load_file(small_folder / "model.safetensors")
    message = refused(small_folder, {**tensors, twin: tensors[name].clone()}, name)
    assert "twice" in message


def test_weight_in_two_shards_is_refused(small_folder):
    """Two shards that hold the same tensor disagree about who is right."""
    tensors = load_file(small_folder / "model.safetensors")
    refill(small_folder, tensors, "model.safetensors.index.json")
    second = small_folder / "model-00002-of-00002.safetensors"
    first_name = min(tensors)
    save_file({**load_file(second), first_name: tensors[first_name]}, second)
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(small_folder)
    assert first_name in str(caught.value)
    assert str(second) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_weight_is_refused(small_folder, dtype):
    """A quantised weight is not its value."""
    tensors = load_file(small_folder / "model.safetensors")
    message = refused(small_folder, {**tensors, QUERY: tensors[QUERY].to(dtype)}, QUERY)
    assert str(dtype) in message


def test_missing_pooler_is_drawn_at_random_and_said(small_folder, capsys):
    """Everything else is loaded; the pooler is small random numbers, its bias 0."""
    tensors = load_file(small_folder / "model.safetensors")
    rest = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    refill(small_folder, rest)
    torch.manual_seed(0)
    model = BertModel.from_pretrained(small_folder)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pooler" in captured.err
    assert str(small_folder / "model.safetensors") in captured.err
    assert model.pooler.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (model.pooler.bias == 0).all()
    drawn = {hub_name(f"pooler.{n}"): p.detach() for n, p in model.pooler.named_parameters()}
    assert_same_weights(model, {**rest, **drawn})


def test_complete_checkpoint_says_nothing(small_folder, capsys):
    """No note where there is nothing to note."""
    BertModel.from_pretrained(small_folder)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


# ------------------------------------------------------------------ configuration


def edit_config(folder, **changes):
    """Change fields of the folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("model_type", "distilbert"),
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", "relative_key_query"),
        ("hidden_act", "silu"),
        ("hidden_act", ["gelu"]),
        ("hidden_act", 3),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("hidden_size", "16"),
        ("hidden_size", 16.0),
        ("hidden_size", -16),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", [2]),
        ("intermediate_size", -1),
        ("vocab_size", 0),
        ("max_position_embeddings", -512),
        ("type_vocab_size", 0),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", float("nan")),
        ("hidden_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1),
        ("attention_probs_dropout_prob", "0.1"),
        ("initializer_range", float("inf")),
        ("pad_token_id", -1),
        ("pad_token_id", 31),
    ],
)
def test_configuration_that_we_lack_is_refused_by_name(small_folder, key, value):
    """One line, with the file and the field."""
    edit_config(small_folder, **{key: value})
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(small_folder)
    message = str(caught.value)
    assert key in message
    assert str(small_folder / "config.json") in message
    assert "\n" not in message


def test_configuration_that_means_the_default_is_accepted(small_folder):
    """Absolute positions, no decoder, nulls and fields that change nothing."""
    edit_config(
        small_folder,
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        pruned_heads={},
        gradient_checkpointing=False,
        use_cache=True,
        layer_norm_eps=None,
        classifier_dropout=None,
    )
    expected = load_file(small_folder / "model.safetensors")
    model = BertModel.from_pretrained(small_folder)
    assert_same_weights(model, expected)
    assert model.config.layer_norm_eps == 1e-12


def test_configuration_without_model_type_is_bert_if_it_has_bert_fields(small_folder):
    """The first published config.json files had no model_type."""
    edit_config(small_folder, model_type="bert")
    file = small_folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["model_type"]
    file.write_text(json.dumps(config), encoding="utf-8")
    assert BertModel.from_pretrained(small_folder).config.hidden_size == 16
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="model_type"):
        BertModel.from_pretrained(small_folder)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_broken_config_file_is_refused(small_folder, content):
    """Missing, not JSON, not UTF-8, not an object: one line with the file's name."""
    file = small_folder / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        BertModel.from_pretrained(small_folder)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_weights_is_refused(small_folder):
    """It says which files were looked for."""
    (small_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights.*model\.safetensors.*pytorch_model\.bin"):
        BertModel.from_pretrained(small_folder)


# ------------------------------------------------------------------ pooling


def test_pooling_against_a_plain_loop():
    """pooler, cls and mean, with scattered masks and a row of padding alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 5, generator=generator)
    output = {"last_hidden_state": hidden, "pooler_output": torch.randn(4, 5, generator=generator)}
    mask = torch.randint(2, (4, 7), generator=generator)
    mask[1] = 1
    mask[3] = 0
    assert torch.equal(pool(output, mask, "pooler"), output["pooler_output"])
    pooled = {how: pool(output, mask, how) for how in ("cls", "mean")}
    for row in range(4):
        assert torch.equal(pooled["cls"][row], hidden[row, 0])
        total, count = torch.zeros(5), 0
        for t in range(7):
            if mask[row, t] == 1:
                total, count = total + hidden[row, t], count + 1
        expected = total / count if count else torch.zeros(5)
        torch.testing.assert_close(pooled["mean"][row], expected, rtol=0, atol=1e-6)


def test_unknown_pooling_is_refused():
    """By its name, with what there is."""
    output = {"last_hidden_state": torch.zeros(1, 1, 1), "pooler_output": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match=r"'max'.*pooler, cls, mean"):
        pool(output, torch.ones(1, 1), "max")
