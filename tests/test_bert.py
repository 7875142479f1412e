"""BertModel against transformers.BertModel: outputs, gradients, files, and refusals.

Tolerances. Outputs in float32: 1e-5, absolute. Gradients: the largest difference within a tensor
as a share of that tensor's largest gradient, plus a hundredth of that share of the largest gradient
of the whole model (the gradient of a key's bias is 0 up to rounding, so its own scale means
nothing). The share is 1e-4 in float32 and 1e-10 in float64.
"""

import inspect
import json
import math
import tempfile
from functools import partial

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import edit_json, edit_tensors, refused, save_as_pickle, save_as_shards
from safetensors.torch import load_file, save_file
from torch import nn

from bert import (
    HUB_NAMES,
    BertConfig,
    BertLayer,
    BertModel,
    BertSelfAttention,
    Dropout,
    eager_attention,
    hub_name,
)
from engine.hub import resolve_model
from tokenizer import BertTokenizer

OUTPUTS = ("last_hidden_state", "pooler_output")
EMBEDDED = "all-MiniLM-L6-v2"
SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def oracle(config, seed=0):
    """A transformers.BertModel in eval mode; every weight is random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    config = transformers.BertConfig(**config, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("LayerNorm.weight")
            parameter.copy_(1 + 0.3 * noise if is_scale else 0.15 * noise)
    return model


def small_model(seed=0, **changes):
    """A random model of ours, in eval mode."""
    torch.manual_seed(seed)
    return BertModel(BertConfig(**{**SMALL, "initializer_range": 0.15, **changes})).eval()


def make_batch(config, rows, length, seed=0, segments=True):
    """Random ids (the padding id among the real tokens), scattered masks, segment ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config["vocab_size"], (rows, length), generator=generator)
    ids[0, length // 2] = config.get("pad_token_id", 0)
    mask = torch.randint(2, (rows, length), generator=generator)
    kept = torch.randint(length, (rows,), generator=generator)
    mask[torch.arange(rows), kept] = 1
    kinds = config.get("type_vocab_size", 2)
    types = torch.randint(kinds, (rows, length), generator=generator)
    return ids, mask, types if segments else None


def run(model, inputs):
    """Both outputs of either implementation."""
    ids, mask, segments = inputs
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=segments)
    return [output[name] for name in OUTPUTS]


def gradients(model, inputs, seed=0):
    """Both outputs, and the gradients of a random function of them by HuggingFace's names."""
    model.zero_grad(set_to_none=True)
    outputs = run(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator).to(output.dtype)
        loss = loss + (weights * output * (1 + output)).mean()
    loss.backward()
    rename = hub_name if isinstance(model, BertModel) else str
    grads = {rename(name): parameter.grad for name, parameter in model.named_parameters()}
    return [output.detach() for output in outputs], grads


def assert_same_gradients(ours, theirs, share):
    """Every parameter's gradient agrees; see the tolerances at the top."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        allowed = share * (gradient.abs().max().item() + 1e-2 * largest)
        assert (ours[name] - gradient).abs().max().item() <= allowed, name


def assert_close(ours, theirs, tolerance=1e-5):
    """Pairs of tensors agree, absolutely."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def assert_same_weights(model, state):
    """Our parameters are the given HuggingFace tensors, bit for bit, in float32."""
    ours = {hub_name(name): parameter for name, parameter in model.named_parameters()}
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def small_folder(tmp_path):
    """A small random model, written by transformers."""
    oracle(SMALL).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(scope="module")
def embedded():
    """The embedded checkpoint, by both implementations."""
    folder = resolve_model(EMBEDDED)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    return BertModel.from_pretrained(EMBEDDED), theirs


# ---------------------------------------------------------------------------- equal to transformers


@st.composite
def configurations(draw):
    """Small architectures of every kind that is supported."""
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


@settings(max_examples=30)
@given(configurations(), st.data(), st.integers(0, 2**31))
def test_equals_transformers_for_any_configuration(config, data, seed):
    """Outputs and the gradient of every parameter, through a folder on disk."""
    rows = data.draw(st.integers(1, 4), label="rows")
    length = data.draw(st.integers(1, config["max_position_embeddings"]), label="length")
    inputs = make_batch(config, rows, length, seed, segments=data.draw(st.booleans()))
    theirs = oracle(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = BertModel.from_pretrained(folder)
    for dtype, tolerance, share in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-11, 1e-10)):
        outputs, grads = gradients(ours.to(dtype), inputs, seed)
        expected, expected_grads = gradients(theirs.to(dtype), inputs, seed)
        assert_close(outputs, expected, tolerance)
        assert_same_gradients(grads, expected_grads, share)


