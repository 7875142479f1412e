"""The benchmarks, with tiny settings: that they run, check what they promise, and write it down."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOOD, NOUNS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import breakdown, encode, evaluate, harness, run, tokenization, train
from benchmarks.harness import Benchmark, Claim, Missing, Wrong
from bert import BertConfig, BertModel, BertSelfAttention, written_attention
from checkpoint import UserError

FILES = [Path(file).stem for file, _ in run.BENCHMARKS.values()]
# Peers that make the project's files unimportable, or are only a command, are run elsewhere.
APART = ("Trainer", "sentence-transformers", "first step, transformers")


@pytest.fixture
def small(monkeypatch, tmp_path, tiny, data):
    """`small(file)`: that benchmark and its command line, everything in it as small as can be."""
    monkeypatch.setattr(harness, "SIZES", dict.fromkeys(harness.SIZES, (1, 64)))
    monkeypatch.setattr(harness, "matrix_rate", lambda *_: 1e9)
    deterministic = torch.are_deterministic_algorithms_enabled()
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    triples = [f"a {noun} is {word},{noun} {word},the {noun}" for noun in NOUNS for word in GOOD]
    (folder / "nli_for_simcse.csv").write_text("\n".join(["sent0,sent1,hard_neg", *triples]))

    def make(file: str):
        benchmark = importlib.import_module(f"benchmarks.{file}").BENCHMARK
        words = ["--quick"]
        if "data_dir" in benchmark.settings:
            words += ["--data_dir", str(folder), "--model", str(tiny), "--rows", "16"]
        args = harness.parse(benchmark, words)
        args.scratch = tmp_path
        return benchmark, args

    yield make
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("file", FILES)
def test_every_contestant_can_be_measured_and_the_record_is_well_formed(file, small):
    benchmark, args = small(file)
    found = {}
    for name, make in benchmark.contestants.items():
        if any(word in name for word in APART):
            continue
        work = make(args)
        work.cold = work.cold or file == "startup"
        figures = harness.measure(work, args, harness.kept_file(args.scratch, name))
        assert all(math.isfinite(value) for value in figures.values()), (name, figures)
        assert min(figures["rate"], figures["seconds"], figures["memory"]) > 0
        found[name] = [figures]
    assert found
    harness.check(benchmark, args)
    claims = [c for c in benchmark.claims if {c.ours, c.peer or c.ours} <= set(found)]
    record = {
        "benchmark": file,
        "units": dict.fromkeys(found, benchmark.unit),
        "contestants": {name: harness.summarised(runs) for name, runs in found.items()},
        "skipped": {},
        "claims": [harness.judge(claim, found) for claim in claims],
    }
    assert claims and json.loads(json.dumps(record, allow_nan=False)) == record
    for lines in (harness.contestant_table(record), harness.claim_table([record])):
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("file", FILES)
def test_claims_name_contestants_and_figures(file):
    benchmark = importlib.import_module(f"benchmarks.{file}").BENCHMARK
    for claim in benchmark.claims:
        assert {claim.ours, claim.peer or claim.ours} <= set(benchmark.contestants)
        assert claim.metric in ("rate", "seconds", "memory", "quotient", "growth")
        assert not claim.target or claim.target.split()[0] in (">=", "<=", "<")
    assert benchmark.doc.splitlines()[2].strip().startswith(f"python benchmarks/{file}.py")


@pytest.fixture(scope="module")
def encoded(tiny, data) -> "subprocess.CompletedProcess[str]":
    """`encode.py` run as a user would, against sentence-transformers."""
    command = [sys.executable, str(harness.ROOT / "benchmarks/encode.py"), "--quick"]
    command += ["--rows", "24", "--model", str(tiny), "--data_dir", str(data)]
    command += ["--only", "^(sentence-transformers|ours), fp32"]
    return subprocess.run(command, capture_output=True, text=True)


def test_encode_end_to_end_against_sentence_transformers(encoded):
    assert encoded.returncode == 0, encoded.stderr
    record = json.loads(encoded.stdout.splitlines()[-1])
    assert record["checked"]["largest difference, ours, fp32"] <= 1e-5
    assert record["quick"] and "DATA" in record["command"] and record["versions"]["torch"]
    [claim] = [claim for claim in record["claims"] if claim["target"]]
    assert claim["value"][0] == pytest.approx(claim["our_figure"] / claim["peer_figure"])
    assert "| ours, fp32 |" in encoded.stdout and "turn 1 of 1" in encoded.stderr


def test_the_trainers_of_others_run_or_are_skipped(tiny, data, tmp_path):
    command = [sys.executable, str(harness.ROOT / "benchmarks/train.py"), "--quick", "--rows", "16"]
    command += ["--model", str(tiny), "--data_dir", str(data), "--scratch", str(tmp_path)]
    names = ("SST, Trainer, auto", "pairs, sentence-transformers, auto")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, "--worker", name], **pipes) for name in names]
    for process in started:
        printed, said = process.communicate()
        if process.returncode == harness.SKIPPED:
            assert "pip install" in said
        else:
            assert process.returncode == 0, said
            assert json.loads(printed.splitlines()[-1])["rate"] > 0


def test_breakdown_accounts_for_every_millisecond(tiny, data, run_script):
    flags = ("--model", tiny, "--data_dir", data, "--rows", 32, "--batch_size", 8)
    code, printed, said = run_script(breakdown, *flags)
    assert code == 0, said
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[0] == "|"][2:]
    for column in (1, 3):
        *parts, whole = (float(row[column]) for row in rows)
        assert sum(parts) == pytest.approx(whole, abs=0.05 * len(parts))
        products, adamw = parts[:2]
        assert products > 0 and adamw > 0 and min(parts) >= 0
    code, _, said = run_script(breakdown, "--data_dir", data / "nothing")
    assert code == 2 and "no such folder" in said


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_run_gives_each_benchmark_flags_that_it_has(name):
    args = run.parse(["--quick", "--data_dir", "data/sample"])
    _, file, *words = run.command(name, args)
    benchmark = importlib.import_module(f"benchmarks.{Path(file).stem}").BENCHMARK
    assert harness.parse(benchmark, words).quick


def test_run_keeps_records_and_rewrites_the_readme_between_its_markers(
    encoded, tmp_path, monkeypatch, run_script
):
    def ran(command, **_):  # one fails, the other has been run above
        failed = subprocess.CompletedProcess(command, 2, "", "")
        return encoded if command[1].endswith("encode.py") else failed

    readme = tmp_path / "README.md"
    before, after = b"\xef\xbb\xbf# A\r\n\xff\n", b"\nend \r\n\n"
    begin, end = run.BEGIN.encode(), run.END.encode()
    readme.write_bytes(before + begin + b"old" + end + after)
    flags = ("--only", "train", "--only", "encode")
    with monkeypatch.context() as patch:
        patch.setattr(run, "call", ran)
        code, _, said = run_script(
            run, *flags, "--results", tmp_path / "results", "--readme", readme
        )
    assert code == 1 and said.strip() == "run.py: failed: train"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["encode.json"]
    record = json.loads((tmp_path / "results/encode.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "versions", "hardware", "started", "claims"} <= set(record)
    content = readme.read_bytes()
    assert content.startswith(before + begin) and content.endswith(end + after)
    text = content[len(before + begin) : -len(end + after)].decode()
    assert "encode, fp32, to SentenceTransformer" in text and "no measurement" in text
    run.rewrite(readme, text.strip())
    assert readme.read_bytes() == content


@pytest.mark.parametrize("text", ["", run.BEGIN, run.END + run.BEGIN, 2 * (run.BEGIN + run.END)])
def test_a_readme_without_the_markers_is_left_alone(text, tmp_path, data, run_script):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    flags = ("--readme", readme, "--results", tmp_path)
    code, _, said = run_script(run, *flags)
    assert code == 2 and said.count("\n") == 1
    assert readme.read_text() == text


def test_the_projects_readme_has_the_markers():
    run.around(harness.ROOT / "README.md")


@pytest.mark.parametrize("words", [["--rows", "0"], ["--turns", "x"], ["--only", "["], ["--no"]])
def test_a_bad_flag_is_refused_in_a_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        harness.main(train.BENCHMARK, words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_results_that_are_not_equal_fail_loudly(tmp_path, small):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8))
    encode.check({encode.PEER: vectors, encode.OURS: 3 * vectors})  # lengths do not matter
    nearly = vectors * (1 + 1e-4 * rng.normal(size=vectors.shape))
    encode.check({encode.PEER: vectors, "ours, auto": nearly})
    with pytest.raises(Wrong, match=r"differs .* by"):
        encode.check({encode.PEER: vectors, encode.OURS: nearly})
    with pytest.raises(Wrong, match="cosine"):
        encode.check({encode.PEER: vectors, "ours, auto": vectors[::-1]})
    with pytest.raises(Wrong):
        encode.check({encode.PEER: vectors, encode.OURS: np.full_like(vectors, np.nan)})
    with pytest.raises(Wrong):
        evaluate.check({evaluate.PEER: vectors, evaluate.OURS: vectors + 2e-4})
    with pytest.raises(Wrong):
        tokenization.check({"ours": np.arange(3), "transformers": np.arange(4)})
    benchmark, args = small("encode")
    args.names = [encode.PEER, encode.OURS]
    np.save(harness.kept_file(tmp_path, encode.PEER), vectors)
    np.save(harness.kept_file(tmp_path, encode.OURS), nearly)
    with pytest.raises(UserError, match="WRONG") as failure:
        harness.check(benchmark, args)
    assert failure.value.exit_code == 1


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_useful_flops_are_those_that_pytorch_counts_without_padding(pooling, monkeypatch):
    monkeypatch.setattr(BertSelfAttention, "attend", staticmethod(written_attention))
    config = BertConfig(50, 24, 3, 4, 40)
    bert = BertModel(config)
    ids = torch.ones(2, 7, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bert(ids, torch.ones_like(ids), first=1 if pooling == "pooler" else None)
    counted = counter.get_total_flops()
    if pooling == "mean":  # our forward computes the pooler all the same
        counted -= 2 * 2 * config.hidden_size**2
    useful = harness.useful_flops(config, [7, 7], training=False, pooling=pooling)
    assert useful == counted
    assert harness.useful_flops(config, [7, 7], pooling=pooling) == 3 * useful


def test_the_matrix_rate_is_a_positive_number():
    config = BertConfig(50, 24, 3, 4, 40)
    assert harness.matrix_rate(config, 5, "bfloat16", "cpu", seconds=0.01) > 0


def test_ratios_are_taken_turn_by_turn():
    found = {
        "a": [{"rate": 4.0}, {"rate": 9.0}, {"rate": 8.0}],
        "b": [{"rate": 2.0}, {"rate": 3.0}, {"rate": 1.0}],
    }
    judged = harness.judge(Claim("x", "a", "b", target=">= 3"), found)
    assert judged["value"] == [3.0, 2.0, 8.0] and judged["met"] is True
    assert harness.judge(Claim("x", "a", None, target="< 8"), found)["met"] is False


def test_what_is_missing_here_is_skipped_and_what_breaks_is_told(capsys, tmp_path):
    def broken(args):
        raise ArithmeticError("it broke")

    def missing(args):
        raise Missing("needs more")

    benchmark = Benchmark(
        "x.py", "Doc.", "things", {"missing": missing, "broken": broken}, [], {"device": "cpu"}
    )
    for words, code, said in [
        (["missing"], harness.SKIPPED, "needs more"),
        (["broken"], 1, "ArithmeticError: it broke"),
        (["broken", "--device", "cuda"], harness.SKIPPED, "there is no GPU here"),
    ]:
        if "cuda" in words and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as ended:
            harness.main(benchmark, ["--scratch", str(tmp_path), "--worker", *words])
        assert ended.value.code == code
        assert capsys.readouterr().err.splitlines()[-1] == said
