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

from benchmarks.harness import LR, Work, bert_config, leave_project
from datasets import TaskDataset
from engine.device import prefers_bf16


class PlainLoop:
    """A model and what its training loop needs; with a `size`, the weights are random."""

    def __init__(self, args: Namespace, size: str = ""):
        import transformers

        torch.manual_seed(0)  # for random weights, order of rows and dropout
        self.args = args
        self.tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
        if size:
            bert = transformers.BertModel(transformers.BertConfig(**vars(bert_config(size))))
        else:
            bert = transformers.BertModel.from_pretrained(args.model)
        self.bert = bert.to(args.device).train()
        self.width = bert.config.hidden_size

    def batches(
        self, columns: Sequence[Sequence[str]], labels: Tensor, shuffle: bool = True
    ) -> torch.utils.data.DataLoader:
        """Batches of (a padded batch per column, labels)."""
        encoded = [self.tokenizer(list(column), truncation=True) for column in columns]

        def collate(rows: list[int]) -> tuple[list[Any], Tensor]:
            sides = [{key: [side[key][row] for row in rows] for key in side} for side in encoded]
            padded = [self.tokenizer.pad(side, return_tensors="pt") for side in sides]
            return [side.to(self.args.device) for side in padded], labels[rows].to(self.args.device)

        rows, batch_size = range(len(labels)), self.args.batch_size
        return torch.utils.data.DataLoader(rows, batch_size, shuffle, collate_fn=collate)

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
    settings = {"output_dir": tempfile.mkdtemp(dir=args.scratch), "num_train_epochs": 1}
    settings |= {"per_device_train_batch_size": args.batch_size, "learning_rate": LR}
    settings |= {"optim": "adamw_torch_fused", "bf16": prefers_bf16(args.device)}
    settings |= {"use_cpu": args.device == "cpu", "dataloader_pin_memory": args.device == "cuda"}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    return {**settings, "disable_tqdm": True}


def hf_trainer(args: Namespace, dataset: TaskDataset) -> Work:
    """`transformers.Trainer` with a classification head."""
    leave_project()
    import transformers

    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    model = transformers.BertForSequenceClassification.from_pretrained(args.model, num_labels=5)
    encoded = tokenizer([example.texts[0] for example in dataset.examples], truncation=True)
    # The collator makes the attention mask.
    labelled = zip(encoded["input_ids"], dataset.labels.tolist(), strict=True)
    rows = [{"input_ids": ids, "label": label} for ids, label in labelled]
    settings = {**trainer_settings(args), "train_sampling_strategy": "group_by_length"}
    settings = transformers.TrainingArguments(**settings)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, settings, train_dataset=rows, data_collator=collate)
    return Work(trainer.train, len(rows))


def st_trainer(
    args: Namespace, tables: dict[str, dict[str, Sequence[Any]]], loss: str, **options: Any
) -> Work:
    """`SentenceTransformerTrainer` on tables of texts in turn, with a loss of that library."""
    leave_project()
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    import datasets  # the library

    model = st.SentenceTransformer(args.model, device=args.device)
    data = {name: datasets.Dataset.from_dict(table) for name, table in tables.items()}
    rows = sum(map(len, data.values()))
    # A single table is passed as it is, several by name, to be sampled from in turn.
    data = data if len(data) > 1 else next(iter(data.values()))
    settings = {**trainer_settings(args), "multi_dataset_batch_sampler": "round_robin"}
    settings = st.SentenceTransformerTrainingArguments(**settings)
    loss = getattr(losses, loss)(model, **options)
    trainer = st.SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss)
    return Work(trainer.train, rows)
