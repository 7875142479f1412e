"""`python -m experiments transfer`: scores against independent ones, records, and refusals."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import PAIR, load_multitask, quick_run, sentence, write_csv, write_data
from matplotlib import image
from model_files import edit_json
from scipy import stats
from scipy.spatial.distance import cosine
from sklearn.metrics import average_precision_score

import classifier
import experiments.__main__
import multitask_classifier
import simcse
from bert import BertModel
from datasets import TokenizedDataset, read_examples
from engine.checkpoint import read_json, read_text, write_text
from engine.metrics import linear_cka
from experiments import transfer
from experiments.transfer_measures import (
    FILES,
    features,
    layer_means,
    logistic_accuracy,
    polarity,
)
from experiments.transfer_report import paired_difference
from model import MultitaskBERT, SentenceEncoder
from tasks import TASKS
from tokenizer import BertTokenizer

METHODS = {"probe": "pretrain", "finetune": "finetune", "lpft": "lpft"}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A data folder with an ood/ of 40 rows a file, every second one a paraphrase."""
    folder = write_data(tmp_path_factory.mktemp("full"), {"train": 60, "dev": 24})
    rng = random.Random(5)
    (folder / "ood").mkdir()
    for path in [folder / file for file in FILES if file.startswith("ood/")]:
        binary, rows = path.stem in ("mrpc", "paws"), []
        for same in [0, 1] * 20:
            first = sentence(rng)
            second = f"{first} ?" if same else sentence(rng)
            label = same if binary else 1 + 3 * same + rng.random()
            rows.append([f"{path.stem}-{len(rows)}", first, second, label])
        # And a pair that runs are trained on, the other way round and in capitals.
        seen = read_examples(folder / "sts-train.csv", TASKS["sts"])[0][0].texts
        rows.append(["seen", *(text.upper() for text in reversed(seen)), 1])
        write_csv(path, ["id", *PAIR, "is_duplicate" if binary else "similarity"], rows)
    return folder


def unseen(folder: Path, file: str, task: str) -> list:
    """The rows of a file whose pairs are in no training file, whatever order, case and marks."""

    def key(row):
        return {text.lower().strip("?! ") for text in row.texts}

    files = {"para": "quora-train.csv", "sts": "sts-train.csv"}
    trained = [key(r) for t, f in files.items() for r in read_examples(folder / f, TASKS[t])[0]]
    rows, _, _ = read_examples(folder / file, TASKS[task])
    return [row for row in rows if task == "cfimdb" or key(row) not in trained]


@pytest.fixture(scope="module")
def runs(tiny, full, tmp_path_factory) -> Path:
    """Two seeds of each method, a SimCSE run, and a joint encoder that begins with it."""
    folder, triples = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("nli") / "nli.csv"
    triples.write_text("sent0,sent1,hard_neg\n" + "a film,a plot,a cat\n" * 8)
    simcse.main(quick_run(tiny, full, folder / "simcse-seed1", "--nli", triples))
    for method, option in METHODS.items():
        for seed in (1, 2):
            run, flags = folder / f"{method}-seed{seed}", ["--option", option, "--seed", seed]
            multitask_classifier.main(quick_run(tiny, full, run, *flags, "--no_test"))
    flags = ["--option", "finetune", "--pair_encoding", "joint", "--no_test"]
    start, run = folder / "simcse-seed1/best", folder / "joint-seed1"
    multitask_classifier.main(quick_run(start, full, run, *flags))
    return folder


@pytest.fixture(scope="module")
def measured(runs, full, tmp_path_factory) -> Path:
    """What `transfer` writes for these runs."""
    out = tmp_path_factory.mktemp("out")
    flags = ["transfer", *runs.iterdir(), "--data_dir", full, "--out", out]
    experiments.__main__.main([str(flag) for flag in flags])
    return out


@pytest.fixture
def records(measured) -> dict[str, dict]:
    """The records by name."""
    return {path.stem: read_json(path) for path in (measured / "records").iterdir()}


@pytest.fixture
def command(run_script, full):
    """Runs `transfer`, which must succeed or fail with `error` in one line; what it prints."""

    def run(*flags, data=full, error=""):
        code, out, err = run_script(experiments.__main__, "transfer", *flags, "--data_dir", data)
        assert code == (2 if error else 0) and error in err, err
        assert not error or (out, err.count("\n")) == ("", 1), err
        return out

    return run


