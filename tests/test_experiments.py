"""The tables end to end on tiny data, and the committed results."""

import importlib
import itertools
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import multitask_classifier
from datasets import read_examples
from engine.checkpoint import read_json, read_text, write_text
from engine.errors import UserError
from engine.run_dir import RunDir, folder_lock
from experiments import __main__ as experiments
from experiments import runner, untouched
from experiments.records import claimed_cells
from experiments.tables import CELLS, CLAIMS, TABLES
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
SAMPLE, RESULTS = ROOT / "data" / "sample", ROOT / "results"
REAL = os.environ.get("MINBERT_DATA")


def test_a_record_has_the_loss_and_the_steps_of_each_head():
    """Of LP-FT the loss of the last stage, but the steps of both; none of a step of two tasks."""
    log = [{"kind": "train", "task": "sst", "loss": 9.0, "stage": "probe"}]
    log += [
        {"kind": "train", "task": task, "loss": loss, "stage": "finetune"}
        for loss in range(40)
        for task in ("sst", "para+sts")
    ]
    curves = runner.head_steps_and_losses([*log, {"kind": "dev", "score": 1}])
    assert curves["head_steps"] == {"sst": 41, "para": 40, "sts": 40}
    assert curves["losses"] == {"sst": [2 * i + 0.5 for i in range(20)]}


def test_the_threshold_is_the_best_one():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 60)
    scores = np.round(gold * 0.3 + rng.normal(size=60) * 0.4, 1)  # with ties
    threshold = untouched.best_threshold(scores, gold)
    accuracies = [((scores >= t) == gold).mean() for t in scores]
    assert ((scores >= threshold) == gold).mean() == max(accuracies)


def test_probes_share_the_encoders_in_turn():
    """Each encoder is trained once, and before the jobs that start from it."""
    jobs = runner.list_jobs(["table1"], None)
    probes = [job for job in jobs if job.cell == "probe-simcse"]
    assert [job.encoder.seed for job in probes] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [job.seed for job in jobs if job.cell == "simcse"] == [1, 2, 3, 4]
    assert all(jobs.index(job.encoder) < jobs.index(job) for job in probes)
    assert set(runner.list_jobs(["table1"], 2)) < set(jobs)  # more seeds only add jobs


def test_a_record_has_the_flags_of_a_recipe_and_not_its_name(tmp_path):
    """The file may be edited later."""
    write_text(tmp_path / "r.txt", "--option finetune  # a comment\n--epochs 9\n")
    args = experiments.parse_args(["run", "table1", f"--flags=@{tmp_path / 'r.txt'} --limit 5"])
    command = runner.recorded_command(runner.Job("simcse", 1), args)
    assert "simcse.py --option finetune --epochs 9 --limit 5 --final_only" in command


def test_flags_of_a_cell_override_those_for_all():
    args = experiments.parse_args(["run", "table1", "--flags=--option finetune --epochs 9"])
    command = runner.build_command(runner.Job("probe", 3), args, args.runs, args.data_dir)
    parsed = multitask_classifier.parse_args(command[1:])
    assert (parsed.option, parsed.epochs, parsed.seed) == ("pretrain", 10, 3)


@pytest.mark.parametrize("cell", CELLS)
def test_the_command_of_each_cell_is_valid(cell):
    args = experiments.parse_args(["run", "table1", "--data_dir", str(SAMPLE)])
    command = runner.build_command(runner.Job(cell, 1), args, args.runs, args.data_dir)
    script = importlib.import_module(Path(command[0]).stem)
    assert script.parse_args(command[1:]).seed == 1


def test_a_script_is_a_process_with_its_own_log(tmp_path):
    assert runner.start_process(["simcse.py", "--temperature", "0"], tmp_path / "log") == 2
    assert "argument --temperature: '0' is not a number above 0" in runner.last_line(
        tmp_path / "log"
    )
    assert runner.last_line(tmp_path / "none.log") == "no output"


