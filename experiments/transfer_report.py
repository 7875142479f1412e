"""The records of `transfer` as transfer.json, transfer.md and plots."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import read_json, write_json, write_text
from engine.errors import UserError, reading
from experiments.render import markdown_table, score_text
from experiments.report import over_seeds
from experiments.stats import mean_interval
from experiments.transfer_measures import SETS
from report.plots import MARKERS, new_figure, save_figure

Methods = dict[str, list[dict[str, Any]]]  # method -> the records of its runs
HOW = ("head", "cosine", "logistic", "geometry")  # the order in the table
FAMILIES = {"sst": "sentiment", "para": "paraphrase", "sts": "similarity"}
# The metric of each family with a head and without: the same on all of its sets.
WITH_HEAD = {
    "sst": ("head", "accuracy"),
    "para": ("head", "average precision"),
    "sts": ("head", "pearson"),
}
FROZEN = {
    "sst": ("logistic", "accuracy"),
    "para": ("cosine", "average precision"),
    "sts": ("cosine", "spearman"),
}
MEANS = ("head/out of domain/mean", "head/in domain/mean")
NOTES = """Mean ± standard deviation over seeds; (n): the number of runs. In domain: SST, Quora and
STS (dev). Out of domain: the other sets, without the pairs that are in the training files of Quora
or STS (STS has pairs of MRPC and SICK). untouched: the encoder that the runs began with, with the
pooling that its name ends with. The average precision of chance is the share of positive pairs.
Compare columns, not rows: the metrics have different scales.

- head: the run's own heads. SST's classes predict CFIMDB (train and dev, as neither was trained
  on): 0 and 1 are negative, 3 and 4 positive, 2 goes to the side that is more probable. Quora's
  head predicts MRPC and PAWS; that of STS, SICK-R and the parts of STS12-16. The means are of
  accuracy for sentiment, average precision for paraphrases and Pearson's r for similarity, first
  over the sets of each.
- cosine: of the embeddings of the two sentences. Nothing is trained.
- logistic: accuracy of a logistic regression on frozen embeddings (u, or [|u - v|; u * v] of pairs;
  standardised; its regularisation chosen by 5-fold cross-validation on the training rows), trained
  on the training file and tested on dev. MRPC: trained on three quarters of the rows, drawn
  with a fixed seed, and tested on the others.
- geometry: alignment and uniformity (Wang & Isola 2020) of STS dev. Lower is better."""
KUMAR = """Kumar et al. (2022, https://arxiv.org/abs/2202.10054) predict that out of domain
fine-tuning is worse than probing, and probing worse than probing followed by fine-tuning: all
differences should be positive. They are paired by seed. The 95% t intervals are over seeds, without
the variance between rows and without correction for their number: exploration, and not comparable
with the intervals of `python -m experiments report`."""


def write_report(args: Namespace) -> None:
    """Write transfer.json, transfer.md, transfer.png and cka.png from all records in --out."""
    methods: Methods = {}
    for path in sorted((args.out / "records").glob("*.json")):
        record = read_json(path)
        with reading(path, "a record of transfer"):
            add_means(record["scores"])
            methods.setdefault(record["method"], []).append(record)
    if not methods:
        raise UserError(f"{args.out}: no records; name the run folders to measure")
    # The untouched encoder, which has no seed, first.
    methods = dict(sorted(methods.items(), key=lambda item: item[1][0]["seed"] is not None))
    first = next(iter(methods.values()))[0]  # all records have the same files and --limit
    summary = {
        "limit": first["limit"],
        "rows": first["rows"],
        "methods": {method: summarize(runs) for method, runs in methods.items()},
        "kumar": compare_methods(methods, args.finetune, args.probe, args.lpft),
    }
    write_json(args.out / "transfer.json", summary)
    plot_transfer(methods, args.out / "transfer.png")
    plot_cka(summary["methods"], args.out / "cka.png")
    text = markdown(summary)
    write_text(args.out / "transfer.md", text)
    print(f"{text}\n{args.out}: transfer.md, transfer.json, transfer.png, cka.png")


def set_keys(family: str, how: str, metric: str) -> list[str]:
    """The scores of a family's sets, the in-domain one first."""
    return [f"{how}/{data.title}/{metric}" for data in SETS if data.head == family]


def add_means(scores: dict[str, float | None]) -> None:
    """Add the means in and out of domain, if the run has all heads; families weigh equally."""
    keys = [set_keys(family, *judged) for family, judged in WITH_HEAD.items()]
    if all(key in scores for family in keys for key in family):
        means = [np.mean([scores[key] for key in family[1:]]) for family in keys]
        inside = [scores[family[0]] for family in keys]
        scores |= dict(zip(MEANS, (float(np.mean(means)), float(np.mean(inside))), strict=True))


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A method's scores and CKA over its runs, and where the runs come from."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        for key, score in run["scores"].items():
            scores.setdefault(key, []).extend([] if score is None else [score])
    layers = zip(*(run["cka"] for run in runs if run["cka"]), strict=True)
    return {
        "scores": {key: over_seeds(values) for key, values in scores.items()},
        "cka": [over_seeds(layer) for layer in layers],
        "runs": len(runs),
        **{key: [run[key] for run in runs] for key in ("seed", "pooling", "commit", "command")},
    }


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any]:
    """Mean of first - second (seed -> score) over the seeds of both, and its 95% t interval."""
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    mean, *interval = mean_interval(differences) if seeds else (None, None, None)
    return {"difference": mean, "interval": interval, "seeds": len(seeds)}


