"""The paper's tables, and ours, as data: run their cells over seeds, report what was recorded.

    python experiments.py run table1 --seeds 3 --model all-MiniLM-L6-v2 --data_dir DATA
    python experiments.py report --data_dir DATA
    python experiments.py conflict RUN
    python experiments.py map RUN --data_dir DATA

A cell is a command line; a table names cells. `run` starts the scripts, one run folder a cell and
seed, skips what has been recorded and resumes what broke off. Each finished run becomes a file
in results/records/ (command, commit, figures, predictions; no sentence and no label of the data),
and `report` reads nothing but those and the gold labels.
"""

import argparse
import fcntl
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from options import POSITIVE, Parser, script

HOME = Path(__file__).resolve().parent
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
BAD_INPUT = 2  # a script's exit code
OWN = ("model", "data_dir", "seed", "run_dir", "features", "resume")  # flags that `run` gives
TASKS = ("sst", "para", "sts")
ENCODERS = 3  # pre-trained ones, each with a seed of its own; they take the longest

# ---------------------------------------------------------------------------- the tables as data


@dataclass(frozen=True)
class Cell:
    """One column of a table: a script with its flags, on top of those that a user gives to all.

    `start` names the cell whose best encoder (`encoder`) it starts from, instead of --model.
    """

    flags: str
    script: str = "multitask_classifier.py"
    start: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns (cells), the paper's figures for them, and the pairs of cells that are compared."""

    title: str
    cells: dict[str, str]  # cell -> the column's heading
    paper: dict[str, dict[str, float]]  # cell -> task -> figure
    pairs: tuple[tuple[str, str], ...] = ()  # (cell, the one that it is compared with)


PROBE, FINE = "--no_test --option pretrain", "--no_test --option finetune"
LONG = f"{PROBE} --epochs 10"  # heads alone take more epochs than --flags may give for BERT
CONCAT = "--para_decoder concat --sts_decoder concat"
CELLS: dict[str, Cell] = {
    # The paper's SimCSE has no temperature, which is 1; contrast wants batches as large as its.
    "simcse": Cell("--batch_size 32 --temperature 1", "simcse.py"),
    "simcse-t0.05": Cell("--batch_size 32 --temperature 0.05", "simcse.py"),
    "probe": Cell(LONG),
    "probe-short": Cell(PROBE),
    "finetune": Cell(f"{FINE} --measure_conflict 100"),
    "probe-simcse": Cell(LONG, start="simcse"),
    "finetune-simcse": Cell(FINE, start="simcse"),
    "probe-simcse-t0.05": Cell(LONG, start="simcse-t0.05"),
    "finetune-simcse-t0.05": Cell(FINE, start="simcse-t0.05"),
    **{f"without-{task}": Cell(f"{FINE} --leave_out {task}") for task in TASKS},
    "probe-concat": Cell(f"{LONG} {CONCAT}"),
    "finetune-concat": Cell(f"{FINE} {CONCAT}"),
    **{
        f"{pooling}-{decoder}": Cell(f"{FINE} --pooling {pooling} --sts_decoder {decoder}")
        for pooling in ("pooler", "cls", "mean")
        for decoder in ("dot", "cosine")
        if (pooling, decoder) != ("pooler", "dot")
    },
    "slow-concat": Cell(f"{FINE} {CONCAT} --lr 1e-5 --head_lr 1e-3"),
    "slow": Cell(f"{FINE} --lr 1e-5 --head_lr 1e-3"),
    "slow-bert": Cell(f"{FINE} --lr 1e-5"),
    "mean-cosine-fast": Cell(f"{FINE} --pooling mean --sts_decoder cosine --lr 1e-4"),
    "proportional": Cell(f"{FINE} --sampling proportional"),
    "annealed": Cell(f"{FINE} --sampling annealed"),
    "lpft": Cell("--no_test --option lpft"),
    "sum": Cell(f"{FINE} --surgery sum"),
    "pcgrad": Cell(f"{FINE} --surgery pcgrad"),
}

