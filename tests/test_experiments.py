"""Tables end to end on tiny data, and the statistics against scipy and by hand."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import experiments
import report
from checkpoint import Run
from datasets import read
from scoring import compare, holm
from tasks import TASKS

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"

# ---------------------------------------------------------------------------- statistics


def test_accuracy_with_one_seed_is_mcnemars_test():
    """The permutation test over rows is the exact McNemar test: a binomial of who is right."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 5, 400)
    first, second = (np.where(rng.random(400) < share, gold, 9) for share in (0.6, 0.5))
    found = compare(gold, first[None], second[None], correlation=False)
    only = [int(np.sum((a == gold) & (b != gold))) for a, b in ((first, second), (second, first))]
    assert found.difference == pytest.approx((only[0] - only[1]) / 400)
    expected = stats.binomtest(only[0], sum(only)).pvalue
    assert found.p == pytest.approx(expected, rel=0.25, abs=0.003)
    # The interval is near that of the normal approximation.
    spread = 1.96 * np.std((first == gold) * 1.0 - (second == gold) * 1.0) / 20
    assert found.low == pytest.approx(found.difference - spread, abs=0.012)
    assert found.high == pytest.approx(found.difference + spread, abs=0.012)


def test_figures_are_averaged_over_seeds():
    gold = np.array([0, 1, 1, 0])
    first = np.array([[0, 1, 1, 0], [0, 1, 0, 1]])  # 1.0 and 0.5
    second = np.array([[1, 1, 1, 0]])  # 0.75
    assert compare(gold, first, second, correlation=False).difference == 0
    scores = np.array([0.0, 1, 2, 5])
    ours = np.array([[0.1, 1, 2, 4], [3, 1, 2, 0.5]])
    theirs = np.array([[1.0, 0, 5, 2]])
    r = [stats.pearsonr(scores, row).statistic for row in (*ours, *theirs)]
    found = compare(scores, ours, theirs, correlation=True, resamples=99)
    assert found.difference == pytest.approx((r[0] + r[1]) / 2 - r[2])


def test_a_clear_difference_of_correlations_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    gold = rng.uniform(0, 5, 500)
    good, other, bad = (gold + noise * rng.normal(size=500) for noise in (1.0, 1.0, 4.0))
    clear = compare(gold, good[None], bad[None], correlation=True)
    assert clear.p < 0.01 and 0 < clear.low < clear.difference < clear.high
    unclear = compare(gold, good[None], other[None], correlation=True)
    assert unclear.p > 0.05 and unclear.low < 0 < unclear.high


