"""Contrastive training on NLI triples: speed and memory.

    python benchmarks/simcse.py --data_dir DATA

Supervised SimCSE with mean pooling at a temperature of 0.05, one loss over all rows of a batch.
Peers: a plain loop (`transformers.BertModel` with SDPA attention, fp32, shuffled batches padded to
their longest sentence, fused `torch.optim.AdamW`), and sentence-transformers' trainer with its
MultipleNegativesRankingLoss. Ours is `contrastive.Contrast` in `train.train`. Rows are tokenised
before the clock starts, but within the time by sentence-transformers, as it goes; "from text" is
ours with that. "auto" is the default precision, sentence-transformers' too.
"""

import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import LR, TEXTS, Benchmark, Claim, Work, leave_project, main, need
from benchmarks.train import default_dtype, named, sized, trainer_settings
from options import script

FILE = "nli_for_simcse.csv"
TEMPERATURE = 0.05


def load(args: Namespace) -> Any:
    """The triples (`datasets.Sentences`)."""
    from datasets import Sentences, read_triples
    from tokenizer import BertTokenizer

    triples = read_triples(args.data_dir / FILE, args.rows)
    columns = list(zip(*triples, strict=True))
    tokenizer = BertTokenizer.from_pretrained(args.model)
    return Sentences("nli", args.data_dir / FILE, columns, tokenizer, least=2)


def peer_plain(args: Namespace) -> Work:
    """The plain loop."""
    import torch
    import transformers

    from datasets import read_triples

    torch.manual_seed(0)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    bert = transformers.BertModel.from_pretrained(args.model).train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=LR, fused=True)
    columns = zip(*read_triples(args.data_dir / FILE, args.rows), strict=True)
    encoded = [tokenizer(list(column), truncation=True) for column in columns]
    rows = [
        [{key: side[key][i] for key in side} for side in encoded]
        for i in range(len(encoded[0]["input_ids"]))
    ]

    def collate(rows: list) -> list:
        return [tokenizer.pad(list(side), return_tensors="pt") for side in zip(*rows, strict=True)]

    loader = torch.utils.data.DataLoader(
        rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate
    )

    def vector(batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"][:, :, None]
        mean = (bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def epoch() -> None:
        for batch in loader:
            anchors, positives, negatives = (vector(side) for side in batch)
            scores = anchors @ torch.cat([positives, negatives]).T / TEMPERATURE
            loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(anchors)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
            optimizer.step()

    return Work(epoch, **sized([load(args)], args, bert.config, "mean"))


def peer_sentence_transformers(args: Namespace) -> Work:
    """`SentenceTransformerTrainer`, from text."""
    need("accelerate", "datasets")
    from datasets import NLI_COLUMNS, read_triples

    dtype = default_dtype(args)
    triples = list(zip(*read_triples(args.data_dir / FILE, args.rows), strict=True))
    size = partial(sized, [load(args)], args)
    leave_project()
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    import datasets  # the library

    model = st.SentenceTransformer(args.model, device=args.device)
    trainer = st.SentenceTransformerTrainer(
        model,
        st.SentenceTransformerTrainingArguments(**trainer_settings(args), bf16=dtype == "bfloat16"),
        train_dataset=datasets.Dataset.from_dict(dict(zip(NLI_COLUMNS, triples, strict=True))),
        loss=losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
    )
    return Work(trainer.train, **size(model[0].auto_model.config, "mean"), dtype=dtype)


def ours_simcse(args: Namespace, precision: str, from_text: bool = False) -> Work:
    """This project's loop."""
    from bert import BertModel
    from checkpoint import Run
    from contrastive import Contrast
    from datasets import Mixture
    from optimizer import AdamW, parameter_groups
    from tasks import MultitaskBERT
    from train import prepare, train

    device, dtype = prepare(0, args.device, precision)
    model = MultitaskBERT(BertModel.from_pretrained(args.model), [], pooling="mean").to(device)
    model.precision = dtype
    model.save_pretrained = lambda folder: None  # the peers save nothing
    optimizers = {"bert": AdamW(parameter_groups(model.bert, 0.01), lr=LR)}
    loss = {"pooling": "mean", "temperature": TEMPERATURE, "hard_negative_weight": 1.0}
    recipe = {"schedule": "constant", "warmup": 0, "clip": 1, "eval_every": 0, "patience": 0}
    settings = Namespace(**loss, **recipe, epochs=1, save_every="0")
    run = Run.begin(Path(tempfile.mkdtemp(dir=args.scratch)) / "run", {})
    run.save_state = lambda tensors, facts: None
    data = load(args)

    def epoch() -> None:
        train(
            model,
            Contrast(model, settings),
            Mixture([load(args) if from_text else data], args.batch_size, 0, 1),
            optimizers,
            lambda: {"score": 0.0, "summary": ""},
            run,
            settings,
        )

    return Work(epoch, **sized([data], args, model.bert.config, "mean"), dtype=named(dtype))


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "rows",
    {
        "plain, fp32": peer_plain,
        "sentence-transformers, auto": peer_sentence_transformers,
        "ours, fp32": partial(ours_simcse, precision="fp32"),
        "ours, auto": partial(ours_simcse, precision="auto"),
        "ours, auto, from text": partial(ours_simcse, precision="auto", from_text=True),
    },
    [
        Claim("SimCSE, default precision, to plain loop fp32", "ours, auto", "plain, fp32"),
        Claim("SimCSE, fp32, to plain loop fp32", "ours, fp32", "plain, fp32"),
        Claim(
            "SimCSE from text, to sentence-transformers' trainer, same precision",
            "ours, auto, from text",
            "sentence-transformers, auto",
        ),
        Claim("useful FLOP rate to matrix rate, SimCSE, fp32", "ours, fp32", None, "quotient"),
        Claim("peak memory, SimCSE, fp32, to plain loop", "ours, fp32", "plain, fp32", "memory"),
    ],
    {**TEXTS, "rows": 320, "batch_size": 32},
    {"rows": 64},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
