"""How long a command takes to answer: `--help`, and the first step of training.

    python benchmarks/run.py startup --data_dir DATA

Ours is `classifier.py`, from the start of the process until the first step is logged: imports,
reading and tokenising SST's training and dev files, loading the model, one step. The peer does the
same with `transformers`, without the dev file, and exits. `--help` has no peer.
"""

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.harness import ROOT, TEXT, Claim, Work, classifier_flags

SCRIPT = """
import csv, os, sys
import torch, transformers
folder, path, device, rows, batch_size = *sys.argv[1:4], *map(int, sys.argv[4:])
tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=5)
model.train().to(device)
with open(path + "/ids-sst-train.csv", encoding="utf-8", newline="") as file:
    data = list(csv.DictReader(file, delimiter="\\t"))[:rows]
encoded = tokenizer([row["sentence"] for row in data], truncation=True)["input_ids"]
batch = tokenizer.pad({"input_ids": encoded[:batch_size]}, return_tensors="pt").to(device)
labels = torch.tensor([int(float(row["sentiment"])) for row in data[:batch_size]], device=device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
model(**batch, labels=labels).loss.backward()
optimizer.step()
if device == "cuda":
    torch.cuda.synchronize()
os._exit(0)  # ours is not waited for either, once it has made its step
"""


def python(*words: object) -> Work:
    """A Python command, run to its end."""
    command = [sys.executable, *map(str, words)]
    return Work(lambda: subprocess.run(command, check=True), 1)


def first_step(args: Namespace) -> None:
    """Start `classifier.py`, and kill it when the log has its first step."""
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    flags = classifier_flags(args, option="finetune", device=args.device, run_dir=folder)
    process = subprocess.Popen([sys.executable, str(ROOT / "classifier.py"), *flags])
    log = folder / "log.jsonl"  # gets a line per step
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"classifier.py ended with {process.returncode}")
            time.sleep(0.002)  # leaves the CPU to the process
    finally:
        process.kill()
        process.wait()


SETTINGS = {**TEXT, "rows": 10000, "batch_size": 32, "passes": 3, "device": "cpu"}
UNIT = "starts"
HELP, PEER, STEP = "--help, ours", "first step, transformers", "first step, ours"
CONTESTANTS = {
    HELP: lambda args: python(ROOT / "multitask_classifier.py", "--help"),
    PEER: lambda args: python(
        "-c", SCRIPT, args.model, args.data_dir, args.device, args.rows, args.batch_size
    ),
    STEP: lambda args: Work(lambda: first_step(args), 1),
}
CLAIMS = [
    Claim("--help", HELP, metric="seconds", target="< 2"),
    Claim("first step", STEP, metric="seconds", target="< 4"),
    Claim("first step, to a transformers script", STEP, PEER, "seconds"),
]
