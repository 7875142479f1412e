"""The content of tables.json as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.stats import format_p
from experiments.tables import CLAIMS, MARGINS, TASK_TITLES

NOTES = f"""Scores: mean ± standard deviation over seeds, on dev; overall is the course's score, the
mean of both accuracies and of (Pearson + 1) / 2. Baselines: the majority class, and the untouched
encoder, that is the cosine of its mean-pooled sentence vectors (for Quora with the threshold that
is best on training pairs) without any training.

Comparisons: runs are paired by seed, and evaluated on the same dev rows. Seeds and rows are crossed
random effects: a 95% interval includes the variance of both (t, with Satterthwaite's degrees of
freedom), but says nothing of other training data or settings. n: how many independent pairs there
are; the mean of runs that start from the same SimCSE encoder counts as one. With n = 2 intervals
are too narrow; "-": no variance could be estimated. Superiority: of all combinations of a run of
the first and a run of the second, the share in which the first scores higher; ties count one half.
Detectable: the smallest true difference that so many runs find with 80% power, at the uncorrected
level of 5%.

Only the claims have p-values, corrected by Holm's method over all of them, run or not; they were
fixed before the runs, and all other differences are exploration. A small p means that there is a
difference. A small p (margin) means that it is smaller than {MARGINS["accuracy"]} of accuracy or
{MARGINS["fisher_z"]} of Fisher's z or, where the paper denies a gain, that there is no gain of that
size. Correlations are tested on the scale of z, and intervals are not corrected: one that excludes
0 may stand beside a large p. Where both cells of a comparison are below the majority class plus the
margin, neither has learnt anything that could differ. A claim needs three independent pairs."""
BUNDLED_NOTE = """**The model is the bundled all-MiniLM-L6-v2, which had been tuned on sentence
pairs before (NLI's and Quora's among them) with mean pooling and the cosine, not through its
pooler. Figures of the paper are for plain BERT-base.**"""


def score_rows(
    table: Mapping[str, Any], baselines: Mapping[str, Any], plus_minus: str
) -> list[list[str]]:
    """The cells of a table as text: a header, then for each task our scores and the paper's."""
    columns = list(table["columns"].values())
    rows = [["", "majority class", "untouched", *(column["heading"] for column in columns)]]
    for task, title in {**TASK_TITLES, "overall": "overall"}.items():
        known = baselines.get(task, {"majority": None, "untouched": None})
        before = [number(known[kind]) for kind in ("majority", "untouched")]
        scores = [column["scores"][task] for column in columns]
        rows.append([title, *before, *(score_text(score, plus_minus) for score in scores)])
        # The paper's own score below ours, where it has one.
        if any(score["paper"] is not None for score in scores):
            rows.append(["in the paper", "", "", *(number(score["paper"]) for score in scores)])
    return rows


def number(value: float | None, before: str = "") -> str:
    """A score with three decimals; nothing for None."""
    return "" if value is None else f"{before}{value:.3f}"


def score_text(score: Mapping[str, float | None], plus_minus: str) -> str:
    """Mean and standard deviation over seeds."""
    return number(score["mean"]) + number(score["sd"], f" {plus_minus} ")


def interval(row: Mapping[str, Any]) -> str:
    """The 95% interval of a difference."""
    if row["low"] == row["high"]:  # no variance could be estimated
        return "-"
    return f"{row['low']:+.3f} to {row['high']:+.3f}"


def comparison_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """The differences of a table as text, with a header."""
    rows = [["comparison", "task", "difference", "95% interval", "superiority", "detectable", "n"]]
    headings = {cell: column["heading"] for cell, column in table["columns"].items()}
    headings["untouched"] = "untouched"
    for row in table["comparisons"]:
        names = f"{headings[row['first']]} - {headings[row['second']]}"
        figures = [f"{row['difference']:+.3f}", interval(row), f"{row['superiority']:.2f}"]
        task = TASK_TITLES[row["task"]]
        rows.append([names, task, *figures, f"{row['detectable']:.3f}", str(row["n"])])
    return rows