def test_a_model_against_itself_differs_by_nothing():
    gold = np.arange(6.0) % 3
    for correlation in (False, True):
        found = compare(gold, gold[None], gold[None], correlation)
        assert (found.difference, found.p) == (0, 1)


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_his_procedure_rejects(p_values):
    """Step down: the k-th smallest of m is rejected at a while it is at most a / (m - k + 1)."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[i] * (len(p_values) - rank) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def row(task, difference, low, high, p, first="a", second="b"):
    names = {
        "first": first,
        "second": second,
        "task": task,
        "p_corrected": p,
        "seeds": 3,
        "floor": False,
        "apart": True,
    }
    return {**names, "difference": difference, "low": low, "high": high}


@pytest.mark.parametrize(
    ("signs", "most", "rows", "expected"),
    [
        ({"sst": -1}, None, [row("sst", -0.1, -0.15, -0.05, 0.001)], "stands"),
        ({"sst": -1}, None, [row("sst", -0.1, -0.25, 0.05, 0.2)], "cannot be told"),
        ({"sst": -1}, None, [row("sst", 0.1, 0.05, 0.15, 0.001)], "falls"),
        ({"sst": -1}, None, [], "cannot be told"),
        ({"sst": 0}, None, [row("sst", 0.001, -0.01, 0.012, 0.9)], "stands"),
        ({"sst": 0}, None, [row("sst", 0.012, 0.005, 0.018, 0.001)], "stands"),
        ({"sst": 0}, None, [row("sst", 0.01, -0.04, 0.06, 0.9)], "cannot be told"),
        ({"sst": 0}, None, [row("sst", 0.1, 0.05, 0.15, 0.001)], "falls"),
        (
            {"sst": -1, "sts": -1},
            None,
            [row("sst", -0.1, -0.2, -0.05, 0.001), row("sts", 0.0, -0.1, 0.1, 1)],
            "cannot be told",
        ),
        (
            {"sst": -1, "sts": -1},
            "sts",
            [row("sst", -0.1, -0.15, -0.05, 0.001), row("sts", -0.3, -0.35, -0.25, 0.001)],
            "stands",
        ),
        (
            {"sst": -1, "sts": -1},
            "sts",
            [row("sst", -0.1, -0.15, -0.05, 0.001), row("sts", -0.12, -0.2, -0.06, 0.001)],
            "cannot be told",
        ),
        (
            {"sst": -1, "sts": -1},
            "sst",
            [row("sst", -0.1, -0.15, -0.05, 0.001), row("sts", -0.3, -0.35, -0.25, 0.001)],
            "falls",
        ),
    ],
)
def test_verdicts_by_hand(signs, most, rows, expected):
    differences = tuple(("a", "b", task, sign) for task, sign in signs.items())
    claim = experiments.Claim("It does.", "table1", differences, most)
    verdict, figures = report.judge(claim, rows)
    assert verdict == expected
    assert all(f"{r['difference']:+.3f}" in figures for r in rows)
    if rows:
        verdict, figures = report.judge(claim, [*rows[:-1], {**rows[-1], "seeds": 2}])
        assert verdict == "cannot be told" and figures.startswith("Fewer than 3 seeds. ")
        overlapping = [{**r, "apart": False} for r in rows]
        if 0 not in signs.values():
            assert report.judge(claim, overlapping)[0] != "stands"
        verdict, figures = report.judge(claim, [{**r, "floor": True} for r in rows])
        assert verdict != "stands" and "neither better than the commonest class" in figures


def test_the_answer_on_conflict_names_the_pairs_that_are_sure(tmp_path):
    """Three measurements of a pair that points apart, of one that agrees, and of one between."""

    def point(step, *cosines):
        pairs = ("sst|para", "sst|sts", "para|sts", "sst|sst", "para|para", "sts|sts")
        found = {p: {"cosine": c, "magnitude": 0.5} for p, c in zip(pairs, cosines, strict=True)}
        return {"step": step, "parts": {"pooler": found, "overall": found}}

    run = [
        point(0, -0.3, 0.1, 0.2, None, None, None),
        point(100, -0.2, 0.2, -0.2, None, None, None),
        point(200, -0.4, 0.3, 0.0, None, None, None),
    ]
    text = report.conflict_report([run], tmp_path, "conflict")
    assert "surely below 0: sst and para; surely above 0: none." in text
    # 4.303: of Student's t with 2 degrees of freedom, 97.5%.
    reach = 4.302653 * 0.1 / 3**0.5
    assert (
        f"| -0.300 | {-0.3 - reach:+.3f} to {-0.3 + reach:+.3f} | - | 100% | 100% | 0.500 |" in text
    )
    assert "is 0.300 in absolute value" in text
    text = report.conflict_report([run, run], tmp_path, "conflict")
    assert "surely below 0: sst and para; surely above 0: sst and sts." in text
    assert report.interval(np.array([0.1, np.nan])) == (-math.inf, math.inf)
    assert r"| sst\|para | -0.300 | - | - | 100% |" in report.conflict_report(
        [run[:1]], tmp_path, "conflict"
    )


@pytest.mark.parametrize("angle", [-0.6, 0.0, 0.9])
def test_the_cosine_of_the_tasks_is_found_behind_what_chance_adds(angle):
    """Two tasks' gradients at a known angle; the less a batch has of one, the more of the other."""
    rng = np.random.default_rng(5)
    first, other = np.linalg.qr(rng.normal(size=(2000, 2)))[0].T
    tasks = {"a": first, "b": angle * first + (1 - angle**2) ** 0.5 * other}
    lengths = {"a": np.linspace(0.3, 2, 60), "b": np.linspace(2, 0.3, 60)}

    def products(one, two):
        seen = [
            lengths[t][:, None] * tasks[t] + rng.normal(size=(60, 2000)) * 2 / 2000**0.5
            for t in (one, two)
        ]
        return (seen[0] * seen[1]).sum(1)

    across, a, b = products("a", "b"), products("a", "a"), products("b", "b")
    scale = (lengths["a"] @ lengths["b"]) / (lengths["a"] @ lengths["a"])
    found, low, high = map(float, re.findall(r"[+-]\d\.\d+", report.without_chance(across, a, b)))
    assert found == pytest.approx(angle * scale, abs=0.05)
    assert low < angle * scale < high and high - low < 0.5
    assert report.without_chance(across, a, b - b.mean()) == "-"
    assert report.without_chance(across[:1], a[:1], b[:1]) == "-"
    missing = np.full(3, np.nan)
    assert report.without_chance(missing, missing, missing) == "-"
    gap = [np.append(of, np.nan) for of in (across, a, b)]
    assert report.without_chance(*gap) == report.without_chance(across, a, b)