@pytest.fixture
def grid(tiny, tmp_path, monkeypatch):
    """Flags of `run` on part of the sample data, and the started jobs; scripts run in-process."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    started = {}  # job -> its --model

    def start_process(command, log, threads):
        assert threads is None
        flags = dict(itertools.pairwise(command))
        started[Path(flags["--run_dir"]).name] = flags["--model"]
        try:
            importlib.import_module(Path(command[0]).stem).main(command[1:])
        except UserError as error:
            log.write_text(str(error), encoding="utf-8")
            return error.exit_code
        return 0

    monkeypatch.setattr(runner, "start_process", start_process)
    flags = ["--model", tiny, "--data_dir", tmp_path / "data", "--out", tmp_path / "results"]
    flags += ["--runs", tmp_path / "runs", "--seeds", 2]
    return [*flags, "--flags=--batch_size 16 --precision fp32 --limit 24"], started


# The others are of a recipe: their cells set a --limit of their own.
PAPER = ["table1", "table2", "table3", "temperature", "probes", "methods", "sts"]


def test_the_tables_run_and_are_reported(grid, tmp_path, command):
    flags, started = grid
    command("run", *PAPER, *flags)
    cells = {cell for table in PAPER for cell in TABLES[table].cells}
    assert {name.rsplit("-seed", 1)[0] for name in started} == {*cells, "simcse", "simcse-t0.05"}
    assert started["probe-simcse-seed2"] == str(tmp_path / "runs/simcse-seed2/best")
    out = tmp_path / "results"
    reported = ["report", "--data_dir", tmp_path / "data", "--out", out, "--seeds", 2]
    command(*reported)

    results = read_json(out / "tables.json")
    assert list(results["tables"]) == PAPER and list(results["conflict"]) == ["finetune", "lpft"]
    records = {path.stem: read_json(path) for path in out.glob("records/*.json")}

    def pearson(cell):
        return [records[f"{cell}-seed{seed}"]["dev"]["sts"]["pearson"] for seed in (1, 2)]

    mean, sd = np.mean(pearson("probe")), np.std(pearson("probe"), ddof=1)
    score = results["tables"]["table1"]["columns"]["probe"]["scores"]["sts"]
    assert score["values"] == pytest.approx(pearson("probe"), abs=1e-6)
    assert (score["mean"], score["sd"], score["paper"]) == pytest.approx(
        (mean, sd, 0.304), abs=1e-6
    )
    rows = results["tables"]["sts"]["comparisons"]
    [row] = [
        r
        for r in rows
        if (r["first"], r["second"], r["task"]) == ("mean-cosine", "mean-dot", "sts")
    ]
    expected = np.mean(pearson("mean-cosine")) - np.mean(pearson("mean-dot"))
    assert row["difference"] == pytest.approx(expected, abs=1e-3)  # of rounded predictions
    before = read_json(out / "untouched.json")["dev"]["sts"]["pearson"]
    assert results["baselines"]["sts"]["untouched"] == pytest.approx(before, abs=1e-6)
    assert len(results["claims"]) == sum(len(claim.contrasts) for claim in CLAIMS)

    text, tex = read_text(out / "tables.md"), read_text(out / "sts.tex")
    assert f"| {mean:.3f} ± {sd:.3f} |" in text
    assert f"| Cosine - Mean pooling | STS Pearson | {row['difference']:+.3f} |" in text
    assert f"Cosine - Mean pooling & STS Pearson & ${row['difference']:+.3f}$ & " in tex
    assert "| in the paper |  |  | 0.386 | 0.390 | 0.494 | 0.487 |" in text
    assert "train: sst 24, para 24, sts 24; dev: sst 24, para 24, sts 24." in text
    assert "bundled all-MiniLM" not in text  # the model is another one
    images = re.findall(r"\]\((.*\.png)\)", text)
    figures = [f"conflict-{cell}-layers" for cell in ("finetune", "lpft")]
    assert {"claims.png", *(f"{name}.png" for name in [*PAPER, *figures])} < set(images)
    assert all((out / image).read_bytes().startswith(b"\x89PNG") for image in images)
    # No sentence of the data is in a record.
    examples, _, _ = read_examples(SAMPLE / "ids-sst-dev.csv", TASKS["sst"], limit=24)
    recorded = "".join(map(read_text, out.rglob("*.json")))
    assert not any(example.texts[0] in recorded for example in examples)
    check_refusals(command, reported, tmp_path)


def check_refusals(command, reported, tmp_path):
    """Records that do not fit each other, the data or the tables of today are refused by name."""
    out = tmp_path / "results"

    def spoil(path, old, new, error, *flags):
        original = read_text(path)
        assert old in original
        write_text(path, original.replace(old, new))
        command(*reported, *flags, error=error)
        write_text(path, original)

    dev, probe = tmp_path / "data/quora-dev.csv", out / "records/probe-seed1.json"
    spoil(dev, "\t1.0\n", "\t0\n", "quora-dev.csv: not the file that ")
    spoil(probe, "--epochs 10", "--epochs 100", "its cell is now `--no_test --final_only --option")
    spoil(probe, '"cell": "probe"', '"cell": "prob"', "there is no cell prob any more; delete")
    spoil(probe, '"float32"', '"bfloat16"', "probe, seed 1, is of ")
    spoil(probe, '"machine": "', '"machine": "x', "or give --mixed")
    encoder = out / "records/simcse-seed1.json"
    spoil(encoder, '"float32"', '"bfloat16"', "or give --mixed")
    spoil(
        probe, '"model_checksum": "', '"model_checksum": "1', "probe and untouched.json have diff"
    )
    spoil(probe, '"quora-train.csv": "', '"quora-train.csv": "1', "was trained on another quora-tr")
    spoil(probe, '"seed": 1', '"seed": 3', "probe: planned with 2 seeds, but recorded: 2;")
    steps = '"head_steps": {\n    "sst": '
    spoil(probe, steps, f"{steps}1", "probe-simcse and probe: unlike numbers of steps of the sst")
    untouched = out / "untouched.json"
    spoil(untouched, '"predictions"', '"x"', "damaged or not the record of the untouched encoder")
    command(*reported[:-1], 3, error="planned with 3 seeds, but recorded: 1, 2; run it again")
    command(*reported[:-1], 9, error="--seeds 9: no cell of table1, table2, table3, temperature")
    untouched.rename(out / "moved.json")
    command(*reported, error="untouched.json: no such file")
    (out / "moved.json").rename(untouched)
    write_text(probe, read_text(probe).replace('"float32"', '"bfloat16"'))
    command(*reported, "--mixed")
    assert "**Mixed runs**: " in read_text(out / "tables.md")
    other = ["--model", "all-MiniLM-L6-v2", "--data_dir", tmp_path / "data", "--out", out]
    command("run", "table3", *other, "--runs", tmp_path / "other", error="made by")
    shutil.rmtree(out / "records")
    other += ["--runs", tmp_path / "other"]
    command("run", "table3", *other, error="untouched.json: made with another --model")
    write_text(dev, read_text(dev) + "\n")
    command("run", "table3", *other, error="untouched.json: made with another quora-dev.csv")


def test_recorded_runs_are_skipped_and_interrupted_ones_resumed(
    grid, tmp_path, command, monkeypatch
):
    flags, started = grid
    log = RunDir.log

    def interrupt(self, kind, *rest, **figures):
        if kind == "dev":
            raise KeyboardInterrupt
        log(self, kind, *rest, **figures)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", interrupt)
        command("run", "table3", *flags, error="the same command continues", code=130)
    assert list(started) == ["probe-concat-seed1"]
    assert "8 runs, 0 already recorded" in command("run", "table3", *flags)
    assert (tmp_path / "runs/probe-concat-seed1/resumed.jsonl").exists()
    started.clear()
    assert "8 runs, 8 already recorded" in command("run", "table3", *flags)
    assert not started
    # A record that is lost is written again, from the finished run.
    lost = tmp_path / "results/records/probe-seed1.json"
    content = lost.read_bytes()
    lost.unlink()
    command("run", "table3", *flags)
    assert lost.read_bytes() == content
    # Neither records nor run folders of another command are taken for this one's.
    command("run", "table3", *flags[:-1], "--flags=--epochs 2", error="--epochs is set by the cell")
    other = [*flags[:-1], "--flags=--limit 23"]
    command("run", "table3", *other, error="name another --out")
    other[other.index("--out") + 1] = tmp_path / "other"
    assert "made with other" in command("run", "table3", *other, error="exit code 2")

    # With these records, `report` shows the one complete table, and names no other.
    reported = ["--data_dir", tmp_path / "data", "--out", tmp_path / "results", "--seeds", 2]
    command("report", *reported)
    assert list(read_json(tmp_path / "results/tables.json")["tables"]) == ["table3"]
    text = read_text(tmp_path / "results/tables.md")
    assert "SimCSE, probe" not in text
    # Of the claims, those about its cells are judged.
    results = read_json(tmp_path / "results/tables.json")
    assert {row["claim"] for row in results["claims"]} == {CLAIMS[-1].text}
    assert "13 more differences need cells that are missing here." in text
    command("report", "table1", *reported, error="probe-simcse: planned with 2 seeds, but")


def test_a_claim_needs_only_its_own_cells():
    """All planned runs of both, but no other cell of their table."""
    recorded = {"probe": 8, "probe-concat": 8, "finetune": 3, "simcse": 4}
    records = {cell: [{"seed": n + 1} for n in range(count)] for cell, count in recorded.items()}
    assert claimed_cells(records, None) == ["probe", "probe-concat"]
    assert claimed_cells(records, 3) == ["finetune", "probe", "probe-concat"]


def test_a_wrong_flag_is_refused_before_anything_is_computed(grid, tmp_path, command):
    flags, started = grid
    command(
        "run", "table3", *flags[:-1], "--flags=--limt 9", error="unrecognized arguments: --limt"
    )
    assert not started and not (tmp_path / "results").exists()


def test_jobs_whose_encoder_failed_are_skipped(grid, tmp_path, command, monkeypatch):
    """Others run. And an encoder is trained again if a job needs it and its folder is gone."""
    flags, started = grid
    flags[flags.index("--seeds") + 1] = 1
    start = runner.start_process
    fail = lambda command, *rest: 1 if command[0] == "simcse.py" else start(command, *rest)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(runner, "start_process", fail)
        out = command("run", "table1", *flags, error="3 of 5 runs failed (simcse-seed1, ...)")
    assert list(started) == ["probe-seed1", "finetune-seed1"]
    assert "probe-simcse-seed1: skipped, because simcse-seed1 failed" in out
    command("run", "table1", *flags)
    for name in ("simcse-seed1", "probe-simcse-seed1"):
        shutil.rmtree(tmp_path / "runs" / name)
    (tmp_path / "results/records/probe-simcse-seed1.json").unlink()
    started.clear()
    command("run", "table1", *flags)
    assert list(started) == ["simcse-seed1", "probe-simcse-seed1"]


def test_interruption_bad_input_and_a_second_command_stop_and_other_failures_do_not(
    grid, tmp_path, command, monkeypatch
):
    flags, _ = grid
    codes = iter([1, -signal.SIGTERM, 2])
    monkeypatch.setattr(runner, "start_process", lambda *_: next(codes))
    command("run", "table3", *flags, error="probe-concat-seed2: exit code -15")
    command("run", "table3", *flags, error="probe-concat-seed1: exit code 2")
    with folder_lock(tmp_path / "runs"):
        command("run", "table3", *flags, error="in use by another process")
    assert next(codes, None) is None


BAD_USAGE = {
    "": "run|report|sweep|compare|conflict|transfer",
    "run table9": "table9: no such table; there are table1, table2",
    "run table1 --seeds 0": "--seeds",
    "run table1 --flags='x": "--flags",
    "run table1 --flags=--seed=3": "--flags: --seed is set by this command",
    "run table1 --data_dir nowhere": "--data_dir nowhere: no such folder",
    "report --out nowhere": "no records; first: python -m experiments run",
    "report --out {tmp}": "x.json: damaged or not a record of a run",
    "conflict nowhere": "nowhere: not a run folder",
    "run table1 --out {tmp}/records/x.json": "Not a directory",
}


def test_bad_usage(command, tmp_path):
    write_text(tmp_path / "records/x.json", '{"cell": "probe"}')
    for flags, expected in BAD_USAGE.items():
        assert command(*flags.format(tmp=tmp_path).split(), error=expected).count("\n") == 1


def flatten(value, path=""):
    """Every leaf of a JSON value by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flatten(inner, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
def test_the_committed_tables_are_those_of_the_committed_records(command, tmp_path):
    shutil.copytree(RESULTS / "records", tmp_path / "records")
    shutil.copy(RESULTS / "untouched.json", tmp_path)
    command("report", "--data_dir", REAL, "--out", tmp_path)
    made, committed = (flatten(read_json(folder / "tables.json")) for folder in (tmp_path, RESULTS))
    assert made == pytest.approx(committed, abs=1e-5)


def test_every_figure_in_the_readme_is_in_the_tables():
    """Decimal figures of results/README.md; a minus sign may be missing, a rounding may not."""

    def figures(name):
        text = re.sub(r"`[^`]*`", "", read_text(RESULTS / name))
        return re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\d)", text)

    files = [read_json(RESULTS / name) for name in ("tables.json", "transfer/transfer.json")]
    stored = {v for file in files for v in flatten(file).values() if type(v) is float}
    # As printed, too: tables.json has so many values that nearly every figure is one of them.
    pages = ("tables.md", "transfer/transfer.md", "leaderboard/README.md")
    printed = {float(value) for name in pages for value in figures(name)}
    mine = figures("README.md")
    assert len(mine) > 20
    for places in {len(figure.split(".")[1]) for figure in mine}:
        texts = {f"{float(f):.{places}f}" for f in mine if len(f.split(".")[1]) == places}
        for values in (stored, printed):
            assert texts <= {f"{abs(v):.{places}f}" for v in values}
    for name in re.findall(r"\]\(([\w./-]+)\)", read_text(RESULTS / "README.md")):
        assert (RESULTS / name).exists(), name
