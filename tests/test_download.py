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
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import download  # noqa: E402

REAL = os.environ.get("MINBERT_DATA")
REAL_IDS, WAITS = download.COURSE_FILES, list(download.WAITS)
NLI = "nli_for_simcse.csv"
FILES = {
    "a.csv": b"".join(b"%d\tThe film is fine.\n" % i for i in range(150)),
    "b.csv": b"\tid\tsentence\n",
    NLI: b"sent0,sent1,hard_neg\n" + b"A film.,A movie.,A car.\n" * 100,
}
but = functools.partial  # but(serve, sent=700): serve, but only 700 bytes


class Handler(BaseHTTPRequestHandler):
    """Answers with the file's next scripted response, or serves it properly if there is none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append((self.path, self.headers["Range"]))
        script = self.server.script.get(name)
        respond = script.pop(0) if script else serve
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has gone
            respond(self, self.server.files.get(name, b""))

    def head(self, code: int, **headers: object) -> None:
        """Send a status code and headers (with _ for -)."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass


def serve(handler, body, *, sent=None, ranges=True, **headers):
    """Serve a file as a good server does, but only `sent` bytes, or without Range requests."""
    wanted = handler.headers["Range"]
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and ranges else 0
    if start >= len(body) > 0:
        return handler.head(416, Content_Length=0)
    handler.head(206 if start else 200, **{"Content_Length": len(body) - start, **headers})
    handler.wfile.write(body[start:][:sent])


def status(handler, body, *, code, **headers):
    """No file at all."""
    handler.head(code, Content_Length=0, **headers)


def hang(handler, body, *, sent=0):
    """Send some bytes, and then nothing until the test ends."""
    if sent:
        serve(handler, body, sent=sent)
    handler.server.over.wait()


def unsized(handler, body, *, sent=None):
    """A body that ends where the connection does."""
    handler.head(200)
    handler.wfile.write(body[:sent])


@contextlib.contextmanager
def serving() -> Iterator[ThreadingHTTPServer]:
    """A server of `files`; `script[name]` lists what it does instead, request by request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *arguments: None
    server.files, server.script, server.requests = dict(FILES), {}, []
    server.over = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def git_blob_id(body: bytes) -> str:
    """As git itself computes it."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=body, capture_output=True)
    return done.stdout.decode().strip()


EXPECTED = {  # what `download` is to know of `FILES`, and quick retries
    "COURSE_FILES": {name: git_blob_id(body) for name, body in FILES.items() if name != NLI},
    "NLI_FILES": {NLI: hashlib.sha256(FILES[NLI]).hexdigest()},
    "WAITS": [0] * 3,
}
vars(download).update(EXPECTED)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


def arguments(server, folder: Path) -> list[str]:
    return ["--out", str(folder), "--course_url", server.url, "--nli_url", server.url]


def run(server, folder: Path, *flags: str) -> tuple[int, list[str], list[str]]:
    """Download from a server: exit code, lines on standard output, lines on standard error."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            download.main([*arguments(server, folder), *flags])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue().splitlines(), errors.getvalue().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def others(name: str) -> dict[str, bytes]:
    """All files but one."""
    return {other: body for other, body in FILES.items() if other != name}


def ranges(server, name: str) -> list[str | None]:
    """The Range header of each request for a file."""
    return [wanted for path, wanted in server.requests if path.endswith(f"/{name}")]


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import download
vars(download).update(json.loads(sys.argv.pop(1)))
download.main()
"""


@contextlib.contextmanager
def stuck(server, folder: Path, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """A process that waits for the rest of a.csv, of which it has the first 1,000 bytes."""
    server.script["a.csv"] = [but(hang, sent=1000)]
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "data"), json.dumps(EXPECTED)]
    command += arguments(server, folder)
    part, deadline = folder / "a.csv.part", time.monotonic() + 20
    # The background job of a shell ignores Ctrl-C, and so would its children.
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=stderr, text=True, preexec_fn=reset) as process:
        try:
            while not (part.exists() and part.stat().st_size == 1000):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_files_arrive_and_are_then_kept_without_a_request(server, tmp_path):
    code, lines, errors = run(server, tmp_path)
    assert (code, errors) == (0, [])  # no progress bars without a terminal
    assert lines[:-1] == [f"{tmp_path / name}: fetching {server.url}/{name}" for name in FILES]
    assert contents(tmp_path) == FILES
    assert len(server.requests) == len(FILES)
    code, lines, errors = run(server, tmp_path)
    assert (code, errors) == (0, [])
    assert lines[:-1] == [f"{tmp_path / name}: already here" for name in FILES]
    assert len(server.requests) == len(FILES)


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
def test_real_files_have_the_ids():
    """All but those two of Quora that are gathered elsewhere."""
    for name in REAL_IDS.keys() - {"quora-train.csv", "quora-test-student.csv"}:
        assert git_blob_id((Path(REAL) / name).read_bytes()) == REAL_IDS[name]
        assert download.has_checksum(Path(REAL) / name, REAL_IDS[name])


