"""The search of learning rates: which pairs go on, what is kept, and what stops it."""

import itertools

import pytest
from conftest import write_data

import multitask_classifier
from engine.checkpoint import read_json, read_text, write_text
from experiments import __main__ as experiments
from experiments import sweep

FLAGS = "--flags=--pooling mean --epochs 1 --precision fp32"


@pytest.fixture
def search(tiny, tmp_path, run_script, monkeypatch):
    """`search(*more)` runs a sweep of four pairs; its exit code, output, and the runs it started.

    Scripts run in this process. Of --head_lr 0.5, 0.25 and 0.125, the first makes training diverge,
    the second is bad input, the third crashes.
    """
    write_data(tmp_path / "data", {"train": 40, "dev": 16})

    def run(*more):
        started = []

        def start_process(command, log, threads):
            flags = dict(itertools.pairwise(command))
            started.append((float(flags["--lr"]), float(flags["--head_lr"]), int(flags["--limit"])))
            assert command[-1] == "--resume"
            write_text(log, "the last line of the log\n")
            if code := {"0.5": 3, "0.25": 2, "0.125": 1}.get(flags["--head_lr"]):
                return code
            multitask_classifier.main(command[1:])
            return 0

        monkeypatch.setattr(sweep, "start_process", start_process)
        flags = ["--model", tiny, "--data_dir", tmp_path / "data", "--out", tmp_path / "out", FLAGS]
        flags += ["--runs", tmp_path / "runs", "--lr", "1e-5", "1e-3", "--rows", 40, "--rungs", 3]
        code, out, err = run_script(experiments, "sweep", *flags, *more)
        return code, out + err, started

    return run


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_better_half_goes_on_to_twice_the_rows(search, tmp_path, jobs):
    code, out, started = search("--head_lr", "1e-3", "1e-2", "--jobs", jobs)
    assert code == 0, out
    trials = [read_json(path) for path in (tmp_path / "out/records").iterdir()]
    rungs = [[t for t in trials if t["limit"] == limit] for limit in (10, 20, 40)]
    assert [len(rung) for rung in rungs] == [4, 2, 1] and len(started) == 7
    for rung, following in itertools.pairwise(rungs):
        ranked = sorted(rung, key=lambda trial: -trial["overall"])
        best = [(trial["lr"], trial["head_lr"]) for trial in ranked[: len(following)]]
        assert {(trial["lr"], trial["head_lr"]) for trial in following} == set(best)
    winner = rungs[-1][0]
    assert f"best: --lr {winner['lr']:g} --head_lr {winner['head_lr']:g};" in out
    text = read_text(tmp_path / "out/sweep.md")
    assert f" --lr {winner['lr']:g} --head_lr {winner['head_lr']:g} --data_dir DATA\n" in text
    assert f"| {winner['overall']:.3f} |" in text
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    # A record is that of its run, and says how to repeat it.
    name = f"lr{winner['lr']:g}-head{winner['head_lr']:g}-limit40"
    assert winner["dev"] == read_json(tmp_path / "runs" / name / "result.json")["dev"]
    assert f"--data_dir DATA --run_dir runs/sweep/{name}" in winner["command"]
    # Nothing is run twice, and records of other flags are not taken for these.
    assert search("--head_lr", "1e-3", "1e-2")[2] == []
    code, out, _ = search("--head_lr", "1e-3", "1e-2", "--flags=--option finetune")
    assert code == 2 and "name another --out" in out


def test_rates_at_which_training_diverges_come_last(search, tmp_path):
    code, out, started = search("--head_lr", "1e-3", "0.5")
    assert code == 0, out
    assert [limit for *_, limit in started] == [10] * 4 + [20] * 2 + [40]
    assert not [trial for trial in started[4:] if trial[1] == 0.5]
    assert "| 10 | 0.001 | 0.5 | diverged |" in read_text(tmp_path / "out/sweep.md")


def test_bad_input_stops_the_search(search, tmp_path):
    code, out, started = search("--head_lr", "0.25", "1e-2")
    assert code == 2 and "lr1e-05-head0.25-limit10: exit code 2: the last line of the log" in out
    assert len(started) == 1 and not (tmp_path / "out/sweep.md").exists()
    code, out, started = search("--head_lr", "0.125")
    assert code == 2 and "exit code 1" in out and len(started) == 1
    assert not list((tmp_path / "out/records").iterdir())  # to be tried again
    code, out, _ = search("--head_lr", "0.5", "--out", tmp_path / "all")
    assert code == 2 and "diverged at all rates" in out
    code, out, started = search("--head_lr", "1e-2", "--rows", 3)
    assert code == 2 and "--rows 3: too few to halve 2 times" in out and not started
    for flag, expected in {"--limit 5": "--limit is set", "'": "No closing"}.items():
        code, out, started = search("--flags", flag)
        assert code == 2 and expected in out and not started
    code, out, started = search("--data_dir", tmp_path / "gone")
    assert code == 2 and "gone: no such folder" in out and not started
