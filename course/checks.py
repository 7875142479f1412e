"""The tests of grade.py: the checks, the message for each mistake, and the points.

The references come from make_references.py. Stored values or PyTorch's own modules replace the
results of other exercises, so that a mistake costs points only once.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Mistake(Exception):
    """A sentence about what is wrong with the code under test."""


class References:
    """The tensors of an .npz file as attributes."""

    def __init__(self, name: str):
        path = Path(__file__).resolve().parent / "references" / f"{name}.npz"
        with np.load(path) as arrays:
            self.tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def __getattr__(self, name: str) -> Tensor:
        return self.tensors[name]

    def fill(self, module: nn.Module, rename: Callable[[str], str] = str) -> Any:
        """The module in evaluation mode, with the stored weights that exist."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if rename(name) in self.tensors:
                    parameter.copy_(self.tensors[rename(name)])
        return module.eval()

    def compare(self, what: str, result: Any, key: str = "expected", **mistakes: str) -> None:
        """Mistake unless `result` is the tensor `key`.

        mistakes: the name of a wrong result -> its message.
        """
        expected = self.tensors[key]
        check(isinstance(result, Tensor), f"{what}: a {type(result).__name__}, not a tensor")
        shapes = tuple(result.shape), tuple(expected.shape)
        check(shapes[0] == shapes[1], f"{what}: the shape is {shapes[0]}, expected {shapes[1]}")
        if not equal(result, expected):
            for name, sentence in mistakes.items():
                check(not equal(result, self.tensors[name]), sentence)
            difference = (result - expected).abs().max().item()
            raise Mistake(f"{what}: differs from the reference by up to {difference:.2g}")


def check(condition: bool, sentence: str) -> None:
    """Mistake with this sentence unless the condition holds."""
    if not condition:
        raise Mistake(sentence)


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32, relative to the largest number."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * (1 + b.abs().max()))


def tripled(x: Tensor) -> Tensor:
    """Stands in for dropout, to see where it is applied."""
    return 3 * x


# ---------------------------------------------------------------------------- bert.py


def attention() -> None:
    """Without padding: the scale of the scores, and dropout on the weights."""
    bert, r = import_module("bert"), References("attention")
    mask = torch.zeros(2, 1, 1, r.key.size(2))
    scale = "attention does not divide the scores by sqrt(head size)"
    axis = "attention takes the softmax over the queries; it is over the keys, the last dimension"
    result = bert.eager_attention(r.query, r.key, r.value, mask, nn.Identity())
    r.compare("attention", result, wrong_scale=scale, wrong_axis=axis)
    result = bert.eager_attention(r.query, r.key, r.value, mask, tripled)
    check(not equal(result, r.expected), "attention does not apply dropout to the weights")


def attention_mask() -> None:
    """Padding changes nothing: a row gives the same with two masked tokens as without them."""
    bert, r = import_module("bert"), References("attention")
    row, tokens = slice(1, 2), slice(0, 3)  # the second row; two of its tokens become padding
    mask = torch.zeros(1, 1, 1, r.key.size(2))
    mask[..., 3:] = -1e9
    q, k, v = (x[row] for x in (r.query, r.key, r.value))
    padded = bert.eager_attention(q, k, v, mask, nn.Identity())[:, :, tokens]
    short = [x[:, :, tokens] for x in (q, k, v)]
    alone = bert.eager_attention(*short, mask[..., tokens], nn.Identity())
    after = "attention adds the mask after the softmax: the weights of padding are not 0 but huge"
    check(bool(padded.abs().max() < 1e6), after)
    ignored = "attention ignores the padding mask: row 2 changes when padding is added"
    check(equal(padded, alone), ignored)
    short[2] = short[2] + torch.tensor([1.0, 0.0, 0.0])[:, None]  # another value of token 1
    changed = bert.eager_attention(*short, mask[..., tokens], nn.Identity())
    check(not equal(changed[:, :, 1:], alone[:, :, 1:]), "attention does not mix the tokens")


def add_norm() -> None:
    """The order of dense layer, dropout, residual connection and LayerNorm."""
    bert, r = import_module("bert"), References("add_norm")
    layer = bert.BertLayer(bert.BertConfig(hidden_size=8, num_attention_heads=2))
    dense = r.fill(nn.Linear(12, 8), "dense.{}".format)
    norm = r.fill(nn.LayerNorm(8, eps=1e-12), "norm.{}".format)
    result = layer.add_norm(r.input, r.output, dense, nn.Identity(), norm)
    residual = "add_norm lacks the residual connection: the input is not added"
    first = "add_norm normalizes before the residual connection; BERT does it after"
    r.compare("add_norm", result, wrong_no_residual=residual, wrong_norm_first=first)
    result = layer.add_norm(r.input, r.output, dense, tripled, norm)
    place = "add_norm applies dropout in the wrong place: it belongs right after the dense layer"
    check(not equal(result, r.expected), "add_norm does not apply dropout")
    check(equal(result, r.expected_tripled), place)


