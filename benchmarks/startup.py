"""How long a command takes to answer: `--help`, and the first step of training.

    python benchmarks/run.py startup --data_dir DATA

Ours is `classifier.py`, from the start of its process until the log has the first step: imports,
reading and tokenising SST's training and dev files, loading the model, one step. The peer does the
same with `transformers`, without the dev file, and exits. `--help` has no peer.
"""

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.harness import ROOT, TEXT, Claim, Work

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


def finish(*command: object) -> None:
    """Run a Python command to its end."""
    words = [sys.executable, *map(str, command)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def peer_first_step(args: Namespace) -> Work:
    """A script that loads everything and takes a step."""
    path = args.data_dir / "ids-sst-train.csv"
    return Work(lambda: finish("-c", PEER, args.model, path, args.rows, args.batch_size), 1)


def our_help(args: Namespace) -> Work:
    """`multitask_classifier.py --help`."""
    return Work(lambda: finish(ROOT / "multitask_classifier.py", "--help"), 1)


def our_first_step(args: Namespace) -> Work:
    """`classifier.py`, killed after its first step."""
    flags = {"model": args.model, "data_dir": args.data_dir, "limit": args.rows}
    flags |= {"option": "finetune", "batch_size": args.batch_size, "device": "cpu"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / "classifier.py"), *words, "--no_test"]

    def first_step() -> None:
        run_dir = Path(tempfile.mkdtemp(dir=args.scratch)) / "run"
        process = subprocess.Popen(
            [*command, f"--run_dir={run_dir}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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


SETTINGS = {
    "model": TEXT["model"],
    "data_dir": TEXT["data_dir"],
    "rows": 10000,
    "batch_size": 32,
    "passes": 3,
}
UNIT = "starts"
HELP, PEER_STEP, FIRST_STEP = "--help, ours", "first step, transformers", "first step, ours"
CONTESTANTS = {HELP: our_help, PEER_STEP: peer_first_step, FIRST_STEP: our_first_step}
CLAIMS = [
    Claim("--help", HELP, metric="seconds", target="< 2"),
    Claim("first step", FIRST_STEP, metric="seconds", target="< 4"),
    Claim("first step, to a transformers script", FIRST_STEP, PEER_STEP, "seconds"),
]