def test_models_at_the_floor():
    gold = np.array([0] * 60 + [1] * 40)
    constant, better = np.zeros((2, 100)), np.array([[0] * 60 + [1] * 3 + [0] * 37])
    assert report.at_floor(gold, [constant, 1 - constant], True)
    assert not report.at_floor(gold, [constant, better], True)
    assert not report.at_floor(gold, [constant, constant], False)


@pytest.mark.parametrize(
    ("low", "high", "p", "changed", "expected"),
    [
        (0.05, 0.15, 0.001, {}, ""),
        (0.05, 0.15, 0.001, {"apart": False}, ", but the seeds overlap"),
        (0.05, 0.15, 0.2, {"apart": False}, ""),
        (-0.01, 0.02, 0.5, {}, ", surely within 0.02"),
        (-0.021, 0.01, 0.5, {}, ""),
        (0.05, 0.15, 0.001, {"seeds": 1}, ", one seed"),
        (0.05, 0.15, 0.001, {"floor": True}, ", neither better than the commonest class"),
    ],
)
def test_a_difference_names_what_is_to_be_doubted(low, high, p, changed, expected):
    assert (
        report.doubt({**row("sts", (low + high) / 2, low, high, p, "a", "b"), **changed})
        == expected
    )


def test_a_curve_leaves_out_the_first_stage_and_cells_of_one_evaluation(tmp_path, monkeypatch):
    """Steps begin anew when lpft starts to fine-tune, after as many as a seed's probe took."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda drawing, path: drawn.append(drawing.axes[0].lines))

    def run(*stages):
        points = [{"step": i, "score": i / 10, "stage": stage} for i, stage in enumerate(stages)]
        return {"overall": 1.0, "curve": points}

    records = {
        "once": [run("finetune")],
        "lpft": [run("probe", "probe", "finetune"), run("probe", "finetune")],
        "twice": [run(None, None)],
    }
    report.plot_curves(records, tmp_path / "curves.png")
    assert [line.get_label() for line in drawn[0]] == ["twice"]


def test_figures_are_put_into_text():
    records = {"a": [{"dev": {"sts": {"pearson": r}}} for r in (0.5, 0.7)]}
    rows = [row("sts", 0.1, 0.05, 0.15, 0.001, "a.b-c", "d")]
    text = "It is {a sts}, by {a.b-c - d sts}; {b sts}, {d - a sts}, {a para} {x}."
    assert report.fill(text, records, rows) == (
        "It is 0.600 ± 0.141, by +0.100 (+0.050 to +0.150); missing, missing, missing {x}."
    )


def test_lessons_name_cells_tasks_and_differences_that_exist():
    pairs = {pair for table in experiments.TABLES.values() for pair in table.pairs}
    for lesson in experiments.LESSONS:
        for first, second, task in re.findall(r"\{([\w.-]+) - ([\w.-]+) (\w+)\}", lesson):
            assert (first, second) in pairs and task in TASKS
        for cell, task in re.findall(r"\{([\w.-]+) (\w+)\}", lesson):
            assert cell in experiments.CELLS and task in TASKS


def test_claims_and_tables_name_cells_that_exist_and_are_compared():
    for table in experiments.TABLES.values():
        assert set(table.cells) <= set(experiments.CELLS)
        assert set(table.paper) <= set(table.cells)
        assert {cell for pair in table.pairs for cell in pair} <= set(table.cells)
    for claim in experiments.CLAIMS:
        pairs = experiments.TABLES[claim.table].pairs
        assert {difference[:2] for difference in claim.differences} <= set(pairs)


# ---------------------------------------------------------------------------- the grid


@pytest.fixture
def grid(tiny, tmp_path, monkeypatch):
    """Flags of `run` over some of the sample data; scripts run in this process."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    modules = {f"{name}.py": __import__(name) for name in ("multitask_classifier", "simcse")}
    started, models = [], {}

    def here(line, log):
        started.append(line[line.index("--run_dir") + 1].rsplit("/", 1)[1])
        models[started[-1]] = line[line.index("--model") + 1]
        modules[line[0]].main(line[1:])
        return 0

    monkeypatch.setattr(experiments, "start", here)
    flags = ["--model", tiny, "--data_dir", tmp_path / "data", "--out", tmp_path / "results"]
    flags += ["--runs", tmp_path / "runs", "--seeds", 2, "--probe_seeds", 2]
    flags += ["--flags=--epochs 1 --batch_size 16 --precision fp32 --limit 24"]
    return flags, started, models