SENTENCES = [
    "A quietly moving film whose last half hour is worth the wait.",
    "Dull.",
    "The committee's decision (announced on Tuesday) surprised nobody, least of all its author!",
    "How do I learn to cook rice without burning the bottom of the pan?",
]


@pytest.mark.parametrize("pairs", [None, SENTENCES[::-1]], ids=["sentences", "pairs"])
def test_embedded_checkpoint_equals_transformers(embedded, pairs):
    """Real weights, real English, padding; pairs have segment ids 0 and 1."""
    tokenizer = BertTokenizer.from_pretrained(EMBEDDED)
    tokens = tokenizer(SENTENCES, pairs, padding=True, return_tensors="pt")
    inputs = [tokens[key] for key in ("input_ids", "attention_mask", "token_type_ids")]
    assert inputs[2].max() == (0 if pairs is None else 1)
    assert inputs[1].min() == 0
    (outputs, grads), (expected, expected_grads) = (gradients(m, inputs) for m in embedded)
    assert_close(outputs, expected)
    assert_same_gradients(grads, expected_grads, share=1e-4)


def test_bf16_autocast_stays_close(embedded):
    """Every token's vector, and the pooler's output, to 2%."""
    model, _ = embedded
    tokens = BertTokenizer.from_pretrained(EMBEDDED)(SENTENCES, padding=True, return_tensors="pt")
    inputs = [tokens[key] for key in ("input_ids", "attention_mask", "token_type_ids")]
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*inputs)
    for name in OUTPUTS:
        error = (found[name].float() - exact[name]).norm(dim=-1) / exact[name].norm(dim=-1)
        assert 0 < error.max() < 0.02


