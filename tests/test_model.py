"""Pooling, decoder heads, and the model that shares one BERT among several tasks."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import BAD, GOOD, NOUNS
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import edit_json, refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import multitask_classifier
from bert import BertModel
from engine.checkpoint import read_json
from model import HEADS, POOLINGS, MultitaskBERT, SentenceEncoder, pool
from optimizer import AdamW
from tasks import TASKS
from tokenizer import BertTokenizer

PAPER = ("sst", "para", "sts")
TEXTS = ["the film is great", "", "a", "the cat " * 100, "a dog sees a house"] * 3


def build(tiny, tasks=PAPER, **options) -> MultitaskBERT:
    """A tiny model with random heads, in evaluation mode."""
    torch.manual_seed(1)
    bert, tokenizer = BertModel.from_pretrained(tiny), BertTokenizer.from_pretrained(tiny)
    tasks = [TASKS[name] for name in tasks]
    return MultitaskBERT(bert, tasks, tokenizer=tokenizer, **options).eval()


def tokenize(model, *texts) -> dict[str, torch.Tensor]:
    return model.tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")


def ids_and_mask(model, texts) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenize(model, texts)
    return batch["input_ids"], batch["attention_mask"]


# ---------------------------------------------------------------------------- pooling and heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_against_a_plain_loop(dtype):
    """Padding counts for nothing, and a row of padding alone stays finite."""
    torch.manual_seed(0)
    hidden, lengths = torch.randn(4, 6, 3).to(dtype), [6, 1, 4, 0]
    mask = torch.tensor([[int(i < n) for i in range(6)] for n in lengths])
    output = {"last_hidden_state": hidden, "pooler_output": torch.randn(4, 3)}
    assert torch.equal(pool(output, mask, "pooler"), output["pooler_output"])
    assert torch.equal(pool(output, mask, "cls"), hidden[:, 0])
    for row, n, mean in zip(hidden, lengths, pool(output, mask, "mean"), strict=True):
        expected = [sum(row[i, d].item() for i in range(n)) / max(n, 1) for d in range(3)]
        assert mean.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("name", ["linear", "concat", "dot", "cosine"])
def test_heads_against_their_formulas(name, task):
    u, v = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    head = HEADS[name](8, TASKS[task], 0.5).eval()
    weight, bias = (p.detach().numpy() for p in head.dense.parameters())
    cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    concat = np.concatenate([u, v], axis=1)
    features = {"linear": u, "concat": concat, "dot": u * v, "cosine": cosine[:, None]}[name]
    inputs = [torch.from_numpy(x) for x in (u, v)][: head.num_embeddings]
    logits = head(*inputs).detach().numpy()
    assert logits.shape == (6, TASKS[task].labels.num_logits)
    np.testing.assert_allclose(logits, features @ weight.T + bias, atol=1e-5)


def test_each_task_may_encode_its_pairs_in_its_own_way(tiny, tmp_path):
    """The logits are those of models that encode all pairs in that way, with the same weights."""
    encodings = {"para": "joint", "sts": "separate"}
    model = build(tiny, pair_encoding=encodings)
    model.save_pretrained(tmp_path / "model")
    again = MultitaskBERT.from_pretrained(tmp_path / "model")
    assert again.pair_encoding == encodings and again.decoders == model.decoders
    assert again.decoders["para"] == "linear" != again.decoders["sts"]
    for task, encoding in encodings.items():
        alone = build(tiny, [task], pair_encoding=encoding)
        alone.bert.load_state_dict(model.bert.state_dict())
        alone.heads[task].load_state_dict(model.heads[task].state_dict())
        side = model.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        inputs = (side.input_ids, side.attention_mask) * 2
        predict = "predict_paraphrase" if task == "para" else "predict_similarity"
        assert torch.equal(*(getattr(m.eval(), predict)(*inputs) for m in (again, alone)))


@pytest.mark.parametrize(("task", "low", "high"), [("sts", 0, 5), ("para", -5, 5)])
def test_heads_start_in_the_logit_range_of_the_task(task, low, high):
    """The cosine head at its ends, the others around its middle."""
    u, v = torch.tensor([[[1.0, 0, 0], [1, 0, 0]], [[0, 1, 0], [2, 0, 0]]])
    head = HEADS["cosine"](3, TASKS[task], 0.1)
    assert head(u, v).flatten().tolist() == pytest.approx([low, high])
    assert HEADS["dot"](3, TASKS[task], 0.1).dense.bias.item() == (low + high) / 2


def test_dropout_acts_before_the_dense_layer_and_not_on_the_cosine():
    torch.manual_seed(0)
    u, v = torch.randn(2, 200, 8)
    for name, head_class in HEADS.items():
        head = head_class(8, TASKS["sts"], 0.5).train()
        inputs = (u, v)[: head.num_embeddings]
        assert torch.equal(head(*inputs), head(*inputs)) == (name == "cosine")
    head, seen = HEADS["linear"](8, TASKS["sst"], 0.5).train(), []
    head.dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head(u)
    assert torch.equal(seen[0][seen[0] != 0], 2 * u[seen[0] != 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decoders": {"sts": "linear"}}, "'linear' of sts"),
        ({"decoders": {"para": "dot"}, "pair_encoding": "joint"}, "'dot' of para"),
        ({"decoders": {"para": "bilinear"}}, "'bilinear' of para: expected linear, concat, dot"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"pair_encoding": "both"}, "'both'"),
    ],
)
def test_decoders_and_poolings_that_do_not_fit_are_refused(tiny, options, expected):
    refused(lambda: build(tiny, **options), expected)


def test_a_joint_model_decides_with_linear_heads(tiny):
    assert build(tiny, pair_encoding="joint").decoders == dict.fromkeys(PAPER, "linear")
    assert build(tiny).decoders == {"sst": "linear", "para": "dot", "sts": "dot"}


def test_the_courses_methods_agree_with_forward(tiny):
    """Also where the two sides of a pair are padded to different lengths."""
    model = build(tiny)
    first, second = ["the film", "a dog sees the plot"], ["the cat moves a car house", "a"]
    a, b, both = (ids_and_mask(model, texts) for texts in (first, second, first + second))
    with torch.no_grad():
        assert torch.equal(model.predict_sentiment(*a), model("sst", *a))
        assert model.predict_sentiment(*a).shape == (2, 5)
        pairs = {"para": model.predict_paraphrase, "sts": model.predict_similarity}
        for name, predict in pairs.items():
            expected = model.heads[name](model.embed(*a), model.embed(*b))
            assert expected.shape == (2, 1)
            for logits in (predict(*a, *b), model(name, *both)):
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert multitask_classifier.MultitaskBERT is MultitaskBERT


@pytest.fixture(scope="module")
def joint(tiny):
    return build(tiny, ["sts"], pair_encoding="joint")


words = st.integers(0, 46).map(lambda n: " ".join((NOUNS + GOOD + BAD)[i % 18] for i in range(n)))


@settings(max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_a_joint_model_joins_pairs_as_the_tokenizer_does(joint, rows):
    """Ids, mask and segments; truncated to the model's limit of 48 tokens."""
    first, second = map(list, zip(*rows, strict=True))
    seen = []
    hook = joint.bert.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        joint.predict_similarity(*ids_and_mask(joint, first), *ids_and_mask(joint, second))
    hook.remove()
    expected = tokenize(joint, first, second)
    keys = ("input_ids", "attention_mask", "token_type_ids")
    assert all(torch.equal(x, expected[key]) for x, key in zip(seen, keys, strict=True))