def test_cka_is_that_of_centred_gram_matrices():
    """tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)), the definition of Kornblith et al."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 7)) + 3, rng.normal(size=(30, 5)) - 1
    y[:, :4] += x[:, :4]
    first, second = (v @ v.T @ (np.eye(30) - 1 / 30) for v in (x, y))
    scale = np.trace(first @ first) * np.trace(second @ second)
    expected = np.trace(first @ second) / np.sqrt(scale)
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    assert linear_cka(torch.tensor(x), torch.tensor(2 * x @ rotation + 1)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_each_layer_are_those_of_transformers(tiny, data, dtype):
    """Their means over the tokens of each sentence, whatever it is batched with."""
    model, _ = load_multitask(tiny, data)
    model.dtype = dtype
    texts = ["the film is fine", "a dull plot", "the cat sees a dog and not the house , or is it ?"]
    dataset = TokenizedDataset("", Path("texts"), [texts], model.tokenizer)
    found = layer_means(model, dataset, 3)
    oracle = transformers.BertModel.from_pretrained(tiny).eval()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for row, ids in enumerate(dataset.token_ids[0]):
        with torch.no_grad():
            states = oracle(torch.tensor(ids)[None].long(), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0].mean(dim=0) for state in states])
        torch.testing.assert_close(found[row], expected, atol=tolerance, rtol=tolerance)


def test_polarity_and_features_by_hand():
    probabilities = [
        [0.4, 0.1, 0.2, 0.2, 0.1],  # 0: negative
        [0.3, 0.25, 0.05, 0.05, 0.35],  # 4: positive, though both negative classes have 0.55
        [0.24, 0.01, 0.45, 0.15, 0.15],  # 2: the positive side
        [0.25, 0.1, 0.4, 0.15, 0.1],  # 2: the negative side
    ]
    assert polarity(torch.tensor(probabilities).log()).tolist() == [0, 1, 1, 0]
    u, v = torch.tensor([[1.0, -2]]), torch.tensor([[3.0, 5]])
    assert features(torch.stack([u, v], dim=1)).tolist() == [[2, 7, 3, -10]]
    assert features(u[:, None]).tolist() == [[1, -2]]


def test_logistic_regression_finds_a_boundary_whatever_the_scale_of_the_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    y = (x @ rng.normal(size=6) > 0).astype(int)
    for scale in (1e-6, 1e6):
        first, second = scale * x[:300], scale * x[300:]
        assert logistic_accuracy(first, y[:300], second, y[300:]) > 0.95
        noise = rng.permutation(y)
        assert logistic_accuracy(first, noise[:300], second, noise[300:]) < 0.65


@pytest.mark.parametrize("name", ["finetune-seed1", "joint-seed1"])
def test_scores_of_heads_by_hand(runs, full, records, name):
    """Predicted by the course's interface: of pairs that are encoded separately, and jointly."""
    model, scores = MultitaskBERT.from_pretrained(runs / name), records[name]["scores"]
    for title, task in (("SST", "sst"), ("Quora", "para"), ("STS", "sts")):
        metric, value = next(iter(read_json(runs / name / "result.json")["dev"][task].items()))
        assert scores[f"head/{title}/{metric}"] == pytest.approx(value)

    def predict(function, task, *files):
        rows = [row for file in files for row in unseen(full, file, task)]
        columns = (list(column) for column in zip(*(row.texts for row in rows), strict=True))
        batches = [model.tokenizer(c, padding=True, return_tensors="pt") for c in columns]
        tensors = [batch[key] for batch in batches for key in ("input_ids", "attention_mask")]
        with torch.no_grad():
            return function(*tensors), np.array([row.label for row in rows])

    logits, gold = predict(model.predict_paraphrase, "para", "ood/mrpc.csv")
    precision = average_precision_score(gold, logits[:, 0])
    assert scores["head/MRPC/average precision"] == pytest.approx(precision)
    assert scores["head/MRPC/accuracy"] == np.mean((logits[:, 0].numpy() > 0) == gold)
    logits, gold = predict(model.predict_similarity, "sts", "ood/sick-r.csv")
    r = stats.pearsonr(logits[:, 0], gold).statistic
    assert scores["head/SICK-R/pearson"] == pytest.approx(r)
    files = (f"ids-cfimdb-{split}.csv" for split in ("train", "dev"))
    logits, gold = predict(model.predict_sentiment, "cfimdb", *files)
    assert scores["head/CFIMDB/accuracy"] == np.mean(polarity(logits).numpy() == gold)