def compare_methods(
    methods: Methods, finetune: Sequence[str], probe: str, lpft: str
) -> dict[str, Any]:
    """Kumar's differences on each out-of-domain set and the means, and missing methods."""
    missing = [name for name in (*finetune, probe, lpft) if name not in methods]
    rows: list[dict[str, Any]] = []
    keys = [key for family in FAMILIES for key in set_keys(family, *WITH_HEAD[family])[1:]]
    pairs = [(probe, name) for name in finetune] + [(lpft, probe)]
    for pair in [*pairs, *((lpft, name) for name in finetune)]:
        for key in (*MEANS, *keys) if set(pair) <= set(methods) else ():
            scores = (
                {run["seed"]: run["scores"][key] for run in methods[name] if key in run["scores"]}
                for name in pair
            )
            rows.append({"pair": " - ".join(pair), "score": key, **paired_difference(*scores)})
    return {"missing": missing, "rows": rows}


def markdown(summary: Mapping[str, Any]) -> str:
    """transfer.md."""
    methods = summary["methods"]
    headings = [f"{name} ({method['runs']})" for name, method in methods.items()]
    keys = {key: None for method in methods.values() for key in method["scores"]}
    table = [["", "set", "metric", *headings]]
    for key in sorted(keys, key=lambda key: HOW.index(key.split("/")[0])):
        scores = [method["scores"].get(key) for method in methods.values()]
        cells = [score_text(score, "±") if score else "" for score in scores]
        table.append([*key.split("/"), *cells])
    layers = [["layer", *headings]]
    for i in range(max(len(method["cka"]) for method in methods.values())):
        scores = [method["cka"][i : i + 1] for method in methods.values()]
        cells = [score_text(score[0], "±") if score else "" for score in scores]
        layers.append([str(i or "embeddings"), *cells])
    rows = ", ".join(f"{name} {describe_rows(rows)}" for name, rows in summary["rows"].items())
    limit = f" (--limit {summary['limit']})" if summary["limit"] else ""
    lines = ["# Out of domain", "", "Written by `python -m experiments transfer`.", "", NOTES, ""]
    lines += [f"Rows: {rows}{limit}.", *markdown_table(table), ""]
    lines += ["![in domain against out of domain](transfer.png)", "", "## Kumar's prediction", ""]
    lines += kumar_lines(summary["kumar"])
    lines += ["", "## Linear CKA to the untouched encoder", ""]
    lines += ["Of the token means of sentences of STS dev (Kornblith et al. 2019); 1: unchanged."]
    return "\n".join([*lines, *markdown_table(layers), "", "![CKA by layer](cka.png)", ""])


