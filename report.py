"""Recorded runs to tables, plots and comparisons: what `experiments.py report` writes.

A record is one finished run (`experiments.record`); a table names cells, and each cell has a record
a seed. Nothing here trains, and every figure comes from the records and the gold labels.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from checkpoint import UserError, read_json, whole_file, write_text
from datasets import read
from scoring import LEVEL, compare, headline, holm, p_value
from tasks import TASKS, MultitaskBERT

TASK_NAMES = {"sst": "Sentiment, accuracy", "para": "Paraphrase, accuracy", "sts": "STS, Pearson"}
RECORDED = {
    *("cell", "seed", "command", "commit", "precision", "rows", "dev", "overall", "curve"),
    *("conflict", "predictions"),
}
Records = dict[str, list[dict[str, Any]]]  # cell -> its runs, by seed
EMBEDDED_NOTE = (
    "**The model is the embedded all-MiniLM-L6-v2, which was tuned on sentence pairs before, NLI's"
    " and Quora's among them. Its SimCSE columns ask another question than the paper's: what more"
    " of the same does, not what contrast does to plain BERT.**"
)
LEAST_SEEDS = 3  # of each cell, for a verdict; of measurements too
RESAMPLES = 2_000  # of a bootstrap
RECORDED_TO = 1e-3  # predictions are rounded in a record
MARGIN = 0.02  # accuracy or r; a difference surely smaller is none
CHANGED_NOTE = "+: in a copy with changes that were not committed."
SHARED_NOTE = (
    "What starts from `NAME-seedN` takes the encoder of that cell and seed. Where there are more"
    " probes than encoders, they take these in turn: ± then is of fewer encoders than probes."
)


class Cell(Protocol):
    """`experiments.Cell`."""

    flags: str


class Table(Protocol):
    """`experiments.Table`."""

    title: str
    cells: dict[str, str]
    paper: dict[str, dict[str, float]]
    pairs: tuple[tuple[str, str], ...]


class Claim(Protocol):
    """`experiments.Claim`."""

    text: str
    table: str
    differences: tuple[tuple[str, str, str, int], ...]
    most: str | None


def load_records(out: Path, cells: Collection[str]) -> Records:
    """The records in `out` by cell, seeds in order; UserError for one of no such cell."""
    paths = sorted((out / "records").glob("*.json"))
    if not paths:
        raise UserError(f"{out / 'records'}: no records; make some with experiments.py run TABLE")
    found: Records = {}
    for path in paths:
        record = read_json(path)
        absent = RECORDED - set(record)
        if absent:
            raise UserError(f"{path}: not a record (no {min(absent)}); move it away")
        if record["cell"] not in cells:
            raise UserError(f"{path}: its cell {record['cell']!r} is in no table; move it away")
        found.setdefault(record["cell"], []).append(record)
    return {cell: sorted(of, key=lambda r: r["seed"]) for cell, of in found.items()}


def mean_and_sd(records: Sequence[dict[str, Any]], task: str) -> tuple[float, float | None]:
    """Of a task's headline over seeds; no deviation from a single one."""
    values = [headline(record["dev"][task]) for record in records]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def having(records: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Those of the records that trained on the task."""
    return [record for record in records if task in record["dev"]]


def comparisons(table: Table, records: Records, data_dir: Path) -> list[dict[str, Any]]:
    """Each pair of the table on each task: difference, 95% interval, p-value corrected by Holm."""
    found = []
    gold: dict[tuple[str, int], np.ndarray] = {}
    for first, second in table.pairs:
        for task in TASK_NAMES:
            groups = [having(records.get(cell, []), task) for cell in (first, second)]
            if not all(groups):
                continue
            sizes = {len(r["predictions"][task]) for of in groups for r in of}
            if len(sizes) > 1:
                raise UserError(
                    f"the records of {first} and {second} have {min(sizes)} to {max(sizes)} dev"
                    f" rows of {task}: run them anew on the same data"
                )
            [size] = sizes
            if (task, size) not in gold:
                path = data_dir / TASKS[task].files.format("dev")
                examples, _ = read(path, TASKS[task], limit=size)
                gold[task, size] = np.array([example.label for example in examples])
            if len(gold[task, size]) != size:
                raise UserError(
                    f"--data_dir {data_dir}: {task} has {len(gold[task, size])} dev rows, but the"
                    f" records of {first} {size}: name the data that they were made on"
                )
            for of in groups:
                check_gold(of, task, gold[task, size], data_dir)
            predicted = [np.array([r["predictions"][task] for r in of]) for of in groups]
            result = compare(gold[task, size], *predicted, correlation=not TASKS[task].whole)
            names = {"first": first, "second": second, "task": task}
            floor = at_floor(gold[task, size], predicted, TASKS[task].whole)
            seeds = min(map(len, groups))
            figures = [[headline(r["dev"][task]) for r in of] for of in groups]
            apart = min(figures[0]) > max(figures[1]) or max(figures[0]) < min(figures[1])
            facts = {"seeds": seeds, "floor": floor, "apart": apart}
            found.append({**names, **facts, **vars(result)})
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_corrected"] = p
    return found


def check_gold(of: Sequence[dict[str, Any]], task: str, gold: np.ndarray, data_dir: Path) -> None:
    """UserError unless the records' predictions and these labels give the recorded figures."""
    for record in of:
        recorded = headline(record["dev"][task])
        again = headline(TASKS[task].report(np.array(record["predictions"][task]), gold))
        if abs(again - recorded) > RECORDED_TO:
            raise UserError(
                f"--data_dir {data_dir}: the record of {record['cell']}, seed {record['seed']}, has"
                f" {recorded:.4f} for {task}, and on these dev rows it is {again:.4f}: name the"
                " data that it was made on, or run it anew"
            )


def at_floor(gold: np.ndarray, predicted: Sequence[np.ndarray], classes: bool) -> bool:
    """Whether no model of two does better, by `MARGIN`, than always giving the commonest class."""
    if not classes:
        return False
    commonest = np.unique(gold, return_counts=True)[1].max() / len(gold)
    return all((of == gold).mean() < commonest + MARGIN for of in predicted)


def figure(records: Sequence[dict[str, Any]], task: str, plus_minus: str) -> str:
    """A cell's text: mean and deviation, or that it is missing."""
    records = having(records, task)
    if not records:
        return "missing"
    mean, sd = mean_and_sd(records, task)
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} {plus_minus} {sd:.3f}"