def tiny_bert(bert: Any, r: References) -> nn.Module:
    """A BertModel of one layer with the stored weights."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "max_position_embeddings": 10}
    return r.fill(bert.BertModel(bert.BertConfig(vocab_size=20, **sizes)), bert.hub_name)


def encoder_layer() -> None:
    """The inputs that the layer gives its parts, and its use of their (stored) results."""
    bert, r = import_module("bert"), References("bert")
    layer = tiny_bert(bert, r).bert_layers[0]

    class Attention(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            r.compare("the encoder layer: the input of self_attention", hidden_states, "input")
            r.compare("the encoder layer: the mask of self_attention", attention_mask, "mask")
            return r.context

    def add_norm(
        input: Tensor, output: Tensor, dense_layer: Any, dropout: Any, ln_layer: Any
    ) -> Tensor:
        first = ln_layer is layer.attention_layer_norm
        modules = (layer.out_dense, layer.out_dropout, layer.out_layer_norm)
        if first:
            modules = (layer.attention_dense, layer.attention_dropout, ln_layer)
        mixed = "the encoder layer gives add_norm modules of both sublayers, or the wrong ones"
        check((dense_layer, dropout, ln_layer) == modules, mixed)
        if first:
            r.compare("the encoder layer: the first input of add_norm", input, "input")
            r.compare("the encoder layer: the first output for add_norm", output, "context")
            return r.attended
        residual = "the encoder layer: the second residual connection starts from the layer's input"
        r.compare("the second input of add_norm", input, "attended", input=residual)
        activation = "the encoder layer lacks the activation interm_af"
        r.compare("the second output for add_norm", output, "fed_forward", wrong_linear=activation)
        return r.expected

    layer.self_attention, layer.add_norm = Attention(), add_norm
    r.compare("the encoder layer", layer(r.input, r.mask))


def embeddings() -> None:
    """The sum of three embeddings, then LayerNorm, then dropout."""
    bert, r = import_module("bert"), References("bert")
    model = tiny_bert(bert, r)
    positions = "embed lacks the position embeddings: the order of the tokens is lost"
    mistakes = {"wrong_no_positions": positions, "wrong_no_norm": "embed lacks embed_layer_norm"}
    mistakes["wrong_no_segments"] = "embed lacks the segment embeddings tk_type_embedding"
    r.compare("embed", model.embed(r.ids, r.segments), "embedded", **mistakes)
    model.embed_dropout.forward = tripled
    result = model.embed(r.ids, r.segments)
    check(equal(result, 3 * r.embedded), "embed does not apply embed_dropout to its result")


def whole_model() -> None:
    """The real all-MiniLM-L6-v2 on three sentences."""
    bert, r = import_module("bert"), References("whole_model")
    output = bert.BertModel.from_pretrained("all-MiniLM-L6-v2")(r.ids, r.mask)
    r.compare("the last hidden state of [CLS]", output["last_hidden_state"][:, 0])
    r.compare("the pooler's output", output["pooler_output"], "expected_pooled")


# ---------------------------------------------------------------------------- optimizer.py


def adamw(r: References, t: int, weight_decay: float) -> dict[str, Tensor]:
    """The stored parameter and its moments after step t."""
    tensors = {name: r.tensors[name].clone() for name in ("p", "grad", "m", "v")}
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.05, "correct_bias": True}
    group["weight_decay"] = weight_decay
    import_module("optimizer").adamw_update(*tensors.values(), t=t, group=group)
    return tensors


def adamw_update() -> None:
    """Moments, bias correction and update, without decay."""
    r = References("adamw")
    tensors = adamw(r, t=3, weight_decay=0.0)
    mistakes = {
        "wrong_t_minus_1": "AdamW's bias correction is off by one: it uses t - 1 for t",
        "wrong_t_plus_1": "AdamW's bias correction is off by one: it uses t + 1 for t",
        "wrong_no_correction": "AdamW does not correct the bias of the moments in the first steps",
        "wrong_eps": "AdamW adds eps to the corrected root; in the formulas it is sqrt(v) + eps",
    }
    r.compare("AdamW's parameter p, in place", tensors["p"], **mistakes)
    r.compare("AdamW's first moment m, in place", tensors["m"], "expected_m")
    r.compare("AdamW's second moment v, in place", tensors["v"], "expected_v")


def adamw_decay() -> None:
    """The decay is decoupled, scaled by the learning rate, and comes last."""
    # At a late step, so that a mistake in the bias correction does not cost points twice.
    r = References("adamw")
    tensors = adamw(r, t=10**6, weight_decay=0.3)
    mistakes = {
        "wrong_coupled": "AdamW adds the weight decay to the gradient; it must change only p",
        "wrong_without_lr": "AdamW does not multiply the weight decay by the learning rate",
        "wrong_decay_first": "AdamW decays before the update; here the decay comes after it",
        "wrong_no_decay": "AdamW does not decay the parameter",
    }
    r.compare("AdamW with weight decay", tensors["p"], "expected_decayed", **mistakes)


# ---------------------------------------------------------------------------- tasks.py, model.py


def sentiment_head() -> None:
    """Logits, with dropout in training only."""
    r, task = References("sentiment"), import_module("tasks").TASKS["sst"]
    head = r.fill(import_module("model").LinearHead(8, task, dropout=0.5))
    results = [head(r.u) for _ in range(4)]
    same = all(torch.equal(results[0], other) for other in results[1:])
    check(same, "the sentiment head applies dropout at evaluation: four calls differ")
    softmax = "the sentiment head returns probabilities; the loss expects logits"
    r.compare("the sentiment head", results[0], "expected_logits", wrong_softmax=softmax)
    head.train()
    same = all(torch.equal(results[0], head(r.u)) for _ in range(4))
    check(not same, "the sentiment head does not apply dropout in training")


def sentiment_loss() -> None:
    """The cross-entropy of each row."""
    r, labels = References("sentiment"), import_module("tasks").TASKS["sst"].labels
    loss = labels.loss(r.expected_logits, r.labels)
    check(loss.ndim == 1, "the loss is a single number, expected one per row: no mean, no sum")
    twice = "the loss applies softmax before cross_entropy, which already includes it"
    r.compare("the sentiment loss", loss, "expected_loss", wrong_softmax_twice=twice)


class MeanOfWords(nn.Module):
    """Stands in for BERT: a sentence's embedding is the mean of its word vectors."""

    def __init__(self, config: Any, vectors: Tensor):
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding.from_pretrained(vectors, freeze=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Any = None
    ) -> dict[str, Tensor]:
        words, mask = self.word_embedding(input_ids), attention_mask[..., None]
        mean = (words * mask).sum(dim=1) / mask.sum(dim=1)
        return {"last_hidden_state": words, "pooler_output": mean}


