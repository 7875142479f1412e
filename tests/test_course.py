"""Code written for the course's own files (CS224N, default final project) runs on ours, unchanged.

Everything below is written from the course's interface alone, as its students do.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BAD, GOOD
from torch import nn

from bert import BertConfig, BertModel
from multitask_classifier import MultitaskBERT
from optimizer import AdamW
from tasks import TASKS
from tokenizer import BertTokenizer

IDS = torch.tensor([[2, 40, 41, 3], [2, 42, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


class BertSentimentClassifier(nn.Module):
    """A student's classifier."""

    def __init__(self, model: str, option: str, num_labels: int):
        super().__init__()
        self.bert = BertModel.from_pretrained(model)
        for param in self.bert.parameters():
            param.requires_grad = option == "finetune"
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.bert.config.hidden_size, num_labels)

    def forward(self, input_ids, attention_mask):
        pooler_output = self.bert(input_ids, attention_mask)["pooler_output"]
        return self.classifier(self.dropout(pooler_output))


@pytest.mark.parametrize("option", ["pretrain", "finetune"])
def test_classifier_of_the_course_trains(tiny, option):
    """Its loss falls, it learns its rows by heart, and a frozen BERT stays as it was."""
    torch.manual_seed(0)
    words = [*zip(GOOD, GOOD[::-1], strict=True), *zip(BAD, BAD[::-1], strict=True)]
    rows = [(f"{one} {other}", int(one in GOOD)) for one, other in words] * 4
    tokenizer = BertTokenizer.from_pretrained(str(tiny))

    def collate(rows):
        sentences = [sentence for sentence, _ in rows]
        encoding = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True)
        token_ids = torch.LongTensor(encoding["input_ids"])
        attention_mask = torch.LongTensor(encoding["attention_mask"])
        return token_ids, attention_mask, torch.LongTensor([label for _, label in rows])

    @torch.no_grad()
    def evaluate():
        token_ids, attention_mask, labels = collate(rows)
        logits = model.eval()(token_ids, attention_mask)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean().item()
        return F.cross_entropy(logits, labels).item(), accuracy

    loader = torch.utils.data.DataLoader(rows, shuffle=True, batch_size=8, collate_fn=collate)
    model = BertSentimentClassifier(str(tiny), option, num_labels=2)
    before = {name: p.clone() for name, p in model.bert.named_parameters()}
    first_loss, _ = evaluate()
    optimizer = AdamW(model.parameters(), lr=1e-2 if option == "pretrain" else 5e-3)
    for _ in range(40 if option == "pretrain" else 6):
        model.train()
        for token_ids, attention_mask, labels in loader:
            optimizer.zero_grad()
            logits = model(token_ids, attention_mask)
            loss = F.cross_entropy(logits, labels.view(-1), reduction="sum") / 8
            loss.backward()
            optimizer.step()
    last_loss, accuracy = evaluate()
    assert last_loss < 0.85 * first_loss
    assert accuracy > 0.8
    moved = [name for name, p in model.bert.named_parameters() if not torch.equal(p, before[name])]
    assert moved if option == "finetune" else not moved


def course_bert(state, input_ids, attention_mask, heads=2):
    """The course's model as a function of its `state_dict`, from which each name is taken once."""

    def linear(name, x):
        return F.linear(x, state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))

    def layer_norm(name, x):
        weight, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-12)

    positions = state.pop("position_ids")[:, : input_ids.size(1)]
    x = state.pop("word_embedding.weight")[input_ids] + state.pop("tk_type_embedding.weight")[0]
    x = layer_norm("embed_layer_norm", x + state.pop("pos_embedding.weight")[positions])
    for layer in ("bert_layers.0", "bert_layers.1"):
        query, key, value = (
            linear(f"{layer}.self_attention.{name}", x).unflatten(-1, (heads, -1))
            for name in ("query", "key", "value")
        )
        scores = torch.einsum("bihk,bjhk->bhij", query, key) / math.sqrt(query.size(-1))
        weights = scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf).softmax(-1)
        context = torch.einsum("bhij,bjhk->bihk", weights, value).flatten(2)
        attended = linear(f"{layer}.attention_dense", context)
        x = layer_norm(f"{layer}.attention_layer_norm", x + attended)
        fed_forward = linear(f"{layer}.out_dense", F.gelu(linear(f"{layer}.interm_dense", x)))
        x = layer_norm(f"{layer}.out_layer_norm", x + fed_forward)
    return {"last_hidden_state": x, "pooler_output": linear("pooler_dense", x[:, 0]).tanh()}