def markdown(table: Table, records: Records, compared: list[dict[str, Any]]) -> str:
    """A table, its comparisons, and what it was made from."""
    lines = [f"## {table.title}", "", "| | " + " | ".join(table.cells.values()) + " |"]
    lines.append("|---" * (len(table.cells) + 1) + "|")
    for task, name in TASK_NAMES.items():
        cells = [figure(records.get(cell, []), task, "±") for cell in table.cells]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if table.paper:
            paper = [table.paper.get(cell, {}).get(task) for cell in table.cells]
            shown = ["-" if value is None else f"{value:.3f}" for value in paper]
            lines.append("| *the paper's* | " + " | ".join(shown) + " |")
    if compared:
        lines += ["", "| difference | task | | 95% interval | p (Holm) |", "|---|---|---|---|---|"]
    for row in compared:
        heading = f"{table.cells[row['first']]} - {table.cells[row['second']]}"
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        shown = p_value(row["p_corrected"])
        lines.append(
            f"| {heading} | {row['task']} | {row['difference']:+.3f} | {interval} | {shown} |"
        )
    lines += ["", "| column | seeds | precision | commit | command |", "|---|---|---|---|---|"]
    for cell, heading in table.cells.items():
        of = records.get(cell, [])
        seeds = " ".join(str(record["seed"]) for record in of) or "none"
        changed = {r["commit"]: "+" if r.get("uncommitted_changes") else "" for r in of}
        commits = (
            " ".join(f"{(commit or '-')[:7]}{mark}" for commit, mark in changed.items()) or "-"
        )
        precisions = " ".join(sorted({record["precision"] for record in of})) or "-"
        line = f"`{of[0]['command']}`" if of else "missing"
        lines.append(f"| {heading} | {seeds} | {precisions} | {commits} | {line} |")
    commands = [record["command"] for cell in table.cells for record in records.get(cell, [])]
    if any("/best --data_dir" in command for command in commands):
        lines += ["", SHARED_NOTE]
    if any(r.get("uncommitted_changes") for cell in table.cells for r in records.get(cell, [])):
        lines += ["", CHANGED_NOTE]
    return "\n".join([*lines, ""])


