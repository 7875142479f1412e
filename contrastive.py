"""The job of `simcse.py`: sentences in, an encoder out whose cosines mean similarity.

Shapes: B rows of a step, D hidden size, V views of a row: (premise, entailment, contradiction), or
the same sentence twice.
"""

import math
import shutil
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import distributed
from bert import BertModel
from checkpoint import Run, UserError, digest, unchanged, write_text
from datasets import Batch, Mixture, Sentences, TaskData, read_triples
from exchange import model_card
from optimizer import AdamW, parameter_groups
from scoring import embeddings
from tasks import TASKS, MultitaskBERT
from tokenizer import BertTokenizer
from train import begin, peak_memory, prepare, random_states, set_random_states, train

# ---------------------------------------------------------------------------- the loss


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    excluded: Tensor | None = None,
    temperature: float = 0.05,
    hard_negative_weight: float = 1.0,
) -> Tensor:
    """The loss of each row, (B,): equation (1) of the paper in its standard form, that of SimCSE.

        -log e(i, i+) / sum_j [e(i, j+) + w_ij e(i, j-)],    e(i, j) = exp(cos(h_i, h_j) / t)

    with w_ij = `hard_negative_weight` for j = i, else 1 (Gao et al. 2021, equations 5 and 8). The
    paper prints h_i where SimCSE has h_j in the denominator, a slip: all terms of its sum would be
    equal, and no other row a negative. It prints no temperature either, which means t = 1.

    Args:
        anchors, positives, negatives: embeddings (B, D); without negatives e(i, j-) is 0.
        excluded: (B, C) bool, C = B or 2 B: candidates (positives, then negatives) that are left
            out of a row's sum. Its own positive always counts.
        temperature: t above, positive.
        hard_negative_weight: w_ii above, positive.
    """
    candidates = positives if negatives is None else torch.cat([positives, negatives])  # (C, D)
    scores = F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T / temperature
    own = torch.arange(len(anchors), device=scores.device)
    if negatives is not None:
        weights = torch.zeros_like(scores)
        weights[own, own + len(anchors)] = math.log(hard_negative_weight)
        scores = scores + weights
    if excluded is not None:
        others = excluded.clone()
        others[own, own] = False
        scores = scores.masked_fill(others, -torch.inf)
    return F.cross_entropy(scores, own, reduction="none")


def false_negatives(keys: Tensor) -> Tensor:
    """The candidates that are no true negatives of a row: sentence keys (V, B) -> (B, C) bool.

    Equal sentences have equal keys. A candidate is no negative where it equals the row's first or
    second sentence, or is the second sentence of a row whose first is equal.
    """
    first, second = keys[0][:, None], keys[1][:, None]  # (B, 1)
    candidates = keys[1:].flatten()  # (C,)
    found = (candidates == first) | (candidates == second)
    found[:, : len(first)] |= keys[0] == first
    return found


def sentence_keys(batches: Sequence[Batch]) -> Tensor:
    """Numbers (V, B) for the sentences of a step, equal where their token ids are."""
    width = max(batch.input_ids.size(1) for batch in batches)
    parts = []
    for batch in batches:
        ids = batch.input_ids.masked_fill(batch.attention_mask == 0, -1)
        ids = F.pad(ids, (0, width - ids.size(1)), value=-1)
        parts.append(ids.unflatten(0, (batch.source.width, len(batch))))
    rows = torch.cat(parts, dim=1)  # (V, B, T)
    rows = rows.expand(max(2, len(rows)), -1, -1)  # a lone sentence is its own second view
    _, keys = torch.unique(rows.flatten(0, 1), dim=0, return_inverse=True)
    return keys.view(rows.shape[:2])


