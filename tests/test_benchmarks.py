"""The benchmarks at tiny sizes: they run, check what they promise, and write it down."""

import math
from argparse import Namespace
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import GOOD, NOUNS
from model_files import refused
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import encode, harness, run, tokenization
from benchmarks.harness import Claim, Work
from bert import BertConfig, BertModel, BertSelfAttention, eager_attention
from engine.checkpoint import read_json
from engine.errors import UserError

# Peers that make the project's files unimportable or are only a command: run in their own process.
APART = ("Trainer", "sentence-transformers", "first step, transformers")
SMALL = BertConfig(50, 24, 3, 4, 40)


def flags(name, tiny, folder) -> list[str]:
    """The command line of a benchmark with everything as small as can be."""
    if "data_dir" in run.load(name).SETTINGS:
        name = f"{name} --data_dir {folder} --model {tiny} --rows 16"
    return [*name.split(), "--quick"]


@pytest.mark.parametrize("name", run.NAMES)
def test_every_contestant_is_measured_and_every_claim_judged(
    name, tiny, data, monkeypatch, tmp_path
):
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    nli = ["sent0,sent1,hard_neg"]
    nli += [f"a {noun} is {word},{noun} {word},the {noun}" for noun in NOUNS for word in GOOD]
    (tmp_path / "nli_for_simcse.csv").write_text("\n".join(nli), encoding="utf-8")
    monkeypatch.setattr(harness, "SIZES", dict.fromkeys(harness.SIZES, (1, 64)))
    # The yardstick is a batch: 16 rows of more than two tokens.
    rate = lambda config, tokens, *_: 1e9 if tokens > 32 else math.nan  # noqa: E731
    monkeypatch.setattr(harness, "matrix_rate", rate)
    benchmark, args = run.load(name), run.parse_args(flags(name, tiny, tmp_path))
    args = Namespace(**{"device": "cpu", **run.settings(benchmark, args)}, scratch=tmp_path)
    runs, outputs = {}, {}
    for contestant, make in benchmark.CONTESTANTS.items():
        if not any(word in contestant for word in APART):
            work = make(args)
            work.warm_up &= name != "startup"
            figures, outputs[contestant] = harness.measure(work, args)
            assert all(math.isfinite(value) for value in figures.values()), (contestant, figures)
            assert min(figures["rate"], figures["seconds"], figures["memory"]) > 0
            runs[contestant] = [figures]
    if hasattr(benchmark, "check"):
        benchmark.check({name: array for name, array in outputs.items() if array is not None})
    for claim in benchmark.CLAIMS:
        names = {claim.ours, claim.peer or claim.ours}
        assert names <= set(benchmark.CONTESTANTS)
        assert not names <= set(runs) or harness.judge(claim, runs)["value"][0] >= 0
    assert f"python benchmarks/run.py {name}" in benchmark.__doc__


def test_a_benchmark_from_the_command_line_to_its_record(tiny, data, tmp_path, run_script):
    words = [*flags("train", tiny, data), "--only", "SST, Trainer", "pairs", "--results", tmp_path]
    code, printed, said = run_script(run, *words)
    assert code == 0, said
    record = read_json(tmp_path / "train.json")
    assert record["quick"] and "--data_dir DATA" in record["command"]
    assert record["device"] == "cpu" and record["settings"]["rows"] == 16
    assert {"commit", "versions", "hardware", "started", "units", "checked"} <= set(record)
    assert len(record["contestants"]) == 3 and not record["skipped"]
    [claim] = record["claims"]
    assert claim["value"][0] == pytest.approx(claim["our_figure"] / claim["peer_figure"])
    assert claim["what"] in printed and "turn 1 of 1, SST, Trainer, auto: rate" in said
    section = run.report(tmp_path)
    assert run.load("train").__doc__.strip() in section and harness.claim_table(record) in section
    assert record["command"] in section and "no measurement" in section


def test_the_page_in_docs_is_what_the_records_say():
    page = run.DOCS.read_text(encoding="utf-8")
    assert page.split(run.BEGIN)[1].split(run.END)[0].strip() == run.report(run.RESULTS)


def test_rewriting_changes_nothing_outside_of_the_markers(tmp_path):
    page = tmp_path / "page.md"
    before, after = f"# A\r\n\u2028{run.BEGIN}", f"{run.END}\nend \r\n\n"
    page.write_bytes(f"{before}old{after}".encode())
    run.rewrite(page, "new")
    assert page.read_bytes() == f"{before}\n\nnew\n\n{after}".encode()
    for text in ("", run.BEGIN, run.END + run.BEGIN, 2 * (run.BEGIN + run.END)):
        page.write_text(text, encoding="utf-8")
        refused(lambda: run.rewrite(page, "new"), "page.md: needs")
        assert page.read_text(encoding="utf-8") == text


