"""Ten epochs of linear probing on SST, from the files' text to dev scores.

    python benchmarks/probe.py --data_dir DATA

Ours is the job of `classifier.py --option pretrain`, the run folder that it writes included: a
frozen encoder runs once over each row. The peer does it the usual way: `transformers.BertModel`
without gradients over every batch of every epoch, padded to its longest sentence, a linear head on
its pooler's output, fused `torch.optim.AdamW`, dev predicted after each epoch. Loading the model
and tokenising are within the time of both, and nothing is warmed up.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import TEXTS, Benchmark, Claim, Work, main
from options import script

EPOCHS = 10


def peer_probe(args: Namespace) -> Work:
    """The encoder in every epoch."""
    import torch
    import transformers
    from torch import nn

    from datasets import read
    from tasks import TASKS

    def rows(split: str) -> list[dict[str, Any]]:
        path = args.data_dir / TASKS["sst"].files.format(split)
        examples, _ = read(path, TASKS["sst"], limit=args.rows)
        encoded = tokenizer([example.texts[0] for example in examples], truncation=True)
        return [
            {**{key: encoded[key][i] for key in encoded}, "labels": int(example.label)}
            for i, example in enumerate(examples)
        ]

    def probe() -> None:
        nonlocal tokenizer
        torch.manual_seed(0)
        tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
        bert = transformers.BertModel.from_pretrained(args.model).eval()
        head = nn.Linear(bert.config.hidden_size, 5)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, fused=True)
        collate = transformers.DataCollatorWithPadding(tokenizer)
        loader = partial(
            torch.utils.data.DataLoader, batch_size=args.batch_size, collate_fn=collate
        )
        train, dev = loader(rows("train"), shuffle=True), loader(rows("dev"))

        def logits(batch: Any) -> torch.Tensor:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad():
                vectors = bert(**inputs).pooler_output
            return head(nn.functional.dropout(vectors, 0.1, head.training))

        for _ in range(EPOCHS):
            head.train()
            for batch in train:
                loss = nn.functional.cross_entropy(logits(batch), batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            head.eval()
            with torch.no_grad():
                right = sum((logits(b).argmax(-1) == b["labels"]).sum().item() for b in dev)
        print(f"accuracy {right / len(dev.dataset):.3f}")

    tokenizer: Any = None
    return Work(probe, 1, cold=True)


def ours_probe(args: Namespace, precision: str) -> Work:
    """`classifier.py --option pretrain`."""
    import classifier
    from supervised import Files, fit

    flags = {"--option": "pretrain", "--epochs": EPOCHS, "--precision": precision}
    flags |= {"--model": args.model, "--data_dir": args.data_dir, "--limit": args.rows}
    flags |= {"--batch_size": args.batch_size, "--device": "cpu"}
    words = [str(word) for pair in flags.items() for word in pair]
    run_dir = args.scratch / f"{precision}-{len(list(args.scratch.iterdir()))}"
    parsed = classifier.parse([*words, "--no_test", "--run_dir", str(run_dir)])

    def probe() -> None:
        fit(parsed, {"sst": Files()})

    return Work(probe, 1, cold=True)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "runs",
    {
        "the usual way, fp32": peer_probe,
        "ours, fp32": partial(ours_probe, precision="fp32"),
        "ours, auto": partial(ours_probe, precision="auto"),
    },
    [
        Claim(
            "ten epochs of probing, fp32, to the usual way",
            "ours, fp32",
            "the usual way, fp32",
            target=">= 9",
        ),
        Claim(
            "ten epochs of probing, default precision, to the usual way",
            "ours, auto",
            "the usual way, fp32",
            target=">= 9",
        ),
        Claim(
            "peak memory, probing, to the usual way", "ours, fp32", "the usual way, fp32", "memory"
        ),
    ],
    {**TEXTS, "rows": 2000, "batch_size": 32},
    {"rows": 64},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