TABLES: dict[str, Table] = {
    "table1": Table(
        "Contrastive pre-training on NLI before probing and fine-tuning (the paper's Table 1)",
        {
            "probe": "Probe",
            "probe-simcse": "Probe, SimCSE",
            "finetune": "Fine-tune",
            "finetune-simcse": "Fine-tune, SimCSE",
        },
        {
            "probe": {"sst": 0.386, "para": 0.694, "sts": 0.304},
            "probe-simcse": {"sst": 0.390, "para": 0.632, "sts": 0.195},
            "finetune": {"sst": 0.494, "para": 0.823, "sts": 0.370},
            "finetune-simcse": {"sst": 0.487, "para": 0.775, "sts": 0.346},
        },
        (("probe-simcse", "probe"), ("finetune-simcse", "finetune")),
    ),
    "table2": Table(
        "A task's loss kept from BERT (the paper's Table 2)",
        {
            "finetune": "None left out",
            "probe-short": "Probe, as many steps",
            **{f"without-{task}": f"{task} left out" for task in TASKS},
        },
        {
            "finetune": {"sst": 0.494, "para": 0.823, "sts": 0.370},
            "probe-short": {"sst": 0.386, "para": 0.694, "sts": 0.304},
            "without-sst": {"sst": 0.278, "para": 0.813, "sts": 0.395},
            "without-para": {"sst": 0.495, "para": 0.628, "sts": 0.357},
            "without-sts": {"sst": 0.501, "para": 0.825, "sts": -0.064},
        },
        (
            *((f"without-{task}", "finetune") for task in TASKS),
            *((f"without-{task}", "probe-short") for task in TASKS),
        ),
    ),
    "table3": Table(
        "Decoders of pairs (the paper's Table 3)",
        {
            "probe-concat": "Probe, concatenate",
            "probe": "Probe, weighted dot",
            "finetune-concat": "Fine-tune, concatenate",
            "finetune": "Fine-tune, weighted dot",
        },
        {
            "probe-concat": {"para": 0.681, "sts": 0.277},
            "probe": {"para": 0.694, "sts": 0.304},
            "finetune-concat": {"para": 0.760, "sts": 0.345},
            "finetune": {"para": 0.823, "sts": 0.370},
        },
        (("probe", "probe-concat"), ("finetune", "finetune-concat")),
    ),
    "temperature": Table(
        "The temperature of contrastive pre-training",
        {
            "probe-simcse": "Probe, t = 1",
            "probe-simcse-t0.05": "Probe, t = 0.05",
            "finetune-simcse": "Fine-tune, t = 1",
            "finetune-simcse-t0.05": "Fine-tune, t = 0.05",
        },
        {},
        (("probe-simcse-t0.05", "probe-simcse"), ("finetune-simcse-t0.05", "finetune-simcse")),
    ),
    "pooling": Table(
        "Pooling and the decoder of STS, fine-tuned",
        {
            "finetune": "pooler, dot",
            **{
                name: name.replace("-", ", ")
                for name in ("pooler-cosine", "cls-dot", "cls-cosine", "mean-dot", "mean-cosine")
            },
        },
        {},
        tuple(
            (name, "finetune")
            for name in ("pooler-cosine", "cls-dot", "cls-cosine", "mean-dot", "mean-cosine")
        ),
    ),
    "ladder": Table(
        "What the low STS figure comes from, one change at a time",
        {
            "slow-concat": "Concatenate, slow",
            "slow": "Weighted dot",
            "slow-bert": "Heads 1e-2",
            "finetune": "BERT 5e-5",
            "mean-dot": "Mean pooling",
            "mean-cosine": "Cosine for STS",
            "mean-cosine-fast": "BERT 1e-4",
        },
        {},
        (
            ("slow", "slow-concat"),
            ("slow-bert", "slow"),
            ("finetune", "slow-bert"),
            ("mean-dot", "finetune"),
            ("mean-cosine", "mean-dot"),
            ("mean-cosine-fast", "mean-cosine"),
        ),
    ),
    "methods": Table(
        "Sampling, probing before fine-tuning, and gradient surgery",
        {
            "finetune": "Round robin",
            "proportional": "Proportional",
            "annealed": "Annealed",
            "lpft": "Probe, then fine-tune",
            "sum": "All tasks a step",
            "pcgrad": "All tasks a step, PCGrad",
        },
        {},
        (
            ("proportional", "finetune"),
            ("annealed", "finetune"),
            ("lpft", "finetune"),
            ("pcgrad", "sum"),
        ),
    ),
}


