"""BertModel against transformers.BertModel: outputs, gradients, files, and refusals."""

import json
import math
import tempfile
from functools import partial

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import edit_json, edit_tensors, refused, save_as_pickle
from safetensors.torch import load_file, save_file
from torch import nn

from bert import HUB_NAMES, BertConfig, BertLayer, BertModel, BertSelfAttention, Dropout, hub_name
from hub.models import resolve_model
from tokenizer import BertTokenizer

BUNDLED = "all-MiniLM-L6-v2"
SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 20}
# Too seldom to ever drop, but training then takes eager attention, and evaluation the fused one.
NEVER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 1e-9}
BOTH_ATTENTIONS = pytest.mark.parametrize("training", [False, True], ids=["fused", "eager"])


def oracle(config, seed=0):
    """A transformers.BertModel in eval mode; every weight is random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    config = transformers.BertConfig(**config, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise + name.endswith("LayerNorm.weight"))
    return model


def small_model(**changes):
    """A random model of ours, in eval mode."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**SMALL, "initializer_range": 0.15, **changes})).eval()


def make_batch(config, rows, length, seed=0):
    """Random ids (the padding id among the real tokens), scattered masks, segment ids."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, size=(rows, length), generator=generator)
    ids, mask = draw(config["vocab_size"]), draw(2)
    segments = draw(config.get("type_vocab_size", 2))
    ids[0, length // 2] = config.get("pad_token_id", 0)
    mask[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = 1
    return ids, mask, segments


def run(model, inputs):
    """Both outputs of either implementation."""
    output = model(*inputs)
    return [output["last_hidden_state"], output["pooler_output"]]


def gradients(model, inputs):
    """Both outputs, and the gradients of a random function of them by HuggingFace's names."""
    model.zero_grad(set_to_none=True)
    outputs, generator = run(model, inputs), torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    sum((w * o * (1 + o)).mean() for w, o in zip(weights, outputs, strict=True)).backward()
    rename = hub_name if isinstance(model, BertModel) else str
    grads = {rename(name): parameter.grad for name, parameter in model.named_parameters()}
    return [output.detach() for output in outputs], grads


