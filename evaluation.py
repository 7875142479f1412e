"""Everything about saved runs: evaluate, predict, report, submit, compare, average, export.

    python evaluation.py runs/NAME                                      # evaluate on dev again
    python evaluation.py runs/NAME --data FILE.csv --task sst --out PREDICTIONS.csv
    python evaluation.py runs/NAME --text "A fine film."                # --text twice for a pair
    python evaluation.py runs/NAME --report                             # RUN/report/index.html
    python evaluation.py runs/NAME --submit FILE.zip
    python evaluation.py runs/NAME --compare runs/OTHER
    python evaluation.py runs/NAME --export onnx                        # after ./setup.sh --dev
    python evaluation.py runs/NAME --export course                      # pytorch_model.bin
    python evaluation.py runs/A runs/B runs/C                           # an ensemble; also --submit
    python evaluation.py runs/A runs/B runs/C --average runs/MEAN       # the mean of their weights

Batch size, precision, pooling, pair encoding and dev files are those of the run.
"""

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert import hub_name
from datasets import Example, TaskDataset, TokenizedDataset, read_examples
from engine.checkpoint import atomic_file, check_new_file, read_json, read_text, write_text
from engine.cli import ArgumentParser, run_script
from engine.errors import UserError
from engine.metrics import similarity_metrics
from engine.stats import SIGNIFICANCE, format_p
from hub.export import write_onnx
from masked_lm import MaskedLM
from model import MultitaskBERT, SentenceEncoder, pool
from prediction import (
    embed_batch,
    embed_dataset,
    format_predictions,
    predict,
    read_predictions,
    task_metrics,
)
from saved_runs import (
    SavedRun,
    check_average,
    check_ensemble,
    evaluate_dev,
    note,
    predict_ensemble,
    read_scores,
    save_average,
)
from tasks import TASKS, find_tasks

DIFFERENT = "DIFFERENT metrics; has the code changed, or the machine? (see its config.json)"
LEADERBOARD = ("sst", "para", "sts")  # the tasks that a submission contains


def format_json(value: dict[str, Any]) -> str:
    """Indented JSON with each innermost list, such as a row of a confusion matrix, on one line."""
    text = json.dumps(value, indent=2)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)


def evaluate_run(run: SavedRun, args: Namespace) -> None:
    """Print the dev metrics of the run's best model, in the form of `result.json`."""
    if "mlm_probability" in run.arguments:
        raise UserError(
            f"{run.folder}: a run of mlm.py, whose scores are in its log.jsonl and, once it has"
            " finished, in result.json; to fill in a blank, give --text with [MASK]"
        )
    model = run.load_model(args.device)
    if model.heads:
        evaluation = evaluate_dev(run.predict(model, ["dev"], args.data_dir))
        result = {"dev": evaluation["tasks"], "overall": evaluation["score"]}
        note(evaluation["summary"])
    else:
        # A SimCSE run has no heads: it is judged by the cosines of STS pairs, as during training.
        dataset = run.dataset(model, TASKS["sts"], "dev", args.data_dir)
        note(dataset)
        vectors = embed_dataset(model, dataset, run.batch_size).cpu()
        result = {"dev": {"sts": similarity_metrics(vectors, dataset.labels)}}
    print(format_json(result))
    # On the same files the metrics must be those that the run recorded.
    recorded = run.folder / "result.json"
    if not recorded.exists():
        note(f"{run.folder}: has not finished; these are its best weights so far")
    elif args.data_dir is None:
        same = read_json(recorded).get("dev") == result["dev"]
        note(f"{recorded}: {'the same metrics, bit for bit' if same else DIFFERENT}")


def evaluate_ensemble(runs: Sequence[SavedRun], args: Namespace) -> None:
    """Print the dev metrics of the runs' averaged logits and, with --average, weights."""
    if args.average:
        check_average(runs, args.average)
    evaluation = evaluate_dev(predict_ensemble(runs, ["dev"], args.data_dir, args.device))
    result = {"dev": evaluation["tasks"], "overall": evaluation["score"]}
    if args.average:
        mean = save_average(runs, args.average, args.device)
        note(f"{args.average} (mean of the weights): {mean['summary']}")
        result["average"] = {"dev": mean["tasks"], "overall": mean["score"]}
    note(f"ensemble: {evaluation['summary']}")
    print(format_json(result))


def compare_runs(run: SavedRun, args: Namespace) -> None:
    """Print the run's dev scores minus those of the reference, and which differ significantly."""
    for reference, score in read_scores([SavedRun(args.compare), run], args.data_dir):
        c = score.comparison
        print(
            f"{score.task.name} {score.metric}, {score.rows:,} rows: {score.score:.4f} -"
            f" {reference.score:.4f} = {c.difference:+.4f}, 95% interval {c.low:+.4f} to"
            f" {c.high:+.4f}, p {format_p(c.p)}:"
            f" {'significant' if c.p < SIGNIFICANCE else 'not significant'}"
        )
    note(
        f"differences: {run.folder} minus {args.compare}",
        "intervals: bootstrap over rows; p: paired test with Holm's correction, significant below"
        f" {SIGNIFICANCE}; neither covers the variance between seeds",
    )


