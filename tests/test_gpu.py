"""On a real GPU, where there is one: the scripts against the CPU, and to the same bits again.

All other tests hide the GPU. Here every run is a process of its own that sees it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import read_log, run_contents
from model_files import edit_json

from engine.checkpoint import read_json
from hub.models import resolve_model
from model import MultitaskBERT

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPUS_OF_TESTS"]}
MAIN = "multitask_classifier --option finetune"
JOBS = {
    "main": MAIN,
    "probe": "multitask_classifier --option pretrain --lr 1e-3",
    "pcgrad": MAIN + " --surgery pcgrad",
    "joint": MAIN + " --pair_encoding joint --measure_conflict 5",
    "simcse": "simcse --accumulate 2",
    "mlm": "mlm --tasks sst,sts",
}


def python(*words: object, **options) -> subprocess.CompletedProcess:
    """Run Python in the project's folder, with the GPU."""
    command = [sys.executable, *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run(command, cwd=ROOT, env=ENV, **options)


def flags(job: str, run: Path, *more: object) -> list[str]:
    """The command line of a short run on the sample data."""
    script, *words = job.split()
    data = ["--data_dir", "data/sample", "--limit", 24, "--batch_size", 8]
    words += ["--model", "all-MiniLM-L6-v2", "--run_dir", run, *data, "--epochs", 1]
    words += ["--save_every", 3, "--keep_last", *more]
    return [f"{script}.py", *map(str, words)]


def train(job: str, run: Path, *more: object) -> Path:
    """A run that must succeed."""
    done = python(*flags(job, run, *more))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    """Skip these tests on a machine without a GPU."""
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if torch.version.cuda is None or python("-c", probe).returncode:
        pytest.skip("no GPU")


@pytest.fixture(scope="module")
def main_run(tmp_path_factory) -> Path:
    """The main job in the default precision, with dropout."""
    return train(MAIN, tmp_path_factory.mktemp("main") / "run", "--use_gpu")


@pytest.mark.parametrize("job", JOBS)
def test_the_gpu_computes_what_the_cpu_computes(job, tmp_path):
    """In fp32 and without dropout, whose masks differ: losses, norms, conflict and dev metrics."""
    model = shutil.copytree(resolve_model("all-MiniLM-L6-v2"), tmp_path / "model")
    edit_json(model / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    more = ("--model", model, "--precision", "fp32", "--device")
    runs = [train(JOBS[job], tmp_path / device, *more, device) for device in ("cuda", "cpu")]
    for one, other in zip(*(read_log(run, "train") for run in runs), strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=0.01)
    for one, other in zip(*(read_log(run, "conflict") for run in runs), strict=True):
        for pair, figures in other["parts"]["overall"].items():
            cosine = one["parts"]["overall"][pair]["cosine"]
            assert cosine == pytest.approx(figures["cosine"], abs=0.01)
    scores = [[entry["score"] for entry in read_log(run, "dev")] for run in runs]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    assert read_json(runs[0] / "config.json")["hardware"]["gpu"]


def test_the_same_command_gives_the_same_bits(main_run, tmp_path):
    assert run_contents(train(MAIN, tmp_path / "run", "--use_gpu")) == run_contents(main_run)


def test_a_killed_run_resumes_to_the_same_bits(main_run, tmp_path):
    words, log = flags(MAIN, tmp_path / "run", "--use_gpu", "--resume"), tmp_path / "run/log.jsonl"
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=ENV)
    while not (log.exists() and log.read_bytes().count(b"\n") > 4):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(MAIN, tmp_path / "run", "--use_gpu", "--resume")
    assert run_contents(tmp_path / "run") == run_contents(main_run)


def test_what_is_saved_works_everywhere(main_run, tmp_path):
    """Evaluated again on the GPU to the same bits, and exported to ONNX for the CPU."""
    done = python("evaluation.py", main_run)
    assert "the same metrics, bit for bit" in done.stdout + done.stderr
    path = tmp_path / "model.onnx"
    done = python("evaluation.py", main_run, "--export", "onnx", "--out", path)
    assert done.returncode == 0, done.stderr
    model, texts = MultitaskBERT.from_pretrained(main_run), ["A fine film.", "Dull."]
    batch = model.tokenizer(texts, padding=True)
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"]).tolist()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    outputs = session.run(None, {name: np.array(batch[name], dtype=np.int64) for name in names})
    expected = model.encode(texts)
    assert any(o.shape == expected.shape and np.allclose(o, expected, atol=1e-4) for o in outputs)


STRICT = """
import sys, torch
sys.argv, script = sys.argv[1:], __import__(sys.argv[1].removesuffix(".py"))
from engine.trainer import Trainer
step = Trainer.train_step
def strict(*args):
    torch.cuda.set_sync_debug_mode("error")
    step(*args)
    torch.cuda.set_sync_debug_mode("default")
Trainer.train_step = strict
script.main(None)
"""


@pytest.mark.parametrize("job", ["main", "pcgrad", "simcse", "mlm"])
def test_no_step_waits_for_the_gpu(job, tmp_path):
    done = python("-c", STRICT, *flags(JOBS[job], tmp_path / "run", "--use_gpu"))
    assert done.returncode == 0, done.stderr


SMALL = """
import sys, torch
from engine.cli import run_script
from multitask_classifier import main
sys.argv = sys.argv[1:]
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction({mebibytes} * 2**20 / total)
run_script(main)
"""


@pytest.mark.parametrize("mebibytes", [40, 200, 300, 400])
def test_too_little_memory_is_one_line(mebibytes, tmp_path):
    """For the model, its gradients, AdamW's moments or the activations."""
    words = flags(MAIN, tmp_path / "run", "--use_gpu", "--limit", 64, "--batch_size", 64)
    done = python("-c", SMALL.format(mebibytes=mebibytes), *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out of memory" in done.stderr.strip().splitlines()[-1]


NCCL = """
import json, torch
from torch import distributed
from engine import distributed as ours
store = distributed.HashStore()
distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
ours._world_size = 2  # its functions then call the collectives; the sums are over one process
model = torch.nn.Linear(3, 2).cuda()
before = model.weight.clone()
ours.broadcast_parameters(model)
model(torch.ones(1, 3, device="cuda")).sum().backward()
ours.all_reduce_gradients(list(model.parameters()))
total = ours.all_reduce_sum(torch.tensor(2.0, dtype=torch.float64, device="cuda"))
ours.barrier()
same = torch.equal(model.weight, before) and bool((model.weight.grad == 1).all())
print(json.dumps([same, total.item(), ours.any_rank(True, False),
                  ours.broadcast_from_rank_zero(lambda: "word")]))
distributed.destroy_process_group()
"""


def test_collectives_over_nccl_with_one_process():
    done = python("-c", NCCL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, 2.0, [True, False], "word"]