def assert_same_gradients(ours, theirs, share):
    """To a share of a tensor's largest gradient, and 1% of the model's (a key's bias has none)."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        allowed = share * (gradient.abs().max().item() + 1e-2 * largest)
        assert (ours[name] - gradient).abs().max().item() <= allowed, name


assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def assert_same_weights(model, state):
    """Our parameters are the given HuggingFace tensors, bit for bit, in float32."""
    ours = {hub_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    assert_close(ours, dict(state), atol=0)


@pytest.fixture
def small_folder(tmp_path):
    """A small random model, written by transformers."""
    oracle(SMALL).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


# ---------------------------------------------------------------------------- equal to transformers


@st.composite
def configurations(draw):
    """Small architectures of every kind that is supported."""
    heads, vocab = draw(st.integers(1, 4)), draw(st.integers(5, 40))
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


@settings(max_examples=20)
@given(configurations(), st.data(), st.integers(0, 2**31))
def test_equals_transformers_for_any_configuration(config, data, seed):
    """Outputs and gradients by both kinds of attention, through a folder on disk."""
    rows = data.draw(st.integers(1, 4), label="rows")
    length = data.draw(st.integers(1, config["max_position_embeddings"]), label="length")
    inputs = make_batch(config, rows, length, seed)[: data.draw(st.sampled_from([2, 3]))]
    theirs = oracle(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = BertModel.from_pretrained(folder, **NEVER)
    for dtype, tolerance, share in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-11, 1e-10)):
        expected, expected_grads = gradients(theirs.to(dtype), inputs)
        for training in (False, True):
            outputs, grads = gradients(ours.to(dtype).train(training), inputs)
            assert_close(outputs, expected, atol=tolerance)
            assert_same_gradients(grads, expected_grads, share)


SENTENCES = ["A quietly moving film whose last half hour is worth the wait.", "Dull."]
SENTENCES += ["The committee's decision (announced on Tuesday) surprised nobody, least of all him!"]
SENTENCES += ["How do I learn to cook rice without burning the bottom of the pan?"]


@pytest.mark.parametrize("pairs", [None, SENTENCES[::-1]], ids=["sentences", "pairs"])
def test_embedded_checkpoint_equals_transformers(pairs):
    """Real weights, real English, padding; pairs have segment ids 0 and 1. In bfloat16 to 2%."""
    ours, folder = BertModel.from_pretrained(BUNDLED), resolve_model(BUNDLED)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = BertTokenizer.from_pretrained(BUNDLED)
    tokens = tokenizer(SENTENCES, pairs, padding=True, return_tensors="pt")
    inputs = [tokens[key] for key in ("input_ids", "attention_mask", "token_type_ids")]
    assert inputs[2].max() == (pairs is not None) and inputs[1].min() == 0
    outputs, grads = gradients(ours, inputs)
    expected, expected_grads = gradients(theirs, inputs)
    assert_close(outputs, expected)
    assert_same_gradients(grads, expected_grads, share=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rounded, exact in zip(run(ours, inputs), expected, strict=True):
            error = (rounded.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert 0 < error.max() < 0.02


def test_default_is_bert_base_with_the_names_and_shapes_of_transformers():
    """One to one; each row of HUB_NAMES is used. On the meta device, which takes no memory."""
    with torch.device("meta"):
        ours = BertModel(BertConfig())
        theirs = transformers.BertModel(transformers.BertConfig()).state_dict()
    shapes = [(hub_name(name), p.shape) for name, p in ours.named_parameters()]
    assert sorted(shapes) == sorted((name, tensor.shape) for name, tensor in theirs.items())
    for row in HUB_NAMES.values():
        assert any(name.startswith(row.format(1) + ".") for name in theirs), row


# ---------------------------------------------------------------------------- the course's names

MODULES = {  # * stands for the layers
    nn.Embedding: "word_embedding pos_embedding tk_type_embedding",
    nn.LayerNorm: "embed_layer_norm *.attention_layer_norm *.out_layer_norm",
    Dropout: "embed_dropout *.self_attention.dropout *.attention_dropout *.out_dropout",
    nn.ModuleList: "bert_layers",
    BertLayer: "*",
    BertSelfAttention: "*.self_attention",
    nn.Linear: "*.self_attention.query *.self_attention.key *.self_attention.value"
    " *.attention_dense *.interm_dense *.out_dense pooler_dense",
    nn.Tanh: "pooler_af",
}


def test_modules_have_the_names_and_plain_types_of_the_course():
    """Exact types: LoRA and quantisation tools look for nn.Linear and nn.Embedding themselves."""
    expected, model = {}, small_model()
    for kind, names in MODULES.items():
        for layer in ("bert_layers.0", "bert_layers.1"):
            expected |= dict.fromkeys(names.replace("*", layer).split(), kind)
    assert {name: type(m) for name, m in model.named_modules() if name} == expected
    assert issubclass(Dropout, nn.Dropout)
    assert model.bert_layers[0].interm_af is nn.functional.gelu
    assert [name for name, _ in model.named_buffers()] == ["position_ids"]
    assert torch.equal(model.position_ids, torch.arange(20)[None])


@BOTH_ATTENTIONS
def test_edits_of_a_layer_take_effect(monkeypatch, training):
    zeros = torch.zeros(2, 5, 16)
    monkeypatch.setattr(BertLayer, "forward", lambda self, hidden_states, attention_mask: zeros)
    assert run(small_model().train(training), make_batch(SMALL, 2, 5))[0] is zeros


# ---------------------------------------------------------------------------- dropout


def test_attention_dropout_drops_weights_and_keeps_the_mean():
    """One token, value 1: the output is 1 / (1 - p) with probability 1 - p, else 0."""
    torch.manual_seed(0)
    ones, mask = torch.ones(4000, 4, 1, 1), torch.zeros(4000, 1, 1, 1)
    layer = BertSelfAttention(BertConfig(**SMALL, attention_probs_dropout_prob=0.25))
    output = layer.attention(ones, ones, ones, mask)
    assert output.unique().tolist() == pytest.approx([0, 4 / 3])
    assert output.mean().item() == pytest.approx(1, abs=0.025)  # five standard deviations
    assert torch.equal(layer.eval().attention(ones, ones, ones, mask), ones)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 7), max_size=3),
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


@pytest.mark.parametrize("p", [0.1, 0.9])
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
    assert_close(one[kept], two[kept], atol=1e-6)
    assert not torch.allclose(one[~kept], two[~kept], atol=1e-3)  # the ids differ


@BOTH_ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_of_padding_alone_has_finite_outputs_and_gradients(training, dtype):
    inputs = make_batch(SMALL, 3, 6)
    inputs[1][1] = 0
    outputs, grads = gradients(small_model(**NEVER).train(training).to(dtype), inputs)
    assert all(tensor.isfinite().all() for tensor in [*outputs, *grads.values()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_may_have_any_dtype(dtype):
    model, (ids, mask, segments) = small_model(), make_batch(SMALL, 2, 7)
    expected = run(model, (ids, mask, segments))
    assert all(map(torch.equal, run(model, (ids, mask.to(dtype), segments)), expected))


def test_too_long_input_is_refused_with_the_limit():
    model, ids = small_model(), torch.ones(1, 21, dtype=torch.long)
    assert model(ids[:, :20], ids[:, :20])["last_hidden_state"].shape == (1, 20, 16)
    with pytest.raises(ValueError, match=r"21 tokens.*limit is 20"):
        model(ids, ids)


# ---------------------------------------------------------------------------- loading, overrides

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
    assert all(map(torch.equal, run(model, inputs), plain))  # in evaluation mode when loaded
    calls, forward = [], Dropout.forward
    record = lambda self, x: calls.append(self.p) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(Dropout, "forward", record)
    assert not torch.allclose(run(model.train(), inputs)[0], plain[0], atol=1e-3)
    assert calls == RATES[key]


def test_overrides_are_checked_and_none_keeps_the_checkpoints_own(small_folder):
    model = BertModel.from_pretrained(small_folder, hidden_dropout_prob=None)
    assert model.config.hidden_dropout_prob == 0.1
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    with pytest.raises(ValueError, match=r"hidden_dropout_prob is 1\.5"):
        BertModel.from_pretrained(small_folder, hidden_dropout_prob=1.5)
    with pytest.raises(TypeError, match="hidden_dropout_probability"):
        BertModel.from_pretrained(small_folder, hidden_dropout_probability=0.3)


def test_new_weights_are_drawn_as_bert_drew_them():
    """Normal with `initializer_range`, biases 0, LayerNorm the identity, the padding row 0."""
    model = small_model(vocab_size=4000, pad_token_id=3, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == name.endswith("norm.weight")).all(), name
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


def old_names(tensors):
    """`bert.`, gamma and beta, heads and position_ids, as in Google's checkpoints."""
    ignored = ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma"]
    ignored += ["classifier.weight", "qa_outputs.bias", "bert.embeddings.position_ids"]
    renamed = {name: torch.ones(1, 20) for name in ignored}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return renamed


