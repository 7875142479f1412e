"""The report as files: index.html with inline plots, the plots, tables.tex and errors.csv."""

import base64
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.figure import Figure

from engine.checkpoint import atomic_folder, read_text, restore_folder
from engine.errors import UserError
from engine.stats import score_interval
from prediction import overall_score
from report import plots
from report.analysis import Predictions, calibrate, group_scores, worst_rows
from report.collect import Report, collect
from saved_runs import SavedRun, note
from tasks import TASKS

TEMPLATE = Path(__file__).with_name("page.html")
GENERATOR = "minbert evaluation.py --report"  # identifies the page of a report
ERRORS = ("task", "id", "text", "second text", "gold", "prediction", "confidence", "loss")
LONG = {"text", "second text", "value"}  # columns that need width
NOTES = """Intervals are at 95%: Wilson's for accuracy, Fisher's z for Pearson's r. They cover the
choice of the dev rows, not the variance between seeds. Groups by number of words and by word
overlap (shared words among all words of the pair) are quarters of the rows. Confidence is the
probability of the predicted class; the expected calibration error is the mean distance between
confidence and accuracy over ten bins. Untouched encoder: Pearson's r of the cosine of mean-pooled
embeddings before any training. Maps: principal component analysis, separate for each model."""
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
)


def latex_text(text: str) -> str:
    """The text without invisible characters, on one line: an empty line would end a paragraph."""
    words = " ".join(text.split())
    return "".join(c for c in words if c.isprintable()).translate(LATEX)


@dataclass(frozen=True)
class Table:
    """A table of text, the first row its header."""

    caption: str
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """The table as HTML, in a box that scrolls sideways if it is too wide."""
        kinds = ("long" if name in LONG else name for name in self.rows[0])
        classes = [f' class="{kind}"' if kind in ("long", "id") else "" for kind in kinds]
        lines = []
        for tag, row in zip(["th", *["td"] * len(self.rows)], self.rows, strict=False):
            cells = zip(classes, row, strict=True)
            line = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in cells)
            lines.append(f"<tr>{line}</tr>")
        rows, caption = "\n".join(lines), f"<h3>{escape(self.caption)}</h3>"
        return f'{caption}\n<div class="scroll"><table>\n{rows}\n</table></div>'

    def latex(self) -> str:
        """The table as a LaTeX tabular, its caption as a comment."""
        width = 0.6 / max(1, len(LONG.intersection(self.rows[0])))
        long = rf"p{{{width:.1f}\linewidth}}"
        columns = "".join(long if name in LONG else "l" for name in self.rows[0])
        lines = [" & ".join(map(latex_text, row)) for row in self.rows]
        header, *body = [rf"{line} \\" for line in lines]
        begin = [f"% {self.caption}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", header]
        return "\n".join([*begin, r"\hline", *body, r"\hline", r"\end{tabular}", ""])


@dataclass(frozen=True)
class Picture:
    """A figure with its file name and what it shows."""

    name: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Write it as PNG and PDF."""
        for suffix in (".png", ".pdf"):
            plots.save_figure(self.figure, folder / f"{self.name}{suffix}")

    def html(self, folder: Path) -> str:
        """The PNG in `folder`, inline."""
        data = base64.b64encode((folder / f"{self.name}.png").read_bytes()).decode()
        caption = escape(self.caption)
        source = f"data:image/png;base64,{data}"
        image = f'<img src="{source}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


Section = tuple[str, str, list[Table | Picture]]  # id, title, contents


# ---------------------------------------------------------------------------- sections


def interval_text(interval: tuple[float, float]) -> str:
    """An interval for a table; empty if it is not known."""
    return "" if np.isnan(interval[0]) else f"{interval[0]:.3f} to {interval[1]:.3f}"


def score_table(report: Report) -> Table:
    """Each task's score with its interval, beside the baselines without training."""
    header = ["task", "metric", "score", "95% interval", "rows", "majority class"]
    rows = [[*header, "untouched encoder"]]
    for name, metrics in report.metrics.items():
        metric, score = next(iter(metrics.items()))
        # The task may no longer be in the task table.
        title = TASKS[name].title if name in TASKS else name
        interval, majority = "", ""
        if metric in ("accuracy", "pearson") and "rows" in metrics:
            correlation = metric == "pearson"
            interval = interval_text(score_interval(score, metrics["rows"], correlation))
        if "confusion" in metrics:
            gold_counts = np.sum(metrics["confusion"], axis=1)
            majority = f"{gold_counts.max() / gold_counts.sum():.3f}"
        rows_text = f"{metrics['rows']:,}" if "rows" in metrics else ""
        untouched = f"{report.untouched[name]:.3f}" if name in report.untouched else ""
        cells = [title, metric, f"{score:.3f}", interval, rows_text, majority]
        rows.append([*cells, untouched])
    return Table("Dev scores", rows)


