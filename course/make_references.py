"""Write the inputs and reference values of grade.py: one .npz file per group of tests.

    python course/make_references.py [FOLDER]

`expected` is what an independent implementation computes: transformers, torch.optim, torch's own
functions, in float64. Other entries are inputs, and `wrong_...`: what a common mistake computes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from hub.models import resolve_model  # noqa: E402

BERT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 12, "max_position_embeddings": 10, "type_vocab_size": 2}
SENTENCES = [
    "A quietly moving film.",
    "Dull.",
    "Its last half hour is worth the wait of the first!",
]
Values = dict[str, Any]  # name -> an array, or something convertible to one


def attention() -> Values:
    """Attention of two heads without a mask."""
    query, key, value = torch.randn(3, 2, 2, 5, 4)
    attend = F.scaled_dot_product_attention
    values = {"query": query, "key": key, "value": value, "expected": attend(query, key, value)}
    values["wrong_scale"] = attend(query, key, value, scale=1.0)
    values["wrong_axis"] = (query @ key.mT / 2).softmax(dim=-2) @ value
    return values


def add_norm() -> Values:
    """LayerNorm(x + dropout(W y + b)), with a "dropout" that triples, and wrong orders."""
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    dense, norm = nn.Linear(12, 8), nn.LayerNorm(8, eps=1e-12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    out = dense(y)
    values = {f"dense.{name}": p for name, p in dense.named_parameters()}
    values |= {f"norm.{name}": p for name, p in norm.named_parameters()}
    values |= {"input": x, "output": y, "expected": norm(x + out)}
    values["expected_tripled"] = norm(x + 3 * out)
    values |= {"wrong_no_residual": norm(out), "wrong_norm_first": x + norm(out)}
    return values


def bert() -> Values:
    """A random BertModel of one layer: its embeddings, and what each part of the layer computes."""
    config = transformers.BertConfig(**BERT, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape) + name.endswith("LayerNorm.weight"))
    values = dict(model.named_parameters())
    # Embeddings, and sums with a missing term.
    e, ids, segments = model.embeddings, torch.randint(1, 20, (2, 6)), torch.randint(2, (2, 6))
    word, position = e.word_embeddings(ids), e.position_embeddings(torch.arange(6))
    segment = e.token_type_embeddings(segments)
    values |= {"ids": ids, "segments": segments, "embedded": e(ids, segments)}
    values["wrong_no_positions"] = e.LayerNorm(word + segment)
    values["wrong_no_segments"] = e.LayerNorm(word + position)
    values["wrong_no_norm"] = word + position + segment
    # The encoder layer.
    layer, x, mask = model.encoder.layer[0], torch.randn(2, 5, 8), torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = -1e9
    context = layer.attention.self(x, mask)[0]
    attended = layer.attention.output(context, x)
    values |= {"input": x, "mask": mask, "context": context, "attended": attended}
    values["fed_forward"] = layer.intermediate(attended)
    values["wrong_linear"] = layer.intermediate.dense(attended)
    values["expected"] = layer(x, mask)
    return values


def adamw_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Step t of torch.optim.AdamW, with hyperparameters that make it our update: p, m, v.

    PyTorch's decays before the update, and adds eps to the root after its bias correction.
    """
    t, lr, eps, decay = (options[name] for name in ("t", "lr", "eps", "weight_decay"))
    b1, b2 = options["betas"]
    root, share = np.sqrt(1 - b2**t), lr * decay
    rate = lr * (1 - share) * (1 if options["correct_bias"] else (1 - b1**t) / root)
    p = p.clone().requires_grad_()
    adam = torch.optim.AdamW([p], rate, (b1, b2), eps / root, weight_decay=share / rate)
    moments = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    adam.state[p] = {"step": torch.tensor(t - 1.0), **moments}
    p.grad = g
    adam.step()
    return [p.detach(), adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]]


def adamw() -> Values:
    """One step, the third, of a parameter with moments: without decay, and with it."""
    p, g, m = torch.randn(3, 4, 3)
    v = torch.rand(4, 3)
    options = {"t": 3, "lr": 0.1, "betas": (0.8, 0.9), "eps": 0.05, "correct_bias": True}
    start, plain = (p, g, m, v), {**options, "weight_decay": 0.0}
    values = {"p": p, "grad": g, "m": m, "v": v}
    values["expected"], values["expected_m"], values["expected_v"] = adamw_step(*start, **plain)
    values["wrong_t_minus_1"] = adamw_step(*start, **{**plain, "t": 2})[0]
    values["wrong_t_plus_1"] = adamw_step(*start, **{**plain, "t": 4})[0]
    values["wrong_no_correction"] = adamw_step(*start, **{**plain, "correct_bias": False})[0]
    textbook = {**plain, "eps": 0.05 * np.sqrt(1 - 0.9**3)}  # eps is added to the corrected root
    values["wrong_eps"] = adamw_step(*start, **textbook)[0]
    # Decay at a late step, so that a mistake in the bias correction does not count twice.
    decay = {**options, "weight_decay": 0.3, "t": 10**6}
    new = adamw_step(*start, **{**decay, "weight_decay": 0.0})[0]
    values["expected_decayed"] = adamw_step(*start, **decay)[0]
    values["wrong_no_decay"] = new
    coupled = {**decay, "weight_decay": 0.0}
    values["wrong_coupled"] = adamw_step(p, g + 0.3 * p, m, v, **coupled)[0]
    values |= {"wrong_without_lr": new - 0.3 * new, "wrong_decay_first": new - 0.1 * 0.3 * p}
    return values


