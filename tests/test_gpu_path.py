"""What the scripts would do on a GPU, seen without one: devices, waiting, strict determinism.

They run in a process of its own, on the made-up device of fake_cuda.py.
"""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MULTITASK = "multitask_classifier --option "
JOBS = {
    "one task": "classifier --option finetune",
    "round robin": MULTITASK + "finetune --rdrop 1",
    "probe": MULTITASK + "pretrain",
    "pcgrad": MULTITASK + "finetune --surgery pcgrad",
    "left out": MULTITASK + "finetune --leave_out sst --pooling mean",
    "joint": MULTITASK + "finetune --pair_encoding joint --accumulate 2",
    "conflict": MULTITASK + "finetune --measure_conflict 1",
    "simcse": "simcse --hard_negative_weight 2",
    "cached": "simcse --mode unsupervised --accumulate 2",
    "mlm": "mlm --tasks sst,sts --accumulate 2",
}
SHORT = ("--epochs", 1, "--limit", 12)  # two steps a task
FAULTS = ("arange", "item", "cumsum")


def plant(fault: str) -> None:
    """Break BERT in one of the ways that this check is there to find."""
    import torch

    from bert import BertModel

    encode = BertModel.encode

    def broken(self, states, mask):
        if fault == "arange":  # on the CPU
            mask = mask * (torch.arange(mask.size(1)) < 99)
        elif fault == "item":  # waits for the GPU
            mask = mask * (mask.sum().item() < 10**9)
        else:  # has no deterministic kernel
            mask = mask * (mask.float().cumsum(1) < 99)
        return encode(self, states, mask)

    BertModel.encode = broken


def replace_what_needs_numbers() -> None:
    """Saving, loading and metrics; and put the models on the made-up device."""
    import fake_cuda
    import torch

    import engine.run_dir
    import mlm
    import multitask_classifier
    import optimizer
    import prediction
    import simcse
    from engine.trainer import Trainer
    from model import SentenceEncoder

    optimizer.FUSED_DEVICES.append(fake_cuda.NAME)
    engine.run_dir.util.find_spec = lambda name: None  # tensorboard takes seconds to import
    SentenceEncoder.to = lambda self, device: fake_cuda.move(self)
    SentenceEncoder.save_pretrained = lambda *_: None
    Trainer.save = lambda self, *_: self.run.flush()
    Trainer.finish = lambda *_, **__: None
    prediction.baseline = lambda *_: ("none", 0.0)
    prediction.evaluate = lambda *_: {"score": 0.0, "summary": "", "tasks": {}}
    simcse.similarity_metrics = lambda *_: {"spearman": 0.0}
    multitask_classifier.load_best = multitask_classifier.write_results = lambda *_: None
    for script in (multitask_classifier, simcse, mlm):
        script.setup_device = lambda *_: (fake_cuda.GPU, torch.bfloat16)
        script.run_facts = lambda *_: {"data": {}}


def work(tiny: Path, data: Path, runs: Path) -> None:
    """Run every job and then, with each fault, the first; print what was counted as JSON."""
    import fake_cuda
    from conftest import quick_run

    import mlm
    import prediction
    from bert import BertModel
    from engine.trainer import Trainer

    replace_what_needs_numbers()
    counted = ((Trainer, "train_step"), (prediction, "compute_rows"), (mlm, "evaluate_model"))
    originals = [getattr(*place) for place in counted]

    def run(name: str, words: str) -> dict:
        script, *flags = words.split()
        folder = fake_cuda.ROOT / "data/sample" if script == "simcse" else data
        watch = fake_cuda.Watch()
        for place, function in zip(counted, originals, strict=True):
            setattr(*place, watch.counting(function))
        try:
            with watch:
                flags = quick_run(tiny, folder, runs / name, *SHORT, *flags)
                import_module(script).main(flags)
        except RuntimeError as error:
            return {"error": str(error)}
        return watch.sections

    results, encode = {name: run(name, words) for name, words in JOBS.items()}, BertModel.encode
    for fault in FAULTS:
        plant(fault)
        results[fault] = run(fault, JOBS["one task"])
        BertModel.encode = encode
    print(json.dumps(results))


@pytest.fixture(scope="module")
def counts(tiny, data, tmp_path_factory) -> dict:
    """Job or fault -> function -> what was counted, by place; or the error that it ended with."""
    words = [sys.executable, __file__, *map(str, (tiny, data, tmp_path_factory.mktemp("runs")))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("job", JOBS)
def test_a_step_waits_for_nothing_and_does_nothing_that_is_refused(job, counts):
    """One copy to the CPU a step, which is read in the next; a measurement of conflict waits once.

    Predicting a file waits once, for whether all of it is finite.
    """
    assert "error" not in counts[job], counts[job]
    assert {"train_step"} < set(counts[job])
    for name, found in counts[job].items():
        assert found["calls"] > 0 and not found["refused"]
        waits = {place: number / found["calls"] for place, number in found["syncs"].items()}
        if name == "train_step" and job != "conflict":
            assert waits == {}
        else:
            assert list(waits.values()) == [1], waits
        assert sum(found["reads"].values()) == (found["calls"] if name == "train_step" else 0)


def test_the_optimizer_launches_one_kernel_for_each_group_of_parameters(counts):
    """BERT's two groups and those of a head: PyTorch's fused kernel, and none for a parameter."""
    launches = counts["one task"]["train_step"]["launches"]
    steps = counts["one task"]["train_step"]["calls"]
    assert launches["_fused_adamw_"] == 4 * steps
    assert sum(launches.values()) < 210 * steps  # of a BERT of two layers


def test_evaluation_takes_more_rows_at_a_time_than_training(counts):
    """All 12 rows, where a training batch has 8: each of three embeddings is looked up once."""
    assert counts["one task"]["compute_rows"]["calls"] == 1
    assert counts["one task"]["compute_rows"]["launches"]["embedding"] == 3


def test_planted_faults_are_found(counts):
    # The second is what torch 2.11 says.
    assert re.search("same device|two different devices", counts["arange"]["error"])
    for fault, kind in (("item", "syncs"), ("cumsum", "refused")):
        assert [place.split(":")[0] for place in counts[fault]["train_step"][kind]] == ["bert.py"]


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