def latex(table: Table, records: Records, compared: list[dict[str, Any]]) -> str:
    """The table for a paper: figures, below each the paper's; and the differences in another."""
    lines = [r"\begin{tabular}{l" + "r" * len(table.cells) + "}", r"\hline"]
    lines += ["& " + " & ".join(table.cells.values()) + r" \\", r"\hline"]
    for task, name in TASK_NAMES.items():
        cells = [figure(records.get(cell, []), task, r"$\pm$") for cell in table.cells]
        lines.append(f"{name} & " + " & ".join(cells) + r" \\")
        if table.paper:
            paper = [table.paper.get(cell, {}).get(task) for cell in table.cells]
            shown = ["" if value is None else f"{value:.3f}" for value in paper]
            lines.append("the paper & " + " & ".join(shown) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    if compared:
        lines += ["", r"\begin{tabular}{llrrr}", r"\hline"]
        lines += [r"difference & task & & 95\% interval & $p$ (Holm) \\", r"\hline"]
    for row in compared:
        heading = f"{table.cells[row['first']]} $-$ {table.cells[row['second']]}"
        interval = f"${row['low']:+.3f}$ to ${row['high']:+.3f}$"
        p = f"${p_value(row['p_corrected'])}$"
        lines.append(
            f"{heading} & {row['task']} & ${row['difference']:+.3f}$ & {interval} & {p} \\\\"
        )
    if compared:
        lines += [r"\hline", r"\end{tabular}"]
    return "\n".join([*lines, ""])


def conditions(records: Records, cells: Mapping[str, Cell]) -> str:
    """How many rows the runs were trained and judged on, and with how many seeds."""
    counts: dict[str, dict[str, set[int]]] = {}
    for record in (record for of in records.values() for record in of):
        for split, of in record["rows"].items():
            for name, count in of.items():
                counts.setdefault(split, {}).setdefault(name, set()).add(count)

    def listed(of: dict[str, set[int]]) -> str:
        sizes = {name: " or ".join(f"{n:,}" for n in sorted(seen)) for name, seen in of.items()}
        return ", ".join(f"{name} {size}" for name, size in sizes.items())

    rows = "; ".join(f"{split}: {listed(counts[split])}" for split in ("train", "dev"))
    seeds = sorted({len(of) for of in records.values()})
    flags = {
        given_flags(r["command"], cells[cell].flags) for cell, of in records.items() for r in of
    }
    given = ""
    if flags != {""}:
        given = f" Flags for all, where a cell has no other: {' or '.join(sorted(flags))}."
    return f"**Rows, {rows}. Seeds of a cell: {' or '.join(map(str, seeds))}.{given}**"


def given_flags(command: str, own: str) -> str:
    """The `--flags` of `experiments.py run` in a recorded command, before the cell's own."""
    found, there, _ = command.partition(".py ")[2].partition(own)
    if not there:
        raise UserError(f"records: made by `{command}`, but its cell has `{own}`: run it anew")
    return f"`{found.strip()}`" if found.strip() else ""


def judge(claim: Claim, compared: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """A verdict on a claim of the paper, and the figures that it rests on.

    Args:
        claim: what the paper says.
        compared: `comparisons` of its table.

    Each difference speaks for the claim (certain, and of the claimed sign; where none is claimed, a
    whole interval within `MARGIN`), against it (certain, and not that), or neither. It is certain
    where p, which knows of the dev rows' chance alone, is below `LEVEL`, and the figures of the one
    model's seeds all lie above those of the other's. That a task differs most is for it where its
    interval lies beyond all others', against it where another's lies beyond it; then only that
    task's own difference has a vote beside. The claim stands if all is for it, falls if anything is
    against it, and else cannot be told; nor can it where a cell has fewer than `LEAST_SEEDS`. A
    difference of two models that are both no better than the commonest class (`at_floor`) speaks
    for nothing, nor does a larger one beside it.
    """
    found = {(row["first"], row["second"], row["task"]): row for row in compared}
    rows = [(found.get((one, other, task)), sign) for one, other, task, sign in claim.differences]
    if any(row is None for row, _ in rows):
        return "cannot be told", "Runs are missing."
    votes = [_vote(row, sign) for row, sign in rows if claim.most in (None, row["task"])]
    if claim.most:
        sizes = {row["task"]: sorted((sign * row["low"], sign * row["high"])) for row, sign in rows}
        low, high = sizes.pop(claim.most)
        beyond_all = all(other_high < low for _, other_high in sizes.values())
        beaten = any(other_low > high for other_low, _ in sizes.values())
        floor = any(row["floor"] for row, _ in rows)
        votes.append(0 if floor else 1 if beyond_all else -1 if beaten else 0)
    verdict = "falls" if -1 in votes else "stands" if set(votes) == {1} else "cannot be told"
    said: dict[str, list[str]] = {}
    for row, sign in rows:
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}, p {p_value(row['p_corrected'])}"
        where = f"{row['first']} - {row['second']}"
        counts = claim.most in (None, row["task"])
        said.setdefault(WORDS[_vote(row, sign)] if counts else "For comparison", []).append(
            f"{row['task']} {row['difference']:+.3f} ({interval}{doubt(row)}; {where})"
        )
    figures = " ".join(f"{word}: {'; '.join(of)}." for word, of in said.items())
    if min(row["seeds"] for row, _ in rows) < LEAST_SEEDS:
        return "cannot be told", f"Fewer than {LEAST_SEEDS} seeds. {figures}"
    return verdict, figures


def doubt(row: dict[str, Any]) -> str:
    """What its interval and its p do not say of a difference, for a parenthesis."""
    if row["floor"]:
        return ", neither better than the commonest class"
    if row["seeds"] < 2:
        return ", one seed"
    if row["p_corrected"] < LEVEL and not row["apart"]:
        return ", but the seeds overlap"
    return f", surely within {MARGIN}" if max(-row["low"], row["high"]) <= MARGIN else ""


WORDS = {1: "As claimed", -1: "Against it", 0: "Not to be told"}  # by `_vote`


def _vote(row: dict[str, Any], sign: int) -> int:
    """1 for a claimed difference, -1 against it, 0 for neither."""
    if row["floor"]:
        return 0
    significant = row["p_corrected"] < LEVEL and row["apart"]
    if sign == 0:
        negligible = max(-row["low"], row["high"]) <= MARGIN
        return 1 if negligible else -1 if significant else 0
    if not significant:
        return 0
    return 1 if row["difference"] * sign > 0 else -1


def fill(text: str, records: Records, compared: Sequence[dict[str, Any]]) -> str:
    """A text with its figures: `{cell task}`, and `{cell - cell task}` for a difference.

    The first is a mean over seeds with its deviation, the second has its 95% interval.
    """

    def difference(match: re.Match) -> str:
        for row in compared:
            if (row["first"], row["second"], row["task"]) == match.groups():
                interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
                return f"{row['difference']:+.3f} ({interval}{doubt(row)})"
        return "missing"

    def mean(match: re.Match) -> str:
        return figure(records.get(match[1], []), match[2], "±")

    text = re.sub(r"\{([\w.-]+) - ([\w.-]+) (\w+)\}", difference, text)
    return re.sub(r"\{([\w.-]+) (\w+)\}", mean, text)


def report(
    tables: dict[str, Table],
    claims: Sequence[Claim],
    lessons: Sequence[str],
    cells: Mapping[str, Cell],
    out: Path,
    data_dir: Path,
    runs: Path,
) -> None:
    """Write README.md, LaTeX tables and plots into `out`, from the records in it.

    Maps of embeddings need the models, in the run folders in `runs`: where one is no longer there,
    an earlier map stays.
    """
    records = load_records(out, cells)
    shown = {name: table for name, table in tables.items() if set(table.cells) & set(records)}
    parts = ["# Results", "", "Written by `python experiments.py report`."]
    if any("all-MiniLM-L6-v2" in r["command"] for of in records.values() for r in of):
        parts += ["", EMBEDDED_NOTE]
    parts += ["", conditions(records, cells)]
    compared = {name: comparisons(table, records, data_dir) for name, table in shown.items()}
    parts += ["", "## The paper's claims", ""]
    parts += [
        "Each figure is a difference with its 95% interval over dev rows. It counts where"
        f" p < {LEVEL} (Holm's correction, within a table) and the seeds of the one lie wholly"
        " above those of the other (`report.judge`). ± is the deviation over seeds. The paper is"
        ' "Evaluating fine-tuning methods for robust multi-task sentence embeddings".'
    ]
    for claim in claims:
        verdict, figures = judge(claim, compared.get(claim.table, []))
        parts += ["", f"- {claim.text} **{verdict.capitalize()}.** {figures}"]
    every = [row for rows in compared.values() for row in rows]
    parts += ["", "## What we learned, and advice"]
    parts += [line for lesson in lessons for line in ("", fill(lesson, records, every))]
    for name, table in shown.items():
        parts += ["", markdown(table, records, compared[name]), f"![{table.title}]({name}.png)"]
        write_text(out / f"{name}.tex", latex(table, records, compared[name]))
        plot_bars(table, records, out / f"{name}.png")
    plot_curves(records, out / "curves.png")
    parts += ["", "## Learning curves", "", "Of the cells that were evaluated more than once."]
    parts += ["", "![dev score over steps](curves.png)"]
    for name, of in records.items():
        if measured := [r["conflict"] for r in of if r["conflict"]]:
            parts += ["", f"## Do the tasks' gradients conflict? `{cells[name].flags}`", ""]
            parts += [conflict_report(measured, out, f"conflict-{name}")]
    parts += maps(records, out, data_dir, runs)
    write_text(out / "README.md", "\n".join([*parts, ""]))
    print(f"{out}: README.md, {', '.join(f'{name}.tex' for name in shown)}, and plots")


def maps(records: Records, out: Path, data_dir: Path, runs: Path) -> list[str]:
    """Plot the embeddings of each of `MAPPED`'s first runs, and name the plots in Markdown."""
    lines: list[str] = []
    for cell in [cell for cell in MAPPED if cell in records]:
        path = out / f"map-{cell}.png"
        run = runs / f"{cell}-seed{records[cell][0]['seed']}"
        note = runs / f"{run.name}.command"
        made = note.read_text(encoding="utf-8") if note.exists() else None
        if made == records[cell][0]["command"] and (run / "best").exists():
            plot_map(run, data_dir, MAP_ROWS, path)
        if path.exists():
            lines += ["", f"![{cell}]({path.name})"]
    return ["", "## Dev sentences, by task", *lines] if lines else []


# ---------------------------------------------------------------------------- plots

MAPPED = ("probe", "probe-simcse", "finetune", "finetune-simcse")
MAP_ROWS = 400  # of each task


def save(drawing: Figure, path: Path) -> None:
    """Write a plot, whole or not at all."""
    with whole_file(path) as draft:
        drawing.savefig(draft, format="png", dpi=120, bbox_inches="tight")


def axes(columns: int = 1, width: float = 6, height: float = 4) -> tuple[Figure, list[Any]]:
    """A figure, drawn without a screen, and its panels side by side."""
    drawing = Figure(figsize=(width * columns, height))
    return drawing, list(drawing.subplots(1, columns, squeeze=False)[0])


def plot_bars(table: Table, records: Records, path: Path) -> None:
    """A bar a cell with its deviation over seeds, the paper's figure as a line, a panel a task."""
    drawing, panels = axes(len(TASK_NAMES), width=4.5)
    for panel, (task, name) in zip(panels, TASK_NAMES.items(), strict=True):
        for i, cell in enumerate(table.cells):
            if of := having(records.get(cell, []), task):
                mean, sd = mean_and_sd(of, task)
                panel.bar(i, mean, yerr=sd, capsize=4, color="tab:blue", alpha=0.8)
            if task in table.paper.get(cell, {}):
                panel.hlines(table.paper[cell][task], i - 0.4, i + 0.4, color="tab:orange")
        panel.set_title(name + (" (line: the paper's)" if table.paper else ""), fontsize="medium")
        panel.set_xticks(range(len(table.cells)), table.cells.values(), rotation=40, ha="right")
    save(drawing, path)


def plot_curves(records: Records, path: Path) -> None:
    """The overall score on dev over training steps, a line a cell, averaged over seeds.

    A cell that was evaluated once has no curve.
    """
    drawing, panels = axes(width=9, height=5)
    for cell, of in records.items():
        if of[0]["overall"] is None:  # contrastive pre-training has another score
            continue
        curves = [
            [p for p in r["curve"] if p["stage"] != "probe"] for r in of
        ]  # lpft's first stage
        length = min(map(len, curves))
        if length < 2:
            continue
        steps = [point["step"] for point in curves[0][:length]]
        scores = np.array([[point["score"] for point in c[:length]] for c in curves])
        panels[0].plot(steps, scores.mean(axis=0), marker="o", label=cell)
    panels[0].set(xlabel="step", ylabel="overall score, dev")
    if panels[0].lines:
        panels[0].legend(fontsize="small", ncols=2)
    save(drawing, path)


def conflict_report(runs: Sequence[list[dict[str, Any]]], out: Path, name: str) -> str:
    """Plot what several runs measured of gradient conflict, and say it in a table of Markdown.

    Args:
        runs: each a list of {"step", "parts"} (`gradients.conflict`).
        out: the folder that gets `name`-layers.png and `name`-steps.png.
        name: see `out`.
    """
    parts = [part for part in runs[0][0]["parts"] if part != "overall"]
    pairs = list(runs[0][0]["parts"]["overall"])

    def values(part: str, pair: str, key: str = "cosine", of: Sequence = runs) -> np.ndarray:
        found = [point["parts"][part][pair].get(key) for run in of for point in run]
        return np.array([np.nan if value is None else value for value in found])

    def mean(of: np.ndarray) -> float:
        return float(np.mean(of[~np.isnan(of)])) if not np.isnan(of).all() else float("nan")

    def negative(of: np.ndarray) -> float:
        return mean(np.where(np.isnan(of), np.nan, of < 0))

    drawing, panels = axes(width=7, height=0.32 * len(parts) + 1)
    grid = np.array([[mean(values(part, pair)) for pair in pairs] for part in parts])
    image = panels[0].imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    panels[0].set_xticks(range(len(pairs)), pairs)
    panels[0].set_yticks(range(len(parts)), parts)
    for (i, j), value in np.ndenumerate(grid):
        panels[0].text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7)
    panels[0].set_title("mean cosine of task gradients (a|a: two batches of one task)")
    drawing.colorbar(image)
    save(drawing, out / f"{name}-layers.png")

    drawing, panels = axes(width=9, height=5)
    for pair in pairs:
        steps = [point["step"] for point in runs[0]]
        cosines = []
        for step in steps:
            at = [[point for point in run if point["step"] == step] for run in runs]
            cosines.append(mean(values("overall", pair, of=at)))
        same = len(set(pair.split("|"))) == 1
        panels[0].plot(steps, cosines, "--" if same else "-", label=pair)
    panels[0].axhline(0, color="black", linewidth=0.5)
    panels[0].set(xlabel="step", ylabel="cosine over all parameters of BERT")
    panels[0].legend()
    save(drawing, out / f"{name}-steps.png")

    count = sum(map(len, runs))
    table = [
        "| pair | mean cosine | 95% interval | of the tasks themselves | negative"
        " | negative, by part | like magnitude |",
        "|---|---|---|---|---|---|---|",
    ]
    across = [pair for pair in pairs if len(set(pair.split("|"))) == 2]
    intervals = {pair: interval(values("overall", pair)) for pair in pairs}
    for pair in pairs:
        cosine, magnitude = values("overall", pair), values("overall", pair, "magnitude")
        low, high = intervals[pair]
        reach = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "-"
        names = [pair, *(f"{task}|{task}" for task in pair.split("|"))]
        products = [values("overall", name, "product") for name in names]
        own = without_chance(*products) if pair in across else "-"
        by_part = np.concatenate([values(part, pair) for part in parts])
        shown = pair.replace("|", r"\|")
        table.append(
            f"| {shown} | {mean(cosine):+.3f} | {reach}"
            f" | {own} | {negative(cosine):.0%}"
            f" | {negative(by_part):.0%} | {mean(magnitude):.3f} |"
        )
    sure = across if count >= LEAST_SEEDS else []
    below = [pair.replace("|", " and ") for pair in sure if intervals[pair][1] < 0]
    above = [pair.replace("|", " and ") for pair in sure if intervals[pair][0] > 0]
    largest = max(abs(mean(values("overall", pair))) for pair in across)
    lines = [
        f"Measurements: {count}, runs: {len(runs)}, over all of BERT's parameters. Intervals are"
        " over the measurements (Student's t, or a bootstrap), as if those of one run were"
        " independent: a handful of them gives too narrow ones. Pairs of tasks whose batches' mean"
        f" cosine is surely below 0: {', '.join(below) or 'none'}; surely above 0:"
        f" {', '.join(above) or 'none'}. The largest of two tasks is {largest:.3f} in absolute"
        " value: 0 is a right angle, where a step for the one batch does nothing for or against the"
        " other.",
        "",
        *table,
        "",
        "A pair a\\|a is two batches of one task: the noise floor. What it lacks to 1 is chance,"
        " which moves the cosines of two tasks towards 0. Of the tasks themselves: without chance"
        " (`report.without_chance`); '-' where a floor is not surely above 0, or was not recorded:"
        " such batches cannot show how the tasks lie to each other."
        " Negative: the share of measurements with a cosine below 0, over all parameters and over"
        " each part of the model. Like magnitude: 1 for gradients of one length, near 0 where one"
        " of them is next to nothing.",
    ]
    lines += ["", f"![by layer]({name}-layers.png)", f"![over steps]({name}-steps.png)"]
    return "\n".join(lines)


