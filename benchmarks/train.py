"""Fine-tuning speed and memory against a plain `transformers` loop, in one run.

    python benchmarks/train.py --data_dir data/sample

The same model, rows, batch size and epochs for all: SST, a linear head on the pooler's output. The
peer is the loop that tutorials show: `transformers.BertModel` with its defaults (SDPA attention),
fp32, shuffled batches padded to their longest sentence, `torch.optim.AdamW`. Ours is `train.train`
itself. Each measurement is a process of its own, taken in turn; a ratio is ours / peer of one turn.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from options import script

LR = 5e-5
MODES = ("peer", "fp32", "auto")


def peer(args: Namespace) -> tuple[int, Callable[[], None]]:
    """The plain loop: the number of rows, and what trains for an epoch."""
    import torch
    import transformers
    from torch import nn

    from checkpoint import model_folder
    from datasets import read
    from tasks import TASKS

    torch.manual_seed(0)
    folder = model_folder(args.model)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    bert = transformers.BertModel.from_pretrained(folder)
    dropout, head = nn.Dropout(0.1), nn.Linear(bert.config.hidden_size, 5)
    parameters = [*bert.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    examples, _ = read(args.data_dir / "ids-sst-train.csv", TASKS["sst"], limit=args.rows)
    encoded = tokenizer([e.texts[0] for e in examples], truncation=True)
    rows = [{key: encoded[key][i] for key in encoded} for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        row["label"] = int(example.label)

    def collate(batch: list[dict]) -> tuple:
        labels = torch.tensor([row["label"] for row in batch])
        texts = [{k: v for k, v in row.items() if k != "label"} for row in batch]
        return tokenizer.pad(texts, return_tensors="pt"), labels

    loader = torch.utils.data.DataLoader(
        rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate
    )
    bert.train()

    def epoch() -> None:
        for inputs, labels in loader:
            logits = head(dropout(bert(**inputs).pooler_output))
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return len(rows), epoch


def ours(args: Namespace, precision: str) -> tuple[int, Callable[[], None]]:
    """This project's loop: the number of rows, and what trains for an epoch."""
    from functools import partial

    from bert import BertModel
    from checkpoint import Run
    from datasets import Mixture, TaskData
    from optimizer import AdamW, parameter_groups
    from scoring import embed
    from tasks import TASKS, MultitaskBERT
    from tokenizer import BertTokenizer
    from train import prepare, summed, train

    task = TASKS["sst"]
    _, dtype = prepare(0, "cpu", precision)
    tokenizer = BertTokenizer.from_pretrained(args.model)
    path = args.data_dir / "ids-sst-train.csv"
    data = TaskData(path, task, tokenizer, limit=args.rows)
    model = MultitaskBERT(BertModel.from_pretrained(args.model), [task])
    model.precision = dtype
    model.save_pretrained = lambda folder: None  # the peer saves nothing
    optimizers = {
        "bert": AdamW(parameter_groups(model.bert, 0.01), lr=LR),
        "sst": AdamW(parameter_groups(model.heads, 0.01), lr=LR),
    }
    recipe = Namespace(
        epochs=1, schedule="constant", warmup=0, clip=1, eval_every=0, patience=0, save_every="0"
    )
    embedder = partial(embed, model)

    folder = tempfile.TemporaryDirectory()  # goes when the process ends
    run = Run.begin(Path(folder.name) / "run", {})
    run.save_state = lambda tensors, facts: None

    def epoch(_: object = folder) -> None:
        train(
            model,
            summed(lambda batch: task.loss(model.decode("sst", embedder(batch)), batch.labels)),
            Mixture([data], args.batch_size, 0, 1),
            optimizers,
            lambda: {"score": 0.0, "summary": ""},
            run,
            recipe,
        )

    return len(data), epoch


def measure(args: Namespace) -> dict[str, float]:
    """Sentences per second over the epochs after the first, and the process's peak memory."""
    rows, epoch = peer(args) if args.worker == "peer" else ours(args, args.worker)
    epoch()  # first touches of memory, caches, thread pools
    started = time.perf_counter()
    for _ in range(args.epochs):
        epoch()
    seconds = time.perf_counter() - started
    import torch

    from train import peak_memory

    memory = peak_memory(torch.device("cpu"))
    return {"speed": rows * args.epochs / seconds, "memory": memory / 2**20}


def compare(args: Namespace) -> dict:
    """Run every mode in turn, `--turns` times; medians, and ratios turn by turn."""
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for turn in range(args.turns):
        for mode in MODES:
            command = [sys.executable, __file__, "--worker", mode]
            for flag in ("model", "data_dir", "rows", "batch_size", "epochs"):
                command += [f"--{flag}", str(getattr(args, flag))]
            done = subprocess.run(command, capture_output=True)
            if done.returncode:
                sys.stderr.write(
                    done.stderr.decode("utf-8", "replace").strip().splitlines()[-1] + "\n"
                )
                sys.exit(done.returncode)
            found[mode].append(json.loads(done.stdout.decode().splitlines()[-1]))
            print(f"turn {turn + 1} of {args.turns}, {mode}: {found[mode][-1]}", file=sys.stderr)
    table = {}
    for mode, runs in found.items():
        ratios = {
            key: [run[key] / base[key] for run, base in zip(runs, found["peer"], strict=True)]
            for key in ("speed", "memory")
        }
        table[mode] = {
            "sentences_per_second": statistics.median(run["speed"] for run in runs),
            "peak_memory_MiB": statistics.median(run["memory"] for run in runs),
            "speed_ratio": [statistics.median(ratios["speed"]), *_range(ratios["speed"])],
            "memory_ratio": [statistics.median(ratios["memory"]), *_range(ratios["memory"])],
        }
    return table


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def main() -> None:
    """Print a Markdown table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--data_dir", type=Path, default=Path("data/sample"))
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    table = compare(args)
    names = {"peer": "plain transformers loop, fp32", "fp32": "ours, fp32", "auto": "ours, auto"}
    print("| | sentences/s | speed ratio (min-max) | peak memory | memory ratio |")
    print("|---|---|---|---|---|")
    for mode, row in table.items():
        speed, low, high = row["speed_ratio"]
        print(
            f"| {names[mode]} | {row['sentences_per_second']:.1f} | {speed:.2f}"
            f" ({low:.2f}-{high:.2f}) | {row['peak_memory_MiB']:.0f} MiB"
            f" | {row['memory_ratio'][0]:.2f} |"
        )
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version(), **table}))


if __name__ == "__main__":
    script(lambda _: main())
