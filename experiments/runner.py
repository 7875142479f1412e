"""Run the cells of tables over seeds: skip what is recorded, resume what was interrupted.

Each job, a cell with a seed, is one process and one run folder in --runs. A finished one becomes a
record in `records/` of --out: command, commit, metrics and dev predictions, but no sentence and no
label of the data.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint import read_json, read_text, write_json
from engine.errors import UserError
from engine.run_dir import folder_lock
from engine.trainer import progress_bar
from experiments.tables import CELLS, TABLES

REPOSITORY = Path(__file__).resolve().parent.parent
ENCODER_SEEDS = 3  # SimCSE takes the longest, so probes with more seeds share its encoders
# After these exit codes the other jobs are not tried: the user interrupted, or the input is bad.
FATAL_EXIT_CODES = (130, -signal.SIGINT, -signal.SIGTERM, UserError.exit_code)
# What a record takes over from config.json, besides the command.
CONFIG_KEYS = ("commit", "uncommitted_changes", "versions", "hardware", "started", "rows")
CONFIG_KEYS += ("precision",)


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
        return Job(start_from, (self.seed - 1) % ENCODER_SEEDS + 1) if start_from else None


def list_jobs(tables: Sequence[str], seeds: int, probe_seeds: int) -> list[Job]:
    """The jobs of some tables, each once, encoders before the jobs that start from them."""
    jobs: dict[Job, None] = {}  # a set that keeps its order
    for name in (name for table in tables for name in TABLES[table].cells):
        for seed in range(1, (probe_seeds if CELLS[name].is_probe else seeds) + 1):
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
    command = [cell.script, *args.flags, *shlex.split(cell.flags), "--model", str(model)]
    command += ["--data_dir", str(data_dir), "--seed", str(job.seed)]
    return [*command, "--run_dir", str(runs / str(job))]


def recorded_command(job: Job, args: argparse.Namespace) -> str:
    """The command as recorded: the same wherever the data and the run folders are."""
    return "python " + shlex.join(build_command(job, args, Path("runs/experiments"), Path("DATA")))


def check_record(job: Job, args: argparse.Namespace) -> None:
    """UserError if the job has a record that another command made."""
    path, command = args.out / "records" / f"{job}.json", recorded_command(job, args)
    if path.exists() and (recorded := read_json(path).get("command")) != command:
        raise UserError(f"{path}: made by `{recorded}`, not `{command}`; use another --out")


def run(args: argparse.Namespace) -> None:
    """Run the jobs of the tables that have no record yet, one after the other."""
    if not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such folder")
    records = args.out / "records"
    records.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    with folder_lock(args.runs):  # two of these commands would run the same jobs
        jobs = list_jobs(args.tables, args.seeds, args.probe_seeds)
        # Check all before the first hour of work.
        for job in jobs:
            check_record(job, args)
        pending = pending_jobs(jobs, args)
        print(f"{len(jobs)} runs, {len(jobs) - len(pending)} already recorded")
        failed = run_jobs(pending, args)
    if failed:
        raise UserError(f"{len(failed)} of {len(pending)} runs failed ({failed[0]}, ...)")
    where = shlex.join(["--out", str(args.out), "--data_dir", str(args.data_dir)])
    print(f"records: {records}; next: python -m experiments report {where}")


def pending_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> list[Job]:
    """Jobs without a record, and the encoders that these need and whose run folders are gone."""
    unrecorded = [job for job in jobs if not (args.out / "records" / f"{job}.json").exists()]
    # Records hold no weights: to start from an encoder, its run folder must still be there.
    needed = {job.encoder for job in unrecorded if job.encoder}
    gone = {job for job in needed if not (args.runs / str(job) / "result.json").exists()}
    return [job for job in jobs if job in unrecorded or job in gone]


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> list[Job]:
    """Run and record jobs; returns those that failed."""
    failed: list[Job] = []
    with progress_bar(len(jobs), "runs") as bar:
        for job in jobs:
            bar.set_postfix_str(str(job))
            log = args.runs / f"{job}.log"
            # --resume: a finished run is left as it is; one with other arguments is refused.
            command = [*build_command(job, args, args.runs, args.data_dir), "--resume"]
            # What would start from an encoder that failed cannot run; the rest can.
            if job.encoder in failed:
                failed.append(job)
                bar.write(f"{job}: skipped, because {job.encoder} failed")
            elif code := start_process(command, log):
                failed.append(job)
                bar.write(f"{job}: exit code {code}: {last_line(log)} (see {log})")
                if code in FATAL_EXIT_CODES:
                    break
            else:
                record_run(job, args)
            bar.update()
    return failed


def start_process(command: Sequence[str], log: Path) -> int:
    """Run a script of this repository, its output going to `log`; returns its exit code."""
    # Its output goes to a file: in the terminal there is one progress bar over all runs.
    with open(log, "w", encoding="utf-8") as file:
        python = [sys.executable, str(REPOSITORY / command[0]), *command[1:]]
        process = subprocess.Popen(python, stdout=file, stderr=file)
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reached the script too: let it save its state
            process.wait()
            raise


def last_line(log: Path) -> str:
    """The last line of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def record_run(job: Job, args: argparse.Namespace) -> None:
    """Write a finished run as one file, unless there is one already."""
    path, folder = args.out / "records" / f"{job}.json", args.runs / str(job)
    if path.exists():
        return
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    log = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
    # The learning curve on dev, but no sentence and no label: those are not ours to publish.
    curve = [
        {"step": entry["step"], "score": entry["score"], "stage": entry.get("stage")}
        for entry in log
        if entry["kind"] == "dev"
    ]
    record = {
        "cell": job.cell,
        "seed": job.seed,
        "command": recorded_command(job, args),
        **{key: config[key] for key in CONFIG_KEYS},
        "dev": result["dev"],
        "overall": result.get("overall"),
        "training_seconds": result["training_seconds"],
        "curve": curve,
        "conflict": [
            {"step": entry["step"], "parts": entry["parts"]}
            for entry in log
            if entry["kind"] == "conflict"
        ],
        "predictions": dev_predictions(result.get("predictions", {})),
    }
    write_json(path, record)


def dev_predictions(paths: dict[str, str]) -> dict[str, list[float]]:
    """Task -> the predictions in its leaderboard file for dev, in file order."""
    predictions = {}
    for name, path in paths.items():
        task, split = name.rsplit("_", 1)
        if split == "dev":
            lines = read_text(Path(path)).splitlines()[1:]
            predictions[task] = [round(float(line.rsplit(" , ", 1)[1]), 5) for line in lines]
    return predictions