def test_scores_without_heads_by_hand(runs, full, tiny, records, measured):
    untouched = {"untouched-pooler", "untouched-mean"}
    assert set(records) == untouched | {path.name for path in runs.iterdir()}
    for name in (*untouched, "simcse-seed1"):
        how = {key.split("/")[0] for key in records[name]["scores"]}
        assert how == {"cosine", "logistic", "geometry"}
    tokenizer, record = BertTokenizer.from_pretrained(tiny), records["untouched-mean"]
    encoder = SentenceEncoder(BertModel.from_pretrained(tiny), tokenizer, "mean").eval()
    rows = unseen(full, "ood/sick-r.csv", "sts")
    assert record["rows"]["SICK-R"] == {"rows": len(rows), "left out": 41 - len(rows)}
    assert 20 < len(rows) < 41 and "seen" not in {row.id for row in rows}
    u, v = (encoder.encode(texts) for texts in zip(*(row.texts for row in rows), strict=True))
    cosines = [1 - cosine(a, b) for a, b in zip(u, v, strict=True)]
    rho = stats.spearmanr(cosines, [row.label for row in rows]).statistic
    assert record["scores"]["cosine/SICK-R/spearman"] == pytest.approx(rho, abs=1e-3)
    # A probe's encoder has not moved; the joint one has moved from where SimCSE began.
    assert records["probe-seed1"]["cka"] == pytest.approx([1, 1, 1])
    assert records["joint-seed1"]["cka"][-1] < records["simcse-seed1"]["cka"][-1] < 1
    recorded = "".join(read_text(path) for path in measured.glob("records/*"))
    assert not any(text in recorded for row in rows for text in row.texts)


def test_the_report_has_means_over_seeds_and_kumars_differences(records, measured):
    text, summary = read_text(measured / "transfer.md"), read_json(measured / "transfer.json")
    assert list(summary["methods"])[:2] == ["untouched-mean", "untouched-pooler"]
    scores = {m: [records[f"{m}-seed{seed}"]["scores"] for seed in (1, 2)] for m in METHODS}
    key = "cosine/PAWS/average precision"
    values = [run[key] for run in scores["finetune"]]
    mean, sd = np.mean(values), np.std(values, ddof=1)
    found = summary["methods"]["finetune"]["scores"][key]
    assert found == pytest.approx({"mean": mean, "sd": sd})
    assert f" {mean:.3f} ± {sd:.3f} |" in text
    similar = [name for name in summary["rows"] if name.startswith(("SICK", "STS1"))]
    families = [["CFIMDB/accuracy"], [f"{name}/pearson" for name in similar]]
    families += [["MRPC/average precision", "PAWS/average precision"]]

    def mean(run):
        return np.mean([np.mean([run[f"head/{key}"] for key in keys]) for keys in families])

    means = {method: [mean(run) for run in scores[method]] for method in METHODS}
    for first, second in (("probe", "finetune"), ("lpft", "probe"), ("lpft", "finetune")):
        test = stats.ttest_rel(means[first], means[second])
        row = next(r for r in summary["kumar"]["rows"] if r["pair"] == f"{first} - {second}")
        assert (row["score"], row["seeds"]) == ("head/out of domain/mean", 2)
        assert row["interval"] == pytest.approx(list(test.confidence_interval()))
        assert row["difference"] == pytest.approx(np.mean(row["interval"]))
    assert all(image.imread(measured / f"{name}.png").std() > 0.01 for name in ("transfer", "cka"))


def test_records_alone_are_enough_for_a_report(measured, command, tmp_path):
    out = shutil.copytree(measured, tmp_path / "out")
    made = read_text(out / "transfer.md")
    (out / "transfer.md").unlink()
    assert made in command("--out", out) and read_text(out / "transfer.md") == made
    for path in (out / "records").iterdir():
        edit_json(path, limit=100)
    text = command("--out", out, "--finetune", "finetune,lpft")
    assert "(--limit 100)." in text
    assert "| probe - lpft | out of domain, mean | 2 |" in text
    command("--out", out, "--limit", 100, error="--limit has no effect without run folders")
    command("--out", tmp_path / "new", error=f"{tmp_path}/new: no records; name the run folders")


