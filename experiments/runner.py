"""Run the cells of tables over seeds: skip what is recorded, resume what was interrupted.

Each job, a cell with a seed, is one process and one run folder in --runs. A finished one becomes a
record in `records/` of --out: command, commit, metrics and dev predictions, but no sentence and no
label of the data.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint import read_json, read_text, write_json
from engine.cli import ArgumentParser
from engine.errors import UserError
from engine.run_dir import folder_lock
from engine.trainer import progress_bar
from experiments.tables import CELLS, TABLES
from experiments.untouched import record_untouched
from tasks import TASKS

REPOSITORY = Path(__file__).resolve().parent.parent
# After these exit codes the other jobs are not tried: the user interrupted, or the input is bad.
FATAL_EXIT_CODES = (130, -signal.SIGINT, -signal.SIGTERM, UserError.exit_code)
# What a record takes over from config.json, besides the command.
CONFIG_KEYS = ("commit", "uncommitted_changes", "versions", "hardware", "started", "rows")
CONFIG_KEYS += ("precision", "model_checksum")
CURVE_POINTS = 20  # of the loss over a run


@dataclass(frozen=True)
class Job:
    """A cell with a seed."""

    cell: str
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}-seed{self.seed}"

    @property
    def encoder(self) -> "Job | None":
        """The job whose best encoder this one starts from."""
        start_from = CELLS[self.cell].start_from
        if not start_from:
            return None
        # SimCSE takes the longest, so there are fewer encoders than runs that start from one.
        return Job(start_from, (self.seed - 1) % CELLS[start_from].seeds + 1)


def planned_seeds(cell: str, seeds: int | None) -> range:
    """The seeds of a cell, from 1; no more than `seeds`."""
    return range(1, min(CELLS[cell].seeds, seeds or CELLS[cell].seeds) + 1)


def list_jobs(tables: Sequence[str], seeds: int | None) -> list[Job]:
    """The jobs of some tables, each once, encoders before the jobs that start from them."""
    jobs: dict[Job, None] = {}  # a set that keeps its order
    for name in (name for table in tables for name in TABLES[table].cells):
        for seed in planned_seeds(name, seeds):
            job = Job(name, seed)
            if job.encoder:
                jobs[job.encoder] = None
            jobs[job] = None
    return list(jobs)


def build_command(job: Job, args: argparse.Namespace, runs: Path, data_dir: Path) -> list[str]:
    """The script and its flags. The cell's own flags come last, so they override --flags."""
    # Of two flags of the same name argparse takes the last.
    cell = CELLS[job.cell]
    model = runs / str(job.encoder) / "best" if job.encoder else args.model
    flags = expand_recipes([*args.flags, *shlex.split(cell.flags)])
    command = [cell.script, *flags, "--model", str(model)]
    command += ["--data_dir", str(data_dir), "--seed", str(job.seed)]
    return [*command, "--run_dir", str(runs / str(job))]


def expand_recipes(words: Sequence[str]) -> list[str]:
    """A command line with the flags of each `@file` in its place: a record must not lose them."""
    parser, flags = ArgumentParser(prog="experiments"), []
    for word in words:
        if word.startswith("@"):
            for line in read_text(Path(word[1:])).splitlines():
                flags += parser.convert_arg_line_to_args(line)
        else:
            flags.append(word)
    return flags


def common_limit(flags: Sequence[str]) -> int | None:
    """The --limit among flags for every script, if there is one."""
    parser = ArgumentParser(prog="experiments")
    parser.add_argument("--limit", type=int)
    return parser.parse_known_args(expand_recipes(flags))[0].limit


def check_flags(flags: Sequence[str], jobs: Sequence[Job]) -> None:
    """UserError if a cell sets one of the flags for every script itself: its own would win."""
    common = {word.split("=")[0] for word in expand_recipes(flags) if word.startswith("--")}
    for cell in dict.fromkeys(job.cell for job in jobs):
        both = common & set(expand_recipes(shlex.split(CELLS[cell].flags)))
        if both:
            raise UserError(f"--flags: {min(both)} is set by the cell {cell} itself; leave it out")