@dataclass(frozen=True)
class Claim:
    """What the paper says, as differences that must then be there.

    `differences`: (cell, other cell, task, sign): the first is below (-1), above (+1), or not far
    from (0) the second. With `most`, only that task's must be there, and be the largest of all.
    """

    text: str
    table: str
    differences: tuple[tuple[str, str, str, int], ...]
    most: str | None = None


def everywhere(first: str, second: str, sign: int) -> tuple[tuple[str, str, str, int], ...]:
    """The same difference on every task."""
    return tuple((first, second, task, sign) for task in TASKS)


CLAIMS = (
    Claim(
        "Contrastive pre-training hurts when probing (but for sentiment).",
        "table1",
        everywhere("probe-simcse", "probe", -1)[1:],
    ),
    Claim(
        "Contrastive pre-training hurts when fine-tuning.",
        "table1",
        everywhere("finetune-simcse", "finetune", -1),
    ),
    Claim(
        "Contrastive pre-training hurts most on STS.",
        "table1",
        everywhere("probe-simcse", "probe", -1),
        most="sts",
    ),
    Claim(
        "Sentiment and STS conflict: leaving out either helps the other.",
        "table2",
        (("without-sst", "finetune", "sts", 1), ("without-sts", "finetune", "sst", 1)),
    ),
    Claim(
        "Paraphrase conflicts with neither: leaving it out changes neither.",
        "table2",
        (("without-para", "finetune", "sst", 0), ("without-para", "finetune", "sts", 0)),
    ),
    Claim(
        "Leaving a task out makes it worse than probing.",
        "table2",
        tuple((f"without-{task}", "probe-short", task, -1) for task in TASKS),
    ),
    Claim(
        "Leaving a task out makes it worse most of all for STS.",
        "table2",
        tuple((f"without-{task}", "probe-short", task, -1) for task in TASKS),
        most="sts",
    ),
    Claim(
        "The weighted dot product beats concatenation.",
        "table3",
        tuple(
            (option, f"{option}-concat", task, 1)
            for option in ("probe", "finetune")
            for task in ("para", "sts")
        ),
    ),
)