def test_the_command_in_a_record_names_no_folder_of_the_machine():
    names = {"/c/a-seed1/best": "runs/a-seed1/best", "'/c d/a-seed1/best'": "runs/a-seed1/best"}
    names |= {"/c/bert": "bert", "runs/a/best": "runs/a/best", "org/bert": "org/bert"}
    for path, name in names.items():
        flags = f"--model {path} --data_dir '/d e' --run_dir=/f/x --resume"
        expected = f"python simcse.py --model {name} --data_dir DATA --run_dir runs/x-seed1"
        assert transfer.portable_command(f"python3 /a/simcse.py {flags}", "x-seed1") == expected


def test_differences_are_paired_by_seed():
    found = paired_difference({1: 0.5, 2: 0.75, 7: 9.0}, {2: 0.5, 1: 0.5, 8: 9.0})
    assert (found["difference"], found["seeds"]) == (0.125, 2)
    expected = {"difference": 0.25, "interval": [None, None], "seeds": 1}
    assert paired_difference({1: 0.5}, {1: 0.25}) == expected
    assert paired_difference({1: 0.5}, {2: 0.25})["difference"] is None


def test_records_are_kept_and_those_of_anything_else_refused(
    runs, full, measured, command, tmp_path, monkeypatch
):
    out, name = tmp_path / "out", "finetune-seed1"
    for kept in ("untouched-pooler", "untouched-mean", "simcse-seed1"):
        write_text(out / f"records/{kept}.json", read_text(measured / f"records/{kept}.json"))
    monkeypatch.delattr(transfer.Job, "measure")  # nothing is measured, again or before a refusal
    text = command(runs / "simcse-seed1", "--out", out)
    assert "Not tested. There is no run of finetune, finetune-long, probe, lpft" in text
    out, run = ["--out", measured], runs / name
    path = measured / f"records/{name}.json"
    assert read_text(measured / "transfer.md") in command(run, *out)
    command(run, *out, "--limit", 100, error="made with another --limit; delete it, or name")
    data = shutil.copytree(full, tmp_path / "data")
    write_text(data / "ood/paws.csv", read_text(data / "ood/paws.csv") + "9\tnew\ta\tb\t1\n")
    command(run, *out, data=data, error="made from other data files; delete it, or name")
    spoiled = shutil.copytree(full, tmp_path / "spoiled")
    write_text(spoiled / "sts-train.csv", read_text(full / "sts-train.csv") + "\n")
    command(run, *out, data=spoiled, error="read another sts-train.csv than the one in --data_dir")
    other = shutil.copytree(run, tmp_path / name)
    shutil.copytree(runs / "finetune-seed2/best", other / "best", dirs_exist_ok=True)
    command(other, *out, error=f"{path}: made from other weights; delete it, or name another --out")
    probe = shutil.copytree(runs / "probe-seed1", tmp_path / "probe-seed1")
    edit_json(probe / "config.json", model_checksum="0")
    command(probe, *out, error="of a run that began with another model; delete it, or name")
    command(run, probe, *out, error="probe-seed1: began with another model than untouched-pooler")


def test_input_that_cannot_be_measured(runs, full, tiny, command, tmp_path):
    out, run = ["--out", tmp_path / "out"], runs / "finetune-seed1"
    command(run, *out, "--limit", 99, error="--limit: '99' is not a whole number at least 100")
    command(run, full, *out, error=f"{full}: not a run folder")
    data = shutil.copytree(full, tmp_path / "data")
    shutil.rmtree(data / "ood")
    command(run, *out, data=data, error=f"{data}/ood/mrpc.csv: no such file; expected the course's")
    copy = shutil.copytree(run, tmp_path / "finetune-seed1")
    command(run, copy, *out, error=f"{copy}: another run is called finetune-seed1")
    flags = ["--task", "cfimdb", "--option", "pretrain", "--no_test"]
    classifier.main(quick_run(tiny, full, tmp_path / "cfimdb", *flags))
    command(run, tmp_path / "cfimdb", *out, error=f"{tmp_path}/cfimdb: was trained on CFIMDB")
    edit_json(copy / "config.json", "arguments", model=str(tmp_path / "cfimdb/best"))
    command(copy, *out, error=f"{tmp_path}/cfimdb: was trained on CFIMDB")
    assert not (tmp_path / "out").exists()