def recorded_command(job: Job, args: argparse.Namespace) -> str:
    """The command as recorded: the same wherever the data and the run folders are."""
    return format_command(build_command(job, args, Path("runs/experiments"), Path("DATA")))


def format_command(command: Sequence[str]) -> str:
    """A script and its flags as a record has them."""
    return f"python {shlex.join(command)}"


def check_data_dir(args: argparse.Namespace) -> None:
    """UserError if there is no folder of data."""
    if not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such folder")


def check_command(path: Path, command: str) -> None:
    """UserError if there is a record that another command made."""
    if path.exists() and (made_by := read_json(path).get("command")) != command:
        raise UserError(
            f"{path}: made by `{made_by}`, not `{command}`; name another --out and another --runs"
        )


def run(args: argparse.Namespace) -> None:
    """Run the jobs of the tables that have no record yet."""
    check_data_dir(args)
    jobs = list_jobs(args.tables, args.seeds)
    check_flags(args.flags, jobs)
    # Check all before the first hour of work, and before there are any folders.
    for job in jobs:
        check_command(args.out / "records" / f"{job}.json", recorded_command(job, args))
        script, *flags = build_command(job, args, args.runs, args.data_dir)
        import_module(Path(script).stem).parse_args(flags)
    records = args.out / "records"
    for folder in (records, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(args.runs):  # two of these commands would run the same jobs
        pending = pending_jobs(jobs, args)
        done = len(jobs) - len(pending)
        print(f"{len(jobs)} runs, {done} already recorded; their logs: {args.runs}/*.log")
        record_untouched(args, common_limit(args.flags))
        failed = run_jobs(pending, args)
    if failed:
        raise UserError(f"{len(failed)} of {len(pending)} runs failed ({failed[0]}, ...)")
    where = ["--out", str(args.out), "--data_dir", str(args.data_dir)]
    where += ["--seeds", str(args.seeds)] if args.seeds else []
    print(f"records: {records}; next: python -m experiments report {shlex.join(where)}")


def pending_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> list[Job]:
    """Jobs without a record, and the encoders that these need and whose run folders are gone."""
    unrecorded = [job for job in jobs if not (args.out / "records" / f"{job}.json").exists()]
    # Records hold no weights: to start from an encoder, its run folder must still be there.
    needed = {job.encoder for job in unrecorded if job.encoder}
    gone = {job for job in needed if not (args.runs / str(job) / "result.json").exists()}
    return [job for job in jobs if job in unrecorded or job in gone]


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> list[Job]:
    """Run and record jobs, --jobs of them at a time; returns those that failed."""
    failed: list[Job] = []

    def attempt(job: Job) -> str | None:
        """Why the job failed, if it did."""
        # What would start from an encoder that failed cannot run; the rest can.
        if job.encoder in failed:
            failed.append(job)
            return f"skipped, because {job.encoder} failed"
        log = args.runs / f"{job}.log"
        # --resume: a finished run is left as it is; one with other arguments is refused.
        command = [*build_command(job, args, args.runs, args.data_dir), "--resume"]
        code = start_process(command, log, threads_per_job(args.jobs))
        if not code:
            record_run(job, args)
            return None
        failed.append(job)
        message = f"exit code {code}: {last_line(log)} (see {log})"
        if code in FATAL_EXIT_CODES:
            raise UserError(f"{job}: {message}")
        return message

    # All encoders first: side by side with one, a job that starts from it would not find it.
    stages = [[j for j in jobs if not j.encoder], [j for j in jobs if j.encoder]]
    with progress_bar(len(jobs), "runs") as bar:
        for stage in stages:
            for job, message in zip(stage, side_by_side(attempt, stage, args.jobs), strict=True):
                if message:
                    bar.write(f"{job}: {message}")
                bar.set_postfix_str(f"last {job}")
                bar.update()
    return failed


def side_by_side(function: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> Iterator[Any]:
    """Yield function(item) for each item in order, `jobs` at a time, each in a thread.

    After an exception no other item begins; it is raised when those that had begun have ended.
    """
    stop = threading.Event()

    def guarded(item: Any) -> Any:
        if stop.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            stop.set()  # here, not where it arrives: this thread takes the next item at once
            raise

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(guarded, items)


def threads_per_job(jobs: int) -> int | None:
    """The threads of each of some jobs that share the cores; None: as many as it likes."""
    return max(1, torch.get_num_threads() // jobs) if jobs > 1 else None


def start_process(command: Sequence[str], log: Path, threads: int | None = None) -> int:
    """Run a script of this repository, its output going to `log`; returns its exit code."""
    # Its output goes to a file: in the terminal there is one progress bar over all runs.
    with open(log, "w", encoding="utf-8") as file:
        python = [sys.executable, str(REPOSITORY / command[0]), *command[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        return subprocess.run(python, stdout=file, stderr=file, env=env).returncode


def last_line(log: Path) -> str:
    """The last line of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def record_run(job: Job, args: argparse.Namespace) -> None:
    """Write a finished run as one file, unless there is one already."""
    path = args.out / "records" / f"{job}.json"
    if not path.exists():
        facts = {"cell": job.cell, "seed": job.seed, "command": recorded_command(job, args)}
        write_json(path, {**facts, **read_run(args.runs / str(job))})


def read_run(folder: Path) -> dict[str, Any]:
    """What is recorded of a finished run, besides the command."""
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    data = {Path(path).name: checksum for path, checksum in config["data"].items()}
    log = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
    # The learning curve on dev, but no sentence and no label: those are not ours to publish.
    return {
        **{key: config[key] for key in CONFIG_KEYS},
        "data": data,
        "dev": result["dev"],
        "overall": result.get("overall"),
        "training_seconds": result["training_seconds"],
        **head_steps_and_losses(log),
        "curve": [
            {"step": entry["step"], "score": entry["score"], "stage": entry.get("stage")}
            for entry in log
            if entry["kind"] == "dev"
        ],
        "conflict": [
            {key: value for key, value in entry.items() if key != "kind"}
            for entry in log
            if entry["kind"] == "conflict"
        ],
        "predictions": dev_predictions(result.get("predictions", {})),
    }


def head_steps_and_losses(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task: the steps that trained its head, and the loss in twentieths of the last stage.

    A step of several tasks counts for the head of each, but logs only the sum of their losses: it
    has no part in the curves.
    """
    steps = [entry for entry in log if entry["kind"] == "train"]
    tasks = dict.fromkeys(task for entry in steps for task in entry["task"].split("+"))
    last = [entry for entry in steps if entry.get("stage") == steps[-1].get("stage")]
    head_steps, losses = {}, {}
    for task in tasks:
        head_steps[task] = sum(task in entry["task"].split("+") for entry in steps)
        if values := [entry["loss"] for entry in last if entry["task"] == task]:
            parts = np.array_split(values, min(CURVE_POINTS, len(values)))
            losses[task] = [round(float(part.mean()), 4) for part in parts]
    return {"head_steps": head_steps, "losses": losses}


def dev_predictions(paths: dict[str, str]) -> dict[str, str | list[float]]:
    """Task -> the predictions in its leaderboard file for dev, in file order.

    Classes are a string of digits, which keeps a record small.
    """
    predictions: dict[str, str | list[float]] = {}
    for name, path in paths.items():
        task, split = name.rsplit("_", 1)
        if split == "dev":
            lines = read_text(Path(path)).splitlines()[1:]
            values = [float(line.rsplit(" , ", 1)[1]) for line in lines]
            predictions[task] = [round(value, 5) for value in values]
            if TASKS[task].labels.integer:
                predictions[task] = "".join(f"{value:.0f}" for value in values)
    return predictions
