"""The paper's claims and tables, and our own, as data: a cell is a command line.

The claims were written down before the runs that judge them (see the history of this file).
"""

from dataclasses import dataclass

TASK_TITLES = {"sst": "SST accuracy", "para": "Quora accuracy", "sts": "STS Pearson"}
# Every cell is evaluated once, at its end: a score that is the best of several is too high.
FINAL = "--no_test --final_only"
FINE_TUNE = f"{FINAL} --option finetune"
LINEAR_PROBE = f"{FINAL} --option pretrain"  # the course's word for training only the heads
PROBE_SHORT = f"{LINEAR_PROBE} --epochs 3"  # as many steps of the heads as in fine-tuning
PROBE = f"{LINEAR_PROBE} --epochs 10"  # until the heads have converged
CONCAT = "--para_decoder concat --sts_decoder concat"
SIMCSE = "--final_only --batch_size 32 --epochs 3 --lr 5e-5"
CONFLICT = "--conflict_rows 512 --measure_conflict"
BEST = "@recipes/best.txt"
SMALL = f"{BEST} {FINAL} --limit 30000 --epochs 2"


@dataclass(frozen=True)
class Cell:
    """A script and its flags, appended to those given for every run.

    `start_from` names the cell whose encoder the run starts from, instead of --model.
    """

    flags: str
    seeds: int = 8
    script: str = "multitask_classifier.py"
    start_from: str | None = None


# Every run, once, however many tables show it.
CELLS: dict[str, Cell] = {
    # The paper's SimCSE has batches of 32 and no temperature, which is a temperature of 1.
    "simcse": Cell(f"{SIMCSE} --temperature 1", 4, "simcse.py"),
    "simcse-t0.05": Cell(f"{SIMCSE} --temperature 0.05", 4, "simcse.py"),
    # 1,701 steps: conflict is measured at the first, the middle and the last.
    "finetune": Cell(f"{FINE_TUNE} {CONFLICT} 850"),
    "without-sst": Cell(f"{FINE_TUNE} --leave_out sst"),
    "without-para": Cell(f"{FINE_TUNE} --leave_out para"),
    "without-sts": Cell(f"{FINE_TUNE} --leave_out sts"),
    "finetune-simcse": Cell(FINE_TUNE, start_from="simcse"),
    "finetune-simcse-t0.05": Cell(FINE_TUNE, start_from="simcse-t0.05"),
    "finetune-concat": Cell(f"{FINE_TUNE} {CONCAT}"),
    "probe-short": Cell(PROBE_SHORT),
    "probe-short-simcse": Cell(PROBE_SHORT, start_from="simcse"),
    "probe": Cell(PROBE),
    "probe-simcse": Cell(PROBE, start_from="simcse"),
    "probe-simcse-t0.05": Cell(PROBE, start_from="simcse-t0.05"),
    "probe-concat": Cell(f"{PROBE} {CONCAT}"),
    # LP-FT trains its heads for 5 + 3 epochs, and so does the fine-tuning beside it. Conflict is
    # measured once, when fine-tuning begins: of trained heads on an untouched BERT.
    "lpft": Cell(f"{FINAL} --option lpft --probe_epochs 5 {CONFLICT} 5000", 4),
    "finetune-long": Cell(f"{FINE_TUNE} --epochs 8", 4),
    # All tasks in every step, and so a third of the steps, with and without projection.
    "sum": Cell(f"{FINE_TUNE} --surgery sum", 4),
    "pcgrad": Cell(f"{FINE_TUNE} --surgery pcgrad", 4),
    "mean-dot": Cell(f"{FINE_TUNE} --pooling mean", 4),
    "mean-cosine": Cell(f"{FINE_TUNE} --pooling mean --sts_decoder cosine", 4),
    # The leaderboard's recipe, and with one of its ingredients taken out at a time. (Its learning
    # rates are those of `python -m experiments sweep`.)
    "best": Cell(BEST, 5),
    "small": Cell(SMALL, 3),
    # A step of R-Drop takes twice the time: once with as many steps, once in the same time.
    "small-no-rdrop": Cell(f"{SMALL} --rdrop 0", 3),
    "small-no-rdrop-long": Cell(f"{SMALL} --rdrop 0 --epochs 4", 3),
    "small-separate": Cell(f"{SMALL} --para_encoding separate", 3),
    "small-pooler": Cell(f"{SMALL} --pooling pooler", 3),
    "small-dot": Cell(f"{SMALL} --sts_decoder dot", 3),
    "small-joint-sts": Cell(f"{SMALL} --sts_encoding joint --sts_decoder linear", 3),
    # Its epochs are passes over the smallest set: five of them are about as many steps.
    "small-roundrobin": Cell(f"{SMALL} --sampling roundrobin --epochs 5", 3),
}


