"""A run's report: its page and files, what it does without a part, and what it replaces."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import quick_run, write_data
from matplotlib import image
from model_files import edit_json
from torch.nn import functional as F

import evaluation
import multitask_classifier
import simcse
from engine.checkpoint import read_json, read_text
from report.page import Table
from saved_runs import SavedRun
from tasks import TASKS

HOSTILE = r"""<script src="http://x.y/">alert('1')</script> &amp; $a_1^2$ 50% #{b} ~ \input{c}"""
NAME = """first <b> & "$x" """.strip()  # of a run folder


@pytest.fixture(scope="module")
def hostile_data(tmp_path_factory) -> Path:
    """Every dev row ends with markup of html and LaTeX."""
    folder = write_data(tmp_path_factory.mktemp("data"), {"train": 24, "dev": 40})
    for path in folder.glob("*-dev.csv"):
        text = re.sub(r"\tthe [^\t]*", lambda match: f"{match[0]} {HOSTILE}", read_text(path))
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tiny, hostile_data, tmp_path_factory) -> Path:
    """A run with a report."""
    folder = tmp_path_factory.mktemp("runs") / NAME
    flags = ["--option", "finetune", "--no_test"]
    multitask_classifier.main(quick_run(tiny, hostile_data, folder, *flags))
    evaluation.main([str(folder), "--report"])
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run without its report, for a test to change."""
    return shutil.copytree(run, tmp_path / "run", ignore=lambda *_: ["report"])


class Page(HTMLParser):
    """What a page holds: its text, tags with attributes, and tables as rows of text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.tables, self.in_cell = "", [], False
        self.feed(read_text(path))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.in_cell = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self.in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def attributes(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags for name in names if name in attrs]


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page(run / "report/index.html")


# ---------------------------------------------------------------------------- the page