# Prose of the report; `report.fill` puts the figures in.
LESSONS = (
    "**What a head on frozen embeddings can see.** With concatenation STS comes to"
    " {probe-concat sts} when probing, with the weighted dot product to {probe sts}, which is"
    " {probe - probe-concat sts} more: a linear layer over two vectors side by side cannot ask if"
    " they agree; one over their product can. Fine-tuned: {finetune-concat sts} and"
    " {finetune sts}, a difference of {finetune - finetune-concat sts}. Paraphrase, a question of"
    " yes or no, does not need the product: {finetune - finetune-concat para} when fine-tuned.",
    "**More contrast on NLI.** At the paper's temperature of 1, which tells candidates apart only"
    " weakly, it changes STS by {probe-simcse - probe sts} when probing and by"
    " {finetune-simcse - finetune sts} after fine-tuning; at SimCSE's 0.05 STS comes to"
    " {probe-simcse-t0.05 sts} and {finetune-simcse-t0.05 sts}.",
    "**What one task costs another.** With sentiment left out STS changes by"
    " {without-sst - finetune sts} and paraphrase by {without-sst - finetune para}; with paraphrase"
    " left out sentiment by {without-para - finetune sst} and STS by {without-para - finetune sts};"
    " with STS left out sentiment by {without-sts - finetune sst} and paraphrase by"
    " {without-sts - finetune para}. PCGrad instead of the sum of all gradients changes sentiment"
    " by {pcgrad - sum sst}, paraphrase by {pcgrad - sum para}, STS by {pcgrad - sum sts}. How the"
    " gradients themselves lie to each other stands under the tables.",
    "**STS, one change at a time.** Concatenation, heads at the paper's 1e-3 and BERT at the"
    " course's 1e-5: {slow-concat sts}; the weighted dot product: {slow sts}; heads at"
    " 1e-2: {slow-bert sts}; BERT at 5e-5: {finetune sts}; the mean of all tokens rather than the"
    " pooler: {mean-dot sts}; the cosine as STS's decoder: {mean-cosine sts}; BERT at 1e-4:"
    " {mean-cosine-fast sts}.",
    "**Probing takes time.** Probes here train their heads for ten epochs, where BERT is fine-tuned"
    " for fewer. With as many steps as that takes, a probe comes to {probe-short sst} for sentiment"
    " rather than {probe sst}, to {probe-short para} for paraphrase rather than {probe para}, to"
    " {probe-short sts} for STS rather than {probe sts}. The head of a task that is left out is"
    " compared with the shorter one.",
    "**Advice.** For degrees of similarity give the decoder a product or a cosine, not two vectors"
    " side by side, and take the mean of all tokens (`--pooling mean --sts_decoder cosine`): STS"
    " {mean-cosine - finetune sts}, paraphrase {mean-cosine - finetune para}, sentiment"
    " {mean-cosine - finetune sst} against the pooler and the dot product. Where those must stay,"
    " train the heads until they converge, and all from there (`--option lpft`, many epochs of"
    " probing and one of fine-tuning here): STS {lpft - finetune sts}, paraphrase"
    " {lpft - finetune para}. Train each variant with several seeds and look whether their figures"
    " lie apart. Before that, look whether a task's models are better than its commonest class:"
    " where they are not, nothing that is done to them shows.",
)

# ---------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Job:
    """A cell with a seed."""

    cell: str
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}-seed{self.seed}"


def jobs_of(tables: Sequence[str], seeds: int, probe_seeds: int) -> list[Job]:
    """What the tables need, each once, encoders before what starts from them."""
    jobs: dict[Job, None] = {}
    for table in tables:
        for name in TABLES[table].cells:
            cell = CELLS[name]
            count = probe_seeds if PROBE in cell.flags else seeds
            for seed in range(1, count + 1):
                job = Job(name, seed)
                if cell.start:
                    jobs[encoder(job)] = None
                jobs[job] = None
    return list(jobs)


def encoder(job: Job) -> Job | None:
    """The job whose encoder this one starts from; more seeds than encoders share them in turn."""
    start = CELLS[job.cell].start
    return Job(start, (job.seed - 1) % ENCODERS + 1) if start else None


def command(job: Job, args: argparse.Namespace, runs: Path, data_dir: Path) -> list[str]:
    """The command line of a job, without the interpreter. The cell's own flags win over --flags."""
    cell = CELLS[job.cell]
    start = encoder(job)
    model = runs / str(start) / "best" if start else args.model
    line = [cell.script, *args.flags, *shlex.split(cell.flags), "--model", str(model)]
    line += ["--data_dir", str(data_dir), "--seed", str(job.seed)]
    return [*line, "--run_dir", str(runs / str(job))]


def recorded_command(job: Job, args: argparse.Namespace) -> str:
    """The same for a record: what does not depend on where things lie."""
    return "python " + shlex.join(command(job, args, Path("runs/experiments"), Path("DATA")))


@contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Hold the folder of run folders; UserError where another `run` does."""
    from checkpoint import UserError

    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--runs {runs}: another run works there; name another") from None
        yield


def run(args: argparse.Namespace) -> None:
    """Run the jobs of some tables that have no record yet, one after the other."""
    from checkpoint import UserError

    if not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such folder")
    records = args.out / "records"
    records.mkdir(parents=True, exist_ok=True)
    with alone(args.runs):
        run_alone(args, records)


def run_alone(args: argparse.Namespace, records: Path) -> None:
    """The same, in folders that nobody else writes to."""
    from checkpoint import UserError, read_json, write_text
    from train import progress

    def finished(job: Job) -> bool:
        return (args.runs / str(job) / "result.json").exists()

    jobs = jobs_of(args.tables, args.seeds, args.probe_seeds)
    recorded = {job for job in jobs if (records / f"{job}.json").exists()}
    # What others start from must be there, recorded or not.
    needed = {encoder(job) for job in jobs if job not in recorded}
    waiting = [j for j in jobs if j not in recorded or (j in needed and not finished(j))]
    for job in jobs:
        line = recorded_command(job, args)
        if job in recorded and read_json(records / f"{job}.json").get("command") != line:
            was = read_json(records / f"{job}.json").get("command")
            raise UserError(
                f"{records / f'{job}.json'}: of another command ({difference(str(was), line)});"
                " name another --out"
            )
        folder, note = args.runs / str(job), args.runs / f"{job}.command"
        if folder.exists() and not (note.exists() and note.read_text(encoding="utf-8") == line):
            was = note.read_text(encoding="utf-8") if note.exists() else "unknown"
            raise UserError(
                f"{folder}: of another command ({difference(was, line)}); name another --runs"
            )
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them recorded already")
    failed: list[Job] = []
    with progress(len(waiting), "runs") as bar:
        for job in waiting:
            bar.set_postfix_str(str(job))
            log = args.runs / f"{job}.log"
            if not finished(job):
                code: int | str = "its encoder failed"
                if encoder(job) not in failed:
                    write_text(args.runs / f"{job}.command", recorded_command(job, args))
                    line = [*command(job, args, args.runs, args.data_dir), "--resume"]
                    if PROBE in CELLS[job.cell].flags:  # shared by seeds and heads
                        line += ["--features", str(args.runs / "features")]
                    code = start(line, log)
                if code:
                    failed.append(job)
                    bar.write(f"{job}: {code if isinstance(code, str) else ending(code, log)}")
                    bar.update()
                    if code in INTERRUPTED or code == BAD_INPUT:
                        break  # stopped from outside; or what would stop the others too
                    continue
            if job not in recorded:
                path = records / f"{job}.json"
                record(args.runs / str(job), path, job, recorded_command(job, args))
            shutil.rmtree(args.runs / str(job) / "last", ignore_errors=True)  # most of its size
            bar.update()
    given = {"--out": args.out, "--data_dir": args.data_dir, "--runs": args.runs}
    where = shlex.join(str(word) for pair in given.items() for word in pair)
    print(f"records are in {records}; tables: python experiments.py report {where}")
    if failed:
        raise UserError(f"{len(failed)} of {len(waiting)} runs failed ({failed[0]}, ...)")


def difference(was: str, now: str) -> str:
    """The words in which two command lines differ."""
    old, new = shlex.split(was), shlex.split(now)
    gone = shlex.join([word for word in old if word not in new]) or "nothing"
    come = shlex.join([word for word in new if word not in old]) or "nothing"
    return f"it had {gone} where now there is {come}"


def ending(code: int, log: Path) -> str:
    """How a script ended: its exit code, and the last that it said."""
    lines = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if log.exists()
        else []
    )
    return f"exit code {code}: {lines[-1].strip() if lines else 'nothing said'} (see {log})"


def start(line: Sequence[str], log: Path) -> int:
    """Run a script to its end, what it prints going to `log`; its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        python = [sys.executable, str(HOME / line[0]), *line[1:]]
        return subprocess.run(python, stdout=file, stderr=file).returncode