def without_chance(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> str:
    """The cosine of two tasks' own gradients, of which a batch's has some, and chance the rest.

    Args:
        products: the inner products of a batch's gradient of the one task and one of the other, by
            measurement.
        first, second: those of two batches of the one task, and of the other.

    Two batches' chances are independent, so the mean of such products is that of the tasks' own
    gradients: sum <a, b> / sqrt(sum <a, a'> sum <b, b'>) is the cosine of what they are in all
    measurements, one after the other ("correction for attenuation", C. Spearman, The proof and
    measurement of association between two things, 1904).
    """
    whole = np.array([products, first, second])
    whole = whole[:, ~np.isnan(whole).any(axis=0)]  # (3, N)
    count = whole.shape[1]
    if count < 2:
        return "-"
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    sums = whole[:, np.concatenate([np.arange(count)[None], drawn])].sum(axis=-1)  # (3, 1 + R)
    if np.quantile(sums[1:, 1:], 0.025, axis=1).min() <= 0:
        return "-"
    cosines = sums[0] / np.sqrt(np.where((sums[1:] > 0).all(axis=0), sums[1] * sums[2], np.nan))
    low, high = np.nanquantile(cosines[1:], [0.025, 0.975])
    return f"{cosines[0]:+.3f} ({low:+.3f} to {high:+.3f})"


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a mean by Student's t, NaN left out; all there is, of fewer than two."""
    from scipy import stats

    values = values[~np.isnan(values)]
    if len(values) < 2:
        return -math.inf, math.inf
    if not np.ptp(values):
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return float(low), float(high)


def plot_conflict(run: Path) -> None:
    """Plot what one run measured of gradient conflict, into its own folder."""
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{run}: not a run folder ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{run / 'log.jsonl'}: not UTF-8 ({error.reason})") from None
    try:
        measured = [r for r in map(json.loads, lines) if r["kind"] == "conflict"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{run / 'log.jsonl'}: has a line that is cut off; remove it") from None
    if not measured:
        raise UserError(f"{run}: nothing was measured; train with --measure_conflict N")
    print(conflict_report([measured], run, "conflict"))
    print(f"\n{run}: conflict-layers.png, conflict-steps.png")


def plot_map(run: Path, data_dir: Path, limit: int | None = None, path: Path | None = None) -> None:
    """Plot the dev sentences of a run's tasks by the first two principal components.

    The plot is the run's own map.png, or `path`; `limit`: rows of each task.
    """
    model = MultitaskBERT.from_pretrained(run)
    vectors, names = [], []
    for task in model.heads:
        examples, _ = read(data_dir / TASKS[task].files.format("dev"), TASKS[task], limit=limit)
        texts = [text for example in examples for text in example.texts]
        vectors.append(model.encode(texts))
        names.append(f"{task} ({len(texts)} sentences)")
    if sum(map(len, vectors)) < 3:
        raise UserError(f"{run}: has no tasks, or too few sentences; a map needs at least three")
    fitted = PCA(2, random_state=0).fit(np.concatenate(vectors))
    drawing, panels = axes(width=8, height=7)
    for name, of in zip(names, vectors, strict=True):
        panels[0].scatter(*fitted.transform(of).T, s=4, alpha=0.5, label=name)
    share = fitted.explained_variance_ratio_.sum()
    panels[0].set_title(
        f"{run.name}: dev sentences, two principal components ({share:.0%} of the variance)"
    )
    panels[0].legend()
    save(drawing, path or run / "map.png")
    print(path or run / "map.png")