def claim_rows(claims: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The paper's claims and our answers as text, with a header; a claim is named once."""
    rows = [["the paper's claim", "comparison", "task", "answer", "difference", "95% interval"]]
    rows[0] += ["paper", "p", "p (margin)", "superiority", "detectable", "n"]
    previous = None
    for row in claims:
        claim = "" if row["claim"] == previous else row["claim"]
        previous = row["claim"]
        names = f"{row['first']} - {row['second']}"
        figures = [f"{row['difference']:+.3f}", interval(row), f"{row['paper']:+.3f}"]
        p_values = [format_p(row["p_corrected"]), format_p(row["p_margin_corrected"])]
        figures += ["-", "-"] if interval(row) == "-" else p_values
        figures += [f"{row['superiority']:.2f}", f"{row['detectable']:.3f}", str(row["n"])]
        rows.append([claim, names, TASK_TITLES[row["task"]], row["answer"], *figures])
    return rows


def origins_note(origins: Sequence[str]) -> str:
    """Where the runs of a table come from, in a sentence."""
    return f"{'**Mixed runs**' if len(origins) > 1 else 'All runs'}: {'; '.join(origins)}."


def bootstrap_note(claims: Sequence[Mapping[str, Any]]) -> str:
    """How the t intervals compare with a bootstrap, in a sentence."""
    widths = [(r["bootstrap"], r["high"] - r["low"]) for r in claims if "bootstrap" in r]
    ratios = [(high - low) / width for (low, high), width in widths if width > 0]
    if not ratios:
        return ""
    return (
        f"For the {len(ratios)} differences with eight runs or more, the intervals of a pigeonhole"
        f" bootstrap (Owen 2007) are {min(ratios):.2f} to {max(ratios):.2f} times as wide."
    )


def run_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Where the columns of a table come from, with a header."""
    # From this table anybody can run a column again.
    rows = [["column", "seeds", "steps of each head", "command of the first seed"]]
    for column in table["columns"].values():
        steps = ", ".join(f"{task} {count:,}" for task, count in column["head_steps"].items())
        seeds = " ".join(map(str, column["seeds"]))
        rows.append([column["heading"], seeds, steps, f"`{column['command']}`"])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, the first of them the header, as lines of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return ["", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def markdown(results: Mapping[str, Any], conflict: Mapping[str, str]) -> str:
    """tables.md; conflict: cell -> what its runs measured, as Markdown."""
    # How much data the figures rest on.
    counts = [
        f"{split}: " + ", ".join(f"{task} {' or '.join(map(str, n))}" for task, n in rows.items())
        for split, rows in results["rows"].items()
    ]
    lines = ["# Tables", "", "Written by `python -m experiments report`."]
    lines += ["", f"Rows, {'; '.join(counts)}. See the end for how to read the tables."]
    tables = results["tables"].values()
    commands = [column["command"] for table in tables for column in table["columns"].values()]
    # Said once, above all tables, as it changes what every figure means.
    if any("--model all-MiniLM-L6-v2 " in command for command in commands):
        lines += ["", BUNDLED_NOTE]
    if results["claims"]:
        lines += ["", "## The paper's claims", *markdown_table(claim_rows(results["claims"]))]
        pending = sum(len(claim.contrasts) for claim in CLAIMS) - len(results["claims"])
        if pending:
            lines += ["", f"{pending} more differences need cells that are missing here."]
        lines += ["", bootstrap_note(results["claims"]), origins_note(results["claim_origins"])]
        lines += ["", "![differences](claims.png)"]
    for name, table in results["tables"].items():
        lines += ["", f"## {table['title']}"]
        lines += markdown_table(score_rows(table, results["baselines"], "±"))
        lines += markdown_table(comparison_rows(table)) if table["comparisons"] else []
        lines += markdown_table(run_rows(table))
        lines += ["", origins_note(table["origins"]), "", f"![{table['title']}]({name}.png)"]
    for cell, text in conflict.items():
        lines += ["", f"## Gradient conflict: {cell}", "", text]
    return "\n".join([*lines, "", "## How to read the tables", "", NOTES, ""])


def latex(table: Mapping[str, Any], baselines: Mapping[str, Any]) -> str:
    """A table and its differences as two LaTeX tabulars."""
    tabulars = [("l" + "r" * (len(table["columns"]) + 2), score_rows(table, baselines, r"$\pm$"))]
    if table["comparisons"]:
        rows = comparison_rows(table)
        # In math mode a minus sign is as wide as a plus.
        signed = [
            [a, b, f"${c}$", f"${d}$".replace(" to ", "$ to $"), *e] for a, b, c, d, *e in rows[1:]
        ]
        tabulars.append(("llrrrrr", [rows[0], *signed]))
    lines = []
    for alignment, rows in tabulars:
        body = [" & ".join(row).replace("%", r"\%") + r" \\" for row in rows]
        lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\hline", body[0], r"\hline", *body[1:]]
        lines += [r"\hline", r"\end{tabular}", ""]
    return "\n".join(lines)