# ---------------------------------------------------------------------------- encode


@pytest.mark.parametrize("pooling", POOLINGS)
def test_encode_gives_each_text_its_embedding_in_order(tiny, pooling):
    bert, tokenizer = BertModel.from_pretrained(tiny), BertTokenizer.from_pretrained(tiny)
    model = SentenceEncoder(bert, tokenizer, pooling).train()
    vectors = model.encode(TEXTS, batch_size=4)  # without dropout
    assert model.training
    model.eval()
    assert (vectors.shape, vectors.dtype) == ((15, 32), np.float32)
    oracle = transformers.BertModel.from_pretrained(tiny).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            output = oracle(**tokenize(model, [text]))
            mean = model.embed(*ids_and_mask(model, [text]), pooling="mean")[0]
        hidden = output.last_hidden_state[0]
        expected = {"pooler": output.pooler_output[0], "cls": hidden[0], "mean": hidden.mean(0)}
        np.testing.assert_allclose(vector, expected[pooling].numpy(), atol=1e-5)
        np.testing.assert_allclose(mean, expected["mean"].numpy(), atol=1e-5)
    assert model.encode([]).shape == (0, 32)
    with pytest.raises(TypeError, match="list of str"):
        model.encode("one sentence")


def test_threads_may_share_a_model(tiny):
    """As a server has them; also in bf16, whose autocast is a thread's own."""
    model = build(tiny).eval()
    for model.dtype in (torch.float32, torch.bfloat16):
        batches = [TEXTS[i:] for i in range(8)]
        expected = [model.encode(batch) for batch in batches]
        with ThreadPoolExecutor(4) as threads:
            for _ in range(3):
                assert all(map(np.array_equal, threads.map(model.encode, batches), expected))


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluating_restores_the_mode(tiny, frozen):
    """Also after an error. A frozen BERT never has dropout."""
    model = build(tiny)
    model.freeze(frozen)
    for mode in (True, False):
        model.train(mode)
        before = [module.training for module in model.modules()]
        assert model.bert.training == (mode and not frozen)
        with pytest.raises(KeyError), model.evaluating():
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyError
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
    assert all(p.requires_grad != frozen for p in model.bert.parameters())
    assert all(p.requires_grad for p in model.heads.parameters())


