"""Processes for tests: forked from one that has imported everything and computed nothing.

Importing takes seconds, forking a fraction of one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds that a run may take; then it is aborted, and its test fails

FORKER = """
import gc, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import huggingface_hub.repocard_data, scipy.stats, sklearn.metrics, torch.utils.tensorboard
import classifier, evaluation, mlm, multitask_classifier, simcse
from engine.cli import run_script
gc.freeze()

def forbid(event, args):
    # Ranks above 0 write nothing in pytest's folders.
    writing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    writing |= event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    if writing and "/pytest-" in str(args[0]):
        os.write(2, f"Traceback: wrote {args[0]}".encode())
        os._exit(99)

def work(rank, job):
    os.environ.update(job["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['out']}.{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = open(os.devnull)
    sys.argv = [job["script"] + ".py", *job["flags"]]
    sys.addaudithook(lambda *event: rank and forbid(*event))
    exec(job["patch"], {"rank": rank})
    try:
        run_script(globals()[job["script"]].main)
    except SystemExit as end:
        if end.code == 0:  # tearing down all that was imported would take half of the time
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
        raise

for line in sys.stdin:
    job = json.loads(line)
    pids = []
    for rank in range(job["processes"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            work(rank, job)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)
"""


class Forker:
    """Starts the processes of a run; `wait` returns their exit codes and output."""

    def __init__(self, folder: Path):
        self.out = folder / "output"
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )

    def start(self, processes: int, script: str, flags: list, patch: str = "") -> None:
        """Start a script with these flags; each process first runs the code in `patch`."""
        for output in self.out.parent.iterdir():
            output.unlink()
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        size, port = str(processes), str(self.store.port)
        env = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        job = {"processes": processes, "script": script, "flags": list(map(str, flags))}
        job |= {"env": env, "out": str(self.out), "patch": patch}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())

    def abort(self) -> None:
        """End all processes."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)

    def wait(self) -> tuple[list[int], str, str]:
        """Each process's exit code, all standard output and all standard error, by rank."""
        timer = threading.Timer(LIMIT, self.abort)
        timer.start()
        codes = json.loads(self.process.stdout.readline())
        timer.cancel()
        files = [sorted(self.out.parent.glob(f"*.{kind}")) for kind in ("out", "err")]
        out, err = ("".join(path.read_text() for path in paths) for paths in files)
        return codes, out, err

    def run(self, processes: int, script: str, flags: list, patch: str = "") -> None:
        """Run a script that must succeed in every process."""
        self.start(processes, script, flags, patch)
        codes, _, err = self.wait()
        assert codes == [0] * processes, err
        assert "Traceback" not in err