def task_section(report: Report, name: str) -> Section:
    """All about one task; without its predictions, the confusion matrix that the run recorded."""
    title = TASKS[name].title if name in TASKS else name
    file = re.sub(r"\W", "-", name)  # a record may have any name
    metrics, items = report.metrics.get(name, {}), []
    if "confusion" in metrics:
        matrix = np.array(metrics["confusion"])
        names = TASKS[name].classes if name in TASKS else map(str, range(len(matrix)))
        caption = f"{title}: confusion matrix, with the share of each gold class's rows"
        items.append(Picture(f"{file}-confusion", caption, plots.plot_confusion(matrix, [*names])))
    predictions = report.predictions.get(name)
    if predictions:
        items += prediction_items(file, title, predictions)
    if embedding_map := report.maps.get(name):
        caption = f"{title}: {len(embedding_map.gold):,} dev rows on two principal components"
        if embedding_map.pairs:
            caption += " of |u - v|, the difference between a pair's two embeddings"
        items.append(Picture(f"{file}-map", caption, plots.plot_embeddings(embedding_map)))
    if predictions:
        worst = worst_rows(predictions)
        rows = [list(worst[0]), *(list(row.values()) for row in worst)]
        items.append(Table(f"{title}: the {len(worst)} rows with the largest loss", rows))
    return file, title, items


def prediction_items(file: str, title: str, predictions: Predictions) -> list[Table | Picture]:
    """How good a task's predictions are, and on which rows; `file` begins the pictures' names."""
    if predictions.probabilities is not None:
        calibration = calibrate(predictions)
        error = f"expected calibration error {calibration.expected_error:.3f}"
        caption = f"{title}: reliability diagram, accuracy by confidence; {error}"
        first = Picture(f"{file}-calibration", caption, plots.plot_calibration(calibration))
    else:
        caption = f"{title}: predicted against gold scores, with their distributions"
        first = Picture(f"{file}-scores", caption, plots.plot_scores(predictions))
    metric, overall = next(iter(predictions.metrics.items()))
    groups = group_scores(predictions)
    rows = [["grouped by", "group", "rows", metric, "95% interval"]]
    for g in groups:
        rows.append([g.by, g.label, f"{g.rows:,}", f"{g.score:.3f}", interval_text(g.interval)])
    caption = f"{title}: {metric} by group of rows"
    figure = plots.plot_groups(groups, metric, overall)
    picture = Picture(f"{file}-groups", f"{caption}; dashed: all rows", figure)
    return [first, picture, Table(caption, rows)]


def record_table(report: Report) -> Table:
    """Everything needed to repeat the run, with its time and memory."""
    config, result = report.run.config, report.result
    changes = " with uncommitted changes" if config.get("uncommitted_changes") else ""
    facts = {
        "command": config.get("command"),
        "started": config.get("started"),
        "commit": config.get("commit") and f"{config['commit']}{changes}",
        "seed": report.run.arguments.get("seed"),
        "precision": config["precision"],
        "best weights": "best_step" in result
        and f"epoch {result['best_epoch']}, step {result['best_step']}",
        "time": "training_seconds" in result and f"{result['training_seconds']:,.0f} s",
        "memory": result.get("peak_memory_bytes")
        and f"{result['peak_memory_bytes'] / 1e9:.2f} GB at most",
        "processes": config.get("processes"),
    }
    facts |= {f"hardware: {key}": value for key, value in config["hardware"].items()}
    facts |= {"python": config.get("python"), **config.get("versions", {})}
    facts |= {f"data: {path}": f"sha256 {sha}" for path, sha in config.get("data", {}).items()}
    rows = [[name, str(value)] for name, value in facts.items() if value]
    return Table("How it was made", [["what", "value"], *rows])