def record(folder: Path, path: Path, job: Job, line: str) -> None:
    """Write a finished run as one file: what it was, its figures, and its dev predictions."""
    from checkpoint import read_json, write_json

    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    predictions = {}
    for name in result.get("predictions", {}):
        task, split = name.split("_")
        if split == "dev":
            predictions[task] = read_predictions(Path(result["predictions"][name]))
    kept = ("commit", "uncommitted_changes", "versions", "hardware", "started", "rows", "precision")
    curve = [
        {"step": r["step"], "score": r["score"], "stage": r.get("stage")}
        for r in log
        if r["kind"] == "dev"
    ]
    conflicts = [{"step": r["step"], "parts": r["parts"]} for r in log if r["kind"] == "conflict"]
    write_json(
        path,
        {
            "cell": job.cell,
            "seed": job.seed,
            "command": line,
            **{name: config[name] for name in kept},
            "dev": result["dev"],
            "overall": result.get("overall"),
            "training_seconds": result["training_seconds"],
            "curve": curve,
            "conflict": conflicts,
            "predictions": predictions,
        },
    )


def read_predictions(path: Path) -> list[float]:
    """The predictions of a leaderboard file, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [round(float(line.rsplit(" , ", 1)[1]), 5) for line in lines]


# ---------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(__doc__.splitlines()[0])
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="run|report|conflict|map", help="what to do"
    )

    def action(name: str, what: str, data: bool = True, out: bool = True) -> Parser:
        added = actions.add_parser(name, help=what, description=what)
        if data:
            added.add_argument("--data_dir", type=Path, default=Path("data"), help="the csv files")
        if out:
            added.add_argument("--out", type=Path, default=Path("results"), help="records, tables")
        return added

    add = action("run", "run what tables need and no record has").add_argument
    add("tables", nargs="+", metavar="TABLE", help=f"{', '.join(TABLES)}, or all")
    add("--model", default="bert-base-uncased", help="as for the scripts")
    add("--seeds", type=POSITIVE, default=3, help="of each cell that trains BERT: 1, 2, ...")
    add("--probe_seeds", type=POSITIVE, default=5, help="of each cell that does not")
    add("--runs", type=Path, default=Path("runs/experiments"), help="a run folder a cell and seed")
    add("--flags", default="", help='for every script, such as --flags="--limit 500 --use_gpu"')
    add = action("report", "write tables and plots from the records").add_argument
    add("--runs", type=Path, default=Path("runs/experiments"), help="of the models to plot")
    add = action("conflict", "plot what a run measured", data=False, out=False).add_argument
    add("run", type=Path, help="a run folder of --measure_conflict")
    add = action("map", "plot a run's sentence embeddings", out=False).add_argument
    add("run", type=Path, help="a run folder")
    add("--limit", type=POSITIVE, help="rows of each task")
    args = parser.parse_args(argv)
    if args.action == "run":
        if "all" in args.tables:
            args.tables = list(TABLES)
        for table in args.tables:
            if table not in TABLES:
                parser.error(f"{table}: no such table; there are {', '.join(TABLES)}, and all")
        try:
            args.flags = shlex.split(args.flags)
        except ValueError as error:
            parser.error(f"--flags {args.flags}: {error}")
        for name in OWN:
            if any(word == f"--{name}" or word.startswith(f"--{name}=") for word in args.flags):
                parser.error(f"--flags: --{name} is given by this script; leave it out there")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse(argv)
    if args.action == "run":
        run(args)
        return
    import report

    if args.action == "report":
        report.report(TABLES, CLAIMS, LESSONS, CELLS, args.out, args.data_dir, args.runs)
    elif args.action == "conflict":
        report.plot_conflict(args.run)
    else:
        report.plot_map(args.run, args.data_dir, args.limit)


if __name__ == "__main__":
    script(main)
