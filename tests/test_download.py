"""`data/download.py` and `setup.sh` against a local server that misbehaves as it is told to."""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import download  # noqa: E402

REAL = os.environ.get("MINBERT_DATA")
REAL_IDS, WAITS = download.COURSE_FILES, list(download.WAITS)
NLI = "nli_for_simcse.csv"
A = b"".join(b"%d\tThe film is fine.\n" % i for i in range(150))
TRIPLES = b"sent0,sent1,hard_neg\n" + b"A film.,A movie.,A car.\n" * 100
FILES = {"a.csv": A, "b.csv": b"\tid\tsentence\n", NLI: TRIPLES}
but = functools.partial  # but(serve, sent=700): serve, but only 700 bytes


class Handler(BaseHTTPRequestHandler):
    """Answers with the file's next scripted response, or serves it properly if there is none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append((self.path, self.headers["Range"]))
        script = self.server.script.get(name)
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has gone
            (script.pop(0) if script else serve)(self, self.server.files.get(name, b""))

    def log_message(self, *_):
        pass


def status(handler, body, *, code, **headers):
    """Send no file, but a status code and headers (with _ for -; None: not that one)."""
    handler.send_response(code)
    for name, value in {"Content_Length": 0, **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def serve(handler, body, *, sent=None, ranges=True, **headers):
    """Serve a file as a good server does, but only `sent` bytes, or without Range requests."""
    wanted = handler.headers["Range"]
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and ranges else 0
    if start >= len(body) > 0:
        return status(handler, body, code=416)
    headers = {"Content_Length": len(body) - start, **headers}
    status(handler, body, code=206 if start else 200, **headers)
    handler.wfile.write(body[start:][:sent])


def hang(handler, body, *, sent=0):
    """Send some bytes, and then nothing until the test ends."""
    if sent:
        serve(handler, body, sent=sent)
    handler.server.over.wait()


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """A server of `files`; `script[name]` lists what it does instead, request by request."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None
        server.files, server.script, server.requests = dict(FILES), {}, []
        server.over = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MINBERT_COURSE_URL", server.url)
        monkeypatch.setenv("MINBERT_NLI_URL", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def git_blob_id(body: bytes) -> str:
    """As git itself computes it."""
    command = ["git", "hash-object", "--stdin"]
    return subprocess.run(command, input=body, capture_output=True).stdout.decode().strip()


EXPECTED = {  # what `download` is to know of `FILES`, and quick retries
    "COURSE_FILES": {name: git_blob_id(body) for name, body in FILES.items() if name != NLI},
    "NLI_FILES": {NLI: hashlib.sha256(TRIPLES).hexdigest()},
    "WAITS": [0] * 3,
}
vars(download).update(EXPECTED)


def run(folder: Path, *flags: str) -> tuple[int, list[str], list[str]]:
    """Download from the server: exit code, lines on standard output, lines on standard error."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            download.main(["--out", str(folder), *flags])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue().splitlines(), errors.getvalue().splitlines()


def succeed(folder: Path, *flags: str) -> list[str]:
    """What a download prints that brings all files (without progress bars)."""
    code, lines, errors = run(folder, *flags)
    assert (code, errors, contents(folder)) == (0, [], FILES)
    return lines


def fail(folder: Path, *flags: str) -> str:
    """The one line of a download that fails."""
    code, _, [error] = run(folder, *flags)
    assert code == 2 and error.startswith("download.py: error: ")
    return error.removeprefix("download.py: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ranges(server, name: str) -> list[str | None]:
    """The Range header of each request for a file."""
    return [wanted for path, wanted in server.requests if path.endswith(f"/{name}")]


SCRIPT = "import sys, json, download as d; vars(d).update(json.loads(sys.argv.pop(1))); d.main()"


@contextlib.contextmanager
def stuck(server, folder: Path, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """A process that waits for the rest of a.csv, of which it has the first 1,000 bytes."""
    server.script["a.csv"] = [but(hang, sent=1000)]
    command = [sys.executable, "-c", SCRIPT, json.dumps(EXPECTED), "--out", str(folder)]
    part, deadline = folder / "a.csv.part", time.monotonic() + 20
    with subprocess.Popen(command, cwd=ROOT / "data", stderr=stderr, text=True) as process:
        try:
            while not (part.exists() and part.stat().st_size == 1000):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_files_arrive_and_are_then_kept_without_a_request(server, tmp_path):
    fetching = [f"{tmp_path / name}: fetching {server.url}/{name}" for name in FILES]
    assert succeed(tmp_path)[:-1] == fetching
    assert succeed(tmp_path)[:-1] == [f"{tmp_path / name}: already here" for name in FILES]
    assert len(server.requests) == len(FILES)


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
def test_real_files_have_the_ids():
    """All but those two of Quora that are gathered elsewhere."""
    for name in REAL_IDS.keys() - {"quora-train.csv", "quora-test-student.csv"}:
        assert git_blob_id((Path(REAL) / name).read_bytes()) == REAL_IDS[name]


def test_the_environment_names_the_servers(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MINBERT_NLI_URL")
    monkeypatch.setenv("MINBERT_COURSE_URL", f"{server.url}/course/")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub/")
    download.main(["--out", str(tmp_path)])
    (tmp_path / NLI).unlink()
    monkeypatch.setenv("MINBERT_NLI_URL", f"{server.url}/nli")
    download.main(["--out", str(tmp_path)])
    on_hub = f"/hub/datasets/princeton-nlp/datasets-for-simcse/resolve/main/{NLI}"
    paths = [path for path, _ in server.requests]
    assert paths == ["/course/a.csv", "/course/b.csv", on_hub, f"/nli/{NLI}"]


cut, again, moved = but(serve, sent=700), "bytes=700-", "/elsewhere/a.csv"
BROKEN = {  # what the server does, and the ranges that are asked for
    "cut": ([but(serve, sent=0), cut, but(serve, sent=500)], [None, None, again, "bytes=1200-"]),
    "moved": ([cut, but(status, code=302, Location=moved)], [None, again, again]),
    "without ranges": ([cut, but(serve, ranges=False)], [None, again]),
    "hanging": ([hang, but(hang, sent=700)], [None, None, again]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_transfer_resumes(server, tmp_path, monkeypatch, kind):
    if kind == "hanging":
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.script["a.csv"], began = BROKEN[kind][0].copy(), time.monotonic()
    reason = "timed out" if kind == "hanging" else f"cut off after 700 of {len(A)} bytes"
    assert f"{reason}; retrying in" in "".join(succeed(tmp_path))
    assert ranges(server, "a.csv") == BROKEN[kind][1] and time.monotonic() - began < 10


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_process_leaves_a_part_for_the_next(server, tmp_path, sent, code):
    with stuck(server, tmp_path) as process:
        process.send_signal(sent)
        error = process.communicate(timeout=20)[1]
    interrupted = "download.py: interrupted: run this again to continue\n"
    assert (process.returncode, error) == (code, interrupted if sent == signal.SIGINT else "")
    assert contents(tmp_path) == {"a.csv.part": A[:1000]}
    succeed(tmp_path)
    assert ranges(server, "a.csv") == [None, "bytes=1000-"]


@pytest.mark.parametrize(("part", "requests"), [(b"o" * 900, 2), (b"o" * 9000, 2), (A, 1)])
def test_a_part_of_something_else_is_thrown_away(server, tmp_path, part, requests):
    (tmp_path / "a.csv.part").write_bytes(part)
    succeed(tmp_path)
    assert ranges(server, "a.csv") == [f"bytes={len(part)}-", None][:requests]


def test_a_terminal_shows_a_progress_bar(server, tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    with stuck(server, tmp_path, stderr=theirs):
        os.set_blocking(ours, False)
        assert re.search(rb"a\.csv: +\d+%", os.read(ours, 10_000))
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("name", ["a.csv", NLI])
def test_only_force_replaces_a_file_and_only_the_right_bytes_arrive(server, tmp_path, name):
    server.files[name] = b"<html>Please log in"
    line = fail(tmp_path)
    assert line.startswith(f"{server.url}/{name}: not the expected file (wrong checksum)")
    assert line.endswith("--data_dir data/sample")
    assert contents(tmp_path).keys() == FILES.keys() - {name}
    (tmp_path / name).write_bytes(b"mine")
    fail(tmp_path, "--force")
    server.files = FILES
    line = fail(tmp_path)
    assert line.startswith(f"{tmp_path / name}: kept, but differs: ") and line.endswith("--force")
    assert contents(tmp_path) == FILES | {name: b"mine"}
    assert len(ranges(server, name)) == 2  # no retries, and none for the file that was kept
    succeed(tmp_path, "--force")
    assert len(server.requests) == len(FILES) + 2


size = st.integers(0, 3000)
faults = st.one_of(
    st.builds(lambda n, known: but(serve, sent=n, ranges=known), size, st.booleans()),
    size.map(lambda n: but(serve, Content_Length=n)),
    size.map(lambda n: but(serve, sent=n, Content_Length=None)),
    size.map(lambda n: lambda handler, body: serve(handler, body[::-1], sent=n)),  # another file
    st.sampled_from([302, 403, 408, 416, 503]).map(lambda code: but(status, code=code)),
    st.just(lambda handler, body: None),
)
scripts = st.fixed_dictionaries({name: st.lists(faults, max_size=8) for name in FILES})


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=scripts)
def test_whatever_the_server_does_a_file_is_right_or_absent(server, tmp_path_factory, script):
    server.script = script
    folder = tmp_path_factory.mktemp("folder")
    for _ in range(30):
        code, _, errors = run(folder)
        there = {n: body for n, body in contents(folder).items() if n.endswith(".csv")}
        assert there.items() <= FILES.items()
        assert (code, len(errors)) == ((0, 0) if there == FILES else (2, 1))
    assert there == contents(folder) == FILES


@pytest.mark.parametrize("code", [404, 408, 429, 503])
def test_only_errors_that_may_pass_are_retried(server, tmp_path, monkeypatch, code):
    waits = []
    monkeypatch.setattr(download, "WAITS", WAITS)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.script[NLI] = [but(status, code=code)] * 4
    line = fail(tmp_path)
    assert line.startswith(f"{server.url}/{NLI}: HTTP Error {code}: ")
    assert line.endswith("--data_dir data/sample")
    assert contents(tmp_path).keys() == FILES.keys() - {NLI}
    assert waits == ([] if code == 404 else WAITS)
    assert len(ranges(server, NLI)) == 1 + len(waits)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1/x", "http://h:x"])
def test_without_network_one_line_names_the_sample(server, tmp_path, monkeypatch, url):
    monkeypatch.setenv("MINBERT_COURSE_URL", url)
    monkeypatch.setenv("MINBERT_NLI_URL", url)
    line = fail(tmp_path)
    assert line.startswith(f"{url}/a.csv: ")
    assert ("Connection refused: check the network" in line) == url.endswith(":9")
    others = 1 if url.endswith(":9") else 2  # where no server answers, b.csv is not even tried
    assert line.endswith(f"--data_dir data/sample (and {others} more)")
    assert contents(tmp_path) == {}


def test_a_bad_folder_or_flag_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a.csv").mkdir()
    assert fail(tmp_path / "file") == f"{tmp_path / 'file'}: File exists"
    assert fail(tmp_path) == f"{tmp_path / 'a.csv'}: Is a directory"
    assert fail(tmp_path, "--unknown") == "unrecognized arguments: --unknown"


PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*) echo "$@" >>calls; /bin/sleep 1; echo "pip says so"; exit $PIP_STATUS ;;
  data/*) echo "$@" ;;
esac
"""


def test_setup_shows_that_it_is_alive(tmp_path):
    """With a python that only pretends to install, and a sleep that is short."""
    scripts = {".venv/bin/python": PYTHON, "bin/sleep": "#!/bin/sh\nexec /bin/sleep 0.3\n"}
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    for path in (ROOT / "setup.sh", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)

    def setup(*flags: str, pip_status: str = "0") -> tuple[int, str, str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PIP_STATUS": pip_status}
        command = [tmp_path / "setup.sh", *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    code, _, errors = setup(pip_status="3")
    assert code == 1 and errors.startswith("pip says so\nsetup.sh: error: this failed: .venv/bin/")
    assert errors.count("\n") == 2 and "-m pip install " in errors
    code, out, errors = setup("--data")  # installs what failed
    assert (code, errors) == (0, "")
    assert len(re.findall(r"still installing requirements\.txt \(\d s\)\n", out)) >= 2
    assert "pip says so" not in out and out.endswith("data/download.py\n")
    assert setup() == (0, "", "")  # all is there
    assert setup("--dev")[0] == 0
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    files = [call.rpartition("requirements")[2] for call in calls]
    assert files == [".txt", ".txt", "-model.txt", "-dev.txt"]
