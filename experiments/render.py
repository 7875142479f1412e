"""The content of tables.json as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.stats import SIGNIFICANCE, format_p
from experiments.conflict import conflict_markdown
from experiments.tables import CELLS, TASK_TITLES

FLOOR_MARGIN = 0.02  # an accuracy within this of the majority class's shows no learning
NOTES = f"""Scores: mean ± standard deviation over seeds, on dev; overall is the course's score, the
mean of both accuracies and of (Pearson + 1) / 2. Baseline: for SST and Quora the
majority class; for STS the untouched encoder, that is the cosine of its mean-pooled sentence
vectors without any training. Differences: 95% bootstrap interval over dev rows, and a paired test
(permutation test for accuracy, bootstrap for Pearson's r), Holm-corrected within a table; neither
covers the variation between seeds. So a difference is marked where p < {SIGNIFICANCE} but the seeds
of the two columns overlap, and where neither column is more than {FLOOR_MARGIN} above the majority
class. "+" after a commit: there were uncommitted changes. Runs whose --model is a SimCSE run start
from its encoder; with more seeds than encoders several runs share one, and ± is too small."""
BUNDLED_NOTE = """**The model is the bundled all-MiniLM-L6-v2, which had been tuned on sentence
pairs before (NLI's and Quora's among them) with mean pooling and the cosine, not through its
pooler. Figures of the paper are for plain BERT-base.**"""


def score_text(score: Mapping[str, Any], plus_minus: str) -> str:
    """Mean and standard deviation of a column on a task."""
    if score["mean"] is None:
        return "not run"
    sd = "" if score["sd"] is None else f" {plus_minus} {score['sd']:.3f}"
    return f"{score['mean']:.3f}{sd}"


def score_rows(
    table: Mapping[str, Any], baselines: Mapping[str, Any], plus_minus: str
) -> list[list[str]]:
    """The cells of a table as text: a header, then for each task our scores and the paper's."""
    columns = list(table["columns"].values())
    rows = [["", "baseline", *(column["heading"] for column in columns)]]
    for task, title in {**TASK_TITLES, "overall": "overall"}.items():
        baseline = f"{baselines[task]['score']:.3f}" if task in baselines else ""
        scores = [column["scores"][task] for column in columns]
        rows.append([title, baseline, *(score_text(score, plus_minus) for score in scores)])
        # The paper's own score below ours, where it has one.
        if any(score["paper"] is not None for score in scores):
            papers = ["" if s["paper"] is None else f"{s['paper']:.3f}" for s in scores]
            rows.append(["in the paper", "", *papers])
    return rows


def comparison_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """The comparisons of a table as text, with a header."""
    rows = [["comparison", "task", "difference", "95% interval", "p (Holm)", "caveat"]]
    for row in table["comparisons"]:
        headings = [table["columns"][row[side]]["heading"] for side in ("first", "second")]
        # Significant over rows, but the worst seed of one is below the best of the other.
        overlap = row["p_corrected"] < SIGNIFICANCE and not row["seeds_separate"]
        doubt = "seeds overlap" if overlap else ""
        if row["both_at_majority"]:
            doubt = "both at the majority class"
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        names = [" - ".join(headings), row["task"], f"{row['difference']:+.3f}"]
        rows.append([*names, interval, format_p(row["p_corrected"]), doubt])
    return rows


def run_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Where the columns of a table come from, with a header."""
    # From this table anybody can run a column again.
    rows = [["column", "seeds", "precision", "commit", "command of the first seed"]]
    for column in table["columns"].values():
        lists = [" ".join(map(str, column[key])) for key in ("seeds", "precision", "commits")]
        command = f"`{column['command']}`" if column["command"] else "not run"
        rows.append([column["heading"], *lists, command])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, the first of them the header, as lines of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return ["", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def markdown(results: Mapping[str, Any], has_curves: bool) -> str:
    """tables.md; `has_curves`: there is a plot of learning curves."""
    # How much data the figures rest on.
    counts = [
        f"{split}: " + ", ".join(f"{task} {' or '.join(map(str, n))}" for task, n in rows.items())
        for split, rows in results["rows"].items()
    ]
    lines = ["# Tables", "", "Written by `python -m experiments report`.", "", NOTES]
    lines += ["", f"Rows, {'; '.join(counts)}."]
    tables = results["tables"].values()
    commands = [column["command"] or "" for t in tables for column in t["columns"].values()]
    # Said once, above all tables, as it changes what every figure means.
    if any("--model all-MiniLM-L6-v2 " in command for command in commands):
        lines += ["", BUNDLED_NOTE]
    for name, table in results["tables"].items():
        lines += ["", f"## {table['title']}"]
        lines += markdown_table(score_rows(table, results["baselines"], "±"))
        lines += markdown_table(comparison_rows(table)) if table["comparisons"] else []
        lines += [*markdown_table(run_rows(table)), "", f"![{table['title']}]({name}.png)"]
    if has_curves:
        lines += ["", "## Learning curves", "", "![overall dev score over steps](curves.png)"]
    for cell, summary in results["conflict"].items():
        lines += ["", f"## Gradient conflict: `{CELLS[cell].flags}`", ""]
        lines.append(conflict_markdown(summary))
        lines += ["", f"![cosine by group of parameters](conflict-{cell}-layers.png)"]
        lines += ["", f"![cosine over steps](conflict-{cell}-steps.png)"]
    return "\n".join([*lines, ""])


def latex(table: Mapping[str, Any], baselines: Mapping[str, Any]) -> str:
    """A table and its comparisons as two LaTeX tabulars."""
    tabulars = [("l" + "r" * (len(table["columns"]) + 1), score_rows(table, baselines, r"$\pm$"))]
    if table["comparisons"]:
        rows = comparison_rows(table)
        # In math mode a minus sign is as wide as a plus.
        signed = [[a, b, f"${c}$", d, f"${p}$", e] for a, b, c, d, p, e in rows[1:]]
        tabulars.append(("llrrrl", [rows[0], *signed]))
    lines = []
    for alignment, rows in tabulars:
        body = [" & ".join(row).replace("%", r"\%") + r" \\" for row in rows]
        lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\hline", body[0], r"\hline", *body[1:]]
        lines += [r"\hline", r"\end{tabular}", ""]
    return "\n".join(lines)
