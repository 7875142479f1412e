"""Fine-tuning speed and memory: SST, the three-task mix, and the pair tasks.

    python benchmarks/train.py --data_dir DATA

The same model, rows, batch size, learning rate and passes for all. Peers:

- plain: the loop that tutorials show. `transformers.BertModel` with its defaults (SDPA attention),
  fp32, shuffled batches padded to their longest sentence, fused `torch.optim.AdamW`.
- Trainer: `transformers.Trainer` at its best usual settings, batches of like length and "auto".
- sentence-transformers: its trainer on both pair sets in turn, mean pooling and cosines.

Ours is `train.train` itself. Rows are tokenised before the clock starts; against
sentence-transformers, which tokenises as it goes, ours does so within the time. "auto" is the
default precision: bf16 where the machine multiplies faster in it, else fp32, for ours and for
the trainers alike. `--device cuda` runs all of it on a GPU, where nothing has been
measured yet.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import (
    LR,
    TEXTS,
    Benchmark,
    Claim,
    Work,
    leave_project,
    main,
    need,
    useful_flops,
)
from options import script

MIX = ("sst", "para", "sts")
PAIRS = ("para", "sts")


def load(args: Namespace, names: Sequence[str]) -> list[Any]:
    """The training sets (`datasets.TaskData`) of these tasks."""
    from datasets import TaskData
    from tasks import TASKS
    from tokenizer import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(args.model)
    paths = {name: args.data_dir / TASKS[name].files.format("train") for name in names}
    return [TaskData(paths[name], TASKS[name], tokenizer, limit=args.rows) for name in names]


def token_counts(sets: Sequence[Any]) -> list[int]:
    """Tokens of every sentence."""
    return [len(ids) for data in sets for column in data.ids for ids in column]


def sized(sets: Sequence[Any], args: Namespace, config: Any, pooling: str) -> dict[str, Any]:
    """How much work a pass over the sets is: what `Work` asks for."""
    if len({len(data) for data in sets}) > 1:  # an epoch is a pass over the smallest
        raise ValueError("--rows is more than the smallest file has: give fewer")
    lengths, rows = token_counts(sets), sum(map(len, sets))
    return {
        "units": rows,
        "flops": useful_flops(config, lengths, pooling=pooling),
        "config": config,
        "tokens": max(1, sum(lengths) * min(args.batch_size, rows) // rows),
    }


def peer_plain(args: Namespace, names: Sequence[str], config: Any = None) -> Work:
    """The plain loop, the tasks in turn; with a `config`, on random weights."""
    import torch
    import transformers
    from torch import nn

    from tasks import TASKS

    torch.manual_seed(0)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    if config is None:
        bert = transformers.BertModel.from_pretrained(args.model)
    else:
        bert = transformers.BertModel(transformers.BertConfig(**vars(config)))
    heads = {name: nn.Linear(bert.config.hidden_size, TASKS[name].outputs) for name in names}
    modules = nn.ModuleList([bert, *heads.values()]).to(args.device).train()
    dropout = nn.Dropout(0.1)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

    def collate(rows: list[tuple]) -> tuple:
        *columns, labels = zip(*rows, strict=True)
        padded = [tokenizer.pad(list(column), return_tensors="pt") for column in columns]
        return [batch.to(args.device) for batch in padded], torch.stack(labels).to(args.device)

    def loader(data: Any) -> torch.utils.data.DataLoader:
        columns = zip(*(example.texts for example in data.examples), strict=True)
        encoded = [tokenizer(list(column), truncation=True) for column in columns]
        rows = [
            (*({key: side[key][i] for key in side} for side in encoded), data.labels[i])
            for i in range(len(data))
        ]
        return torch.utils.data.DataLoader(
            rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate
        )

    sets = load(args, names)
    loaders = {data.name: loader(data) for data in sets}

    def epoch() -> None:
        for batches in zip(*loaders.values(), strict=True):
            for name, (inputs, labels) in zip(loaders, batches, strict=True):
                vectors = [bert(**side).pooler_output for side in inputs]
                vector = vectors[0] if len(vectors) == 1 else vectors[0] * vectors[1]
                loss = TASKS[name].loss(heads[name](dropout(vector)), labels).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()

    return Work(epoch, **sized(sets, args, bert.config, "pooler"))


def peer_trainer(args: Namespace) -> Work:
    """`transformers.Trainer` on SST."""
    need("accelerate")
    [data] = load(args, ["sst"])
    dtype = default_dtype(args)
    leave_project()
    import transformers

    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    model = transformers.BertForSequenceClassification.from_pretrained(args.model, num_labels=5)
    encoded = tokenizer([example.texts[0] for example in data.examples], truncation=True)
    rows = [
        {**{key: encoded[key][i] for key in encoded}, "label": int(data.labels[i])}
        for i in range(len(data))
    ]
    settings = transformers.TrainingArguments(
        **trainer_settings(args),
        bf16=dtype == "bfloat16",
        train_sampling_strategy="group_by_length",
    )
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    return Work(trainer.train, **sized([data], args, model.config, "pooler"), dtype=dtype)


def default_dtype(args: Namespace) -> str:
    """The dtype of matrix products that is faster here, for a peer."""
    import torch

    from train import prepare

    _, dtype = prepare(0, args.device, "auto")
    torch.set_deterministic_debug_mode("default")  # which peers do not ask for
    return named(dtype)


def trainer_settings(args: Namespace) -> dict[str, Any]:
    """What both trainers are told: one epoch, and nothing but training."""
    return {
        "output_dir": tempfile.mkdtemp(dir=args.scratch),
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "optim": "adamw_torch_fused",
        "use_cpu": args.device == "cpu",
        "dataloader_pin_memory": args.device == "cuda",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def peer_sentence_transformers(args: Namespace) -> Work:
    """`SentenceTransformerTrainer` on both pair sets in turn, from text."""
    need("accelerate", "datasets")
    dtype = default_dtype(args)
    sets = load(args, PAIRS)
    leave_project()
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    import datasets  # the library

    model = st.SentenceTransformer(args.model, device=args.device)

    def table(data: Any) -> datasets.Dataset:
        a, b = zip(*(example.texts for example in data.examples), strict=True)
        labels = (data.labels.double() / data.labels.max()).tolist()
        return datasets.Dataset.from_dict({"sentence1": a, "sentence2": b, "label": labels})

    settings = st.SentenceTransformerTrainingArguments(
        **trainer_settings(args),
        bf16=dtype == "bfloat16",
        multi_dataset_batch_sampler="round_robin",
    )
    trainer = st.SentenceTransformerTrainer(
        model,
        settings,
        train_dataset={data.name: table(data) for data in sets},
        loss=losses.CosineSimilarityLoss(model),
    )
    config = model[0].auto_model.config
    return Work(trainer.train, **sized(sets, args, config, "mean"), dtype=dtype)


def named(dtype: Any) -> str:
    """A dtype's name: torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