def predict_file(run: SavedRun, args: Namespace) -> None:
    """Write the predictions for a csv file; print metrics if it has labels."""
    check_new_file(args.out)  # now, and not after minutes of predicting
    model = run.load_model(args.device)
    if args.task not in model.heads:
        trained = ", ".join(model.heads) or "none: SimCSE pre-training has no heads"
        raise UserError(f"--task {args.task}: the run has no head for it; it has {trained}")
    task = TASKS[args.task]
    # The file may have labels or not.
    dataset = TaskDataset(args.data, task, model.tokenizer, model.encoding(task), labelled=None)
    note(dataset)
    logits = predict(model, dataset, run.batch_size)
    write_text(args.out, format_predictions(dataset, logits))
    if dataset.labels is not None:
        print(format_json({task.name: task_metrics(dataset, logits)}))
    note(args.out)


def predict_texts(run: SavedRun, args: Namespace) -> None:
    """Print each matching task's prediction for a sentence or a pair, with probabilities."""
    texts = args.text
    if "mlm_probability" in run.arguments and len(texts) == 1:
        masked = run.load_model(args.device, MaskedLM)
        for number, choices in enumerate(masked.fill(texts[0]), start=1):
            listed = ", ".join(f"{token} {p:.4f}" for token, p in choices)
            print(f"{masked.tokenizer.mask_token} {number}: {listed}")
        return
    model = run.load_model(args.device)
    tasks = [task for task in find_tasks(list(model.heads)) if len(task.text_columns) == len(texts)]
    if not tasks:
        raise UserError(
            f"{run.folder}: no task takes {len(texts)} --text; it has"
            f" {', '.join(model.heads) or 'no heads at all'}"
        )
    for task in tasks:
        # A data set of one row: the same path as a file takes.
        joint = len(texts) > model.embeddings_per_row(task)
        columns = [[text] for text in texts]
        dataset = TokenizedDataset(task.name, Path("--text"), columns, model.tokenizer, joint)
        if dataset.truncated:  # say so: the end of the text was not read
            note(dataset)
        with model.evaluating():
            batch = dataset.batch(np.arange(1)).to(model.device)
            logits = model.decode(task.name, embed_batch(model, batch)).cpu()
        prediction = task.labels.predict(logits).item()
        if task.classes:
            probabilities = task.labels.probabilities(logits)[0].tolist()
            names = zip(task.classes, probabilities, strict=True)
            listed = ", ".join(f"{name} {p:.4f}" for name, p in names)
            print(f"{task.name}: {task.classes[int(prediction)]} ({listed})")
        else:
            print(f"{task.name}: {prediction:.4f}")


def submit(run: SavedRun, args: Namespace) -> None:
    """Check the run's prediction files and pack them for the leaderboard."""
    check_new_file(args.submit)
    files: dict[tuple[str, str], str] = {}
    for (name, split), (source, examples) in leaderboard_rows(run, args.data_dir).items():
        path = run.prediction_file(TASKS[name], split)
        read_predictions(path, TASKS[name], examples, source)  # checks every line
        files[name, split] = read_text(path)
        note(f"{path}: {len(examples):,} predictions, in the order of {source}")
    pack(files, args.submit)


def submit_ensemble(runs: Sequence[SavedRun], args: Namespace) -> None:
    """Predict with the runs' averaged logits, and pack the predictions for the leaderboard."""
    check_new_file(args.submit)
    leaderboard_rows(runs[0], args.data_dir)  # now, and not after minutes of predicting
    outputs = predict_ensemble(runs, ["dev", "test"], args.data_dir, args.device)
    note(f"ensemble: {evaluate_dev(outputs)['summary']}")
    files = {key: format_predictions(*outputs[key]) for key in outputs if key[0] in LEADERBOARD}
    pack(files, args.submit)


def leaderboard_rows(
    run: SavedRun, data_dir: Path | None
) -> dict[tuple[str, str], tuple[Path, list[Example]]]:
    """(task, split) -> a file that the leaderboard scores, and its rows.

    UserError unless the run has learnt all these tasks and predicts all rows.
    """
    decoders = run.config["decoders"]
    if not set(LEADERBOARD) <= set(decoders):
        raise UserError(
            f"{run.folder}: the leaderboard wants {', '.join(LEADERBOARD)}; the run has"
            f" {', '.join(decoders) or 'no heads'}"
        )
    rows = {}
    for task, split in product(find_tasks(LEADERBOARD), ("dev", "test")):
        source = run.data_file(task, split, data_dir)
        examples = read_examples(source, task, labelled=split == "dev")[0]
        if run.limit is not None and run.limit < len(examples):
            raise UserError(
                f"{run.folder}: had --limit {run.limit}, but {source} has {len(examples)} rows, and"
                " the leaderboard wants all: train without --limit"
            )
        rows[task.name, split] = source, examples
    return rows


def pack(files: dict[tuple[str, str], str], out: Path) -> None:
    """Write prediction files, (task, split) -> contents, as a zip archive."""
    with atomic_file(out) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for (task, split), text in files.items():
            # Without a date: equal files give equal archives.
            entry = zipfile.ZipInfo(f"predictions/{task}-{split}-output.csv")
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    print(out)


