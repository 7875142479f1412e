"""Fine-tuning speed and memory: SST, the three tasks in turn ("mix"), and the two pair tasks.

    python benchmarks/run.py train --data_dir DATA

All train the same model on the same rows, with the same batch size, learning rate and number of
epochs. The peers (`benchmarks/peers.py`): the plain loop of the tutorials in fp32;
`transformers.Trainer` with batches grouped by length; the trainer of sentence-transformers on both
pair tasks, with mean pooling and cosine similarity. Ours is `Trainer` as `multitask_classifier.py`
uses it, without evaluating and saving. Rows are tokenised before the clock starts;
sentence-transformers tokenises as it goes, so against it ours reads and tokenises within the time.
"auto" is the default precision, for ours and the two trainers: bf16 where the hardware multiplies
faster in it, else fp32.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import peers
from benchmarks.harness import LR, TEXT, Claim, Work
from bert import BertConfig, BertModel
from datasets import TaskDataset, TaskMixture, TokenizedDataset
from engine.device import setup_device
from engine.errors import UserError
from engine.run_dir import RunDir
from engine.trainer import Trainer
from evaluation import embed_batch
from model import MultitaskBERT, SentenceEncoder
from multitask_classifier import make_backward
from optimizer import AdamW, parameter_groups
from tasks import TASKS
from tokenizer import BertTokenizer

MIX = ("sst", "para", "sts")
PAIRS = ("para", "sts")


def load(args: Namespace, names: Sequence[str]) -> list[TaskDataset]:
    """The training sets of these tasks, of equal size: an epoch is a pass over the smallest."""
    tokenizer = BertTokenizer.from_pretrained(args.model)
    datasets = []
    for task in map(TASKS.get, names):
        path = args.data_dir / task.files.format("train")
        datasets.append(TaskDataset(path, task, tokenizer, limit=args.rows))
    if len({len(dataset) for dataset in datasets}) > 1:
        raise UserError(f"--rows {args.rows}: more than the smallest file has; give fewer")
    return datasets


def token_counts(datasets: Sequence[TokenizedDataset]) -> list[int]:
    """The number of tokens of every sentence."""
    return [len(ids) for dataset in datasets for column in dataset.token_ids for ids in column]


def plain(args: Namespace, names: Sequence[str], config: BertConfig | None = None) -> Work:
    """The plain loop, the tasks in turn; with a `config`, on random weights."""
    loop = peers.PlainLoop(args, config)
    datasets = load(args, names)
    loaders = [
        loop.batches(list(zip(*(e.texts for e in d.examples), strict=True)), d.labels.tolist())
        for d in datasets
    ]
    heads = [nn.Linear(loop.width, d.task.labels.num_logits).to(args.device) for d in datasets]
    dropout = nn.Dropout(0.1)
    step = loop.optimize(loop.bert, *heads)

    def epoch() -> None:
        for batches in zip(*loaders, strict=True):
            for dataset, head, (inputs, labels) in zip(datasets, heads, batches, strict=True):
                vectors = [loop.bert(**side).pooler_output for side in inputs]
                vector = vectors[0] if len(vectors) == 1 else vectors[0] * vectors[1]
                step(dataset.task.labels.loss(head(dropout(vector)), labels).mean())

    return Work(epoch, sum(map(len, datasets)))


def st_trainer(args: Namespace) -> Work:
    """The trainer of sentence-transformers on both pair tasks."""
    tables = {}
    for dataset in load(args, PAIRS):
        a, b = zip(*(example.texts for example in dataset.examples), strict=True)
        labels = (dataset.labels.double() / dataset.labels.max()).tolist()
        tables[dataset.name] = {"sentence1": a, "sentence2": b, "label": labels}
    return peers.st_trainer(args, tables, lambda losses, bert: losses.CosineSimilarityLoss(bert))


def epoch_of(
    args: Namespace,
    model: SentenceEncoder,
    backward: Callable[[Sequence[Any], int], float],
    load_datasets: Callable[[], list[TokenizedDataset]],
) -> Callable[[], None]:
    """A function that trains for an epoch, neither evaluating nor saving, as the peers."""
    model.save_pretrained = lambda folder: None
    modules = {"bert": model.bert, **getattr(model, "heads", {})}
    optimizers = {
        name: AdamW(parameter_groups(module, 0.01), lr=LR, fused=True)
        for name, module in modules.items()
    }
    run_dir = Path(tempfile.mkdtemp(dir=args.scratch)) / "run"
    settings = {"epochs": 1, "clip": 1.0, "eval_every": 0, "patience": 0, "save_every": "0"}
    settings = Namespace(**settings, seed=0, run_dir=run_dir, resume=False)
    run = RunDir.start_or_resume(settings, data={})
    run.save_state = lambda tensors, facts: None

    def epoch() -> None:
        mixture = TaskMixture(load_datasets(), args.batch_size, seed=0, epochs=1)
        evaluate = lambda: {"score": 0.0, "summary": ""}  # noqa: E731
        constant = lambda step, total: 1.0  # noqa: E731
        Trainer(model, optimizers, constant, mixture, backward, evaluate, run, settings).fit()

    return epoch


def ours(
    args: Namespace,
    names: Sequence[str],
    precision: str,
    config: BertConfig | None = None,
    from_text: bool = False,
) -> Work:
    """Ours; with a `config`, on random weights; `from_text`, with mean pooling and cosine heads."""
    device, dtype = setup_device(0, args.device, precision)
    datasets = load(args, names)
    model = MultitaskBERT(
        BertModel.from_pretrained(args.model) if config is None else BertModel(config),
        [TASKS[name] for name in names],
        dict.fromkeys(names, "cosine") if from_text else None,
        pooling="mean" if from_text else "pooler",
    ).to(device)
    model.dtype = dtype
    method = Namespace(surgery="none", leave_out=None)
    backward = make_backward(method, model, partial(embed_batch, model))
    epoch = epoch_of(args, model, backward, lambda: load(args, names) if from_text else datasets)
    rows, lengths = sum(map(len, datasets)), token_counts(datasets)
    return Work(epoch, rows, model.bert.config, lengths, dtype, pooling=model.pooling)


SETTINGS = {**TEXT, "rows": 640, "batch_size": 32}
UNIT = "rows"
CONTESTANTS = {
    "SST, plain, fp32": partial(plain, names=["sst"]),
    "SST, Trainer, auto": lambda args: peers.hf_trainer(args, *load(args, ["sst"])),
    "SST, ours, fp32": partial(ours, names=["sst"], precision="fp32"),
    "SST, ours, auto": partial(ours, names=["sst"], precision="auto"),
    "mix, plain, fp32": partial(plain, names=MIX),
    "mix, ours, fp32": partial(ours, names=MIX, precision="fp32"),
    "mix, ours, auto": partial(ours, names=MIX, precision="auto"),
    "pairs, sentence-transformers, auto": st_trainer,
    "pairs, ours, auto": partial(ours, names=PAIRS, precision="auto", from_text=True),
}
CLAIMS = []
for what in ("SST", "mix"):
    peer, fp32, auto = (f"{what}, {name}" for name in ("plain, fp32", "ours, fp32", "ours, auto"))
    to_peer = "to plain loop fp32"
    CLAIMS += [
        Claim(f"fine-tune {what}, default precision, {to_peer}", auto, peer, target=">= 3.5"),
        Claim(f"fine-tune {what}, fp32, {to_peer}", fp32, peer, target=">= 1.8"),
        Claim(f"peak memory, fine-tune {what}, fp32, {to_peer}", fp32, peer, "memory", "<= 0.8"),
    ]
CLAIMS += [
    Claim(
        "fine-tune SST, default precision, to Trainer grouped by length, same precision",
        "SST, ours, auto",
        "SST, Trainer, auto",
        target=">= 1.3",
    ),
    Claim(
        "fine-tune pairs from text, to sentence-transformers' trainer, same precision",
        "pairs, ours, auto",
        "pairs, sentence-transformers, auto",
    ),
]
for precision in ("fp32", "auto"):
    what = f"useful FLOP rate to matrix rate, fine-tune SST, {precision}"
    CLAIMS.append(Claim(what, f"SST, ours, {precision}", metric="quotient", target=">= 0.6"))