def multitask_model(r: References) -> Any:
    """A MultitaskBERT with the stand-in for BERT, and with heads of PyTorch's own."""
    bert, model = import_module("bert"), import_module("model")
    tasks = import_module("tasks").find_tasks(["sst", "para", "sts"])
    multitask = model.MultitaskBERT(tiny_bert(bert, r), tasks).eval()
    multitask.bert = MeanOfWords(multitask.bert.config, r.vectors.clone())
    multitask.heads["sst"] = nn.Linear(8, 5, bias=False)
    for i, task in enumerate(("para", "sts")):
        multitask.heads[task] = nn.Bilinear(8, 8, 1, bias=False)
        multitask.heads[task].weight.data = r.bilinear[i : i + 1].clone()
    multitask.heads["sst"].weight.data = r.linear.clone()
    return multitask


def predict_sentiment() -> None:
    """Logits of sentences, through the right head."""
    r = References("multitask")
    result = multitask_model(r).predict_sentiment(r.ids[0], r.mask[0])
    softmax = "predict_sentiment returns probabilities, expected logits"
    r.compare("predict_sentiment", result, "expected_sst", wrong_softmax=softmax)


def predict_pairs(name: str, key: str, **mistakes: str) -> None:
    """Logits of pairs of two lengths, through the right head."""
    r = References("multitask")
    predict = getattr(multitask_model(r), name)
    result = predict(r.ids[0], r.mask[0], r.ids[1, :, :4], r.mask[1, :, :4])  # of two lengths
    r.compare(name, result, key, **mistakes)