@pytest.mark.parametrize("rename", [dict, old_names])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "old pickle"])
def test_every_kind_of_weight_file_loads_to_the_same_bits(small_folder, kind, dtype, rename):
    """The file's own values; from float64, rounded once."""
    path = small_folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(rename(tensors), path)
    if kind != "safetensors":
        save_as_pickle(small_folder, zipped=kind == "pickle")
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same_weights(BertModel.from_pretrained(small_folder), expected)


# ---------------------------------------------------------------------------- refusals

QUERY = "encoder.layer.1.attention.self.query.weight"
NORM = "embeddings.LayerNorm"


def refused_load(folder, *parts):
    """The one line of the UserError that loading the folder must raise."""
    return refused(lambda: BertModel.from_pretrained(folder), *parts)


@pytest.mark.parametrize("name", [QUERY, f"{NORM}.bias", "pooler.dense.bias"])
def test_missing_weight_is_refused(small_folder, name):
    """By name and file; half a pooler too."""
    edit_tensors(small_folder / "model.safetensors", **{name: None})
    refused_load(small_folder, small_folder / "model.safetensors", name, "missing")


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("encoder.layer.2.output.dense.weight", (16, 24), "not a weight"),
        ("clsx", (2,), "not a weight"),
        ("embeddings.position_ids.more", (2,), "not a weight"),
        ("bert.bert.pooler.dense.weight", (16, 16), "not a weight"),
        (QUERY, (16, 15), "(16, 16)"),
        ("pooler.dense.bias", (1,), "(16,)"),  # would broadcast
        ("bert." + QUERY, (16, 16), "twice"),
        (f"{NORM}.gamma", (16,), "twice"),
        (f"bert.{NORM}.beta", (16,), "twice"),
    ],
)
def test_extra_misshapen_and_duplicate_weights_are_refused(small_folder, name, shape, reason):
    """By the names of tensor and file, and the reason; nothing is broadcast."""
    path = small_folder / "model.safetensors"
    edit_tensors(path, **{name: torch.zeros(shape)})
    current = name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias")
    message = refused_load(small_folder, path, reason)
    assert name in message or (reason == "twice" and current in message)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(small_folder, prefix):
    """Of DataParallel and torch.compile, whose `state_dict` has them."""
    path = small_folder / "model.safetensors"
    tensors, expected = load_file(path), BertModel.from_pretrained(small_folder).state_dict()
    save_file({f"{prefix}bert.{name}": tensor for name, tensor in tensors.items()}, path)
    loaded = BertModel.from_pretrained(small_folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_head_of_somebodys_own_is_left_out_and_named(small_folder, capsys):
    """Beside `bert.`; in a plain model the same name is a mistake. Usual heads need no mention."""
    path = small_folder / "model.safetensors"
    tensors, expected = load_file(path), BertModel.from_pretrained(small_folder).state_dict()
    heads = {name: torch.zeros(2) for name in ("fc.weight", "crf.transitions", "cls.bias")}
    save_file({**{f"bert.{name}": tensor for name, tensor in tensors.items()}, **heads}, path)
    loaded = BertModel.from_pretrained(small_folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert capsys.readouterr().err == f"note: {path}: not loaded, as of a head: crf, fc\n"
    save_file({**tensors, **heads}, path)
    refused_load(small_folder, path, "not a weight")


def test_missing_pooler_is_drawn_at_random_with_a_note(small_folder, capsys):
    path = small_folder / "model.safetensors"
    BertModel.from_pretrained(small_folder)
    assert "note" not in "".join(capsys.readouterr())
    edit_tensors(path, **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    model = BertModel.from_pretrained(small_folder)
    out, err = capsys.readouterr()
    assert out == "" and "pooler" in err and str(path) in err
    drawn = {f"pooler.dense.{n}": p.detach() for n, p in model.pooler_dense.named_parameters()}
    assert drawn["pooler.dense.weight"].std().item() == pytest.approx(0.02, rel=0.3)
    assert_same_weights(model, {**load_file(path), **drawn})


UNSUPPORTED = {"model_type": ["roberta", 3], "position_embedding_type": ["relative_key"]}
UNSUPPORTED |= {"is_decoder": [True], "add_cross_attention": [True], "pruned_heads": [{"0": [1]}]}
UNSUPPORTED |= {"hidden_act": ["silu", 3], "num_attention_heads": [3, 0], "vocab_size": [0]}
UNSUPPORTED |= {"hidden_size": ["16", 16.0, -16, True], "num_hidden_layers": [0, [2]]}
UNSUPPORTED |= {"layer_norm_eps": ["1e-12", -1e-12, math.nan], "pad_token_id": [-1, 31]}
UNSUPPORTED |= {"hidden_dropout_prob": [1.0, -0.1], "attention_probs_dropout_prob": ["0.1"]}


@pytest.mark.parametrize(("key", "values"), UNSUPPORTED.items())
def test_unsupported_configuration_is_refused_by_name(small_folder, key, values):
    path = small_folder / "config.json"
    for value in values:
        edit_json(path, **{key: value})
        refused_load(small_folder, path, key)


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
