"""Pre-train BERT on plain text by masked language modelling, its original objective.

    python mlm.py --tasks sst,para,sts --use_gpu              # on the tasks' own sentences
    python mlm.py --text FILE.txt --use_gpu                   # a sentence per line
    python mlm.py --text FILE.txt --from_scratch 4x256        # from random weights
    python multitask_classifier.py --option finetune --use_gpu --model runs/NAME
    python evaluation.py runs/NAME --text "the movie was [MASK]"

The run folder is like that of the other scripts, without predictions.
"""

import hashlib
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bert import BertConfig, BertModel
from datasets import Batch, TokenizedDataset, read_examples, sample_rows
from engine import cli, distributed
from engine.checkpoint import read_text
from engine.device import setup_device, to_float64
from engine.errors import UserError
from engine.mixture import TaskMixture
from engine.run_dir import RunDir
from engine.trainer import Trainer
from hub.export import model_card
from masked_lm import MaskedLM, hide_tokens
from model import POOLINGS
from optimizer import AdamW, lr_factor, parameter_groups
from saved_runs import run_facts
from tasks import find_tasks
from tokenizer import BertTokenizer

DEV_SHARE, MAX_DEV = 0.05, 2000  # share of a text's lines; limit of dev sentences
HEAD_SIZE = 64  # features of an attention head, as in BERT-base


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = cli.ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--tasks", help="train on the sentences of these tasks' training files")
    source("--text", type=Path, metavar="FILE", help="train on the lines of a text file")
    add = parser.add_argument_group("method").add_argument
    size_help = "random weights: layers x width (a multiple of 64), with --model's vocabulary"
    add("--from_scratch", type=size, metavar="LxD", help=size_help)
    probability = cli.number(float, 0, 1, above=True, below=True)
    probability_help = "fraction of the tokens to predict"
    add("--mlm_probability", type=probability, default=0.15, metavar="P", help=probability_help)
    add("--whole_word", action="store_true", help="mask all pieces of a word together")
    add("--epochs", type=cli.POSITIVE_INT, default=10, help="passes over the sentences")
    add("--lr", type=cli.POSITIVE, default=5e-5, help="peak learning rate")
    cli.add_training_flags(parser, POOLINGS)
    args = parser.parse_args(argv)
    cli.complete_training_args(args, parser, "mlm")
    # As in multitask_classifier.py, the record has a list.
    if args.tasks:
        args.tasks = [name.strip() for name in args.tasks.split(",")]
    return args


def size(text: str) -> list[int]:
    """A flag type: "4x256" -> 4 layers of width 256."""
    layers, _, width = text.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) % HEAD_SIZE == 0):
        raise ArgumentTypeError(f"{text!r} is not LAYERSxWIDTH with a width of 64, 128, 192, ...")
    return [int(layers), int(width)]


# ---------------------------------------------------------------------------- sentences