def report(run: SavedRun, args: Namespace) -> None:
    """Write the run's report/: a page with tables, plots and the worst predictions."""
    from report.page import write_report  # matplotlib takes a second

    print(write_report(run, args.data_dir, args.device))


class ExportedEncoder(nn.Module):
    """A run's encoder with its pooling, as ONNX gets it."""

    OUTPUTS = ("last_hidden_state", "pooler_output", "sentence_embedding")

    def __init__(self, model: SentenceEncoder):
        super().__init__()
        self.bert = model.bert
        self.pooling = model.pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Three tensors (B, T) -> those of `OUTPUTS`: (B, T, D), (B, D), (B, D)."""
        output = self.bert(input_ids, attention_mask, token_type_ids)
        embedding = pool(output, attention_mask, self.pooling)
        return output["last_hidden_state"], output["pooler_output"], embedding


def export(run: SavedRun, args: Namespace) -> None:
    """Write the run's encoder as ONNX, or as the file that the course's own `BertModel` loads."""
    # Where the hub and the course look for it.
    name = {"onnx": "onnx/model.onnx", "course": "pytorch_model.bin"}[args.export]
    path = args.out or run.folder / "best" / name
    check_new_file(path)
    model = MultitaskBERT.from_pretrained(run.folder)
    if args.export == "onnx":
        limit = model.bert.config.max_position_embeddings
        write_onnx(path, ExportedEncoder(model).eval(), ExportedEncoder.OUTPUTS, limit)
    else:
        # The course's loader wants HuggingFace's names, each with this prefix.
        tensors = {f"bert.{hub_name(n)}": p.detach() for n, p in model.bert.named_parameters()}
        with atomic_file(path) as draft:
            torch.save(tensors, draft)
    print(path)


# ---------------------------------------------------------------------------- command line

# Without an action, the run is evaluated again.
ACTIONS = {
    "evaluate": evaluate_run,
    "data": predict_file,
    "text": predict_texts,
    "submit": submit,
    "compare": compare_runs,
    "report": report,
    "export": export,
}
ENSEMBLE_ACTIONS = {  # of several runs
    "evaluate": evaluate_ensemble,
    "submit": submit_ensemble,
    "average": evaluate_ensemble,
}
# For each other flag, the actions in which it has an effect.
ACTIONS_OF_FLAG = {
    "task": {"data"},
    "out": {"data", "export"},
    "data_dir": {"evaluate", "submit", "compare", "report"},
    "device": {"evaluate", "data", "text", "report", "average"},
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked; `action` is a key of `ACTIONS`."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="a run folder, or several (ensemble)")
    group = parser.add_argument_group("what to do (default: evaluate on dev again)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--data", type=Path, metavar="FILE", help="predict a csv file in the course's format")
    add("--text", action="append", help="predict a sentence, or a pair: --text A --text B")
    add("--submit", type=Path, metavar="ZIP", help="check and pack the leaderboard files")
    add("--compare", type=Path, metavar="OTHER", help="compare dev metrics with another run's")
    add("--report", action="store_true", default=None, help="write a one-page report of the run")
    export_help = (
        "write the encoder as ONNX (after ./setup.sh --dev), or for the course's BertModel"
    )
    add("--export", choices=["onnx", "course"], help=export_help)
    average_help = "new run folder for the mean of the runs' weights"
    add("--average", type=Path, metavar="FOLDER", help=average_help)
    add = parser.add_argument
    add("--task", help="the task of the --data file")
    add("--out", type=Path, help="new file for --data (predictions) or --export (model)")
    add("--data_dir", type=Path, help="folder of the csv files (default: the files the run read)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="device (default: the run's)")
    args = parser.parse_args(argv)
    actions = {**ACTIONS, **ENSEMBLE_ACTIONS}
    given = [action for action in actions if getattr(args, action, None) is not None]
    args.action = given[0] if given else "evaluate"
    if len(args.runs) > 1 and args.action not in ENSEMBLE_ACTIONS:
        parser.error(f"--{args.action} takes one run")
    # A flag that would have no effect is refused, not ignored.
    for flag, useful in ACTIONS_OF_FLAG.items():
        if flag == "device" and len(args.runs) > 1:  # every action of an ensemble predicts
            continue
        if getattr(args, flag) is not None and args.action not in useful:
            parser.error(f"--{flag} has no effect {f'with --{given[0]}' if given else 'by itself'}")
    if args.data and not (args.task and args.out):
        parser.error("--data FILE needs --task NAME and --out FILE")
    if args.text and len(args.text) > 2:
        parser.error("--text: give one sentence, or the two of a pair")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks."""
    args = parse_args(argv)
    runs = [SavedRun(folder) for folder in args.runs]
    if len(runs) == 1 and args.action in ACTIONS:
        ACTIONS[args.action](runs[0], args)
    else:
        check_ensemble(runs)
        ENSEMBLE_ACTIONS[args.action](runs, args)


if __name__ == "__main__":
    run_script(main)
