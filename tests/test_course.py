"""Code written for the course's own files (CS224N, default final project) runs on ours, unchanged.

Everything below is written from the course's interface alone, as its students do.
"""

import copy
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


def collate(tokenizer, rows):
    """A batch of (sentence, label) rows, as a student's data set makes it."""
    sentences = [sentence for sentence, _ in rows]
    encoding = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True)
    return {
        "token_ids": torch.LongTensor(encoding["input_ids"]),
        "attention_mask": torch.LongTensor(encoding["attention_mask"]),
        "labels": torch.LongTensor([label for _, label in rows]),
    }


@pytest.mark.parametrize("option", ["pretrain", "finetune"])
def test_classifier_of_the_course_trains(tiny, option):
    """Its loss falls, it learns its rows by heart, and a frozen BERT stays as it was."""
    torch.manual_seed(0)
    words = [*zip(GOOD, GOOD[::-1], strict=True), *zip(BAD, BAD[::-1], strict=True)]
    rows = [(f"{one} {other}", int(one in GOOD)) for one, other in words] * 4
    tokenizer = BertTokenizer.from_pretrained(str(tiny))
    loader = torch.utils.data.DataLoader(
        rows, shuffle=True, batch_size=8, collate_fn=lambda batch: collate(tokenizer, batch)
    )
    model = BertSentimentClassifier(str(tiny), option, num_labels=2)
    before = {name: p.clone() for name, p in model.bert.named_parameters()}
    everything = collate(tokenizer, rows)

    @torch.no_grad()
    def evaluate():
        model.eval()
        logits = model(everything["token_ids"], everything["attention_mask"])
        accuracy = (logits.argmax(dim=-1) == everything["labels"]).float().mean().item()
        return F.cross_entropy(logits, everything["labels"]).item(), accuracy

    first_loss, _ = evaluate()
    optimizer = AdamW(model.parameters(), lr=1e-2 if option == "pretrain" else 5e-3)
    for _ in range(40 if option == "pretrain" else 6):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            logits = model(batch["token_ids"], batch["attention_mask"])
            loss = F.cross_entropy(logits, batch["labels"].view(-1), reduction="sum") / 8
            loss.backward()
            optimizer.step()
    last_loss, accuracy = evaluate()
    assert last_loss < 0.85 * first_loss
    assert accuracy > 0.8
    moved = [name for name, p in model.bert.named_parameters() if not torch.equal(p, before[name])]
    assert moved if option == "finetune" else not moved


def test_training_goes_on_from_a_saved_state(tiny, tmp_path):
    """`torch.save` of the model's and the optimizer's `state_dict`, and back."""
    tokenizer = BertTokenizer.from_pretrained(str(tiny))
    batch = collate(tokenizer, [("the film is great", 1), ("the plot is dull", 0)])

    def start():
        model = BertSentimentClassifier(str(tiny), "finetune", num_labels=2).eval()
        return model, AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        logits = model(batch["token_ids"], batch["attention_mask"])
        F.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "save.pt")
    other, other_optimizer = start()
    saved = torch.load(tmp_path / "save.pt")
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optim"])
    step(model, optimizer)
    step(other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ---------------------------------------------------------------------------- the course's model


class CourseBert(nn.Module):
    """The course's BertModel by its names, attention a head at a time; segment ids are all 0."""

    def __init__(self, config):
        super().__init__()
        width, inner, self.heads = config.hidden_size, config.intermediate_size, 3
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=0)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embed_layer_norm = nn.LayerNorm(width, eps=1e-12)
        positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
        self.register_buffer("position_ids", positions)
        self.bert_layers = nn.ModuleList(nn.Module() for _ in range(config.num_hidden_layers))
        for layer in self.bert_layers:
            layer.self_attention = nn.Module()
            for name in ("query", "key", "value"):
                setattr(layer.self_attention, name, nn.Linear(width, width))
            layer.attention_dense = nn.Linear(width, width)
            layer.attention_layer_norm = nn.LayerNorm(width, eps=1e-12)
            layer.interm_dense = nn.Linear(width, inner)
            layer.out_dense = nn.Linear(inner, width)
            layer.out_layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.pooler_dense = nn.Linear(width, width)

    def attend(self, maps, x, attention_mask):
        qkv = (m(x).chunk(self.heads, dim=-1) for m in (maps.query, maps.key, maps.value))
        contexts = []
        for query, key, value in zip(*qkv, strict=True):
            scores = torch.einsum("bik,bjk->bij", query, key) / math.sqrt(query.size(-1))
            scores = scores.masked_fill(attention_mask[:, None, :] == 0, -torch.inf)
            contexts.append(torch.einsum("bij,bjk->bik", scores.softmax(-1), value))
        return torch.cat(contexts, dim=-1)

    def forward(self, input_ids, attention_mask):
        x = self.word_embedding(input_ids) + self.tk_type_embedding(torch.zeros_like(input_ids))
        x = self.embed_layer_norm(x + self.pos_embedding(self.position_ids[:, : x.size(1)]))
        for layer in self.bert_layers:
            attended = layer.attention_dense(self.attend(layer.self_attention, x, attention_mask))
            x = layer.attention_layer_norm(x + attended)
            fed_forward = layer.out_dense(F.gelu(layer.interm_dense(x)))
            x = layer.out_layer_norm(x + fed_forward)
        pooled = torch.tanh(self.pooler_dense(x[:, 0]))
        return {"last_hidden_state": x, "pooler_output": pooled}