# ---------------------------------------------------------------------------- the paper's claims

# A difference below these is of no consequence: two points of accuracy, and 0.05 in Fisher's z,
# which is .02 of a correlation of .77. The systems that lead the course's leaderboard are as far
# apart, and so are the paper's own effects that it calls clear.
MARGINS = {"accuracy": 0.02, "fisher_z": 0.05}


@dataclass(frozen=True)
class Contrast:
    """The score of `cell` minus that of `reference` on a task.

    expected: what the paper says of it, "above 0", "below 0" or "not above 0"; paper: its figure.
    """

    cell: str
    reference: str
    task: str
    expected: str
    paper: float


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and the differences that it is about."""

    text: str
    contrasts: tuple[Contrast, ...]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "SimCSE before linear probing harms Quora and STS, and helps SST slightly",
        (
            Contrast("probe-simcse", "probe", "sst", "above 0", 0.004),
            Contrast("probe-simcse", "probe", "para", "below 0", -0.062),
            Contrast("probe-simcse", "probe", "sts", "below 0", -0.109),
        ),
    ),
    Claim(
        "SimCSE before fine-tuning harms every task",
        (
            Contrast("finetune-simcse", "finetune", "sst", "below 0", -0.007),
            Contrast("finetune-simcse", "finetune", "para", "below 0", -0.048),
            Contrast("finetune-simcse", "finetune", "sts", "below 0", -0.024),
        ),
    ),
    Claim(
        "A task that is left out of fine-tuning does worse than in linear probing",
        (
            Contrast("without-sst", "probe-short", "sst", "below 0", -0.108),
            Contrast("without-para", "probe-short", "para", "below 0", -0.066),
            Contrast("without-sts", "probe-short", "sts", "below 0", -0.368),
        ),
    ),
    Claim(
        "SST and STS conflict: leaving one out helps the other",
        (
            Contrast("without-sst", "finetune", "sts", "above 0", 0.025),
            Contrast("without-sts", "finetune", "sst", "above 0", 0.007),
        ),
    ),
    Claim(
        "Quora conflicts with neither: leaving it out helps neither",
        (
            Contrast("without-para", "finetune", "sst", "not above 0", 0.001),
            Contrast("without-para", "finetune", "sts", "not above 0", -0.013),
        ),
    ),
    Claim(
        "The weighted dot product is a better decoder than concatenation",
        (
            Contrast("probe", "probe-concat", "para", "above 0", 0.013),
            Contrast("probe", "probe-concat", "sts", "above 0", 0.027),
            Contrast("finetune", "finetune-concat", "para", "above 0", 0.063),
            Contrast("finetune", "finetune-concat", "sts", "above 0", 0.025),
        ),
    ),
)


# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Column:
    """A cell in a table; `compare_with`: other cells of the table, `paper`: its scores by task."""

    cell: str
    heading: str
    compare_with: tuple[str, ...] = ()
    paper: tuple[float | None, float | None, float | None] = (None, None, None)


@dataclass(frozen=True)
class Table:
    """Columns side by side."""

    title: str
    columns: tuple[Column, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of its columns."""
        return tuple(column.cell for column in self.columns)