predict_paraphrase = partial(
    predict_pairs,
    *("predict_paraphrase", "expected_para"),
    wrong_sigmoid="predict_paraphrase returns a probability, expected a logit",
    wrong_swapped="predict_paraphrase swaps the first and the second sentences",
    expected_sts="predict_paraphrase uses the head of sts",
)
predict_similarity = partial(
    predict_pairs,
    *("predict_similarity", "expected_sts"),
    wrong_scaled="predict_similarity applies a sigmoid; the score is the plain output of the head",
    expected_para="predict_similarity uses the head of para",
)


# ---------------------------------------------------------------------------- multitask step


def step(r: References, task: str, detach: bool = False) -> tuple[Any, Tensor]:
    """The model, and the losses of a batch of three pairs."""
    model, embed_batch = multitask_model(r), import_module("prediction").embed_batch
    batch = SimpleNamespace(task=task, token_type_ids=None, labels=r.tensors[f"labels_{task}"])
    batch.input_ids, batch.attention_mask = r.ids.flatten(0, 1), r.mask.flatten(0, 1)
    row_losses = import_module("multitask_classifier").row_losses
    return model, row_losses(model, partial(embed_batch, model), batch, detach)


def step_losses() -> None:
    """The losses of a step's rows, for two tasks."""
    r = References("multitask")
    r.compare("row_losses of paraphrases", step(r, "para")[1], "expected_para_loss")
    integers = "row_losses casts the labels to int: a similarity of 2.6 becomes 2"
    head = "row_losses decodes similarity with the head of another task"
    mistakes = {"wrong_int_labels": integers, "wrong_head": head}
    r.compare("row_losses of similarity", step(r, "sts")[1], "expected_sts_loss", **mistakes)


def step_detach() -> None:
    """With detach the loss reaches only the head; without it, BERT too."""
    for detach in (False, True):
        model, losses = step(References("multitask"), "sts", detach)
        losses.sum().backward()
        reached = model.bert.word_embedding.weight.grad is not None
        check(reached or detach, "the loss of row_losses does not reach BERT")
        check(not (reached and detach), "row_losses ignores detach: the loss still reaches BERT")
        reached = any(p.grad is not None for p in model.heads.parameters())
        check(reached, "the loss of row_losses does not reach the head")


# ---------------------------------------------------------------------------- simcse.py


def contrastive() -> None:
    """Cosines over the temperature, classified by their diagonal."""
    r = References("contrastive")
    loss = import_module("simcse").contrastive_loss(r.anchors, r.positives, temperature=0.5)
    r.compare(
        "the contrastive loss",
        loss,
        wrong_no_temperature="the contrastive loss does not divide by the temperature",
        wrong_dot="the contrastive loss takes dot products, expected cosines",
    )


def contrastive_negatives() -> None:
    """Hard negatives with their weight, and excluded candidates."""
    # Unit vectors at t = 1: neither dot products nor a forgotten temperature matter.
    r = References("contrastive")
    vectors = (x / x.norm(dim=1, keepdim=True) for x in (r.anchors, r.positives, r.negatives))
    options = {"temperature": 1.0, "hard_negative_weight": 3.0}
    loss = import_module("simcse").contrastive_loss(*vectors, r.excluded, **options)
    mistakes = {
        "wrong_weight": "the contrastive loss ignores hard_negative_weight",
        "wrong_not_excluded": "the contrastive loss ignores `excluded`",
        "wrong_own_positive": "the contrastive loss excludes a row's own positive, which must stay",
    }
    r.compare("the contrastive loss with hard negatives", loss, "expected_all", **mistakes)


# ---------------------------------------------------------------------------- points


class Test(NamedTuple):
    """A row of the table of points."""

    name: str
    points: int
    run: Callable[[], None]


TESTS = (
    Test("attention", 10, attention),
    Test("attention with padding", 8, attention_mask),
    Test("add_norm", 8, add_norm),
    Test("encoder layer", 10, encoder_layer),
    Test("embeddings", 8, embeddings),
    Test("AdamW", 8, adamw_update),
    Test("AdamW with weight decay", 6, adamw_decay),
    Test("sentiment head", 6, sentiment_head),
    Test("sentiment loss", 4, sentiment_loss),
    Test("predict_sentiment", 4, predict_sentiment),
    Test("predict_paraphrase", 4, predict_paraphrase),
    Test("predict_similarity", 4, predict_similarity),
    Test("multitask step", 6, step_losses),
    Test("multitask step with detach", 4, step_detach),
    Test("contrastive loss", 6, contrastive),
    Test("contrastive loss with hard negatives", 4, contrastive_negatives),
    # Worth nothing: it needs most of the exercises, so a mistake in one would cost points twice.
    Test("the whole model", 0, whole_model),
)