def test_the_page_has_all_its_parts_and_needs_no_other_file(run, page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    names = {"viewport": "width=device-width, initial-scale=1"}
    metas = {attrs.get("name"): attrs.get("content") for tag, attrs in page.tags if tag == "meta"}
    assert names.items() <= metas.items()
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link for link in page.attributes("href")} == {f"#{id}" for id in ids}
    pictures = [source.partition("base64,") for source in page.attributes("src")]
    assert {start for start, _, _ in pictures} == {"data:image/png;"}
    for _, _, data in pictures:
        picture = image.imread(io.BytesIO(base64.b64decode(data, validate=True)))
        assert picture.std() > 0.01  # not a blank one
    assert len(page.attributes("alt")) == len(pictures)
    expected = {"curves"}
    for task in ("sst", "para"):
        expected |= {f"{task}-{kind}" for kind in ("confusion", "calibration", "groups", "map")}
    expected |= {f"sts-{kind}" for kind in ("scores", "groups", "map")}
    folder = run / "report"
    files = {f"{name}{suffix}" for name in expected for suffix in (".png", ".pdf")}
    assert {path.name for path in folder.iterdir()} == files | {
        *("index.html", "tables.tex", "errors.csv")
    }
    assert all((folder / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in expected)
    assert f"Run {NAME}" in page.text and "Missing" not in page.text


def test_the_page_has_the_numbers_of_the_run(run, page):
    result, config = (read_json(run / f"{name}.json") for name in ("result", "config"))
    header, *rows = page.tables[0]
    assert header[1:] == [
        *("metric", "score", "95% interval", "rows", "majority class", "untouched encoder")
    ]
    scores = {row[0]: row[2:] for row in rows}
    for name, metrics in result["dev"].items():
        score, interval, count, majority, untouched = scores[TASKS[name].title]
        assert (score, count) == (f"{next(iter(metrics.values())):.3f}", "40")
        low, high = map(float, interval.split(" to "))
        assert low <= float(score) <= high
        given = result["baselines"][name]
        shown = {"majority class": majority, "untouched encoder": untouched}
        assert {k: v for k, v in shown.items() if v} == {k: f"{v:.3f}" for k, v in given.items()}
    record = dict(page.tables[-1][1:])
    assert record["command"] == config["command"] and record["torch"] == torch.__version__
    assert record["time"] == f"{result['training_seconds']:,.0f} s" and "GB" in record["memory"]
    assert {f"data: {path}" for path in config["data"]} < set(record)


def test_the_worst_rows_are_those_of_the_largest_loss(run, page):
    saved = SavedRun(run)
    outputs = saved.predict(saved.load_model(), ["dev"], None)
    with open(run / "report/errors.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 3 * 25
    for (task, _), (dataset, logits) in outputs.items():
        gold, first = dataset.labels, logits[:, 0]
        losses = {
            "sst": lambda g=gold, x=logits: -F.one_hot(g, 5).mul(x.softmax(-1).log()).sum(-1),
            "para": lambda g=gold, x=first: -torch.where(g > 0, x.sigmoid(), 1 - x.sigmoid()).log(),
            "sts": lambda g=gold, x=first: (x - g) ** 2,
        }[task]()
        rows = [row for row in listed if row["task"] == task]
        worst = losses.sort(descending=True, stable=True)
        shown = [float(row["loss"]) for row in rows]
        assert shown == pytest.approx(worst.values[:25].tolist(), abs=1e-3)
        examples = {e.id: (e.texts, e.label, i) for i, e in enumerate(dataset.examples)}
        for row in rows:
            texts, label, i = examples[row["id"]]
            assert losses[i].item() == pytest.approx(float(row["loss"]), abs=1e-3)
            assert texts == (row["text"], row["second text"])[: len(texts)]
            names = TASKS[task].class_names
            assert row["gold"] == (names[int(label)] if names else f"{label:.2f}")
        table = next(t for t in page.tables if t[0][0] == "id" and t[1][0] == rows[0]["id"])
        assert [row[0] for row in table[1:]] == [row["id"] for row in rows]
        assert [row[1] for row in table[1:]] == [row["text"] for row in rows]  # markup as text


def test_markup_in_texts_is_text_in_latex(run):
    tex = read_text(run / "report/tables.tex")
    assert r"\textless{}script" in tex and r"\textbackslash{}input\{c\}" in tex
    for tabular in re.findall(
        r"\\begin\{tabular\}\{([^\n]*)\}\n\\hline\n(.*?)\\hline\n\\end", tex, re.S
    ):
        columns = len(re.sub(r"p\{[^}]*\}", "p", tabular[0].replace("\\linewidth", "")))
        for line in tabular[1].replace("\\hline\n", "").splitlines():
            cells = line.removesuffix(r" \\").split(" & ")
            assert len(cells) == columns
            plain = re.sub(r"\\text[a-z]+\{\}|\\[#$%&_{}]", "", "".join(cells))
            assert not re.search(r"[#$%&_{}~^\\]", plain)
    assert Table("t", [["a\n\nb"]]).latex().count("a b") == 1  # no new paragraph


CHROME = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROME is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page_without_errors_or_cut_parts(run, tmp_path, width):
    """In a frame, as a window has a smallest width; only `.scroll` boxes may be wider inside."""
    text = escape(read_text(run / "report/index.html"), quote=True)
    script = """onload = () => {
      const root = document.querySelector("iframe").contentDocument.documentElement;
      const outside = e => !e.closest("table") && e.getBoundingClientRect().right > WIDTH + 1;
      const cut = [...root.querySelectorAll("body *")].filter(outside).map(e => e.tagName);
      document.title = JSON.stringify([root.scrollWidth, cut]);
    }""".replace("WIDTH", str(width))
    frame = f'<iframe srcdoc="{text}" style="border: 0; width: {width}px; height: 900px"></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"<!DOCTYPE html><title></title>{frame}<script>{script}</script>", "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command = [CHROME, *flags, f"--user-data-dir={tmp_path}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    scroll_width, cut = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert scroll_width <= width and cut == []
    assert "CONSOLE" not in done.stderr


# ---------------------------------------------------------------------------- what is not there


def test_what_is_missing_is_named_and_the_rest_is_shown(copy, run_script):
    config = read_text(copy / "config.json").replace("ids-sst-dev.csv", "gone.csv")
    (copy / "config.json").write_text(config, encoding="utf-8")
    edit_json(copy / "config.json", "arguments", model=str(copy / "moved"))
    (copy / "log.jsonl").unlink()
    code, out, err = run_script(evaluation, copy, "--report")
    assert (code, out) == (0, f"{copy}/report/index.html\n"), err
    page = Page(copy / "report/index.html")
    missing = page.text.partition("Missing from this report")[2].partition("Overall")[0]
    for name in ("gone.csv: no such file", f"{copy}/moved: no such folder", "log.jsonl: no such"):
        assert name in missing
    assert missing.strip().count("\n") == 2
    files = {path.stem for path in (copy / "report").glob("*.png")}
    assert "sst-confusion" in files and "curves" not in files  # the recorded one
    assert {"para-calibration", "sts-map"} < files and "sst-calibration" not in files
    assert page.tables[0][1][0] == "SST sentiment"


def test_a_run_whose_task_is_gone_and_one_without_heads(copy, tiny, data, run_script):
    triples = copy.parent / "nli.csv"
    triples.write_text("sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8, encoding="utf-8")
    run = copy.parent / "simcse"
    simcse.main(quick_run(tiny, data, run, "--nli", triples))
    assert run_script(evaluation, run, "--report")[0] == 0
    page = Page(run / "report/index.html")
    assert "predictions: the run has no heads" in page.text
    assert page.tables[0][1][:2] == ["STS similarity", "spearman"]
    assert {path.stem for path in (run / "report").glob("*.png")} == {"curves", "sts-map"}

    for path in (copy / "best/heads.json", copy / "result.json"):
        path.write_text(read_text(path).replace('"sst"', '"gone"'), encoding="utf-8")
    assert run_script(evaluation, copy, "--report")[0] == 0
    page = Page(copy / "report/index.html")
    assert "gone: no such task" in page.text.partition("Missing from this report")[2]
    assert [row[0] for row in page.tables[0][1:]] == ["gone", "Quora paraphrase", "STS similarity"]
    files = {path.stem for path in (copy / "report").glob("*.png")}
    assert files == {"curves", "gone-confusion", "para-confusion"}


def test_only_an_earlier_report_is_replaced(run, copy, run_script):
    report = shutil.copytree(run / "report", copy / "report")
    (report / "curves.png").write_bytes(b"")
    shutil.rmtree(copy / "best")
    (copy / "result.json").write_text("{", encoding="utf-8")
    assert run_script(evaluation, copy, "--report")[0] == 0
    text = Page(report / "index.html").text
    assert "result.json: damaged" in text and "a run without best/" in text
    assert (report / "curves.png").stat().st_size > 1000
    assert not (report / "sts-map.png").exists()
    (report / "notes.txt").write_text("mine", encoding="utf-8")
    code, out, err = run_script(evaluation, copy, "--report")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"{report}/notes.txt: not part of a report" in err
    assert (report / "notes.txt").read_text(encoding="utf-8") == "mine"
    shutil.rmtree(report)
    report.write_text("mine", encoding="utf-8")
    assert run_script(evaluation, copy, "--report")[0] == 2
    for flags in (["--task", "sst"], ["--out", "x"], [run]):
        assert run_script(evaluation, copy, "--report", *flags)[0] == 2


def test_a_finished_run_on_the_sample_data_says_how_to_get_its_report(train, run_script, tmp_path):
    run = tmp_path / "a run"
    sample = Path(__file__).resolve().parent.parent / "data/sample"
    flags = ["--option", "finetune", "--epochs", 1, "--limit", 40, "--no_test"]
    out = train(multitask_classifier, run, "--data_dir", sample, *flags)
    says = f"for its report: python evaluation.py '{run}' --report\n"
    assert out.endswith(says)
    assert run_script(evaluation, *shlex.split(says)[5:])[:2] == (0, f"{run}/report/index.html\n")
