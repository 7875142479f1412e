"""A model and data small enough to train in a test, ways to run a script, and to read a run."""

import csv
import json
import os
import random
import signal
import string
import sys
from collections.abc import Iterator
from pathlib import Path

# A GPU is for tests/test_gpu.py; all other tests compute on the CPU, whatever the machine has.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from forker import Forker
from hypothesis import settings

from bert import BertConfig, BertModel
from datasets import TaskDataset
from engine.checkpoint import read_json, read_state, write_json
from engine.cli import run_script as run_as_script
from model import MultitaskBERT
from tasks import find_tasks
from tokenizer import BertTokenizer

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
# A process that a shell starts in the background ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Several test processes run side by side: each, and whatever it starts, takes one core.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

GOOD = ["great", "lovely", "fine", "superb"]
BAD = ["dull", "awful", "poor", "weak"]
NOUNS = ["film", "plot", "scene", "actor", "story", "song", "cat", "dog", "car", "house"]
VERBS = ["sees", "likes", "finds", "takes", "moves"]
PAIR = ["sentence1", "sentence2"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model folder: BERT with 2 layers of width 32, and a vocabulary of letters and words."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = list(string.ascii_lowercase + string.digits + ".,?!'-")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters]
    tokens += [*GOOD, *BAD, *NOUNS, *VERBS, "the", "a", "is", "not"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 48}
    config = BertConfig(vocab_size=len(tokens), initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def sentence(rng: random.Random) -> str:
    """A short sentence of the tiny vocabulary."""
    return f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)}"


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """A file in the course's format: tabs, an index column without a name."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["", *header])
        writer.writerows([i, *row] for i, row in enumerate(rows))


def write_data(folder: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """The course's twelve files of `sizes[split]` rows each; STS has half as many for training."""
    rng = random.Random(seed)

    def sentiment(classes: int) -> list:
        label = rng.randrange(classes)
        word = rng.choice(GOOD if label >= classes / 2 else BAD)
        return [f"the {rng.choice(NOUNS)} is {word} {'!' * label}".strip(), label]

    def pair(low: float, high: float) -> list:
        a, same = sentence(rng), rng.random() < 0.5
        return [a, f"{a} !", high] if same else [a, sentence(rng), low]

    kinds = {
        "ids-sst": (["sentence", "sentiment"], sentiment, [5]),
        "ids-cfimdb": (["sentence", "sentiment"], sentiment, [2]),
        "quora": ([*PAIR, "is_duplicate"], pair, [0.0, 1.0]),
        "sts": ([*PAIR, "similarity"], pair, [2.6, 4.6]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        name = "test-student" if split == "test" else split
        for kind, (header, row, given) in kinds.items():
            file = f"{kind}-{name}.csv"
            count = size // 2 if file == "sts-train.csv" else size
            rows = [[f"{file}-{i}", *row(*given)] for i in range(count)]
            if split == "test":
                header, rows = header[:-1], [r[:-1] for r in rows]
            write_csv(folder / file, ["id", *header], rows)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder in the course's format: 40 training rows a task (STS 20), 16 dev, 8 test."""
    return write_data(tmp_path_factory.mktemp("data"), {"train": 40, "dev": 16, "test": 8})


def quick_run(model: Path, data: Path, run_dir: Path, *more: object) -> list[str]:
    """Flags of a training run that takes about a second."""
    flags = ["--model", model, "--data_dir", data, "--run_dir", run_dir, "--epochs", 2]
    flags += ["--batch_size", 8, "--lr", "1e-3", "--precision", "fp32", *more]
    return [str(flag) for flag in flags]


def read_log(run_dir: Path, kind: str) -> list[dict]:
    """The lines of that kind in a run's log."""
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def run_contents(run_dir: Path) -> dict:
    """Everything that a run made with --keep_last leaves, except for times, memory and paths."""
    files = {str(p.relative_to(run_dir)): p for p in run_dir.rglob("*") if p.is_file()}
    changing = ("config.json", "resumed.jsonl", "best/README.md", "tensorboard/")
    contents = {n: p.read_bytes() for n, p in files.items() if not n.startswith(changing)}
    result = read_json(run_dir / "result.json")
    for name in ("training_seconds", "peak_memory_bytes", "predictions"):
        result.pop(name, None)
    tensors, facts = read_state(run_dir / "last/state.safetensors")
    del facts["seconds"]
    state = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, facts
    return {**contents, "result.json": result, "last/state.safetensors": state}


def load_multitask(
    tiny: Path, data: Path, split: str = "train", **options: object
) -> tuple[MultitaskBERT, list[TaskDataset]]:
    """A tiny model of the paper's three tasks in evaluation mode, and a dataset for each."""
    tasks = find_tasks(["sst", "para", "sts"])
    tokenizer = BertTokenizer.from_pretrained(tiny)
    torch.manual_seed(2)
    bert = BertModel.from_pretrained(tiny)
    model = MultitaskBERT(bert, tasks, tokenizer=tokenizer, **options).eval()
    return model, [TaskDataset(data / t.file(split), t, tokenizer) for t in tasks]


@pytest.fixture
def run_script(capsys, monkeypatch):
    """`run_script(module, *flags)` runs its main as a shell would: exit code, stdout, stderr."""

    def run(module, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended:
            run_as_script(lambda _: module.main([str(flag) for flag in flags]))
        signal.signal(signal.SIGINT, handler)  # an interrupted script ignores it from then on
        code = ended.value.code
        return (code if isinstance(code, int) else 1, *capsys.readouterr())

    return run


@pytest.fixture
def command(run_script):
    """Runs `python -m experiments`, which must succeed or fail with `error`; what it prints."""

    from experiments import __main__ as experiments

    def run(*flags, error="", code=2):
        ended, out, err = run_script(experiments, *flags)
        assert ended == (code if error else 0) and error in err, err
        return out + err

    return run


@pytest.fixture
def ask(run_script):
    """`ask(*flags)`: what evaluation.py prints on standard output and on standard error."""

    import evaluation

    def run(*flags):
        code, *printed = run_script(evaluation, *flags)
        assert code == 0, printed
        return printed

    return run


@pytest.fixture
def refused(run_script):
    """`refused(flags, *expected)`: evaluation.py must refuse in a line that has `expected`."""

    import evaluation

    def run(flags, *expected):
        code, out, err = run_script(evaluation, *flags)
        assert (code, out, err.count("error: ")) == (2, "", 1), err
        line = err.splitlines()[-1]
        assert line.startswith("evaluation.py: error: ")
        assert all(str(part) in line for part in expected), line

    return run


@pytest.fixture
def train(run_script, tiny, data):
    """`train(script, run_dir, *more)` is a quick run that must succeed; its standard output."""

    def run(script, run_dir: Path, *more: object) -> str:
        code, out, err = run_script(script, *quick_run(tiny, data, run_dir, *more))
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="session")
def forker(tmp_path_factory) -> Iterator[Forker]:
    """Starts scripts in processes of their own; only rank 0 may write below /pytest-."""
    forker = Forker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.process.stdin.close()
    forker.process.wait()
