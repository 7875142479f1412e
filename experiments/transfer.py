"""Evaluate runs outside the domain of their training data, with and without their heads.

Each run gets a record in `records/` of --out, and so does the untouched encoder that the runs
started from.
"""

import hashlib
import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import checksum, read_json, read_tensors, read_text, write_json
from engine.errors import UserError, reading
from engine.trainer import progress_bar
from experiments.transfer_measures import FILES, SETS, Measurement
from experiments.transfer_report import write_report
from hub.models import resolve_model
from report.collect import load_untouched
from saved_runs import SavedRun

# What a record was made from. The command refuses records made from anything else.
FACTS = {
    "limit": "made with another --limit",
    "data": "made from other data files",
    "untouched": "of a run that began with another model",
    "weights": "made from other weights",
}


@dataclass(frozen=True)
class Job:
    """A record to make: of a run or, with `pooling`, of the encoder that it started from."""

    name: str
    run: SavedRun
    origin: SavedRun  # the run, or the first in the chain of runs that it started from
    pooling: str | None = None

    def facts(self) -> dict[str, Any]:
        """Checksums of the weights to measure and of those that the run started from."""
        untouched = self.origin.config.get("model_checksum")
        if self.pooling:
            return {"untouched": untouched, "weights": untouched}
        best = resolve_model(self.run.folder)
        files = sorted(best.glob("*.safetensors"))
        tensors = {f"{f.name} {k}": v for f in files for k, v in read_tensors(f).items()}
        weights = checksum(tensors, read_text(best / "heads.json"))
        return {"untouched": untouched, "weights": weights}

    def measure(self, args: Namespace) -> dict[str, Any]:
        """The rest of the record: scores, and where the run comes from."""
        model = self.run.load_model(args.device)
        untouched = load_untouched(self.origin, model)
        untouched.pooling = self.pooling or model.pooling
        encoder = untouched if self.pooling else model
        measured = Measurement(encoder, self.run.batch_size, args.data_dir, args.limit)
        for data in SETS:
            measured.add_set(data)
        measured.add_logistic()
        measured.add_geometry()
        config = {"arguments": {}} if self.pooling else self.run.config
        return {
            "method": re.sub(r"-seed\d+$", "", self.name),
            **{key: config["arguments"].get(key) for key in ("seed", "option")},
            **{key: config.get(key) for key in ("commit", "uncommitted_changes", "decoders")},
            "command": portable_command(config.get("command", ""), self.name),
            "pooling": encoder.pooling,
            "precision": str(encoder.dtype).removeprefix("torch."),
            "rows": measured.rows,
            "scores": measured.scores,
            "cka": None if self.pooling else measured.cka(untouched),
        }


def portable_command(command: str, name: str) -> str:
    """A run's command without the paths of this machine, as in all records."""

    def portable_model(flag: re.Match) -> str:
        path = Path(flag[1].strip("'"))
        place = f"runs/{path.parent.name}/best" if path.name == "best" else path.name
        return f" {shlex.quote(place)}" if path.is_absolute() else flag[0]

    for flag, place in (("data_dir", "DATA"), ("run_dir", f"runs/{name}")):
        command = re.sub(rf"(?<=--{flag})[ =]('.*?'|\S+)", f" {place}", command)
    command = re.sub(r"(?<=--model)[ =]('.*?'|\S+)", portable_model, command)
    return re.sub(r"^\S+ \S*?([^/\s]+\.py)", r"python \1", command).removesuffix(" --resume")


def transfer(args: Namespace) -> None:
    """Measure each run that has no record in --out, then report on all records in it."""
    if args.runs:
        measure_runs(args)
    write_report(args)


def measure_runs(args: Namespace) -> None:
    """Write the missing records of the runs, and of the untouched encoder."""
    jobs, data, records = list_jobs(args.runs), check_data(args.data_dir), args.out / "records"
    check_own_data(jobs, data)
    facts = {job.name: {"limit": args.limit, "data": data, **job.facts()} for job in jobs}
    check_facts(facts, records)  # before hours of work
    pending = [job for job in jobs if not (records / f"{job.name}.json").exists()]
    with progress_bar(len(pending), "encoders") as bar:
        for job in pending:
            bar.set_postfix_str(job.name)
            write_json(records / f"{job.name}.json", {**facts[job.name], **job.measure(args)})
            bar.update()


def list_jobs(folders: Sequence[Path]) -> list[Job]:
    """The records of these runs and, before them, those of the untouched encoder.

    UserError for two runs with one name, and for a run that was trained on CFIMDB.
    """
    jobs: dict[str, Job] = {}
    for folder in folders:
        run, name = SavedRun(folder), folder.resolve().name
        origin, path = find_origin(run), resolve_model(folder) / "heads.json"
        with reading(path, "the settings of a trained model"):
            own = read_json(path)["pooling"]
        for pooling in (own, "mean"):  # the mean is the strongest baseline
            untouched = Job(f"untouched-{pooling}", run, origin, pooling)
            jobs.setdefault(untouched.name, untouched)
        if name in jobs:
            raise UserError(f"{folder}: another run is called {name}; records are named by run")
        jobs[name] = Job(name, run, origin)
    return sorted(jobs.values(), key=lambda job: job.pooling is None)


def find_origin(run: SavedRun) -> SavedRun:
    """The run, or the first in the chain of runs that it started from: its --model is untouched.

    UserError if one of them was trained on CFIMDB.
    """
    if "cfimdb" in (*run.files.get("train", {}), *(run.arguments.get("tasks") or ())):
        raise UserError(f"{run.folder}: was trained on CFIMDB, which must be out of domain here")
    path = Path(str(run.arguments.get("model")))
    folder = path.parent if path.name == "best" else path
    return find_origin(SavedRun(folder)) if (folder / "log.jsonl").exists() else run


def check_data(data_dir: Path) -> dict[str, str]:
    """The sha256 of each file; UserError if one is missing."""
    for file in FILES:
        if not (data_dir / file).is_file():
            names = ", ".join(Path(file).name for file in FILES if file.startswith("ood/"))
            raise UserError(
                f"{data_dir / file}: no such file; expected the course's files in --data_dir, and"
                f" in its folder ood/ {names} (see docs/training.md)"
            )
    return {file: hashlib.sha256((data_dir / file).read_bytes()).hexdigest() for file in FILES}


def check_own_data(jobs: Sequence[Job], data: dict[str, str]) -> None:
    """UserError if a run was trained on other files: "in domain" would be wrong."""
    for run in (job.run for job in jobs):
        for path, sha256 in run.config["data"].items():
            if data.get(Path(path).name, sha256) != sha256:
                raise UserError(
                    f"{run.folder}: read another {Path(path).name} than the one in --data_dir"
                )


def check_facts(facts: dict[str, dict[str, Any]], records: Path) -> None:
    """UserError unless all runs started from one model, and all records match them."""
    (name, first), *others = facts.items()
    for other, mine in others:
        if mine["untouched"] != first["untouched"]:
            raise UserError(f"{other}: began with another model than {name}; give it its own --out")
    for path in sorted(records.glob("*.json")):
        record = read_json(path)
        expected = facts.get(path.stem, {**first, "weights": record.get("weights")})
        for key, text in FACTS.items():
            if record.get(key) != expected[key]:
                raise UserError(f"{path}: {text}; delete it, or name another --out")