def test_every_table_runs_and_is_reported(grid, tmp_path, run_script, monkeypatch):
    flags, started, models = grid
    flags[flags.index("--seeds") + 1] = 1
    monkeypatch.setitem(report.__dict__, "EMBEDDED_NOTE", "not shown")
    code, _, err = run_script(experiments, "run", "all", *flags)
    assert code == 0, err
    assert len(started) == len(set(started))
    assert {name.rsplit("-seed", 1)[0] for name in started} == set(experiments.CELLS)
    # Each comes after the encoder that it starts from.
    assert started.index("simcse-seed2") < started.index("probe-simcse-seed2")
    assert models["probe-simcse-seed2"] == str(tmp_path / "runs/simcse-seed2/best")
    # All probes of an encoder share its embeddings of the six sets.
    names = {path.name.split("-")[0] for path in (tmp_path / "runs/features").iterdir()}
    assert len(names) == 5 * 6
    assert models["probe-seed2"] != models["probe-simcse-seed2"]
    out = tmp_path / "results"
    (out / "records/without-sts-seed1.json").unlink()
    reported = ["--data_dir", tmp_path / "data", "--out", out, "--runs", tmp_path / "runs"]
    code, _, err = run_script(experiments, "report", *reported)
    assert code == 0, err
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "not shown" not in text  # the model is not the embedded one
    record = json.loads((out / "records/probe-seed1.json").read_text(encoding="utf-8"))
    other = json.loads((out / "records/probe-seed2.json").read_text(encoding="utf-8"))
    values = [r["dev"]["sts"]["pearson"] for r in (record, other)]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
    # The sign of a difference: the first minus the second.
    means = {
        cell: np.mean(
            [
                json.loads(path.read_text(encoding="utf-8"))["dev"]["sts"]["pearson"]
                for path in (out / "records").glob(f"{cell}-seed?.json")
            ]
        )
        for cell in ("mean-cosine", "mean-dot")
    }
    difference = means["mean-cosine"] - means["mean-dot"]
    assert f"| Cosine for STS - Mean pooling | sts | {difference:+.3f} |" in text
    assert "| *the paper's* | 0.386 | 0.390 | 0.494 | 0.487 |" in text
    assert "| sts left out | none | - | - | missing |" in text
    assert "leaving out either helps the other. **Cannot be told.** Runs are missing." in text
    assert "--option pretrain --epochs 10 --model" in text
    flags_of = experiments.CELLS["finetune"].flags
    assert f"## Do the tasks' gradients conflict? `{flags_of}`" in text
    for what in ("layers", "steps"):
        assert f"(conflict-finetune-{what}.png)" in text
        image = (out / f"conflict-finetune-{what}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
    assert "train: sst 24, para 24, sts 24, nli 24; dev: sst 24, para 24, sts 24." in text
    given = "`--epochs 1 --batch_size 16 --precision fp32 --limit 24`"
    assert f"Seeds of a cell: 1 or 2. Flags for all, where a cell has no other: {given}.**" in text
    assert text.count(report.SHARED_NOTE) == 2  # table1 and temperature
    for cell in report.MAPPED:
        assert f"![{cell}](map-{cell}.png)" in text
        assert (out / f"map-{cell}.png").read_bytes().startswith(b"\x89PNG")
    tex = (out / "ladder.tex").read_text(encoding="utf-8")
    assert f"Cosine for STS $-$ Mean pooling & sts & ${difference:+.3f}$ & $" in tex
    for table in experiments.TABLES:
        assert (out / f"{table}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{table}.tex").read_text(encoding="utf-8").startswith(r"\begin{tabular}")
    # Other labels are noticed, and so is a cell that has changed since.
    dev = tmp_path / "data/quora-dev.csv"
    was = dev.read_text(encoding="utf-8")
    header, *rows = was.splitlines(keepends=True)
    flipped = [row.replace("\t1.0\n", "\t0\n") for row in rows]
    assert flipped != rows
    dev.write_text("".join([header, *flipped]), encoding="utf-8")
    code, _, err = run_script(experiments, "report", *reported)
    assert code == 2 and "for para, and on these dev rows it is" in err
    dev.write_text(was, encoding="utf-8")
    path = out / "records/simcse-seed1.json"
    stale = {**json.loads(path.read_text(encoding="utf-8"))}
    stale["command"] = stale["command"].replace("--temperature 1", "--temperature 2")
    path.write_text(json.dumps(stale), encoding="utf-8")
    code, _, err = run_script(experiments, "report", *reported)
    assert code == 2 and "but its cell has `--batch_size 32 --temperature 1`" in err
    # No sentence of the data is in a record.
    examples, _ = read(SAMPLE / "ids-sst-dev.csv", TASKS["sst"], limit=24)
    for path in out.rglob("*.json"):
        recorded = path.read_text(encoding="utf-8")
        assert not any(example.texts[0] in recorded for example in examples)


def test_what_is_recorded_is_skipped_and_what_broke_off_is_resumed(
    grid, tmp_path, run_script, monkeypatch
):
    flags, started, _ = grid
    broken = tmp_path / "runs/probe-concat-seed1"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}", encoding="utf-8")
    code, out, err = run_script(experiments, "run", "table3", *flags)
    # Whoever made that folder, it was not this command.
    assert code == 2 and "probe-concat-seed1: of another command (it had unknown" in err
    assert (broken / "config.json").exists() and not started
    args = experiments.parse(["run", "table3", *map(str, flags)])
    line = experiments.recorded_command(experiments.Job("probe-concat", 1), args)
    (tmp_path / "runs/probe-concat-seed1.command").write_text(line, encoding="utf-8")
    shutil.rmtree(broken)

    def log(self, kind, *rest, **figures):
        if kind == "dev":
            raise KeyboardInterrupt
        real(self, kind, *rest, **figures)

    real = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        assert run_script(experiments, "run", "table3", *flags)[0] == 130
    assert started == ["probe-concat-seed1"]
    code, out, err = run_script(experiments, "run", "table3", *flags)
    assert code == 0, err
    assert "8 runs, 0 of them recorded already" in out
    assert (broken / "result.json").exists() and (broken / "resumed.jsonl").exists()
    first = list(started)
    code, out, _ = run_script(experiments, "run", "table3", *flags)
    assert code == 0 and "8 runs, 8 of them recorded already" in out and started == first
    flags[-1] = "--flags=--epochs 2"
    code, _, err = run_script(experiments, "run", "table3", *flags)
    assert code == 2 and "name another --out" in err
    assert "where now there is" in err
    flags[flags.index("--out") + 1] = tmp_path / "other"
    code, _, err = run_script(experiments, "run", "table3", *flags)
    assert code == 2 and "name another --runs" in err
    assert started == first