IDS = torch.tensor([[2, 40, 41, 3], [2, 42, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_saved_state_of_the_courses_model_loads_and_computes_the_same(tmp_path):
    """Strictly, both ways: `position_ids` is in the file, and nothing else is missing or extra."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = BertConfig(**sizes, intermediate_size=40, max_position_embeddings=9)
    theirs = CourseBert(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.save({"model": theirs.state_dict(), "args": {"lr": 1e-5}}, tmp_path / "model.pt")
    ours = BertModel(config).eval()
    ours.load_state_dict(torch.load(tmp_path / "model.pt")["model"])
    theirs.load_state_dict(ours.state_dict())
    expected = theirs(IDS, MASK)
    for name, value in ours(IDS, MASK).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


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
    model = BertModel.from_pretrained(tiny)
    expected = model(IDS, MASK)["pooler_output"]
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, LoRALinear(child))
    wrapped = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == 6 * len(model.bert_layers) + 1
    found = model(IDS, MASK)["pooler_output"]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.{part}" for name in wrapped for part in "ab"}
    assert model.bert_layers[1].self_attention.query.b.grad.abs().max() > 0


def test_layers_are_found_by_name(tiny):
    """For freezing, and for learning rates by layer: 16 parameters in `bert.bert_layers.N`."""
    model = BertSentimentClassifier(str(tiny), "finetune", num_labels=2)
    rates, counts = {}, {}
    for name, param in model.named_parameters():
        if "bert_layers" in name:
            layer = int(name.split(".")[2])
            rates[name] = 1e-3 * 0.5 ** (1 - layer)
            counts[layer] = counts.get(layer, 0) + 1
        elif "embed" in name:
            param.requires_grad = False
    assert counts == {0: 16, 1: 16}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    embeddings = {"word_embedding", "pos_embedding", "tk_type_embedding", "embed_layer_norm"}
    assert {name.split(".")[1] for name in frozen} == embeddings
    named = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamW([{"params": [named[name]], "lr": rate} for name, rate in rates.items()])
    model.eval()(IDS, MASK).sum().backward()
    optimizer.step()
    for name, rate in rates.items():
        change = (named[name].detach() - before[name]).abs().max().item()
        assert change == pytest.approx(rate, rel=0.05) or name.endswith("key.bias"), name


def test_a_layer_may_be_replaced_and_called_alone(tiny):
    """An adapter around a layer; a layer called with the additive mask of the handout."""
    model = BertModel.from_pretrained(tiny)
    hidden_states = model.embed(IDS)
    additive = (1.0 - MASK[:, None, None, :]) * -10000.0
    for layer in model.bert_layers:
        attended = layer.self_attention(hidden_states, additive)
        assert attended.shape == hidden_states.shape
        hidden_states = layer(hidden_states, additive)
    torch.testing.assert_close(hidden_states, model.encode(model.embed(IDS), MASK))

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, attention_mask):
            return 2 * self.layer(hidden_states, attention_mask)

    model.bert_layers[-1] = Adapter(model.bert_layers[-1])
    torch.testing.assert_close(model(IDS, MASK)["last_hidden_state"], 2 * hidden_states)


@pytest.mark.parametrize("pair_encoding", ["separate", "joint"])
def test_predict_functions_of_the_multitask_model(tiny, pair_encoding):
    """Ids and masks of a batch, padded to different lengths, in; a row of logits each, out."""
    torch.manual_seed(0)
    tasks = [TASKS[name] for name in ("sst", "para", "sts")]
    bert = BertModel.from_pretrained(tiny)
    model = MultitaskBERT(bert, tasks, pair_encoding=pair_encoding).eval()
    ids, mask = F.pad(IDS, (0, 2)), F.pad(MASK, (0, 2))
    assert model.predict_sentiment(IDS, MASK).shape == (2, 5)
    for predict in (model.predict_paraphrase, model.predict_similarity):
        logits = predict(IDS, MASK, ids.flip(0), mask.flip(0))
        assert logits.shape == (2, 1)
        assert logits.requires_grad
        shorter = predict(IDS, MASK, IDS.flip(0), MASK.flip(0))
        torch.testing.assert_close(logits, shorter, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- optimizer_test.py


class WrittenAdamW:
    """The handout's AdamW in float32, for one parameter; `decay` is its last line."""

    def __init__(self, params, decay):
        (self.param,) = params
        self.m, self.v, self.t = torch.zeros_like(self.param), torch.zeros_like(self.param), 0
        self.decay = decay

    @torch.no_grad()
    def step(self):
        grad = self.param.grad
        self.t += 1
        self.m = 0.9 * self.m + (1 - 0.9) * grad
        self.v = 0.999 * self.v + (1 - 0.999) * grad * grad
        step_size = 1e-3 * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        self.param.copy_(self.decay(self.param - step_size * self.m / (self.v.sqrt() + 1e-6)))


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
    rate = 1e-3 * 1e-4
    reference = trained_weights(WrittenAdamW, decay=lambda p: p - rate * p)
    options = {"lr": 1e-3, "weight_decay": 1e-4, "correct_bias": True}
    assert torch.allclose(reference, trained_weights(AdamW, **options))
    fused = trained_weights(AdamW, **options, fused=True)
    assert torch.allclose(reference, fused, rtol=1e-4, atol=1e-6)
    # The check is strict enough to tell a decay of another rounding, and none, apart.
    for decay in (lambda p: p * (1 - rate), lambda p: p):
        assert not torch.allclose(reference, trained_weights(WrittenAdamW, decay=decay))
