"""Fine-tuning speed and memory: SST, the three tasks in turn ("mix"), and the two pair tasks.

    python benchmarks/run.py train --data_dir DATA

All train the same model on the same rows, with the same batch size, learning rate and number of
epochs. The peers (`benchmarks/peers.py`): the plain loop of tutorials in fp32;
`transformers.Trainer` with batches grouped by length; the trainer of sentence-transformers on both
pair tasks, with mean pooling and cosine similarity. Ours is `Trainer` as in
`multitask_classifier.py`, without evaluating and saving. Rows are tokenised before the clock
starts. Only sentence-transformers tokenises during training; compared with it, our time includes
reading and tokenising, too.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import nn

import classifier
from benchmarks import peers
from benchmarks.harness import LR, TEXT, Claim, Work, bert_config, classifier_flags, flop_rates
from bert import BertModel
from datasets import TaskDataset, TokenizedDataset
from engine.device import setup_device
from engine.errors import UserError
from engine.mixture import TaskMixture
from engine.run_dir import RunDir
from engine.trainer import Trainer
from model import MultitaskBERT, SentenceEncoder
from multitask_classifier import Backward, make_backward
from optimizer import AdamW, lr_factor, parameter_groups
from prediction import embed_batch
from tasks import TASKS
from tokenizer import BertTokenizer

SST, MIX, PAIRS = ("sst",), ("sst", "para", "sts"), ("para", "sts")


def load(args: Namespace, names: Sequence[str]) -> list[TaskDataset]:
    """The training sets of these tasks, of equal size: an epoch is a pass over the smallest."""
    tokenizer = BertTokenizer.from_pretrained(args.model)
    datasets = []
    for task in map(TASKS.get, names):
        path = args.data_dir / task.file("train")
        datasets.append(TaskDataset(path, task, tokenizer, limit=args.rows))
    if len(set(map(len, datasets))) > 1:
        raise UserError(f"--rows {args.rows}: more than the smallest file has; give fewer")
    return datasets


def token_counts(datasets: Sequence[TokenizedDataset]) -> list[int]:
    """The number of tokens of every sentence."""
    return [len(ids) for dataset in datasets for column in dataset.token_ids for ids in column]


def plain(args: Namespace, names: Sequence[str], size: str = "") -> Work:
    """The plain loop, the tasks in turn; with a `size`, on random weights."""
    loop = peers.PlainLoop(args, size)
    datasets = load(args, names)
    columns = [list(zip(*(e.texts for e in d.examples), strict=True)) for d in datasets]
    loaders = [loop.batches(c, d.labels) for c, d in zip(columns, datasets, strict=True)]
    heads = [nn.Linear(loop.width, d.task.labels.num_logits).to(args.device) for d in datasets]
    dropout = nn.Dropout(0.1)
    step = loop.optimize(loop.bert, *heads)

    def epoch() -> None:
        for batches in zip(*loaders, strict=True):
            for dataset, head, (inputs, labels) in zip(datasets, heads, batches, strict=True):
                # The head of a pair gets the product of its embeddings, as our "dot" decoder.
                vectors = [loop.bert(**side).pooler_output for side in inputs]
                vector = vectors[0] if len(vectors) == 1 else vectors[0] * vectors[1]
                step(dataset.task.labels.loss(head(dropout(vector)), labels).mean())

    return Work(epoch, sum(map(len, datasets)))


def st_trainer(args: Namespace) -> Work:
    """The trainer of sentence-transformers on both pair tasks."""
    tables = {}
    for dataset in load(args, PAIRS):
        a, b = zip(*(example.texts for example in dataset.examples), strict=True)
        # Labels from 0 to 1, as the loss compares them with cosines.
        labels = (dataset.labels.double() / dataset.labels.max()).tolist()
        tables[dataset.name] = {"sentence1": a, "sentence2": b, "label": labels}
    return peers.st_trainer(args, tables, "CosineSimilarityLoss")


def train_epochs(
    args: Namespace, model: SentenceEncoder, backward: Backward, read: Callable[[], list]
) -> Work:
    """Epochs of `Trainer` on the sets that `read` returns, without evaluating and saving."""
    datasets = read()
    lengths, rows = token_counts(datasets), sum(map(len, datasets))
    flags = classifier_flags(args, option="finetune", epochs=1, seed=0, save_every=0)
    settings = classifier.parse_args(flags)
    run = RunDir.start_or_resume(settings, data={})
    # The peers neither evaluate nor save while the clock runs, nor does a learning rate change.
    run.save_state = model.save_pretrained = lambda *ignored: None
    modules = {"bert": model.bert, **getattr(model, "heads", {})}
    groups = {name: parameter_groups(module, 0.01) for name, module in modules.items()}
    optimizers = {name: AdamW(group, lr=LR, fused=True) for name, group in groups.items()}
    factor, evaluate = partial(lr_factor, "constant", 0.0), {"score": 0.0, "summary": ""}.copy

    def epoch() -> None:
        mixture = TaskMixture(read(), args.batch_size, seed=0, epochs=1)
        Trainer(model, optimizers, factor, mixture, backward, evaluate, run, settings).fit()

    return Work(epoch, rows, partial(flop_rates, args, model, lengths, rows, True))


def ours(
    args: Namespace, names: Sequence[str], precision: str, size: str = "", from_text: bool = False
) -> Work:
    """Ours; with a `size`, on random weights; `from_text`, with mean pooling and cosine heads."""
    device, dtype = setup_device(0, args.device, precision)
    read = partial(load, args, names)
    bert = BertModel(bert_config(size)) if size else BertModel.from_pretrained(args.model)
    decoders, pooling = (dict.fromkeys(names, "cosine"), "mean") if from_text else (None, "pooler")
    model = MultitaskBERT(bert, [TASKS[name] for name in names], decoders, pooling).to(device)
    model.dtype = dtype
    # One task per step, and its plain gradient: the default method.
    method = Namespace(surgery="none", leave_out=None, rdrop=0.0)
    backward = make_backward(method, model, partial(embed_batch, model))
    # Cached, rows are read and tokenised before the clock starts.
    return train_epochs(args, model, backward, read if from_text else cache(read))


SETTINGS = {**TEXT, "rows": 640, "batch_size": 32, "device": "cpu"}
UNIT = "rows"
HF, ST = "SST, Trainer, auto", "pairs, sentence-transformers, auto"
CONTESTANTS = {
    "SST, plain, fp32": partial(plain, names=SST),
    HF: lambda args: peers.hf_trainer(args, *load(args, SST)),
    "SST, ours, fp32": partial(ours, names=SST, precision="fp32"),
    "SST, ours, auto": partial(ours, names=SST, precision="auto"),
    "mix, plain, fp32": partial(plain, names=MIX),
    "mix, ours, fp32": partial(ours, names=MIX, precision="fp32"),
    "mix, ours, auto": partial(ours, names=MIX, precision="auto"),
    ST: st_trainer,
    "pairs, ours, auto": partial(ours, names=PAIRS, precision="auto", from_text=True),
}
TO_HF = "to Trainer grouped by length, same precision"
TO_ST = "to sentence-transformers' trainer, same precision"
TO_PLAIN, RATE = "to plain loop fp32", "useful FLOP rate to matrix rate"
CLAIMS = []
for job in ("SST", "mix"):
    peer, fp32, auto = f"{job}, plain, fp32", f"{job}, ours, fp32", f"{job}, ours, auto"
    CLAIMS += [
        Claim(f"fine-tune {job}, default precision, {TO_PLAIN}", auto, peer, target=">= 3.5"),
        Claim(f"fine-tune {job}, fp32, {TO_PLAIN}", fp32, peer, target=">= 1.8"),
        Claim(f"peak memory, fine-tune {job}, fp32, {TO_PLAIN}", fp32, peer, "memory", "<= 0.8"),
    ]
CLAIMS += [
    Claim(f"fine-tune SST, default precision, {TO_HF}", "SST, ours, auto", HF, target=">= 1.3"),
    Claim(f"fine-tune pairs from text, {TO_ST}", "pairs, ours, auto", ST),
    Claim(f"{RATE}, fine-tune SST, fp32", "SST, ours, fp32", None, "quotient", ">= 0.6"),
    Claim(f"{RATE}, fine-tune SST, auto", "SST, ours, auto", None, "quotient", ">= 0.6"),
]