def describe_rows(rows: Mapping[str, float]) -> str:
    """The number of rows, how many were left out, and the share of the positive class."""
    notes = [f"{rows['left out']:,} left out"] if rows["left out"] else []
    notes += [f"{rows['positive']:.0%} positive"] if "positive" in rows else []
    return f"{rows['rows']:,}" + (f" ({', '.join(notes)})" if notes else "")


def kumar_lines(kumar: Mapping[str, Any]) -> list[str]:
    """The test of Kumar's prediction in Markdown, and what is missing for it."""
    names = ", ".join(kumar["missing"])
    note = f"There is no run of {names} (--finetune, --probe and --lpft)." if names else ""
    if not kumar["rows"]:
        return [f"Not tested. {note}"]
    table = [["difference", "score", "seeds", "mean", "95% interval"]]
    for row in kumar["rows"]:
        mean = "" if row["difference"] is None else f"{row['difference']:+.3f}"
        interval = " to ".join(f"{end:+.3f}" for end in row["interval"] if end is not None)
        score = ", ".join(row["score"].split("/")[1:])
        table.append([row["pair"], score, str(row["seeds"]), mean, interval])
    return [KUMAR, *markdown_table(table), *(["", note] if note else [])]


def method_style(number: int) -> dict[str, Any]:
    """Colour and marker of a method: the same in both plots, and distinct in grey."""
    # Colours repeat after seven methods; from then on, markers are hollow.
    color, marker = f"C{number % len(MARKERS)}", MARKERS[number % len(MARKERS)]
    fill = "full" if number < len(MARKERS) else "none"
    return {"color": color, "marker": marker, "fillstyle": fill}


def plot_transfer(methods: Methods, path: Path) -> None:
    """A panel per family, with heads and below without: a dot per run, in domain against out."""
    has_heads = any(run["decoders"] for runs in methods.values() for run in runs)
    ways = [WITH_HEAD, FROZEN] if has_heads else [FROZEN]
    figure, panels = new_figure(len(FAMILIES), width=3.6, height=3.2, rows=len(ways))
    shown = [(name, set_keys(name, *way[name])) for way in ways for name in FAMILIES]
    entries = {}
    for panel, (family, (inside, *outside)) in zip(panels, shown, strict=True):
        for i, (method, runs) in enumerate(methods.items()):
            known = [run["scores"] for run in runs if run["scores"].get(inside) is not None]
            y = [np.mean([scores[key] for key in outside]) for scores in known]
            x = [scores[inside] for scores in known]
            (entries[method],) = panel.plot(x, y, linestyle="", markersize=7, **method_style(i))
        how, title, metric = inside.split("/")
        others = f"mean of {len(outside)} sets" if outside[1:] else outside[0].split("/")[1]
        panel.set(title=f"{FAMILIES[family]}, {how}: {metric}", xlabel=f"in domain: {title}")
        panel.set_ylabel(f"out of domain: {others}")
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def plot_cka(methods: Mapping[str, Any], path: Path) -> None:
    """CKA to the untouched encoder by layer: mean and standard deviation over runs."""
    figure, (panel,) = new_figure(width=6, height=3.6)
    for i, (name, method) in enumerate(methods.items()):
        layers = method["cka"]
        if layers:  # the untouched encoder has none
            means, sds = (np.array([x[key] or 0 for x in layers]) for key in ("mean", "sd"))
            panel.plot(means, label=name, **method_style(i))
            band = {"color": f"C{i % len(MARKERS)}", "alpha": 0.2, "linewidth": 0}
            panel.fill_between(range(len(means)), means - sds, means + sds, **band)
    panel.set(xlabel="layer (0: embeddings)", ylabel="linear CKA to the untouched encoder")
    panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper")
    save_figure(figure, path)