def test_saved_state_has_the_names_of_the_courses_model_and_computes_the_same(tiny, tmp_path):
    """`position_ids` too, and nothing else: states load strictly both ways."""
    torch.manual_seed(0)
    ours = BertModel.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.save({"model": ours.state_dict(), "args": {"lr": 1e-5}}, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")["model"]
    again = BertModel(ours.config).eval()
    again.load_state_dict(state)
    torch.testing.assert_close(again(IDS, MASK), course_bert(state, IDS, MASK), rtol=0, atol=1e-5)
    assert not state


# ---------------------------------------------------------------------------- names and types


class LoRALinear(nn.Module):
    """A frozen layer with a trainable update of rank 2, which starts at 0."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def test_lora_replaces_every_linear_layer_by_its_exact_type(tiny):
    """The outputs stay, and only the wrappers get gradients."""
    model = BertModel.from_pretrained(tiny).requires_grad_(False)
    expected = model(IDS, MASK)["pooler_output"]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, LoRALinear(child))
    wrapped = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == 6 * len(model.bert_layers) + 1
    outputs = model(IDS, MASK)["pooler_output"]
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.{part}" for name in wrapped for part in "ab"}
    assert model.bert_layers[1].self_attention.query.b.grad.abs().max() > 0


def test_a_trained_lora_inside_the_multitask_model_evaluates_in_bf16(tiny):
    model = MultitaskBERT(BertModel.from_pretrained(tiny), [TASKS["sst"]]).eval()
    for layer in model.bert.bert_layers:
        layer.self_attention.value = LoRALinear(layer.self_attention.value)
        nn.init.normal_(layer.self_attention.value.b)
    expected = model.predict_sentiment(IDS, MASK)
    model.dtype = torch.bfloat16
    with model.evaluating():
        torch.testing.assert_close(model.predict_sentiment(IDS, MASK), expected, rtol=0, atol=0.2)


def test_from_pretrained_takes_the_starters_keywords_or_refuses_them_by_name(tiny, tmp_path):
    config = BertConfig.from_file(tiny / "config.json")
    config.hidden_dropout_prob = 0.5
    model = BertModel.from_pretrained(tiny, config=config, cache_dir=tmp_path, revision="main")
    assert model.embed_dropout.p == 0.5 and not list(tmp_path.iterdir())  # a folder needs no cache
    assert BertModel.from_pretrained(tiny, config=tiny / "config.json").embed_dropout.p != 0.5
    for keyword in ("state_dict", "proxies", "output_loading_info"):
        with pytest.raises(TypeError, match=keyword):
            BertModel.from_pretrained(tiny, **{keyword: None})


def test_a_layer_may_be_called_alone_and_hooked(tiny):
    """With the additive mask of the handout; a hook, as adapters use them, changes its output."""
    model = BertModel.from_pretrained(tiny)
    x = model.embed(input_ids=IDS)
    additive = (1.0 - MASK[:, None, None, :]) * -10000.0
    for layer in model.bert_layers:
        assert layer.self_attention(hidden_states=x, attention_mask=additive).shape == x.shape
        x = layer(hidden_states=x, attention_mask=additive)
    encoded = model.encode(hidden_states=model.embed(IDS), attention_mask=MASK)
    torch.testing.assert_close(x, encoded)
    layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    output = model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(output["last_hidden_state"], 2 * x)


# ---------------------------------------------------------------------------- optimizer_test.py


class WrittenAdamW:
    """The handout's AdamW in float32, for one parameter, with the options of the check."""

    def __init__(self, params):
        (self.param,) = params
        self.m, self.v, self.t = 0.0, 0.0, 0

    @torch.no_grad()
    def step(self):
        grad = self.param.grad
        self.t += 1
        self.m = 0.9 * self.m + (1 - 0.9) * grad
        self.v = 0.999 * self.v + (1 - 0.999) * grad * grad
        step_size = 1e-3 * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        updated = self.param - step_size * self.m / (self.v.sqrt() + 1e-6)
        self.param.copy_(updated - 1e-3 * 1e-4 * updated)


def trained_weights(optimizer, **options):
    """The course's check of an optimizer: a seeded 3 -> 2 linear model after 1,000 steps."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    opt = optimizer(model.parameters(), **options)
    for _ in range(1000):
        model.zero_grad()
        x = torch.FloatTensor(rng.uniform(size=[model.in_features]))
        y = torch.Tensor([x[0] + x[1], -x[2]])
        ((y - model(x)) ** 2).sum().backward()
        opt.step()
    return model.weight.detach()


def test_optimizer_passes_the_courses_strict_check():
    """`torch.allclose` as it is: update, then decay, each rounded; the fused one at rtol 1e-4."""
    reference = trained_weights(WrittenAdamW)
    options = {"lr": 1e-3, "weight_decay": 1e-4, "correct_bias": True}
    assert torch.allclose(reference, trained_weights(AdamW, **options))
    fused = trained_weights(AdamW, **options, fused=True)
    assert torch.allclose(reference, fused, rtol=1e-4, atol=1e-6)