def sentiment() -> Values:
    """A linear head, and the cross-entropy of its logits."""
    u, weight, bias, labels = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5), [3, 0, 4, 1]
    logits, labels = F.linear(u, weight, bias), torch.tensor(labels)
    loss = nn.CrossEntropyLoss(reduction="none")
    values = {"u": u, "dense.weight": weight, "dense.bias": bias, "labels": labels}
    values["expected_logits"] = logits
    values |= {"wrong_softmax": logits.softmax(dim=-1), "expected_loss": loss(logits, labels)}
    values["wrong_softmax_twice"] = loss(logits.softmax(dim=-1), labels)
    return values


def multitask() -> Values:
    """Sentences embedded as the mean of their word vectors; a linear and two bilinear heads."""
    vectors, linear, bilinear = torch.randn(20, 8), torch.randn(5, 8), torch.randn(2, 8, 8)
    ids, mask = torch.randint(20, (2, 3, 5)), torch.ones(2, 3, 5, dtype=torch.int64)
    mask[0, 1, 3:] = mask[1, :, 4:] = mask[1, 2, 2:] = 0
    u, v = (vectors[ids] * mask[..., None]).sum(dim=2) / mask.sum(dim=2)[..., None]
    para, sts = torch.einsum("bi,tij,bj->tb", u, bilinear, v)[..., None]
    swapped, _ = torch.einsum("bi,tij,bj->tb", v, bilinear, u)[..., None]
    labels = {"para": torch.tensor([1.0, 0.0, 1.0]), "sts": torch.tensor([2.6, 4.8, 0.4])}
    bce, mse = nn.BCEWithLogitsLoss(reduction="none"), nn.MSELoss(reduction="none")
    values = {"vectors": vectors, "linear": linear, "bilinear": bilinear, "ids": ids, "mask": mask}
    values |= {"expected_sst": u @ linear.T, "expected_para": para, "expected_sts": sts}
    values |= {"wrong_softmax": (u @ linear.T).softmax(dim=-1), "wrong_sigmoid": para.sigmoid()}
    values |= {"wrong_swapped": swapped, "wrong_scaled": 5 * sts.sigmoid()}
    values |= {f"labels_{task}": label for task, label in labels.items()}
    values["expected_para_loss"] = bce(para[:, 0], labels["para"])
    values["expected_sts_loss"] = mse(sts[:, 0], labels["sts"])
    values["wrong_int_labels"] = mse(sts[:, 0], labels["sts"].trunc())
    values["wrong_head"] = mse(para[:, 0], labels["sts"])
    return values


def contrastive() -> Values:
    """Equation (1): only positives at t = 1/2, and all terms at t = 1."""
    a, p, n = torch.randn(3, 4, 6)
    targets, cross_entropy = torch.arange(4), nn.CrossEntropyLoss(reduction="none")
    cosines = F.cosine_similarity(a[:, None], p[None], dim=-1)
    values = {"anchors": a, "positives": p, "negatives": n}
    values["expected"] = cross_entropy(cosines / 0.5, targets)
    values["wrong_no_temperature"] = cross_entropy(cosines, targets)
    values["wrong_dot"] = cross_entropy(a @ p.T / 0.5, targets)
    excluded = torch.rand(4, 8) < 0.3
    excluded[2, 2] = True  # a row's own positive still counts
    e = F.cosine_similarity(a[:, None], torch.cat([p, n])[None], dim=-1).exp()

    def loss(weight: float, left_out: Tensor) -> Tensor:
        weighted = torch.cat([e[:, :4], e[:, 4:] * (1 + (weight - 1) * torch.eye(4))], dim=1)
        return -(e[:, :4].diagonal() / weighted.masked_fill(left_out, 0.0).sum(dim=1)).log()

    others = excluded & ~torch.eye(4, 8, dtype=torch.bool)
    values |= {"excluded": excluded, "expected_all": loss(3.0, others)}
    values |= {"wrong_weight": loss(1.0, others), "wrong_own_positive": loss(3.0, excluded)}
    values["wrong_not_excluded"] = loss(3.0, torch.zeros_like(excluded))
    return values


def whole_model() -> Values:
    """Three English sentences through the bundled model, padded."""
    folder = resolve_model("all-MiniLM-L6-v2")
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True)
    ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
    output = model(ids, mask)
    cls, pooled = output.last_hidden_state[:, 0], output.pooler_output
    return {"ids": ids, "mask": mask, "expected": cls, "expected_pooled": pooled}


MAKERS: tuple[Callable[[], Values], ...] = (
    *(attention, add_norm, bert, adamw, sentiment, multitask, contrastive, whole_model),
)


def main(folder: Path) -> None:
    """Write all of them, floats as float32."""
    torch.set_default_dtype(torch.float64)
    for make in MAKERS:
        torch.manual_seed(0)
        with torch.no_grad():
            arrays = {name: torch.as_tensor(value).numpy() for name, value in make().items()}
        kinds = {np.dtype("float64"): np.float32}
        arrays = {n: a.astype(kinds.get(a.dtype, a.dtype)) for n, a in arrays.items()}
        np.savez_compressed(folder / f"{make.__name__}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "course" / "references")