def test_what_is_missing_is_skipped_and_a_failed_benchmark_stops_no_other(
    monkeypatch, tmp_path, run_script
):
    errors = {"benchmarks.broken": RuntimeError("it broke"), "ours": BrokenProcessPool("Killed")}
    broken, load = ModuleType("benchmarks.broken"), run.load
    broken.SETTINGS, broken.CONTESTANTS, broken.CLAIMS, broken.UNIT = {}, {"a": None}, [], "steps"

    def start_worker(name, contestant, args):
        raise errors.get(name) or errors.get(contestant) or ImportError("No module named 'x'")

    monkeypatch.setattr(run, "load", lambda name: broken if name == "train" else load(name))
    monkeypatch.setattr(harness, "start_worker", start_worker)
    words = ("train", "tokenization", "--quick", "--results", tmp_path)
    code, printed, said = run_script(run, *words)
    assert code == 1 and "a: run.py: error: Traceback" in said and "it broke" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tokenization.json"]
    assert "| ours | skipped: Killed |" in printed
    assert "| transformers | skipped: No module named 'x' |" in printed


BAD = {"--rows 0": "--rows", "training": "no such benchmark"}
BAD |= {"optimizer --rows 9": "no effect", "--data_dir nowhere": "no such folder"}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_command_line_is_refused_in_a_line(words, run_script):
    code, _, said = run_script(run, *words.split())
    assert code == 2 and BAD[words] in said and said.count("\n") == 1


def test_unequal_results_are_refused():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8))
    nearly = vectors * (1 + 1e-4 * rng.normal(size=vectors.shape))
    encode.check({encode.ST: vectors, encode.FP32: 3 * vectors})  # norms do not matter
    encode.check({encode.ST: vectors, encode.AUTO: nearly})
    wrong = [(encode.FP32, nearly), (encode.AUTO, vectors[::-1]), (encode.FP32, vectors * np.nan)]
    for name, other in wrong:
        with pytest.raises(UserError):
            encode.check({encode.ST: vectors, name: other})
    with pytest.raises(UserError):
        tokenization.check({"ours": np.arange(3), "transformers": np.arange(4)})


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_useful_flops_are_those_that_pytorch_counts(pooling, monkeypatch):
    attention = lambda self, q, k, v, mask: eager_attention(q, k, v, mask, self.dropout)  # noqa: E731
    monkeypatch.setattr(BertSelfAttention, "attention", attention)
    bert, mask = BertModel(SMALL).eval(), torch.zeros(2, 1, 1, 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = bert.embed(torch.ones(2, 7, dtype=torch.int64))
        *layers, last = bert.bert_layers
        for layer in layers:
            x = layer(x, mask)
        if pooling == "mean":
            last(x, mask)
        else:  # of the last layer no more than the pooler needs
            heads, first = last.self_attention, x[:, :1]
            q, k, v = heads.query(first), heads.key(x), heads.value(x)
            context = heads.attention(*map(heads.split_heads, (q, k, v)), mask)
            first = last.attention_dense(context.transpose(1, 2).flatten(2))
            bert.pooler_dense(last.out_dense(last.interm_dense(first))[:, 0])
    useful = harness.useful_flops(SMALL, [7, 7], training=False, pooling=pooling)
    assert useful == counter.get_total_flops()
    assert harness.useful_flops(SMALL, [7, 7], pooling=pooling) == 3 * useful
    assert harness.matrix_rate(SMALL, 5, torch.bfloat16, "cpu") > 0


def test_ratios_are_taken_turn_by_turn():
    rates = {"a": [4.0, 9.0, 8.0], "b": [2.0, 3.0, 1.0]}
    runs = {name: [{"rate": rate} for rate in turns] for name, turns in rates.items()}
    judged = harness.judge(Claim("x", "a", "b", target=">= 3"), runs)
    assert judged["value"] == [3.0, 2.0, 8.0] and judged["met"] is True
    assert harness.judge(Claim("x", "a", target="< 8"), runs)["met"] is False


def test_the_median_of_the_passes_counts_and_the_warm_up_does_not(monkeypatch):
    clock, calls = iter([0, 1, 1, 4, 4, 6]), []  # passes of 1, 3 and 2 seconds
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    work = Work(lambda: calls.append(1), 10)
    figures, _ = harness.measure(work, Namespace(passes=3, device="cpu"))
    assert len(calls) == 4 and figures["rate"] == 5 and figures["seconds"] == 0.2
