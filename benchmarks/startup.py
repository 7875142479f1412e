"""How long a command takes to answer: `--help`, and the first step of training.

    python benchmarks/startup.py --data_dir DATA

Ours is `classifier.py`, a process of its own from its start until the log has the first step's
line: imports, reading and tokenising SST's training and dev files, loading the model, one step. The
peer does the same with `transformers` (tokenising the training file, no dev) and leaves. `--help`
has no peer. Memory is of the largest process started.
"""

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import ROOT, TEXTS, Benchmark, Claim, Work, main
from options import script

PEER = """
import csv, os, sys
import torch, transformers
folder, path, rows, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=5).train()
with open(path, encoding="utf-8", newline="") as file:
    data = list(csv.DictReader(file, delimiter="\\t"))[:rows]
encoded = tokenizer([row["sentence"] for row in data], truncation=True)["input_ids"]
batch = tokenizer.pad({"input_ids": encoded[:batch_size]}, return_tensors="pt")
labels = torch.tensor([int(float(row["sentiment"])) for row in data[:batch_size]])
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
model(**batch, labels=labels).loss.backward()
optimizer.step()
os._exit(0)  # ours is not waited for either, once it has made its step
"""


def peer_first_step(args: Namespace) -> Work:
    """A script that loads all, and takes a step."""
    path = args.data_dir / "ids-sst-train.csv"
    words = [args.model, str(path), str(args.rows), str(args.batch_size)]
    return Work(lambda: finish([sys.executable, "-c", PEER, *words]), 1)


def ours_help(args: Namespace) -> Work:
    """`multitask_classifier.py --help`."""
    return Work(
        lambda: finish([sys.executable, str(ROOT / "multitask_classifier.py"), "--help"]), 1
    )


def ours_first_step(args: Namespace) -> Work:
    """`classifier.py`, ended after its first step."""
    flags = {"--option": "finetune", "--model": args.model, "--data_dir": args.data_dir}
    flags |= {"--limit": args.rows, "--batch_size": args.batch_size, "--device": "cpu"}
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, str(ROOT / "classifier.py"), *words, "--no_test", "--run_dir"]

    def first_step() -> None:
        run_dir = Path(tempfile.mkdtemp(dir=args.scratch)) / "run"
        process = subprocess.Popen(
            [*command, str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = run_dir / "log.jsonl"
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"classifier.py ended with {process.returncode}")
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()

    return Work(first_step, 1)


def finish(command: list[str]) -> None:
    """Run a command to its end."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "starts",
    {
        "--help, ours": ours_help,
        "first step, transformers": peer_first_step,
        "first step, ours": ours_first_step,
    },
    [
        Claim("--help", "--help, ours", None, "seconds", "< 0.5"),
        Claim("first step", "first step, ours", None, "seconds", "< 4"),
        Claim(
            "first step, to a transformers script",
            "first step, ours",
            "first step, transformers",
            "seconds",
        ),
    ],
    {**TEXTS, "rows": 10000, "batch_size": 32, "passes": 3},
    {"rows": 64, "passes": 1},
)

if __name__ == "__main__":
    script(partial(main, BENCHMARK))