# The scores of the paper are those that it prints; a column without them is ours.
TABLES: dict[str, Table] = {
    "table1": Table(
        "Contrastive pre-training on NLI (the paper's Table 1)",
        (
            Column("probe", "Probe", paper=(0.386, 0.694, 0.304)),
            Column("probe-simcse", "SimCSE, probe", ("probe",), (0.390, 0.632, 0.195)),
            Column("finetune", "Fine-tune", paper=(0.494, 0.823, 0.370)),
            Column("finetune-simcse", "SimCSE, fine-tune", ("finetune",), (0.487, 0.775, 0.346)),
        ),
    ),
    "table2": Table(
        "Fine-tuning with one task left out (the paper's Table 2)",
        (
            Column("finetune", "All tasks", paper=(0.494, 0.823, 0.370)),
            Column("probe-short", "Probe, same steps", paper=(0.386, 0.694, 0.304)),
            Column("probe", "Probe, converged", ("probe-short",)),
            *(
                Column(f"without-{task}", f"Without {name}", ("finetune", "probe-short"), paper)
                for task, name, paper in (
                    ("sst", "SST", (0.278, 0.813, 0.395)),
                    ("para", "Quora", (0.495, 0.628, 0.357)),
                    ("sts", "STS", (0.501, 0.825, -0.064)),
                )
            ),
        ),
    ),
    "table3": Table(
        "Decoders for sentence pairs (the paper's Table 3)",
        (
            Column("probe-concat", "Probe, concatenate", paper=(None, 0.681, 0.277)),
            Column("probe", "Probe, weighted dot", ("probe-concat",), (None, 0.694, 0.304)),
            Column("finetune-concat", "Fine-tune, concatenate", paper=(None, 0.760, 0.345)),
            Column(
                "finetune", "Fine-tune, weighted dot", ("finetune-concat",), (None, 0.823, 0.370)
            ),
        ),
    ),
    "temperature": Table(
        "Temperature of contrastive pre-training",
        (
            Column("probe-simcse", "Probe, t = 1"),
            Column("probe-simcse-t0.05", "Probe, t = 0.05", ("probe-simcse",)),
            Column("finetune-simcse", "Fine-tune, t = 1"),
            Column("finetune-simcse-t0.05", "Fine-tune, t = 0.05", ("finetune-simcse",)),
        ),
    ),
    "probes": Table(
        "Linear probes: as many steps as fine-tuning, and converged",
        (
            Column("probe-short", "Probe, short"),
            Column("probe", "Probe", ("probe-short",)),
            Column("probe-short-simcse", "SimCSE, probe, short", ("probe-short",)),
            Column("probe-simcse", "SimCSE, probe", ("probe",)),
        ),
    ),
    "methods": Table(
        "LP-FT and PCGrad, each beside a control with as many steps of the heads",
        (
            Column("finetune", "Fine-tune"),
            Column("finetune-long", "Fine-tune, 8 epochs"),
            Column("lpft", "LP-FT, 5 + 3 epochs", ("finetune", "finetune-long")),
            Column("sum", "All tasks per step"),
            Column("pcgrad", "PCGrad", ("sum",)),
        ),
    ),
    "sts": Table(
        "Where the low STS score comes from: one change at a time, from left to right",
        (
            Column("finetune-concat", "Concatenate"),
            Column("finetune", "Weighted dot", ("finetune-concat",)),
            Column("mean-dot", "Mean pooling", ("finetune",)),
            Column("mean-cosine", "Cosine", ("mean-dot",)),
        ),
    ),
    "leaderboard": Table("The best recipe", (Column("best", "recipes/best.txt"),)),
    "recipe": Table(
        "The best recipe at 30,000 Quora pairs and 2 epochs, one ingredient taken out at a time",
        (
            Column("small", "All ingredients"),
            Column("small-no-rdrop-long", "No R-Drop, 4 epochs", ("small",)),
            Column("small-no-rdrop", "No R-Drop", ("small",)),
            Column("small-separate", "Quora encoded separately", ("small",)),
            Column("small-pooler", "Pooler", ("small",)),
            Column("small-dot", "STS by weighted dot", ("small",)),
            Column("small-joint-sts", "STS encoded jointly", ("small",)),
            Column("small-roundrobin", "Round robin", ("small",)),
        ),
    ),
}