class Contrast:
    """Gradients of `contrastive_loss` over all rows of a step together, for `train.train`.

    With several batches in a step (`--accumulate`) the loss is still that of the one big batch, in
    which every row is a negative of every other, and memory that of a small one (gradient caching,
    Gao et al. 2021, https://arxiv.org/abs/2101.06983): embeddings are made first, keeping nothing
    else; the loss gives each its gradient; then every batch is encoded again, under the same
    dropout, and takes its gradients further.

    Of several processes each embeds its own rows; the loss is made in all of them from all rows,
    and each takes the gradients of its own rows further: their sum is the big batch's.
    """

    def __init__(self, model: MultitaskBERT, args: Namespace):
        self.model = model
        self.args = args

    def embed(self, batch: Batch) -> Tensor:
        """The views of a batch's rows, (V, b, D); a lone sentence is seen twice."""
        if not len(batch):  # of a short batch, a process may have no row
            width = max(2, batch.source.width)
            size = (width, 0, self.model.bert.config.hidden_size)
            return torch.zeros(size, device=self.model.device, requires_grad=True)
        ids, mask = batch.input_ids, batch.attention_mask
        if batch.source.width == 1:
            ids, mask = torch.cat([ids, ids]), torch.cat([mask, mask])
        vectors = self.model.embed(ids, mask, pooling=self.args.pooling)
        return vectors.unflatten(0, (-1, len(batch)))

    def loss(self, vectors: Tensor, batches: Sequence[Batch]) -> Tensor:
        """The mean loss of the step's rows, from their views (V, B, D)."""
        losses = contrastive_loss(
            *vectors,
            excluded=false_negatives(sentence_keys([batch.complete() for batch in batches])),
            temperature=self.args.temperature,
            hard_negative_weight=self.args.hard_negative_weight,
        )
        return losses.mean()

    def __call__(self, batches: Sequence[Batch]) -> float:
        """Leave gradients in the model's parameters; the mean loss for the log."""
        if len(batches) == 1:
            (batch,) = batches
            vectors = distributed.all_rows(self.embed(batch), len(batch.whole))
            loss = self.loss(vectors, batches)
            loss.backward()
            return loss.item()
        device = self.model.device
        states, parts = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(random_states(device))
                parts.append(distributed.all_rows(self.embed(batch), len(batch.whole)))
        vectors = torch.cat(parts, dim=1).requires_grad_()
        loss = self.loss(vectors, batches)
        loss.backward()
        shares = vectors.grad.split([len(batch.whole) for batch in batches], dim=1)
        after = random_states(device)
        for batch, state, share in zip(batches, states, shares, strict=True):
            set_random_states(device, state)
            self.embed(batch).backward(share[:, distributed.own(len(batch.whole))])
        set_random_states(device, after)
        return loss.item()


# ---------------------------------------------------------------------------- figures


def alignment(u: Tensor, v: Tensor) -> float:
    """Mean squared distance of the unit vectors of positive pairs (N, D), 0 to 4, less is better.

    Wang & Isola 2020, https://arxiv.org/abs/2005.10242, with their alpha = 2.
    """
    u, v = F.normalize(u.double(), dim=-1), F.normalize(v.double(), dim=-1)
    return (u - v).square().sum(dim=-1).mean().item()