def make_sections(report: Report) -> list[Section]:
    """The page from top to bottom."""
    scores = score_table(report)
    sections: list[Section] = [("scores", "Scores", [scores])] if report.metrics else []
    if report.curves:
        caption = "Training loss by task, dev scores and learning rates"
        picture = Picture("curves", caption, plots.plot_curves(report.curves))
        sections.append(("learning", "Learning curves", [picture]))
    names = dict.fromkeys([*report.metrics, *report.maps])
    sections += [section for name in names if (section := task_section(report, name))[2]]
    return [*sections, ("record", "Record", [record_table(report)])]


# ---------------------------------------------------------------------------- files


def write_report(run: SavedRun, data_dir: Path | None, device: str | None) -> Path:
    """Write `report/` into a run's folder, replacing an earlier report; returns its index.html.

    UserError if that folder holds anything but a report.
    """
    folder = run.folder / "report"
    restore_folder(folder)
    check_replaceable(folder)
    report = collect(run, data_dir, device)
    sections = make_sections(report)
    with atomic_folder(folder) as draft:
        items = [item for _, _, items in sections for item in items]
        for item in items:
            if isinstance(item, Picture):
                item.save(draft)
        tables = [item.latex() for item in items if isinstance(item, Table)]
        (draft / "tables.tex").write_text("\n".join(tables), encoding="utf-8")
        with open(draft / "errors.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ERRORS)
            writer.writeheader()
            for name, predictions in report.predictions.items():
                writer.writerows({"task": name, **row} for row in worst_rows(predictions))
        names = sorted([*(path.name for path in draft.iterdir()), "index.html"])
        (draft / "index.html").write_text(page(report, sections, draft, names), encoding="utf-8")
        check_replaceable(folder)  # again, minutes later
    note(*(f"missing from the report: {line}" for line in report.missing))
    return folder / "index.html"


def check_replaceable(folder: Path) -> None:
    """UserError if `folder` exists and holds anything but an earlier report's files."""
    if not folder.exists():
        return
    page = folder / "index.html"
    listed = read_text(page) if page.is_file() else ""
    ours = f'content="{GENERATOR}"' in listed
    for path in folder.iterdir() if folder.is_dir() else [folder]:
        if not ours or f"<code>{escape(path.name)}</code>" not in listed:
            raise UserError(f"{path}: not part of a report; move it elsewhere, then run this again")


def page(report: Report, sections: Sequence[Section], folder: Path, names: Sequence[str]) -> str:
    """index.html, for the pictures and the other files in `folder`."""
    links = " ".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections)
    body = [f"<nav>{links}</nav>"]
    if report.missing:
        lines = "\n".join(f"<p>{escape(line)}</p>" for line in report.missing)
        body.append(f'<div class="missing"><h3>Missing from this report</h3>\n{lines}\n</div>')
    if report.predictions:
        score = overall_score({name: p.metrics for name, p in report.predictions.items()})
        body.append(f"<p>Overall dev score of {', '.join(report.predictions)}: {score:.3f}</p>")
    for id, title, items in sections:
        body.append(f'<h2 id="{id}">{escape(title)}</h2>')
        body += [i.html(folder) if isinstance(i, Picture) else i.html() for i in items]
    files = ", ".join(f"<code>{escape(name)}</code>" for name in names)
    body.append(f"<p>{NOTES}</p>\n<p>The files of this report: {files}</p>")
    title = escape(f"Run {report.run.folder.resolve().name}")
    template = Template(read_text(TEMPLATE))
    return template.substitute(title=title, generator=GENERATOR, body="\n".join(body))