SIZES = {  # layers, width, heads, feed-forward width
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "medium": (8, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_the_names_and_shapes_of_transformers(size):
    """One to one; each row of HUB_NAMES is used. On the meta device, which takes no memory."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    config = dict(zip(keys, SIZES[size], strict=True))
    with torch.device("meta"):
        ours = BertModel(BertConfig(**config))
        theirs = transformers.BertModel(transformers.BertConfig(**config)).state_dict()
    shapes = [(hub_name(name), p.shape) for name, p in ours.named_parameters()]
    assert len(shapes) == len(theirs)
    assert dict(shapes) == {name: tensor.shape for name, tensor in theirs.items()}
    for row in HUB_NAMES.values():
        assert any(name.startswith(row.format(1) + ".") for name in theirs), row


# ---------------------------------------------------------------------------- the course's names


LAYER = {
    BertSelfAttention: ["self_attention"],
    nn.Linear: [
        *("self_attention.query", "self_attention.key", "self_attention.value"),
        *("attention_dense", "interm_dense", "out_dense"),
    ],
    nn.LayerNorm: ["attention_layer_norm", "out_layer_norm"],
    Dropout: ["self_attention.dropout", "attention_dropout", "out_dropout"],
}
MODEL = {
    nn.Embedding: ["word_embedding", "pos_embedding", "tk_type_embedding"],
    nn.LayerNorm: ["embed_layer_norm"],
    Dropout: ["embed_dropout"],
    nn.ModuleList: ["bert_layers"],
    BertLayer: ["bert_layers.0", "bert_layers.1"],
    nn.Linear: ["pooler_dense"],
    nn.Tanh: ["pooler_af"],
}


def test_modules_have_the_names_and_plain_types_of_the_course():
    """Exact types: LoRA and quantisation tools look for nn.Linear and nn.Embedding themselves."""
    expected = {name: kind for kind, names in MODEL.items() for name in names}
    for layer in MODEL[BertLayer]:
        expected |= {f"{layer}.{name}": kind for kind, names in LAYER.items() for name in names}
    model = small_model()
    assert {name: type(m) for name, m in model.named_modules() if name} == expected
    assert issubclass(Dropout, nn.Dropout)
    assert model.bert_layers[0].interm_af is nn.functional.gelu
    assert [name for name, _ in model.named_buffers()] == ["position_ids"]
    assert torch.equal(model.position_ids, torch.arange(20)[None])


SIGNATURES = {
    BertModel.forward: "(self, input_ids, attention_mask, token_type_ids=None)",
    BertModel.encode: "(self, hidden_states, attention_mask)",
    BertModel.embed: "(self, input_ids, token_type_ids=None)",
    BertLayer.forward: "(self, hidden_states, attention_mask)",
    BertSelfAttention.forward: "(self, hidden_states, attention_mask)",
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_methods_take_what_the_course_passes(method):
    """No argument of our own; segment ids alone are optional."""
    parameters = inspect.signature(method).parameters.values()
    plain = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    assert str(plain) == SIGNATURES[method]


def test_edits_of_a_layer_take_effect(monkeypatch):
    """There is no second implementation that an edit of BertLayer.forward would miss."""
    model, inputs = small_model(), make_batch(SMALL, 2, 5)
    zeros = torch.zeros(2, 5, 16)
    monkeypatch.setattr(BertLayer, "forward", lambda self, hidden_states, attention_mask: zeros)
    for mode in (True, False):
        assert run(model.train(mode), inputs)[0] is zeros


# ---------------------------------------------------------------------------- attention


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99)
)
def test_eager_attention_equals_scaled_dot_product_attention(rows, heads, length, size, seed):
    """The same outputs and gradients for any shape and mask, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, rows, heads, length, size)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.randint(2, (rows, 1, 1, length), generator=generator).double()
    mask[..., 0] = 1
    weights = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    attention = BertSelfAttention(BertConfig(hidden_size=12, num_attention_heads=4)).eval()
    results = []
    for attend in (attention.attention, partial(eager_attention, dropout=nn.Identity())):
        inputs = qkv.clone().requires_grad_()
        output = attend(*inputs, (1 - mask) * -1e9)
        (output * weights).sum().backward()
        results.append((output.detach(), inputs.grad))
    assert_close(*results, tolerance=1e-12)
    assert results[0][1].abs().max() > 0


def test_eager_attention_is_the_formula():
    """softmax(Q K^T / sqrt(K)) V, summed by hand over the tokens that the mask keeps."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn((3, 1, 1, 4, 5), generator=generator, dtype=torch.float64)
    mask = torch.tensor([0, -1e9, 0, 0], dtype=torch.float64)[None, None, None]
    output = eager_attention(query, key, value, mask, nn.Identity())[0, 0]
    for t in range(4):
        shares = {s: math.exp(query[0, 0, t] @ key[0, 0, s] / 5**0.5) for s in (0, 2, 3)}
        expected = sum(share * value[0, 0, s] for s, share in shares.items())
        expected /= sum(shares.values())
        torch.testing.assert_close(output[t], expected, rtol=0, atol=1e-12)


# Too seldom to ever drop, but training then takes eager attention.
NEVER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 1e-9}


def test_training_equals_evaluation_but_for_dropout():
    """Eager attention in training, SDPA in evaluation: the same outputs and gradients."""
    model, inputs = small_model(**NEVER).double(), make_batch(SMALL, 3, 11)
    expected, expected_grads = gradients(model, inputs)
    outputs, grads = gradients(model.train(), inputs)
    assert_close(outputs, expected, tolerance=1e-12)
    assert_same_gradients(grads, expected_grads, share=1e-10)


def test_attention_dropout_drops_weights_and_keeps_the_mean():
    """One token, value 1: the output is 1 / (1 - p) with probability 1 - p, else 0."""
    torch.manual_seed(0)
    ones = torch.ones(4000, 4, 1, 1)
    layer = BertSelfAttention(BertConfig(**SMALL, attention_probs_dropout_prob=0.25))
    output = layer.attention(ones, ones, ones, torch.zeros(4000, 1, 1, 1))
    assert output.unique().tolist() == pytest.approx([0, 4 / 3])
    assert output.mean().item() == pytest.approx(1, abs=0.025)  # five standard deviations
    assert torch.equal(layer.eval().attention(ones, ones, ones, torch.zeros(4000, 1, 1, 1)), ones)


# ---------------------------------------------------------------------------- dropout


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 7), min_size=0, max_size=3),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
def test_dropout_zeroes_or_scales_and_its_gradient_has_the_same_mask(shape, p, dtype, seed):
    """x -> 0 or x / (1 - p), with p rounded to 16 bits; equal seeds give equal masks."""
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(seed)
    y = Dropout(p)(x)
    y.sum().backward()
    dropped = min(round(p * 2**16), 2**16 - 1)
    scale = torch.tensor(1 / (1 - dropped / 2**16), dtype=torch.float64).to(dtype)
    assert y.shape == x.shape and y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, (scale * 2).item()}
    assert torch.equal(x.grad * 2, y)
    torch.manual_seed(seed)
    assert torch.equal(Dropout(p)(x), y)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_drops_independently_with_its_probability(p):
    """A million elements: the share dropped, at each of the four places that share 64 random bits,
    and the share of neighbours dropped together, within five standard deviations."""
    torch.manual_seed(0)
    dropped = (Dropout(p)(torch.ones(250_000, 4)) == 0).double()
    deviation = (p * (1 - p) / 250_000) ** 0.5
    assert (dropped.mean(dim=0) - p).abs().max() < 5 * deviation
    for shift in (1, 2, 3):
        together = (dropped * dropped.roll(shift, dims=1)).mean().item()
        assert abs(together - p**2) < 5 * p * (1 - p**2) ** 0.5 / 500


@pytest.mark.parametrize("module", [Dropout(0.0).train(), Dropout(0.5).eval()])
def test_dropout_that_drops_nothing_draws_nothing(module):
    """Probability 0, or evaluation: the identity, and the random stream stays where it was."""
    x, before = torch.randn(100), torch.get_rng_state()
    assert torch.equal(module(x), x)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- padding, lengths


@settings(max_examples=20)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.integers(0, 2**31))
def test_padding_changes_nothing(lengths, seed):
    """A sentence alone and the same sentence among longer ones give the same vectors."""
    model = small_model(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, SMALL["vocab_size"], mask.shape) * mask
    with torch.no_grad():
        together = model(ids, mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row, None, :length], mask[row, None, :length])
            assert_close(
                [together["last_hidden_state"][row, :length], together["pooler_output"][row]],
                [alone["last_hidden_state"][0], alone["pooler_output"][0]],
            )


BOTH_ATTENTIONS = pytest.mark.parametrize("training", [False, True], ids=["sdpa", "eager"])


@BOTH_ATTENTIONS
def test_ids_under_the_padding_do_not_matter(training):
    """With scores in the thousands too: a masked token has a weight of exactly 0."""
    model, (ids, mask, segments) = small_model(**NEVER).train(training), make_batch(SMALL, 3, 10)
    attention, kept = model.bert_layers[0].self_attention, mask.bool()
    with torch.no_grad():
        attention.query.weight.mul_(300)
        attention.key.weight.mul_(300)
        x = model.embed(ids, segments)
        assert (attention.query(x) @ attention.key(x).transpose(1, 2)).abs().max() > 10_000
        other = torch.where(kept, ids, (ids + 7) % SMALL["vocab_size"])
        one, two = (model(i, mask, segments)["last_hidden_state"] for i in (ids, other))
    torch.testing.assert_close(one[kept], two[kept], rtol=0, atol=1e-6)
    assert not torch.allclose(one[~kept], two[~kept], atol=1e-3)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_of_padding_alone_is_finite(training, dtype):
    """Forward and backward."""
    model, (ids, mask, segments) = small_model(**NEVER), make_batch(SMALL, 3, 6)
    mask[1] = 0
    outputs, grads = gradients(model.train(training).to(dtype), (ids, mask, segments))
    assert all(tensor.isfinite().all() for tensor in [*outputs, *grads.values()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_may_have_any_dtype(dtype):
    """A boolean, integer or float mask means the same."""
    model, (ids, mask, segments) = small_model(), make_batch(SMALL, 2, 7)
    expected = run(model, (ids, mask, segments))
    assert all(map(torch.equal, run(model, (ids, mask.to(dtype), segments)), expected))


def test_too_long_input_is_refused_with_the_limit():
    """20 positions take 20 tokens; 21 raise a ValueError."""
    model = small_model()
    ids = torch.ones(1, 21, dtype=torch.long)
    assert model(ids[:, :20], ids[:, :20])["last_hidden_state"].shape == (1, 20, 16)
    with pytest.raises(ValueError, match=r"21 tokens.*limit is 20"):
        model(ids, ids)


# ---------------------------------------------------------------------------- loading, overrides


def test_from_pretrained_is_in_eval_mode_and_trainable(small_folder):
    model, inputs = BertModel.from_pretrained(small_folder), make_batch(SMALL, 2, 8)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert all(map(torch.equal, run(model, inputs), run(model, inputs)))


RATES = {
    "hidden_dropout_prob": [0.5] * 5,
    "attention_probs_dropout_prob": [0.0, *[0.5, 0.0, 0.0] * 2],
}


@pytest.mark.parametrize("key", RATES)
def test_dropout_overrides_reach_every_sublayer(small_folder, monkeypatch, key):
    """Embeddings, then attention weights, attention output and feed-forward output of a layer."""
    none, inputs = dict.fromkeys(RATES, 0.0), make_batch(SMALL, 2, 8)
    model = BertModel.from_pretrained(small_folder, **{**none, key: 0.5})
    assert getattr(model.config, key) == 0.5
    plain = run(BertModel.from_pretrained(small_folder, **none).train(), inputs)
    assert all(map(torch.equal, run(model, inputs), plain))
    calls, forward = [], Dropout.forward
    record = lambda self, x: calls.append(self.p) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(Dropout, "forward", record)
    assert not torch.allclose(run(model.train(), inputs)[0], plain[0], atol=1e-3)
    assert calls == RATES[key]


def test_overrides_are_checked_and_none_keeps_the_checkpoints_own(small_folder):
    """An impossible value and an unknown name are refused by name."""
    model = BertModel.from_pretrained(small_folder, hidden_dropout_prob=None)
    assert model.config.hidden_dropout_prob == 0.1
    with pytest.raises(ValueError, match=r"hidden_dropout_prob is 1\.5"):
        BertModel.from_pretrained(small_folder, hidden_dropout_prob=1.5)
    with pytest.raises(TypeError, match="hidden_dropout_probability"):
        BertModel.from_pretrained(small_folder, hidden_dropout_probability=0.3)


def test_new_weights_are_drawn_as_bert_drew_them():
    """Normal with `initializer_range`, biases 0, LayerNorm the identity, the padding row 0."""
    model = small_model(vocab_size=4000, pad_token_id=3, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.3), name
    assert model.word_embedding.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert (model.word_embedding.weight[3] == 0).all()


# ---------------------------------------------------------------------------- files


def test_saving_and_loading_through_transformers_keeps_every_bit(tmp_path):
    """Ours -> file -> transformers -> file -> ours -> file: tensors and bytes stay the same."""
    model = small_model(pad_token_id=2, hidden_act="gelu_new", type_vocab_size=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "ours")
    assert_same_weights(model, theirs.state_dict())
    for name, value in vars(model.config).items():
        assert getattr(theirs.config, name) == value, name
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertModel.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    again.save_pretrained(tmp_path / "again")
    files = [{p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("ours", "again")]
    assert files[0] == files[1]
    assert files[0].keys() == {"config.json", "model.safetensors"}


# How to write a folder that holds model.safetensors in another way.
WRITTEN = {
    "safetensors": lambda folder: folder / "model.safetensors",
    "shards": save_as_shards,
    "pickle": save_as_pickle,
    "old pickle": partial(save_as_pickle, zipped=False),
    "pickled shards": partial(save_as_shards, kind="pytorch_model.bin"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", WRITTEN)
def test_every_kind_of_weight_file_loads_to_the_same_bits(small_folder, kind, dtype):
    """The file's own values; from float64, rounded once."""
    path = small_folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    WRITTEN[kind](small_folder)
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same_weights(BertModel.from_pretrained(small_folder), expected)


@pytest.mark.parametrize("head", ["Model", "ForPreTraining", "ForSequenceClassification"])
def test_files_of_transformers_load(tmp_path, head):
    """In shards of `save_pretrained`; heads are ignored."""
    theirs = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**SMALL))
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected = getattr(theirs, "bert", theirs).state_dict()
    assert_same_weights(BertModel.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("kind", WRITTEN)
def test_old_names_prefix_and_heads_are_understood(small_folder, kind):
    """`bert.`, gamma and beta, heads and position_ids, as in Google's checkpoints."""
    tensors = load_file(small_folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    assert "bert.encoder.layer.1.attention.output.LayerNorm.gamma" in renamed
    for name in ("predictions.bias", "predictions.transform.LayerNorm.gamma", "seq_relationship.x"):
        renamed[f"cls.{name}"] = torch.ones(3)
    for name in ("classifier.weight", "qa_outputs.bias", "bert.embeddings.position_ids"):
        renamed[name] = torch.ones(1, 20)
    save_file(renamed, small_folder / "model.safetensors")
    WRITTEN[kind](small_folder)
    assert_same_weights(BertModel.from_pretrained(small_folder), tensors)


# ---------------------------------------------------------------------------- refusals

QUERY = "encoder.layer.1.attention.self.query.weight"
NORM = "embeddings.LayerNorm"


def refused_load(folder, *parts):
    """The one line of the UserError that loading the folder must raise."""
    return refused(lambda: BertModel.from_pretrained(folder), *parts)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("name", [QUERY, f"{NORM}.bias", "pooler.dense.bias"])
def test_missing_weight_is_refused(small_folder, name, kind):
    """By name and file; half a pooler too."""
    edit_tensors(small_folder / "model.safetensors", **{name: None})
    refused_load(small_folder, WRITTEN[kind](small_folder), name, "missing")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("encoder.layer.2.output.dense.weight", torch.zeros(16, 24), "not a weight"),
        ("score.weight", torch.zeros(2), "not a weight"),
        ("clsx", torch.zeros(2), "not a weight"),
        ("embeddings.position_ids.more", torch.zeros(2), "not a weight"),
        ("bert.bert.pooler.dense.weight", torch.zeros(16, 16), "not a weight"),
        (QUERY, torch.zeros(16, 15), "(16, 15)"),
        (QUERY, torch.zeros(256), "(256,)"),
        (QUERY, torch.zeros(1, 16, 16), "(16, 16)"),
        ("pooler.dense.bias", torch.zeros(1), "(16,)"),  # would broadcast
        (QUERY, torch.zeros(16, 16, dtype=torch.int8), "int8"),
        ("bert." + QUERY, torch.zeros(16, 16), "twice"),
        (f"{NORM}.gamma", torch.zeros(16), "twice"),
        (f"bert.{NORM}.beta", torch.zeros(16), "twice"),
    ],
)
def test_extra_misshapen_and_duplicate_weights_are_refused(small_folder, name, tensor, reason):
    """By the name of the tensor, the file and the reason; nothing is broadcast or cast."""
    edit_tensors(small_folder / "model.safetensors", **{name: tensor})
    message = refused_load(small_folder, small_folder / "model.safetensors", reason)
    current = name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias")
    assert name in message or (reason == "twice" and current in message)