def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2 squared distance) over all pairs of unit vectors, less is better.

    x: (N, D). Wang & Isola 2020, with their t = 2.
    """
    x = F.normalize(x.double(), dim=-1)
    # Of unit vectors, the squared distance is 2 - 2 cos. In blocks, as memory is to be bounded.
    total = sum((4 * (block @ x.T) - 4).exp().sum().item() for block in x.split(1024))
    pairs = len(x) * (len(x) - 1)
    return math.log((total - len(x)) / pairs)  # each vector met itself once, at a distance of 0


def figures(model: MultitaskBERT, dev: TaskData, batch_size: int) -> dict[str, Any]:
    """How well the plain cosine of embeddings orders the STS pairs of `dev`, without training.

    Spearman's rho with the 0-5 scores ("score"); alignment over the pairs of at least 4, SimCSE's
    threshold; uniformity over all sentences.
    """
    vectors = embeddings(model, dev, batch_size)  # (N, 2, D)
    return distributed.first(lambda: figures_of(vectors, dev))


def figures_of(vectors: Tensor, dev: TaskData) -> dict[str, Any]:
    """The same from the embeddings, (N, 2, D)."""
    from scipy import stats  # half a second, which the first training step need not wait for

    u, v = vectors[:, 0], vectors[:, 1]
    cosines = F.cosine_similarity(u.double(), v.double(), dim=-1)
    gold = dev.labels.double()
    constant = len(gold) < 2 or not cosines.std() or not gold.std()
    spearman = 0.0 if constant else float(stats.spearmanr(cosines, gold).statistic)
    similar = gold >= 4
    found = {
        "spearman": spearman,
        "alignment": alignment(u[similar], v[similar]) if similar.any() else None,
        "uniformity": uniformity(vectors.flatten(0, 1)),
    }
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if value is not None)
    return {"score": spearman, "summary": f"sts {numbers}", **found}


# ---------------------------------------------------------------------------- the job


def load(args: Namespace, tokenizer: BertTokenizer) -> tuple[Sentences, TaskData]:
    """The training sentences (triples, or each distinct sentence by itself) and STS dev."""
    path = args.nli or args.data_dir / "nli_for_simcse.csv"
    tokens = args.run_dir / "tokens"
    with unchanged(path):
        triples = read_triples(path, args.limit)
        found = digest(path)
    columns: list[Sequence[str]] = list(zip(*triples, strict=True))
    unit = "rows"
    if args.mode == "unsupervised":
        columns = [list(dict.fromkeys(text for triple in triples for text in triple))]
        unit = "distinct sentences"
    # A row alone in a batch would have nothing to be told apart from.
    sentences = Sentences("nli", path, columns, tokenizer, unit=unit, least=2, tokens=tokens)
    sentences.digest = found
    if len(sentences) < 2:
        raise UserError(f"{path}: fewer than two {unit}; a contrastive loss needs at least two")
    sts = TASKS["sts"]
    dev_path = args.sts_dev or args.data_dir / sts.files.format("dev")
    return sentences, TaskData(dev_path, sts, tokenizer, limit=args.limit, tokens=tokens)


def fit(args: Namespace) -> dict[str, Any]:
    """Train in a new run folder, keeping the best encoder by Spearman; what `result.json` holds.

    Unsupervised with the pooler, it is trained through the pooler (SimCSE's MLP) and evaluated and
    kept without: the pooling of best/ is then `cls`.

    Raises:
        UserError: anything the user can mend; before training starts nothing has been written.
    """
    recorded = distributed.first(lambda: Run.check(args.run_dir, vars(args), args.resume))
    device, precision = prepare(args.seed, args.device, args.precision, recorded)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    sentences, dev = load(args, tokenizer)
    print(sentences, dev, sep="\n")
    without_mlp = args.mode == "unsupervised" and args.pooling == "pooler"
    model = MultitaskBERT(
        BertModel.from_pretrained(args.model, hidden_dropout_prob=args.hidden_dropout_prob),
        tasks=[],
        pooling="cls" if without_mlp else args.pooling,
        tokenizer=tokenizer,
    )
    model.precision = precision
    distributed.spread(model.to(device))
    mixture = Mixture(
        [sentences], args.batch_size, args.seed, args.epochs, accumulate=args.accumulate
    )
    run = begin(
        args,
        data={str(of.path): of.digest for of in (sentences, dev)},
        device=str(device),
        precision=str(precision).removeprefix("torch."),
        rows={"train": {"nli": len(sentences)}, "dev": {"sts": len(dev)}},
        files={
            "train": {"nli": str(sentences.path.absolute())},
            "dev": {"sts": str(dev.path.absolute())},
        },
    )
    with closing(run):
        for of in (sentences, dev):
            if run.writes:
                of.save_tokens()
        return carry_out(args, model, mixture, dev, run)


def carry_out(
    args: Namespace, model: MultitaskBERT, mixture: Mixture, dev: TaskData, run: Run
) -> dict[str, Any]:
    """All that a run does once its folder is there: train, and report on the best."""
    optimizers = {"bert": AdamW(parameter_groups(model.bert, args.weight_decay), lr=args.lr)}
    print(f"run folder: {run.path}")
    model.eval()
    before = figures(model, dev, args.batch_size)
    if run.state is None:
        run.log("dev", 0, epoch=-1, **before)
    print(f"before training: {before['summary']}")
    gradients = distributed.reduced(Contrast(model, args), list(model.bert.parameters()))
    best = train(
        model,
        gradients,
        mixture,
        optimizers,
        lambda: figures(model, dev, args.batch_size),
        run,
        args,
    )
    seconds = run.seconds()
    names = ("spearman", "alignment", "uniformity")
    result = {
        "dev": {"sts": {name: best[name] for name in names}},
        "before": {"sts": {name: before[name] for name in names}},
        "best_epoch": best["epoch"] + 1,
        "best_step": best["step"],
        "training_seconds": round(seconds, 1),
        "saving_seconds": round(run.saving, 2),  # of them, for the states to resume from
        "peak_memory_bytes": peak_memory(model.device),  # of the first process
        "processes": distributed.size(),
    }
    if run.writes:
        write_text(run.path / "best" / "README.md", model_card(run.path, result))
    run.finish(result)
    if run.writes:
        shutil.rmtree(run.path / "tokens", ignore_errors=True)  # nothing is left to go on with
    print(f"dev, best epoch {best['epoch'] + 1}: {best['summary']}")
    print(f"{run.path}: best/, result.json; trained for {seconds:.0f} s")
    return result