def test_the_environment_names_the_servers(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MINBERT_NLI_URL", raising=False)
    monkeypatch.setenv("MINBERT_COURSE_URL", f"{server.url}/course/")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub/")
    download.main(["--out", str(tmp_path)])
    repository = "datasets/princeton-nlp/datasets-for-simcse/resolve/main"
    paths = [path for path, _ in server.requests]
    assert paths == ["/course/a.csv", "/course/b.csv", f"/hub/{repository}/{NLI}"]
    (tmp_path / NLI).unlink()
    monkeypatch.setenv("MINBERT_NLI_URL", f"{server.url}/nli")
    download.main(["--out", str(tmp_path)])
    assert server.requests[-1][0] == f"/nli/{NLI}"


def test_a_cut_connection_resumes(server, tmp_path):
    server.script["a.csv"] = [but(serve, sent=0), but(serve, sent=700), but(serve, sent=500)]
    code, lines, _ = run(server, tmp_path)
    assert code == 0
    assert contents(tmp_path) == FILES
    assert ranges(server, "a.csv") == [None, None, "bytes=700-", "bytes=1200-"]
    assert f"cut off after 700 of {len(FILES['a.csv'])} bytes; retrying in" in lines[2]


def test_a_redirect_keeps_the_range(server, tmp_path):
    elsewhere = but(status, code=302, Location="/elsewhere/a.csv")
    server.script["a.csv"] = [but(serve, sent=700), elsewhere]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert ("/elsewhere/a.csv", "bytes=700-") in server.requests


def test_a_server_without_range_starts_again(server, tmp_path):
    server.script["a.csv"] = [but(serve, sent=700), but(serve, ranges=False)]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert ranges(server, "a.csv") == [None, "bytes=700-"]


def test_a_killed_process_leaves_a_part_for_the_next_run(server, tmp_path):
    with stuck(server, tmp_path) as process:
        process.kill()
    assert contents(tmp_path) == {"a.csv.part": FILES["a.csv"][:1000]}
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert ranges(server, "a.csv") == [None, "bytes=1000-"]


def test_ctrl_c_keeps_the_part(server, tmp_path):
    with stuck(server, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert errors == "download.py: interrupted: run this again to continue\n"
    assert contents(tmp_path) == {"a.csv.part": FILES["a.csv"][:1000]}


A = FILES["a.csv"]


@pytest.mark.parametrize(
    ("part", "requests"), [(b"o" * 900, 2), (b"o" * 9000, 2), (b"o" * len(A), 2), (A, 1)]
)
def test_a_part_of_something_else_is_thrown_away(server, tmp_path, part, requests):
    (tmp_path / "a.csv.part").write_bytes(part)
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert ranges(server, "a.csv") == [f"bytes={len(part)}-", None][:requests]


def test_a_terminal_shows_a_progress_bar(server, tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    with stuck(server, tmp_path, stderr=theirs):
        os.set_blocking(ours, False)
        assert re.search(rb"a\.csv: +\d+%", os.read(ours, 10_000))
    os.close(ours)
    os.close(theirs)


def test_a_second_process_is_turned_away(server, tmp_path):
    with stuck(server, tmp_path):
        code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert "another download is running here" in errors[0]
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["a.csv", NLI])
def test_wrong_bytes_never_appear(server, tmp_path, name):
    server.files[name] = b"<html>Please log in"
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert errors[0] == (
        f"download.py: error: {server.url}/{name}: not the expected file (wrong checksum),"
        " or use the sample with --data_dir data/sample"
    )
    assert contents(tmp_path) == others(name)
    assert len(ranges(server, name)) == 1
    (tmp_path / name).write_bytes(b"mine")
    assert run(server, tmp_path, "--force")[0] == 2
    assert contents(tmp_path) == others(name) | {name: b"mine"}


size = st.integers(0, 3000)
faults = st.one_of(
    st.builds(lambda n, known: but(serve, sent=n, ranges=known), size, st.booleans()),
    size.map(lambda n: but(serve, Content_Length=n)),
    size.map(lambda n: but(unsized, sent=n)),
    size.map(lambda n: lambda handler, body: serve(handler, body[::-1], sent=n)),  # another file
    st.sampled_from([302, 403, 408, 416, 503]).map(lambda code: but(status, code=code)),
    st.just(lambda handler, body: None),
)
scripts = st.fixed_dictionaries({name: st.lists(faults, max_size=8) for name in FILES})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scripts)
def test_whatever_the_server_does_a_file_is_right_or_absent(script):
    with serving() as server, tempfile.TemporaryDirectory() as name:
        folder, server.script = Path(name), script
        for _ in range(30):
            code, _, errors = run(server, folder)
            there = {n: body for n, body in contents(folder).items() if n.endswith(".csv")}
            assert there.items() <= FILES.items()
            assert (code, len(errors)) == ((0, 0) if there == FILES else (2, 1))
        assert contents(folder) == FILES


@pytest.mark.parametrize("name", ["a.csv", NLI])
def test_a_file_that_differs_is_kept_without_force(server, tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert errors[0] == (
        f"download.py: error: {tmp_path / name}: kept, but differs: move it or run"
        " data/download.py --force"
    )
    assert contents(tmp_path) == others(name) | {name: b"mine"}
    assert ranges(server, name) == []
    assert run(server, tmp_path, "--force")[0] == 0
    assert contents(tmp_path) == FILES
    assert len(server.requests) == len(FILES)


@pytest.mark.parametrize("code", [403, 404, 408, 429, 503])
def test_only_errors_that_may_pass_are_retried(server, tmp_path, monkeypatch, code):
    waits = []
    monkeypatch.setattr(download, "WAITS", WAITS)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.script[NLI] = [but(status, code=code)] * 4
    exit_code, _, errors = run(server, tmp_path)
    assert (exit_code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"download.py: error: {server.url}/{NLI}: HTTP Error {code}: ")
    assert errors[0].endswith(", or use the sample with --data_dir data/sample")
    assert contents(tmp_path) == others(NLI)
    assert waits == ([] if code in (403, 404) else WAITS)
    assert len(ranges(server, NLI)) == 1 + len(waits)


def test_no_network_names_the_sample(server, tmp_path):
    server.url = "http://127.0.0.1:9"
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert re.fullmatch(
        r"download.py: error: http://127.0.0.1:9/a.csv: .*Connection refused: check the network and"
        r" run this again, or use the sample with --data_dir data/sample \(and 1 more\)",
        errors[0],  # b.csv was not even tried: it has the same server
    )
    assert contents(tmp_path) == {}


def test_a_server_that_hangs_times_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.script["a.csv"] = [hang, but(hang, sent=700)]
    began = time.monotonic()
    assert run(server, tmp_path)[0] == 0
    assert time.monotonic() - began < 5
    assert ranges(server, "a.csv") == [None, None, "bytes=700-"]


@pytest.mark.parametrize("url", ["127.0.0.1/x", "http://[", "http://h:x", "http://a b"])
def test_a_bad_address_is_one_line(server, tmp_path, url):
    server.url = url
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"download.py: error: {url}/a.csv: ")


def test_a_bad_folder_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    code, _, errors = run(server, tmp_path / "file")
    assert (code, errors) == (2, [f"download.py: error: {tmp_path / 'file'}: File exists"])
    (tmp_path / "a.csv").mkdir()
    code, _, errors = run(server, tmp_path)
    assert (code, errors) == (2, [f"download.py: error: {tmp_path / 'a.csv'}: Is a directory"])
    code, _, errors = run(server, tmp_path, "--unknown")
    assert (code, errors) == (2, ["download.py: error: unrecognized arguments: --unknown"])


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

    def setup(*flags: str, pip_status: int = 0) -> tuple[int, str, str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PIP_STATUS": str(pip_status)}
        command = [tmp_path / "setup.sh", *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    code, _, errors = setup(pip_status=3)
    said, error = errors.splitlines()
    assert (code, said) == (1, "pip says so")
    assert error.startswith("setup.sh: error: this failed: .venv/bin/python -m pip install ")
    code, out, errors = setup("--data")  # installs what failed
    assert (code, errors) == (0, "")
    assert len(re.findall(r"still installing requirements\.txt \(\d s\)\n", out)) >= 2
    assert "pip says so" not in out
    assert out.endswith("data/download.py\n")
    assert setup() == (0, "", "")  # all is there
    assert setup("--dev")[0] == 0
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    files = [call.rpartition("requirements")[2] for call in calls]
    assert files == [".txt", ".txt", "-model.txt", "-dev.txt"]
