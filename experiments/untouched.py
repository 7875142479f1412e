"""The strongest baseline: the cosine of the encoder's embeddings before any training."""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from bert import BertModel
from datasets import TaskDataset
from engine.checkpoint import read_json, write_json
from engine.csv_reader import read_rows
from engine.device import setup_device
from engine.errors import UserError
from engine.run_dir import provenance
from experiments.tables import TASK_TITLES
from model import SentenceEncoder
from prediction import mean_cosines
from saved_runs import model_checksum
from tasks import TASKS
from tokenizer import BertTokenizer

BATCH_SIZE = 64
THRESHOLD_ROWS = 10_000  # training pairs to choose the threshold on


def record_untouched(args: argparse.Namespace, limit: int | None) -> None:
    """Write the scores of `args.model` without training to untouched.json in `args.out`, once.

    Mean-pooled, in fp32: for STS the cosine itself, for Quora whether it reaches the threshold that
    is best on training pairs. An existing record of another model or other rows is an error.
    """
    path = args.out / "untouched.json"
    data = {}
    for task, split in product(TASK_TITLES, ("train", "dev")):
        file = args.data_dir / TASKS[task].file(split)
        data[file.name] = read_rows(file, TASKS[task].text_columns, "\t")[1]
    tokenizer = BertTokenizer.from_pretrained(args.model)
    bert = BertModel.from_pretrained(args.model)
    identity = {"model_checksum": model_checksum(bert, tokenizer), "limit": limit}
    if path.exists():
        check_same(path, data, identity)
        return
    encoder = SentenceEncoder(bert, tokenizer, "mean").to(setup_device(0, "auto", "fp32")[0]).eval()

    def score(task: str, split: str, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The cosine and the label of each pair, (N,) each."""
        file = args.data_dir / TASKS[task].file(split)
        dataset = TaskDataset(file, TASKS[task], tokenizer, limit=rows)
        return mean_cosines(encoder, dataset, BATCH_SIZE), dataset.labels.numpy()

    threshold = best_threshold(*score("para", "train", THRESHOLD_ROWS))
    cosines, gold = score("para", "dev", limit)
    duplicates = (cosines >= threshold).astype(int)
    cosines, similarities = score("sts", "dev", limit)
    metrics = {
        "para": TASKS["para"].labels.metrics(duplicates, gold),
        "sts": TASKS["sts"].labels.metrics(cosines, similarities),
    }
    predictions = {"para": "".join(map(str, duplicates)), "sts": cosines.round(5).tolist()}
    facts = {"cell": "untouched", **provenance(), "model": args.model, **identity, "data": data}
    del facts["command"]  # it is that of whichever `run` came first
    write_json(path, {**facts, "threshold": threshold, "dev": metrics, "predictions": predictions})


def check_same(path: Path, data: dict[str, str], identity: dict[str, Any]) -> None:
    """UserError if the record was made from other files (name -> sha256), model or rows."""
    recorded = read_json(path)
    changed = [name for name, sha256 in data.items() if recorded["data"].get(name) != sha256]
    flags = {"model_checksum": "--model", "limit": "--limit"}
    changed += [flag for key, flag in flags.items() if recorded[key] != identity[key]]
    if changed:
        raise UserError(
            f"{path}: made with another {changed[0]}; name another --out and another --runs"
        )


def best_threshold(scores: np.ndarray, gold: np.ndarray) -> float:
    """The threshold with the highest accuracy for `score >= threshold` as class 1; both (N,)."""
    false_positives, true_positives, thresholds = roc_curve(gold, scores, drop_intermediate=False)
    share = gold.mean()
    accuracy = true_positives * share + (1 - false_positives) * (1 - share)
    return float(thresholds[1:][accuracy[1:].argmax()])  # the first is infinite