def test_more_probes_than_encoders_take_them_in_turn():
    """Five probes of three encoders: 1, 2, 3, 1, 2; each encoder is made once, and before."""
    jobs = experiments.jobs_of(["table1"], 3, 5)
    probes = [job for job in jobs if job.cell == "probe-simcse"]
    starts = [experiments.encoder(job) for job in probes]
    assert [job.seed for job in starts] == [1, 2, 3, 1, 2]
    assert {job.seed for job in jobs if job.cell == "simcse"} == {1, 2, 3}
    assert all(jobs.index(s) < jobs.index(p) for s, p in zip(starts, probes, strict=True))
    assert experiments.encoder(experiments.Job("probe", 4)) is None
    assert set(experiments.jobs_of(["table1"], 1, 2)) < set(jobs)  # more seeds only add


def test_what_starts_from_an_encoder_that_failed_is_not_run(
    grid, tmp_path, run_script, monkeypatch
):
    """Other runs are. And the encoder is made again where it is recorded but its folder is gone."""
    flags, started, _ = grid
    here = experiments.start
    monkeypatch.setattr(
        experiments, "start", lambda line, log: 1 if line[0] == "simcse.py" else here(line, log)
    )
    flags[flags.index("--seeds") + 1] = flags[flags.index("--probe_seeds") + 1] = 1
    code, out, err = run_script(experiments, "run", "table1", *flags)
    assert code == 2 and "3 of 5 runs failed (simcse-seed1, ...)" in err
    assert started == ["probe-seed1", "finetune-seed1"]
    assert "its encoder failed" in out + err
    monkeypatch.setattr(experiments, "start", here)
    assert run_script(experiments, "run", "table1", *flags)[0] == 0
    shutil.rmtree(tmp_path / "runs" / "simcse-seed1")
    (tmp_path / "results/records/probe-simcse-seed1.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "probe-simcse-seed1")
    started.clear()
    assert run_script(experiments, "run", "table1", *flags)[0] == 0
    assert started == ["simcse-seed1", "probe-simcse-seed1"]


def test_two_runs_do_not_share_their_folders(grid, tmp_path, run_script):
    flags, started, _ = grid
    with experiments.alone(tmp_path / "runs"):
        code, _, err = run_script(experiments, "run", "table3", *flags)
    assert code == 2 and "another run works there" in err and not started


def test_a_cells_own_flags_win_over_those_for_all():
    args = experiments.parse(["run", "table1", "--flags=--option finetune --epochs 9"])
    line = experiments.command(experiments.Job("probe", 3), args, args.runs, args.data_dir)
    import multitask_classifier

    parsed = multitask_classifier.parse(line[1:])
    assert (parsed.option, parsed.epochs, parsed.seed) == ("pretrain", 10, 3)


def test_the_papers_own_figures_bear_out_the_papers_claims():
    """Each of its differences, taken for certain."""
    for claim in experiments.CLAIMS:
        paper = experiments.TABLES[claim.table].paper
        if claim.table == "table2":  # its baselines stand in Table 1
            paper = {**experiments.TABLES["table1"].paper, **paper}
        rows = []
        for first, second, task, sign in claim.differences:
            gap = paper[first][task] - paper[second][task]
            gap = gap if sign else 0.0
            rows.append(row(task, gap, gap - 1e-4, gap + 1e-4, 1.0 if not sign else 0.0))
            rows[-1].update(first=first, second=second)
        assert report.judge(claim, rows)[0] == "stands", claim.text


def test_an_interrupted_run_ends_the_command_and_others_failures_do_not(
    grid, tmp_path, run_script, monkeypatch
):
    flags, *_ = grid
    codes = iter([1, -signal.SIGTERM, 2])
    calls = []

    def failing(line, log):
        calls.append(line)
        return next(codes)

    monkeypatch.setattr(experiments, "start", failing)
    code, _, err = run_script(experiments, "run", "table3", *flags)
    assert code == 2 and "2 of 8 runs failed (probe-concat-seed1, ...)" in err
    assert len(calls) == 2
    # What one script finds wrong with its input, the others would.
    code, _, err = run_script(experiments, "run", "table3", *flags)
    assert code == 2 and "1 of 8 runs failed" in err
    assert len(calls) == 3


def test_a_script_starts_as_a_process_with_its_own_log(tmp_path):
    log = tmp_path / "runs" / "job.log"
    assert experiments.start(["simcse.py", "--temperature", "0"], log) == 2
    assert "--temperature: 0 is out of range" in log.read_text(encoding="utf-8")
    assert experiments.ending(2, log).startswith("exit code 2: simcse.py: error: argument --temp")


def test_what_differs_between_commands_is_named():
    was = "python a.py --epochs 1 --limit 5 --seed 3"
    found = experiments.difference(was, "python a.py --epochs 2 --seed 3")
    assert found == "it had 1 --limit 5 where now there is 2"


def test_plots_of_one_run(tiny, data, tmp_path, run_script):
    import multitask_classifier

    flags = ["--model", tiny, "--data_dir", data, "--run_dir", tmp_path / "run", "--epochs", 1]
    flags += ["--option", "finetune", "--measure_conflict", 3, "--precision", "fp32"]
    assert run_script(multitask_classifier, *flags)[0] == 0
    code, out, err = run_script(experiments, "conflict", tmp_path / "run")
    assert code == 0, err
    assert r"| sst\|sts |" in out
    code, out, err = run_script(experiments, "map", tmp_path / "run", "--data_dir", data)
    assert code == 0, err
    for name in ("conflict-layers.png", "conflict-steps.png", "map.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_maps_and_records_that_cannot_be(tiny, data, tmp_path, run_script):
    import classifier

    flags = ["--model", tiny, "--data_dir", data, "--run_dir", tmp_path / "run", "--epochs", 1]
    assert run_script(classifier, *flags)[0] == 0
    code, _, err = run_script(
        experiments, "map", tmp_path / "run", "--data_dir", data, "--limit", 1
    )
    assert code == 2 and "a map needs at least three" in err
    code, _, err = run_script(experiments, "conflict", tmp_path / "run")
    assert code == 2 and "nothing was measured; train with --measure_conflict N" in err
    with open(tmp_path / "run" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "conf')
    code, _, err = run_script(experiments, "conflict", tmp_path / "run")
    assert code == 2 and "a line that is cut off" in err
    (tmp_path / "results/records").mkdir(parents=True)
    (tmp_path / "results/records/x.json").write_text('{"cell": "probe"}', encoding="utf-8")
    code, _, err = run_script(experiments, "report", "--out", tmp_path / "results")
    assert code == 2 and "x.json: not a record" in err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "run|report|conflict|map"),
        (["run", "table9"], "table9: no such table; there are table1, table2"),
        (["run", "table1", "--seeds", "0"], "--seeds"),
        (["run", "table1", "--flags=--seed 'x"], "--flags"),
        (["run", "table1", "--flags=--seed=3"], "--flags: --seed is given by this script"),
        (["run", "table1", "--flags=--limit 3 --model x"], "--flags: --model is given by"),
        (["report", "--out", "nowhere"], "no records; make some with experiments.py run"),
        (["conflict", "nowhere"], "nowhere: not a run folder"),
        (["map", "nowhere"], "nowhere: no such run folder"),
        (["run", "table1", "--out", __file__], "Not a directory"),
        (["run", "table1", "--out", "{tmp}", "--runs", __file__], "File exists"),
    ],
)
def test_bad_usage(run_script, tmp_path, flags, expected):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    code, _, err = run_script(experiments, *flags)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
