"""Predicting SST dev, from the file's text to logits.

    python benchmarks/evaluate.py --data_dir DATA

Ours is `datasets.TaskData` and `scoring.predict`, as `evaluation.py` uses them. The peer is the
plain loop: `transformers.BertModel` without gradients, batches in file order, padded to their
longest sentence. Both have the same linear head; that their logits in fp32 are equal to 1e-4 is
checked. `--device cuda` runs on a GPU, where nothing has been measured yet.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import TEXTS, Benchmark, Claim, Work, Wrong, main, useful_flops
from options import script

PEER = "plain, fp32"
OURS = "ours, fp32"


def sized(args: Namespace, config: Any) -> dict[str, Any]:
    """How much work a pass is: what `Work` asks for."""
    data = load(args)
    tokens = sum(data.lengths.tolist())
    return {
        "units": len(data),
        "flops": useful_flops(config, data.lengths, training=False),
        "config": config,
        "tokens": max(1, tokens * min(args.batch_size, len(data)) // len(data)),
    }


def load(args: Namespace) -> Any:
    """The dev set, tokenised by ours."""
    from datasets import TaskData
    from tasks import TASKS
    from tokenizer import BertTokenizer

    path = args.data_dir / TASKS["sst"].files.format("dev")
    return TaskData(path, TASKS["sst"], BertTokenizer.from_pretrained(args.model), limit=args.rows)


def new_head(width: int) -> Any:
    """The linear head of both: the same numbers for the same width."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Linear(width, 5)


def peer_evaluate(args: Namespace) -> Work:
    """The plain loop."""
    import torch
    import transformers

    from datasets import read
    from tasks import TASKS

    path = args.data_dir / TASKS["sst"].files.format("dev")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(args.model)
    bert = transformers.BertModel.from_pretrained(args.model).eval().to(args.device)
    head = new_head(bert.config.hidden_size).to(args.device)

    @torch.no_grad()
    def evaluate() -> Any:
        texts = [e.texts[0] for e in read(path, TASKS["sst"], limit=args.rows)[0]]
        found = []
        for start in range(0, len(texts), args.batch_size):
            chunk = texts[start : start + args.batch_size]
            batch = tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")
            found.append(head(bert(**batch.to(args.device)).pooler_output).cpu())
        return torch.cat(found).numpy()

    return Work(evaluate, **sized(args, bert.config))


def ours_evaluate(args: Namespace, precision: str) -> Work:
    """This project's."""
    from bert import BertModel
    from scoring import embed, predict
    from tasks import TASKS, MultitaskBERT
    from train import prepare

    device, dtype = prepare(0, args.device, precision)
    model = MultitaskBERT(BertModel.from_pretrained(args.model), [TASKS["sst"]]).to(device)
    model.heads["sst"].dense.load_state_dict(new_head(model.bert.config.hidden_size).state_dict())
    model.precision = dtype
    embedder = partial(embed, model)

    def evaluate() -> Any:
        return predict(model, load(args), args.batch_size, embedder).numpy()

    name = str(dtype).removeprefix("torch.")
    return Work(evaluate, **sized(args, model.bert.config), dtype=name)


def check(found: dict[str, Any]) -> dict[str, float]:
    """Wrong, unless the logits in fp32 are the peer's; the largest difference."""
    if not {OURS, PEER} <= set(found):
        return {}
    difference = float(abs(found[OURS] - found[PEER]).max())
    if not difference <= 1e-4:
        raise Wrong(f"a logit differs from the plain loop's by {difference:.2e}")
    return {"largest difference of a logit": difference}


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "rows",
    {
        PEER: peer_evaluate,
        OURS: partial(ours_evaluate, precision="fp32"),
        "ours, auto": partial(ours_evaluate, precision="auto"),
    },
    [
        Claim("predict SST dev, fp32, to plain loop fp32", OURS, PEER),
        Claim("predict SST dev, default precision, to plain loop fp32", "ours, auto", PEER),
        Claim("useful FLOP rate to matrix rate, predict, fp32", OURS, None, "quotient"),
        Claim("peak memory, predict SST dev, fp32, to plain loop", OURS, PEER, "memory"),
    ],
    {**TEXTS, "rows": 1101, "batch_size": 32, "device": "cpu"},
    {"rows": 64},
    check,
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