def test_missing_pooler_is_drawn_at_random_with_a_note(small_folder, capsys):
    """Everything else is loaded; a complete checkpoint causes no note."""
    path = small_folder / "model.safetensors"
    BertModel.from_pretrained(small_folder)
    assert "note" not in "".join(capsys.readouterr())
    edit_tensors(path, **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    torch.manual_seed(0)
    model = BertModel.from_pretrained(small_folder)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pooler" in captured.err and str(path) in captured.err
    assert model.pooler_dense.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (model.pooler_dense.bias == 0).all()
    drawn = {f"pooler.dense.{n}": p.detach() for n, p in model.pooler_dense.named_parameters()}
    assert_same_weights(model, {**load_file(path), **drawn})


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "model_type": ["roberta", "distilbert", 3],
        "position_embedding_type": ["relative_key", "relative_key_query"],
        "is_decoder": [True],
        "add_cross_attention": [True],
        "pruned_heads": [{"0": [1]}],
        "hidden_act": ["silu", 3],
        "num_attention_heads": [3, 0],
        "hidden_size": ["16", 16.0, -16, True],
        "num_hidden_layers": [0, [2]],
        "intermediate_size": [-1],
        "vocab_size": [0],
        "max_position_embeddings": [-512],
        "type_vocab_size": [0],
        "layer_norm_eps": ["1e-12", -1e-12, math.nan],
        "hidden_dropout_prob": [1.0, -0.1],
        "attention_probs_dropout_prob": ["0.1"],
        "initializer_range": [math.inf],
        "pad_token_id": [-1, 31],
    }.items(),
)
def test_unsupported_configuration_is_refused_by_name(small_folder, key, values):
    """With the file and the field."""
    for value in values:
        edit_json(small_folder / "config.json", **{key: value})
        refused_load(small_folder, small_folder / "config.json", key)


def test_fields_that_mean_plain_bert_are_accepted(small_folder):
    """Absolute positions, no decoder, nulls; the first config.json files had no model_type."""
    path = small_folder / "config.json"
    none = {"is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
    edit_json(path, position_embedding_type="absolute", layer_norm_eps=None, **none)
    assert BertModel.from_pretrained(small_folder).config == BertConfig(**SMALL)
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    assert BertModel.from_pretrained(small_folder).config == BertConfig(**SMALL)
    path.write_text("{}", encoding="utf-8")
    refused_load(small_folder, path, "model_type")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_refused(small_folder, name):
    (small_folder / name).unlink()
    refused_load(small_folder, small_folder, name)