def test_bf16_keeps_weights_embeddings_and_logits_in_fp32(tiny):
    model, seen = build(tiny), []
    batch = tokenize(model, ["the film is great", "a dog"])
    exact = model("sst", **batch)
    model.dtype = torch.bfloat16
    layer = model.bert.bert_layers[0].interm_dense
    layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    logits = model("sst", **batch)
    assert seen == [torch.bfloat16]
    assert model.embed(**batch).dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(logits, exact)
    logits.sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "limit", "length"),
    [(torch.float32, 48, 9), (torch.bfloat16, 48, 12), (torch.bfloat16, 10, 10)],
)
def test_batches_in_bf16_have_few_lengths_within_the_limit(tiny, dtype, limit, length):
    model, seen = build(tiny, ["sts"], pair_encoding="joint"), []
    batch = tokenize(model, ["the film is"], ["a cat moves"])  # 9 tokens
    expected = model("sts", **batch)
    model.dtype = dtype
    model.bert.config = replace(model.bert.config, max_position_embeddings=limit)
    model.bert.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    torch.testing.assert_close(model("sts", **batch), expected, atol=0.05, rtol=0.05)
    assert [tensor.shape for tensor in seen] == [(1, length)] * 3


class WeightCasts(TorchDispatchMode):
    """Counts the casts to bfloat16 of each of these tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.count = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            for pointer in {args[0].data_ptr()} & self.count.keys():
                self.count[pointer] += 1
        return result


def test_weights_are_cast_to_bf16_once_in_an_evaluation_and_anew_in_the_next(tiny):
    model = build(tiny)
    model.dtype = torch.bfloat16
    casts = WeightCasts(m.weight for m in model.bert.modules() if isinstance(m, nn.Linear))
    with casts, model.evaluating():
        before = [model.encode(TEXTS, batch_size=8) for _ in range(3)]
    assert list(casts.count.values()) == [1] * 13
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    AdamW(model.parameters(), lr=0.1).step()
    changed = model.encode(TEXTS)
    assert not np.allclose(changed, before[0], atol=0.01)
    model.dtype = torch.float32
    np.testing.assert_allclose(changed, model.encode(TEXTS), atol=0.05)


# ---------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("pair_encoding", ["separate", "joint"])
def test_saved_and_loaded_is_the_same_to_the_bit(tiny, tmp_path, pair_encoding):
    """From the run folder and from its best/."""
    decoders = {"para": "concat", "sts": "cosine"} if pair_encoding == "separate" else {}
    options = {"pooling": "mean", "decoders": decoders, "pair_encoding": pair_encoding}
    model, best = build(tiny, **options), tmp_path / "run" / "best"
    model.save_pretrained(best)
    for again in map(MultitaskBERT.from_pretrained, (tmp_path / "run", best)):
        settings = [(m.pooling, m.decoders, m.pair_encoding) for m in (again, model)]
        assert settings[0] == settings[1] and not again.training
        weights = again.state_dict()
        assert list(weights) == list(model.state_dict())
        assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
        assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_saving_leaves_a_folder_of_something_else_alone(tiny, tmp_path):
    model, mine, thesis = build(tiny, ["sst"]), tmp_path / "mine", tmp_path / "thesis.txt"
    mine.mkdir()
    model.save_pretrained(mine)  # empty: it may be used
    model.save_pretrained(mine)  # a model is replaced
    thesis.write_text("precious", encoding="utf-8")
    refused(lambda: model.save_pretrained(tmp_path), "contains something other than a model")
    assert set(tmp_path.iterdir()) == {mine, thesis}


def test_heads_that_do_not_fit_are_refused(tiny, tmp_path):
    build(tiny).save_pretrained(tmp_path / "best")
    path = tmp_path / "best" / "heads.json"
    stored = read_json(path)
    for change, expected in [
        ({"decoders": {**stored["decoders"], "sts": "concat"}}, "heads.safetensors: "),
        ({"decoders": {"sst": "linear"}}, "heads.safetensors: "),
        ({"decoders": {"nli": "dot"}}, "nli: no such task"),
        ({"decoders": ["sst"]}, "heads.json: damaged"),
        ({"pooling": []}, "pooling "),
    ]:
        edit_json(path, **{**stored, **change})
        refused(lambda: MultitaskBERT.from_pretrained(tmp_path), expected)
    refused(lambda: MultitaskBERT.from_pretrained(tiny), "heads.json: no such file")
    refused(lambda: MultitaskBERT.from_pretrained(tmp_path / "no"), "no such run folder")
