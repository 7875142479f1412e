"""Pre-train BERT for sentence embeddings with a contrastive loss (SimCSE, Gao et al. 2021).

    python simcse.py --use_gpu
    python multitask_classifier.py --option finetune --use_gpu --model runs/NAME/best

Supervised: an NLI premise is pulled towards its entailment, and pushed away from its contradiction
and from the sentences of other rows. Unsupervised: a sentence is pulled towards its own embedding
under another dropout mask. The run folder is like that of the other scripts, without predictions.

Shapes: B rows of a step, D hidden size, V views of a row: (premise, entailment, contradiction), or
the same sentence twice.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bert import BertModel
from datasets import Batch, TaskDataset, TokenizedDataset, read_triples
from engine import cli, distributed
from engine.device import get_rng_states, set_rng_states, setup_device
from engine.errors import UserError
from engine.metrics import similarity_metrics
from engine.mixture import TaskMixture
from engine.run_dir import RunDir
from engine.trainer import Trainer
from hub.export import model_card
from model import POOLINGS, SentenceEncoder
from optimizer import AdamW, lr_factor, parameter_groups
from prediction import embed_dataset
from saved_runs import run_facts
from tasks import TASKS
from tokenizer import BertTokenizer


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument_group("method").add_argument
    modes = ["supervised", "unsupervised"]
    add("--mode", choices=modes, default=modes[0], help="NLI triples, or single sentences")
    add("--epochs", type=cli.POSITIVE_INT, default=3, help="passes over the triples or sentences")
    add("--lr", type=cli.POSITIVE, default=5e-5, help="peak learning rate")
    add("--temperature", type=cli.POSITIVE, default=0.05, help="0.05 in SimCSE, 1 in the paper")
    weight_help = "weight of a row's own contradiction among its negatives (default: 1)"
    add("--hard_negative_weight", type=cli.POSITIVE, help=weight_help)
    cli.add_training_flags(parser, POOLINGS)
    add = parser.add_argument_group("files").add_argument
    add("--nli", type=Path, help="NLI triples (default: nli_for_simcse.csv in --data_dir)")
    add("--sts_dev", type=Path, help="STS pairs to evaluate on (default: in --data_dir)")
    args = parser.parse_args(argv)
    cli.complete_training_args(args, parser, f"simcse-{args.mode}")
    if args.mode == "unsupervised" and args.hard_negative_weight:
        parser.error("--hard_negative_weight: --mode unsupervised has no hard negatives")
    args.hard_negative_weight = args.hard_negative_weight or 1.0  # all negatives have equal weight
    if min(args.batch_size, args.limit or 2) < 2:
        parser.error("a contrastive loss needs two rows per batch: raise --batch_size or --limit")
    return args


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    excluded: Tensor | None = None,
    temperature: float = 0.05,
    hard_negative_weight: float = 1.0,
) -> Tensor:
    """The loss of each row, (B,): equation (1) of the paper in its standard form, SimCSE's.

        -log e(i, i+) / sum_j [e(i, j+) + w_ij e(i, j-)],    e(i, j) = exp(cos(h_i, h_j) / t)

    with w_ij = `hard_negative_weight` for j = i, else 1 (Gao et al. 2021, equations 5 and 8). In
    the denominator the paper prints h_i instead of SimCSE's h_j, by mistake: all terms of the sum
    would be equal, and no other row a negative. It prints no temperature, which means t = 1.

    anchors, positives, negatives: (B, D); without negatives e(i, j-) is 0. excluded: (B, C) bool, C
    candidates (positives, then negatives) to leave out of a row's sum; its own positive stays.
    """
    # SOLUTION: scores (B, C) are cosines / t; row i's label is candidate i; then cross-entropy
    # Cosine of each row's anchor with every candidate: a row of scores (B, C), classified.
    candidates = positives if negatives is None else torch.cat([positives, negatives])  # (C, D)
    scores = F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T / temperature
    diagonal = torch.arange(len(anchors), device=scores.device)  # row i's positive is candidate i
    if negatives is not None:
        # A factor on the exponential is a term added to the score: w exp(s) = exp(s + log w).
        weights = torch.zeros_like(scores)
        weights[diagonal, diagonal + len(anchors)] = math.log(hard_negative_weight)
        scores = scores + weights
    if excluded is not None:
        # A row's own positive stays, even if it equals the anchor.
        excluded = excluded.clone()
        excluded[diagonal, diagonal] = False
        scores = scores.masked_fill(excluded, -torch.inf)  # exp(-inf) = 0
    return F.cross_entropy(scores, diagonal, reduction="none")
    # END SOLUTION


def false_negatives(keys: Tensor) -> Tensor:
    """Which candidates are false negatives of each row: sentence keys (V, B) -> (B, C) bool.

    Equal sentences have equal keys. A candidate is a false negative if it equals the row's first or
    second sentence, or is the second sentence of a row whose first is equal.
    """
    # A sentence that occurs in two rows would be pushed away from itself.
    first, second = keys[0][:, None], keys[1][:, None]  # (B, 1)
    candidates = keys[1:].flatten()  # (C,)
    false = (candidates == first) | (candidates == second)
    false[:, : len(first)] |= keys[0] == first
    return false


def sentence_keys(batches: Sequence[Batch]) -> Tensor:
    """Numbers (V, B) for the sentences of a step, equal where their token ids are.

    Every process computes them for the rows of all processes.
    """
    views = max(2, batches[0].dataset.embeddings_per_row)  # a single sentence is its own positive
    # The token ids, not the text: sentences that differ only in case are equal to the model.
    keys: dict[bytes, int] = {}
    columns = []
    for batch in batches:
        token_ids = batch.dataset.token_ids
        for row in batch.global_rows:
            ids = [token_ids[min(view, len(token_ids) - 1)][row].tobytes() for view in range(views)]
            columns.append([keys.setdefault(key, len(keys)) for key in ids])
    return torch.tensor(columns).to(batches[0].input_ids.device, non_blocking=True).T


@dataclass
class ContrastiveBackward:
    """Gradients of `contrastive_loss` over all rows of a step together, for `Trainer`.

    With several batches in a step (--accumulate) the loss is still that of one big batch, in which
    every row is a negative of every other, with the memory of a small one (gradient caching, Gao et
    al. 2021, https://arxiv.org/abs/2101.06983).

    With several processes, each embeds its own rows, computes the loss over all rows, and
    backpropagates through its own: the sum of the gradients is that of the big batch.
    """

    model: SentenceEncoder
    args: Namespace  # `pooling`, `temperature` and `hard_negative_weight`

    def __call__(self, batches: Sequence[Batch], step: int) -> Tensor:
        """Leave gradients in the model's parameters; returns the mean loss."""
        if len(batches) == 1:
            loss = self.loss(self.embed_all(batches[0]), batches)
            loss.backward()
        else:
            loss = self.cached_backward(batches)
        distributed.all_reduce_gradients(list(self.model.bert.parameters()))
        return loss.detach()

    def cached_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Gradient caching: embed all batches, differentiate the loss with respect to them, then
        embed each batch again with the same dropout masks and backpropagate its part."""
        # 1. Embeddings of all rows, without a graph; the states reproduce the dropout masks.
        device = self.model.device
        states, parts = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(get_rng_states(device))
                parts.append(self.embed_all(batch))
        # 2. The gradient of the loss with respect to the embeddings.
        vectors = torch.cat(parts, dim=1).requires_grad_()
        loss = self.loss(vectors, batches)
        loss.backward()
        # 3. The chain rule: embed each batch again, with a graph, and pass its part backwards.
        after = get_rng_states(device)
        grads = vectors.grad.split([len(batch.global_rows) for batch in batches], dim=1)
        for batch, state, grad in zip(batches, states, grads, strict=True):
            set_rng_states(device, state)
            rows = distributed.rank_slice(len(batch.global_rows))
            self.embed(batch).backward(grad[:, rows])
        set_rng_states(device, after)
        return loss

    def embed(self, batch: Batch) -> Tensor:
        """The views of this process's rows, (V, b, D); a single sentence is embedded twice."""
        if not len(batch):  # a process may have no row of a short batch
            size = (max(2, batch.dataset.embeddings_per_row), 0, self.model.bert.config.hidden_size)
            return torch.zeros(size, device=self.model.device, requires_grad=True)
        ids, mask = batch.input_ids, batch.attention_mask
        # Unsupervised: the two views of a sentence differ only in their dropout masks.
        if batch.dataset.embeddings_per_row == 1:
            ids, mask = torch.cat([ids, ids]), torch.cat([mask, mask])
        vectors = self.model.embed(ids, mask, pooling=self.args.pooling)
        return vectors.unflatten(0, (-1, len(batch)))

    def embed_all(self, batch: Batch) -> Tensor:
        """The views of the rows of all processes, (V, B, D)."""
        return distributed.all_gather_rows(self.embed(batch), len(batch.global_rows))

    def loss(self, vectors: Tensor, batches: Sequence[Batch]) -> Tensor:
        """The mean loss of the step's rows, from their views (V, B, D)."""
        losses = contrastive_loss(
            *vectors,
            excluded=false_negatives(sentence_keys(batches)),
            temperature=self.args.temperature,
            hard_negative_weight=self.args.hard_negative_weight,
        )
        return losses.mean()


def load_datasets(
    args: Namespace, tokenizer: BertTokenizer
) -> tuple[TokenizedDataset, TaskDataset]:
    """The training sentences (triples, or distinct single sentences) and STS dev."""
    path = args.nli or args.data_dir / "nli_for_simcse.csv"
    triples, checksum = read_triples(path, args.limit)
    columns: list[Sequence[str]] = list(zip(*triples, strict=True))
    unit = "rows"
    # Without the labels of NLI, its file is just a list of sentences.
    if args.mode == "unsupervised":
        columns = [list(dict.fromkeys(text for triple in triples for text in triple))]
        unit = "distinct sentences"
    if len(columns[0]) < 2:
        raise UserError(f"{path}: fewer than two {unit}; a contrastive loss needs at least two")
    # min_batch_size: a row alone in a batch would have no negatives.
    nli = TokenizedDataset(
        "nli", path, columns, tokenizer, unit=unit, min_batch_size=2, checksum=checksum
    )
    sts_path = args.sts_dev or args.data_dir / TASKS["sts"].file("dev")
    dev = TaskDataset(sts_path, TASKS["sts"], tokenizer, limit=args.limit)
    print(nli, dev, sep="\n")
    return nli, dev


def evaluate_embeddings(
    model: SentenceEncoder, dev: TaskDataset, batch_size: int
) -> dict[str, Any]:
    """Spearman ("score"), alignment and uniformity of the embeddings on STS pairs."""
    vectors = embed_dataset(model, dev, batch_size).cpu()
    metrics = distributed.broadcast_from_rank_zero(lambda: similarity_metrics(vectors, dev.labels))
    shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
    return {"score": metrics["spearman"], "summary": f"sts {shown}", "metrics": metrics}


def train(
    args: Namespace, model: SentenceEncoder, nli: TokenizedDataset, dev: TaskDataset, run: RunDir
) -> dict[str, Any]:
    """Train the encoder and write result.json; returns its content."""
    # The untouched encoder is the baseline, and step 0 of the learning curve.
    evaluate = partial(evaluate_embeddings, model, dev, args.batch_size)
    before = evaluate()
    if run.state is None:
        run.log("dev", 0, epoch=0, **before)
    print(f"before training: {before['summary']}")
    groups = parameter_groups(model.bert, args.weight_decay)
    trainer = Trainer(
        model,
        {"bert": AdamW(groups, lr=args.lr, fused=True)},
        partial(lr_factor, args.schedule, args.warmup),
        TaskMixture([nli], args.batch_size, args.seed, args.epochs, accumulate=args.accumulate),
        ContrastiveBackward(model, args),
        evaluate,
        run,
        args,
    )
    best = trainer.fit()
    print(f"dev, best epoch {best['epoch']}: {best['summary']}")
    metrics = {"dev": {"sts": best["metrics"]}, "before": {"sts": before["metrics"]}}
    return trainer.finish(model_card, **metrics)


def run_training(args: Namespace) -> dict[str, Any]:
    """Train as the command line says; returns the content of `result.json`."""
    with distributed.process_group(args):
        # As in multitask_classifier.py: checks, data and model, run folder, training.
        recorded = RunDir.check(args)
        device, dtype = setup_device(args.seed, args.device, args.precision, recorded)
        tokenizer = BertTokenizer.from_pretrained(args.model)
        nli, dev = load_datasets(args, tokenizer)
        bert = BertModel.from_pretrained(args.model, hidden_dropout_prob=args.hidden_dropout_prob)
        # Unsupervised SimCSE trains with the pooler but evaluates [CLS] itself (Gao et
        # al. 2021, section 6.3): such a run evaluates and saves the model with pooling `cls`.
        without_mlp = args.mode == "unsupervised" and args.pooling == "pooler"
        model = SentenceEncoder(bert, tokenizer, "cls" if without_mlp else args.pooling)
        model.dtype = dtype
        distributed.broadcast_parameters(model.to(device))
        run = RunDir.start_or_resume(args, **run_facts(model, {"train": [nli], "dev": [dev]}))
        with closing(run):
            print(f"run folder: {run.path} ({device}, {str(dtype).removeprefix('torch.')})")
            return train(args, model, nli, dev, run)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    run_training(parse_args(argv))


if __name__ == "__main__":
    cli.run_script(main)