def load_datasets(
    args: Namespace, tokenizer: BertTokenizer
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """The training sentences, and others for evaluation."""
    if args.text:
        text = read_text(args.text)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        lines = sample_rows(lines, args.limit)
        if len(lines) < 2:
            raise UserError(f"{args.text}: {len(lines)} lines of text; expected at least 2")
        # A fixed random share of the lines is held out for evaluation.
        count = min(MAX_DEV, max(1, round(DEV_SHARE * len(lines))))
        held_out = set(sample_rows(range(len(lines)), count))
        parts = [[x for i, x in enumerate(lines) if (i in held_out) == dev] for dev in (0, 1)]
        path, checksum = args.text, hashlib.sha256(text.encode()).hexdigest()
    else:
        path = args.data_dir
        parts, sums = zip(*(task_sentences(args, split) for split in ("train", "dev")), strict=True)
        parts = [parts[0], sample_rows(parts[1], MAX_DEV)]
        checksum = "+".join(sums)  # one for both, as they have one path in the record
    train, dev = (
        TokenizedDataset("mlm", path, [part], tokenizer, unit="sentences", checksum=checksum)
        for part in parts
    )
    print(f"{train}, and {len(dev):,} others to evaluate on")
    return train, dev


def task_sentences(args: Namespace, split: str) -> tuple[list[str], str]:
    """Every distinct sentence of the tasks' files of a split, and a checksum of the files."""
    # Labels play no role, and a sentence that occurs in many pairs counts once.
    sentences: dict[str, None] = {}
    checksums = []
    for task in find_tasks(args.tasks):
        path = args.data_dir / task.file(split)
        examples, _, checksum = read_examples(path, task, limit=args.limit)
        sentences |= dict.fromkeys(text for e in examples for text in e.texts if text.strip())
        checksums.append(checksum)
    return list(sentences), "+".join(checksums)


# ---------------------------------------------------------------------------- the loss


@dataclass
class Masking:
    """Chooses the hidden tokens of a batch from the seed, the step and its row numbers."""

    tokenizer: BertTokenizer
    args: Namespace  # `mlm_probability`, `whole_word` and `seed`

    def __post_init__(self) -> None:
        # By id: [CLS] and its like are never hidden, nor drawn as random tokens.
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        names = set(self.tokenizer.files.special.values())
        self.special = np.array([token is None or token in names for token in tokens])
        pieces = np.array([(token or "").startswith("##") for token in tokens])
        self.continues = pieces & self.args.whole_word  # else every piece counts as a word

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input ids (B, T) of a batch at a step, and the index of the N tokens to predict:
        their rows (N,) and columns (N,)."""
        # Rebuilt on the CPU: reading the GPU's copy would synchronize.
        original = batch.dataset.batch(batch.rows)
        ids, lengths = original.input_ids.numpy(), original.attention_mask.numpy().sum(axis=1)
        hidden = np.zeros(ids.shape, dtype=bool)
        for i, (row, length) in enumerate(zip(batch.rows, lengths, strict=True)):
            # A function of row and step alone, not of padding: so several processes hide the same
            # tokens as one, and a resumed run the same as an uninterrupted one.
            rng = np.random.default_rng([self.args.seed, step, int(row)])
            options = (self.continues, self.special, self.tokenizer.mask_token_id)
            chosen = hide_tokens(ids[i, :length], *options, self.args.mlm_probability, rng)
            ids[i, :length], hidden[i, :length] = chosen
        arrays, device = (ids, *hidden.nonzero()), batch.input_ids.device
        ids, *index = (torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)
        return ids, tuple(index)


@dataclass
class MaskedLMBackward:
    """Gradients of the mean cross-entropy over all hidden tokens of a step, for `Trainer`."""

    model: MaskedLM
    masking: Masking

    def __call__(self, batches: Sequence[Batch], step: int) -> Tensor:
        """Leave gradients in the model's parameters; returns the mean loss."""
        hidden_batches = [self.masking(batch, step) for batch in batches]
        # One division for all batches and processes, so that all hidden tokens have equal weight.
        counts = torch.tensor([sum(len(hidden[0]) for _, hidden in hidden_batches)])
        count = max(1, distributed.all_reduce_sum(counts).item())
        total = to_float64(self.model.head.bias.new_zeros(()))
        for batch, (ids, hidden) in zip(batches, hidden_batches, strict=True):
            if len(hidden[0]):
                logits = self.model(ids, batch.attention_mask, hidden)
                loss = F.cross_entropy(logits, batch.input_ids[hidden], reduction="sum") / count
                loss.backward()
                total += to_float64(loss.detach())
        distributed.all_reduce_gradients(list(self.model.parameters()))
        return distributed.all_reduce_sum(total)


def evaluate_model(
    model: MaskedLM, dev: TokenizedDataset, masking: Masking, batch_size: int
) -> dict[str, Any]:
    """Loss, perplexity and accuracy on hidden tokens of dev, the same ones each time."""
    # Each process sums over its own batches.
    sums = to_float64(torch.zeros(3, device=model.device))  # loss, right predictions, tokens
    with model.evaluating():
        for batch in dev.eval_batches(batch_size):
            batch = batch.to(model.device)
            ids, hidden = masking(batch, step=0)
            if len(hidden[0]):
                logits, targets = model(ids, batch.attention_mask, hidden), batch.input_ids[hidden]
                loss = F.cross_entropy(logits, targets, reduction="sum")
                right = logits.argmax(-1) == targets
                values = (loss, right.sum(), torch.ones_like(targets).sum())
                sums += torch.stack([to_float64(x) for x in values])
    loss, right, count = distributed.all_reduce_sum(sums).cpu().tolist()
    loss, accuracy = loss / max(1, count), right / max(1, count)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    return {"score": -loss, "summary": f"hidden tokens: {shown}", "metrics": metrics}


# ---------------------------------------------------------------------------- training


def load_model(args: Namespace) -> MaskedLM:
    """--model, or with --from_scratch a BERT with random weights and the tokenizer of --model."""
    rate = args.hidden_dropout_prob
    if not args.from_scratch:
        model = MaskedLM.from_pretrained(args.model, hidden_dropout_prob=rate)
        model.pooling = args.pooling
        return model
    # The proportions of BERT: a feed-forward layer of 4 D, attention heads of 64 features.
    tokenizer = BertTokenizer.from_pretrained(args.model)
    layers, width = args.from_scratch
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_SIZE,
        intermediate_size=4 * width,
        max_position_embeddings=tokenizer.max_length,
        hidden_dropout_prob=0.1 if rate is None else rate,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MaskedLM(BertModel(config), tokenizer, args.pooling)


def run_training(args: Namespace) -> dict[str, Any]:
    """Train as the command line says; returns the content of `result.json`."""
    with distributed.process_group(args):
        recorded = RunDir.check(args)
        device, dtype = setup_device(args.seed, args.device, args.precision, recorded)
        train, dev = load_datasets(args, BertTokenizer.from_pretrained(args.model))
        model = load_model(args)
        model.dtype = dtype
        distributed.broadcast_parameters(model.to(device))
        run = RunDir.start_or_resume(args, **run_facts(model, {"train": [train], "dev": [dev]}))
        with closing(run):
            print(f"run folder: {run.path} ({device}, {str(dtype).removeprefix('torch.')})")
            masking = Masking(model.tokenizer, args)
            evaluate = partial(evaluate_model, model, dev, masking, args.batch_size)
            before = evaluate()
            print(f"before training: {before['summary']}")
            # One optimizer for BERT and head: the output matrix belongs to both.
            groups = parameter_groups(model, args.weight_decay)
            mixture = TaskMixture(
                [train], args.batch_size, args.seed, args.epochs, accumulate=args.accumulate
            )
            trainer = Trainer(
                model,
                {"bert": AdamW(groups, lr=args.lr, fused=True)},
                partial(lr_factor, args.schedule, args.warmup),
                mixture,
                MaskedLMBackward(model, masking),
                evaluate,
                run,
                args,
            )
            best = trainer.fit()
            print(f"dev, best epoch {best['epoch']}: {best['summary']}")
            metrics = {"dev": {"mlm": best["metrics"]}, "before": {"mlm": before["metrics"]}}
            return trainer.finish(model_card, **metrics)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    run_training(parse_args(argv))


if __name__ == "__main__":
    cli.run_script(main)
