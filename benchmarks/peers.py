"""The other implementations that training is compared with.

- `PlainLoop`, the loop of the tutorials: `transformers.BertModel` with its defaults (SDPA
  attention), fp32, shuffled batches padded to their longest sentence, fused `torch.optim.AdamW`.
- `transformers.Trainer`, batches grouped by length, and the trainer of sentence-transformers, both
  in our default precision ("auto"): bf16 where the hardware multiplies faster in it, else fp32.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import LR, Work, leave_project
from bert import BertConfig
from datasets import TaskDataset
from engine.device import prefers_bf16


class PlainLoop:
    """A model and what its training loop needs; with a `config`, the weights are random."""

    def __init__(self, args: Namespace, config: BertConfig | None = None):
        import transformers

        torch.manual_seed(0)
        self.args = args
        self.tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
        if config is None:
            bert = transformers.BertModel.from_pretrained(args.model)
        else:
            bert = transformers.BertModel(transformers.BertConfig(**vars(config)))
        self.bert = bert.to(args.device).train()
        self.width = bert.config.hidden_size

    def batches(
        self, columns: Sequence[Sequence[str]], labels: Sequence[Any], shuffle: bool = True
    ) -> torch.utils.data.DataLoader:
        """Batches of (a padded batch per column, labels)."""
        encoded = [self.tokenizer(list(column), truncation=True) for column in columns]
        rows = [
            ([{key: side[key][i] for key in side} for side in encoded], label)
            for i, label in enumerate(labels)
        ]

        def collate(rows: list[tuple]) -> tuple[list[Any], Tensor]:
            sides, labels = zip(*rows, strict=True)
            padded = [
                self.tokenizer.pad(list(column), return_tensors="pt").to(self.args.device)
                for column in zip(*sides, strict=True)
            ]
            return padded, torch.tensor(labels, device=self.args.device)

        return torch.utils.data.DataLoader(
            rows, batch_size=self.args.batch_size, shuffle=shuffle, collate_fn=collate
        )

    def optimize(self, *modules: nn.Module, lr: float = LR) -> Callable[[Tensor], None]:
        """A function that takes an optimizer step on these modules for a loss."""
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)

        def step(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return step


def trainer_settings(args: Namespace) -> dict[str, Any]:
    """The arguments of both trainers: one epoch, and nothing but training."""
    return {
        "output_dir": tempfile.mkdtemp(dir=args.scratch),
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "optim": "adamw_torch_fused",
        "bf16": prefers_bf16(args.device),
        "use_cpu": args.device == "cpu",
        "dataloader_pin_memory": args.device == "cuda",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def hf_trainer(args: Namespace, dataset: TaskDataset) -> Work:
    """`transformers.Trainer` with a classification head."""
    leave_project()
    import transformers

    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    model = transformers.BertForSequenceClassification.from_pretrained(args.model, num_labels=5)
    encoded = tokenizer([example.texts[0] for example in dataset.examples], truncation=True)
    rows = [
        {**{key: encoded[key][i] for key in encoded}, "label": int(dataset.labels[i])}
        for i in range(len(dataset))
    ]
    settings = transformers.TrainingArguments(
        **trainer_settings(args), train_sampling_strategy="group_by_length"
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, settings, train_dataset=rows, data_collator=collate)
    return Work(trainer.train, len(dataset))


def st_trainer(
    args: Namespace,
    tables: dict[str, dict[str, Sequence[Any]]],
    make_loss: Callable[[Any, Any], nn.Module],
) -> Work:
    """`SentenceTransformerTrainer` on tables of texts in turn; (losses, model) -> the loss."""
    leave_project()
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    import datasets  # the library

    model = st.SentenceTransformer(args.model, device=args.device)
    data = {name: datasets.Dataset.from_dict(table) for name, table in tables.items()}
    settings = st.SentenceTransformerTrainingArguments(
        **trainer_settings(args), multi_dataset_batch_sampler="round_robin"
    )
    trainer = st.SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=data if len(data) > 1 else next(iter(data.values())),
        loss=make_loss(losses, model),
    )
    return Work(trainer.train, sum(map(len, data.values())))