def ours(
    args: Namespace,
    names: Sequence[str],
    precision: str,
    config: Any = None,
    cosines: bool = False,
) -> Work:
    """This project's loop; with a `config`, on random weights; with `cosines`, from text."""
    from bert import BertModel
    from checkpoint import Run
    from datasets import Mixture
    from optimizer import AdamW, parameter_groups
    from scoring import embed
    from tasks import TASKS, MultitaskBERT
    from train import prepare, summed, train

    device, dtype = prepare(0, args.device, precision)
    sets = load(args, names)
    model = MultitaskBERT(
        BertModel.from_pretrained(args.model) if config is None else BertModel(config),
        [TASKS[name] for name in names],
        dict.fromkeys(names, "cosine") if cosines else None,
        pooling="mean" if cosines else "pooler",
    ).to(device)
    model.precision = dtype
    model.save_pretrained = lambda folder: None  # the peers save nothing
    modules = {"bert": model.bert, **model.heads}
    optimizers = {
        name: AdamW(parameter_groups(module, 0.01), lr=LR) for name, module in modules.items()
    }
    recipe = Namespace(
        epochs=1, schedule="constant", warmup=0, clip=1, eval_every=0, patience=0, save_every="0"
    )
    run = Run.begin(Path(tempfile.mkdtemp(dir=args.scratch)) / "run", {})
    run.save_state = lambda tensors, facts: None

    def epoch() -> None:
        train(
            model,
            summed(
                lambda batch: TASKS[batch.task].loss(
                    model.decode(batch.task, embed(model, batch)), batch.labels
                )
            ),
            Mixture(load(args, names) if cosines else sets, args.batch_size, 0, 1),
            optimizers,
            lambda: {"score": 0.0, "summary": ""},
            run,
            recipe,
        )

    return Work(epoch, **sized(sets, args, model.bert.config, model.pooling), dtype=named(dtype))


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "rows",
    {
        "SST, plain, fp32": partial(peer_plain, names=["sst"]),
        "SST, Trainer, auto": peer_trainer,
        "SST, ours, fp32": partial(ours, names=["sst"], precision="fp32"),
        "SST, ours, auto": partial(ours, names=["sst"], precision="auto"),
        "mix, plain, fp32": partial(peer_plain, names=MIX),
        "mix, ours, fp32": partial(ours, names=MIX, precision="fp32"),
        "mix, ours, auto": partial(ours, names=MIX, precision="auto"),
        "pairs, sentence-transformers, auto": peer_sentence_transformers,
        "pairs, ours, auto": partial(ours, names=PAIRS, precision="auto", cosines=True),
    },
    [
        *(
            claim
            for what in ("SST", "mix")
            for claim in (
                Claim(
                    f"fine-tune {what}, default precision, to plain loop fp32",
                    f"{what}, ours, auto",
                    f"{what}, plain, fp32",
                    target=">= 3.5",
                ),
                Claim(
                    f"fine-tune {what}, fp32, to plain loop fp32",
                    f"{what}, ours, fp32",
                    f"{what}, plain, fp32",
                    target=">= 1.8",
                ),
                Claim(
                    f"peak memory, fine-tune {what}, fp32, to plain loop fp32",
                    f"{what}, ours, fp32",
                    f"{what}, plain, fp32",
                    "memory",
                    "<= 0.8",
                ),
            )
        ),
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
        *(
            Claim(
                f"useful FLOP rate to matrix rate, fine-tune SST, {precision}",
                f"SST, ours, {precision}",
                None,
                "quotient",
                ">= 0.6",
            )
            for precision in ("fp32", "auto")
        ),
    ],
    {**TEXTS, "rows": 640, "batch_size": 32, "passes": 1, "device": "cpu"},
    {"rows": 64},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
