"""The paper's tables and ours, as data: a cell is a command line, a table is a row of cells."""

from dataclasses import dataclass

TASK_TITLES = {"sst": "SST accuracy", "para": "Quora accuracy", "sts": "STS Pearson"}
LINEAR_PROBE = "--no_test --option pretrain"  # the course's word for training only the heads
FINE_TUNE = "--no_test --option finetune"
# Heads alone need more epochs than a fine-tuned encoder, whatever --flags says.
LONG_PROBE = f"{LINEAR_PROBE} --epochs 10"
CONCAT = "--para_decoder concat --sts_decoder concat"


@dataclass(frozen=True)
class Cell:
    """A script and its flags, appended to those given for every run.

    `start_from` names the cell whose best encoder the run starts from, instead of --model.
    """

    flags: str
    script: str = "multitask_classifier.py"
    start_from: str | None = None

    @property
    def is_probe(self) -> bool:
        """Whether the encoder stays frozen."""
        return LINEAR_PROBE in self.flags


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


# Every run, once, however many tables show it.
CELLS: dict[str, Cell] = {
    # The paper's SimCSE has batches of 32 and no temperature, which is a temperature of 1.
    "simcse": Cell("--batch_size 32 --temperature 1", "simcse.py"),
    "simcse-t0.05": Cell("--batch_size 32 --temperature 0.05", "simcse.py"),
    "probe": Cell(LONG_PROBE),
    "probe-short": Cell(LINEAR_PROBE),
    "finetune": Cell(f"{FINE_TUNE} --measure_conflict 100"),
    "probe-simcse": Cell(LONG_PROBE, start_from="simcse"),
    "finetune-simcse": Cell(FINE_TUNE, start_from="simcse"),
    "probe-simcse-t0.05": Cell(LONG_PROBE, start_from="simcse-t0.05"),
    "finetune-simcse-t0.05": Cell(FINE_TUNE, start_from="simcse-t0.05"),
    "without-sst": Cell(f"{FINE_TUNE} --leave_out sst"),
    "without-para": Cell(f"{FINE_TUNE} --leave_out para"),
    "without-sts": Cell(f"{FINE_TUNE} --leave_out sts"),
    "probe-concat": Cell(f"{LONG_PROBE} {CONCAT}"),
    "finetune-concat": Cell(f"{FINE_TUNE} {CONCAT}"),
    "pooler-cosine": Cell(f"{FINE_TUNE} --pooling pooler --sts_decoder cosine"),
    "cls-dot": Cell(f"{FINE_TUNE} --pooling cls --sts_decoder dot"),
    "cls-cosine": Cell(f"{FINE_TUNE} --pooling cls --sts_decoder cosine"),
    "mean-dot": Cell(f"{FINE_TUNE} --pooling mean --sts_decoder dot"),
    "mean-cosine": Cell(f"{FINE_TUNE} --pooling mean --sts_decoder cosine"),
    "mean-cosine-fast": Cell(f"{FINE_TUNE} --pooling mean --sts_decoder cosine --lr 1e-4"),
    "slow-concat": Cell(f"{FINE_TUNE} {CONCAT} --lr 1e-5 --head_lr 1e-3"),
    "slow": Cell(f"{FINE_TUNE} --lr 1e-5 --head_lr 1e-3"),
    "slow-bert": Cell(f"{FINE_TUNE} --lr 1e-5"),
    "proportional": Cell(f"{FINE_TUNE} --sampling proportional"),
    "annealed": Cell(f"{FINE_TUNE} --sampling annealed"),
    "lpft": Cell("--no_test --option lpft"),
    "sum": Cell(f"{FINE_TUNE} --surgery sum"),
    "pcgrad": Cell(f"{FINE_TUNE} --surgery pcgrad"),
}

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
    "pooling": Table(
        "Pooling and STS decoder, fine-tuned",
        (
            Column("finetune", "pooler, dot"),
            *(
                Column(cell, cell.replace("-", ", "), ("finetune",))
                for cell in ("pooler-cosine", "cls-dot", "cls-cosine", "mean-dot", "mean-cosine")
            ),
        ),
    ),
    "ablation": Table(
        "Where the low STS score comes from: one change at a time, from left to right",
        (
            Column("slow-concat", "Concatenate, low lr"),
            Column("slow", "Weighted dot", ("slow-concat",)),
            Column("slow-bert", "Heads lr 1e-2", ("slow",)),
            Column("finetune", "Encoder lr 5e-5", ("slow-bert",)),
            Column("mean-dot", "Mean pooling", ("finetune",)),
            Column("mean-cosine", "Cosine for STS", ("mean-dot",)),
            Column("mean-cosine-fast", "Encoder lr 1e-4", ("mean-cosine",)),
        ),
    ),
    "methods": Table(
        "Sampling, LP-FT and PCGrad",
        (
            Column("finetune", "Round robin"),
            Column("proportional", "Proportional", ("finetune",)),
            Column("annealed", "Annealed", ("finetune",)),
            Column("lpft", "LP-FT", ("finetune",)),
            Column("sum", "All tasks per step"),
            Column("pcgrad", "PCGrad", ("sum",)),
        ),
    ),
}
