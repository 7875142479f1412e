"""`data/download.py` and `data/fetch.py` against a local server that plays both of their places."""

import contextlib
import ctypes
import email.utils
import fcntl
import functools
import http.client
import io
import itertools
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
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

import fetch  # noqa: E402

REAL = os.environ.get("MINBERT_DATA")
NLI = download.NLI_FILE
IDS = download.BLOB_IDS
FILES = {
    "a.csv": b"".join(b"%d\tThe film is fine.\n" % i for i in range(150)),
    "b.csv": b"\tid\tsentence\n",
    NLI: b"sent0,sent1,hard_neg\n" + b"A film.,A movie.,A car.\n" * 100,
}
DATE = "Mon, 01 Jan 2024 00:00:00 GMT"
QUICK = {
    "tries": 4,
    "wait": 0.002,
    "max_wait": 2,
    "timeout": 3,
    "min_speed": 2000,
    "max_bytes": 100_000,
}


class Handler(BaseHTTPRequestHandler):
    """Plays a file's next part of `server.plays`, and where there is none, serves it properly."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.asked.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        self.server.times.append(time.monotonic())
        plays = self.server.plays.get(name)
        play = plays.pop(0) if plays else serve
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has left
            play(self, self.server.files.get(name, b""))

    def head(self, status: int, **headers: object) -> None:
        """Send a status, and headers named with _ for -."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass


def serve(handler, body, *, sent=None, etag='"1"', ranges=True, if_range=True, **headers):
    """Serve as a good server does, except for what is asked for.

    Args:
        sent: bytes of the body to send before hanging up; all by default.
        etag: the version's name; "" for none.
        ranges, if_range: whether the server knows these headers.
        headers: more of them.
    """
    wanted, known = handler.headers["Range"], handler.headers["If-Range"]
    if etag:
        headers["ETag"] = etag
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and ranges else 0
    if if_range and known and known not in (etag, headers.get("Last_Modified")):
        start = 0
    if start >= len(body) > 0:
        return handler.head(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
    if start:
        headers.setdefault("Content_Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    headers.setdefault("Content_Length", len(body) - start)
    handler.head(206 if start else 200, **headers)
    handler.wfile.write(body[start:][:sent])


def play(function=serve, /, **options):
    """A part for `Handler.plays`."""
    return functools.partial(function, **options)


def answer(handler, body, *, status, **headers):
    """A bare status."""
    handler.head(status, Content_Length=0, **headers)


def silent(handler, body):
    """No answer at all."""
    handler.server.over.wait()


def stall(handler, body, *, sent):
    """Some bytes, and then nothing."""
    serve(handler, body, sent=sent)
    handler.wfile.flush()
    handler.server.over.wait()


def trickle(handler, body, *, start=b""):
    """A byte every now and then, for ever."""
    handler.wfile.write(start)
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"x")


def flood(handler, body, *, status=200, **headers):
    """As many bytes as the client takes."""
    handler.head(status, **headers)
    while not handler.server.over.is_set():
        handler.wfile.write(b"x" * 10_000)


def chunked(handler, body, *, whole=True):
    """The body in chunks, without its length."""
    handler.head(200, Transfer_Encoding="chunked", ETag='"1"')
    for i in range(0, len(body), 1000):
        chunk = body[i : i + 1000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    handler.wfile.write(b"0\r\n\r\n" if whole else b"")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *arguments):
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Serves `files`; `plays[name]` are what it does instead, one after the other."""
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.plays, server.asked, server.times = dict(FILES), {}, [], []
    server.over = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/files"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@functools.cache
def git_blob_id(body: bytes) -> str:
    """As git itself says."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=body, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture(autouse=True, scope="module")
def small_files():
    """`FILES` are what the course and SimCSE have; no proxy is in the way."""
    with pytest.MonkeyPatch.context() as patch:
        ids = {name: git_blob_id(body) for name, body in FILES.items() if name != NLI}
        patch.setattr(download, "BLOB_IDS", ids)
        patch.setenv("no_proxy", "*")
        yield


@pytest.fixture
def server():
    with serving() as server:
        yield server


def run(server, folder: Path, *flags: str, **limits: float) -> tuple[int, list[str], list[str]]:
    """Download from the server: exit code, lines on standard output, lines on standard error."""
    argv = ["--out", str(folder), "--course_url", server.url, "--nli_url", server.url, *flags]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            download.main(argv, fetch.Limits(**{**QUICK, **limits}))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue().splitlines(), errors.getvalue().splitlines()


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import download
download.BLOB_IDS = json.loads(sys.argv.pop(1))
limits = download.Limits(**json.loads(sys.argv.pop(1)))
download.main(None, limits)
"""


def start(server, folder: Path, *flags: str, limits=QUICK, **more) -> subprocess.Popen:
    """The same as `run` in a process of its own."""
    ids, limits = json.dumps(download.BLOB_IDS), json.dumps(limits)
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "data"), ids, limits]
    command += ["--out", str(folder), "--course_url", server.url]
    command += ["--nli_url", server.url, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, encoding="utf-8", **{**streams, **more})


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked(server, name: str) -> list[tuple]:
    """The Range and If-Range of each request for a file."""
    return [(wanted, known) for path, wanted, known in server.asked if f"/{name}" in path]


def moments(server, name: str) -> list[float]:
    """When each request for a file came, in seconds."""
    return [t for t, (path, *_) in zip(server.times, server.asked, strict=True) if name in path]


def others(name: str) -> dict[str, bytes]:
    """All files but one."""
    return {other: body for other, body in FILES.items() if other != name}


# ---------------------------------------------------------------------------- what goes well


def test_files_arrive_and_are_then_kept_without_a_request(server, tmp_path):
    code, lines, errors = run(server, tmp_path)
    assert (code, errors) == (0, [])  # no bars where nobody watches
    assert sorted(lines) == [f"{tmp_path / name}: fetched" for name in FILES]
    assert contents(tmp_path) == FILES
    assert len(server.asked) == len(FILES)
    code, lines, errors = run(server, tmp_path)
    assert (code, errors) == (0, [])
    assert sorted(lines) == [f"{tmp_path / name}: here already" for name in FILES]
    assert len(server.asked) == len(FILES)


@pytest.mark.skipif(REAL is None, reason="MINBERT_DATA names no folder with the course's data")
def test_real_files_have_the_ids():
    """All but those two of Quora that are gathered elsewhere."""
    for name in IDS.keys() - {"quora-train.csv", "quora-test-student.csv"}:
        assert git_blob_id((Path(REAL) / name).read_bytes()) == IDS[name]


def test_setup_fetches_the_data_from_where_the_environment_says(server, tmp_path):
    """A copy of the project that expects this server's files under the course's names."""
    source = (ROOT / "data" / "download.py").read_text(encoding="utf-8")
    names = re.findall(r'^    "(.*)": "[0-9a-f]{40}",$', source, flags=re.MULTILINE)
    splits = ("train", "dev", "test-student")
    assert names == [
        f"{task}-{s}.csv" for task in ("ids-sst", "ids-cfimdb", "quora", "sts") for s in splits
    ]
    server.files = {name: name.encode() for name in names} | {NLI: FILES[NLI]}
    for name in names:
        source = re.sub(f'(?<="{name}": ")[0-9a-f]+', git_blob_id(name.encode()), source)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "download.py").write_text(source, encoding="utf-8")
    shutil.copy(ROOT / "data" / "fetch.py", tmp_path / "data")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    shutil.copy(ROOT / "setup.sh", tmp_path)
    for name in ("requirements.txt", "requirements-model.txt"):  # all installed already
        shutil.copy(ROOT / name, tmp_path)
        shutil.copy(ROOT / name, tmp_path / ".venv" / f"installed-{name}")
    places = {"MINBERT_COURSE_URL": f"{server.url}/course", "MINBERT_NLI_URL": f"{server.url}/nli/"}
    done = subprocess.run(
        [tmp_path / "setup.sh", "--data"], env=os.environ | places, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    for name, body in server.files.items():
        assert (tmp_path / "data" / name).read_bytes() == body
    paths = [f"/files/course/{name}" for name in names] + [f"/files/nli/{NLI}"]
    assert sorted(path for path, *_ in server.asked) == sorted(paths)


def test_a_terminal_shows_bars_one_below_the_other(server, tmp_path):
    for name in ("a.csv", NLI):
        server.plays[name] = [play(stall, sent=1000)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    process = start(server, tmp_path, stderr=theirs, limits=QUICK | {"timeout": 0.6})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # once the other end is closed
        while piece := os.read(ours, 1000):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"a\.csv: +\d+%.*1\.00k/", shown)
    assert re.search(rb"nli_for_simcse\.csv: +\d+%.*1\.00k/", shown)
    assert b"\n" in shown and b"\x1b[A" in shown  # down to a second line and up again
    assert b"again in 0 s: " in shown
    process.stdout.close()


# ---------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("headers", "known"),
    [({"etag": '"1"', "Last_Modified": DATE}, '"1"'), ({"etag": "", "Last_Modified": DATE}, DATE)],
)
@pytest.mark.parametrize("name", ["a.csv", NLI])
def test_a_cut_connection_costs_only_the_rest(server, tmp_path, name, headers, known):
    server.plays[name] = [play(sent=n, **headers) for n in (0, 700, 500)] + [play(**headers)]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    resumed = [("bytes=700-", known), ("bytes=1200-", known)]
    assert asked(server, name) == [(None, None), (None, None), *resumed]


def test_without_a_version_only_a_checksum_allows_to_go_on(server, tmp_path):
    weak = {"etag": 'W/"1"'}
    server.plays = {name: [play(sent=700, **weak), play(**weak)] for name in ("a.csv", NLI)}
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert asked(server, "a.csv")[1] == ("bytes=700-", None)
    assert asked(server, NLI)[1] == (None, None)


def test_a_killed_process_leaves_a_part_for_the_next(server, tmp_path):
    server.plays["a.csv"] = [play(stall, sent=1000)]
    process = start(server, tmp_path, limits={"timeout": 60})
    part = tmp_path / "a.csv.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 1000)
    process.kill()
    process.communicate()
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert asked(server, "a.csv") == [(None, None), ("bytes=1000-", '"1"')]


def test_parts_stay_when_all_tries_fail(server, tmp_path):
    server.plays["a.csv"] = [play(sent=200)] * QUICK["tries"]
    code, _, errors = run(server, tmp_path)
    assert code == 2
    assert errors == [
        f"download.py: error: {server.url}/a.csv: cut off after 800 of {len(FILES['a.csv'])} bytes:"
        " check the network and run this again, or go on with --data_dir data/sample"
    ]
    part = {"a.csv.part": FILES["a.csv"][:800], "a.csv.part.etag": b'"1"'}
    assert contents(tmp_path) == others("a.csv") | part
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert asked(server, "a.csv")[-1] == ("bytes=800-", '"1"')


@pytest.mark.parametrize("name", ["a.csv", NLI])
@pytest.mark.parametrize(
    "second",
    [
        {},  # the whole file, since If-Range does not hold
        {"if_range": False},  # a server that would splice the two
        {"if_range": False, "etag": '"new"', "Content_Range": "bytes 5-9/10"},
    ],
)
def test_a_file_that_changes_between_tries_is_not_spliced(server, tmp_path, name, second):
    """The first try saw other words in it, under another ETag."""

    def old(handler, body):
        serve(handler, body.replace(b" ", b"_"), sent=900, etag='"old"')

    server.plays[name] = [old, play(**second)]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("etag", [b"", b'"1"', b'"2"', b"\0\0\xff\n", None])
@pytest.mark.parametrize("part", [b"o" * 900, b"o" * 9000, b"o" * len(FILES["a.csv"])])
def test_a_part_of_something_else_is_mended_by_the_checksum(server, tmp_path, part, etag):
    (tmp_path / "a.csv.part").write_bytes(part)
    if etag is not None:
        (tmp_path / "a.csv.part.etag").write_bytes(etag)
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_a_part_that_is_whole_already_is_only_asked_about(server, tmp_path):
    for name in ("a.csv", NLI):
        (tmp_path / f"{name}.part").write_bytes(FILES[name])
        (tmp_path / f"{name}.part.etag").write_bytes(b'"1"')
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert len(server.asked) == len(FILES)


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / f"{NLI}.part").write_bytes(FILES[NLI] + b"more")
    (tmp_path / f"{NLI}.part.etag").write_bytes(b'"1"')
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_a_server_without_range_starts_again(server, tmp_path):
    server.plays["a.csv"] = [play(sent=700), play(ranges=False)]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def reversed_serve(handler, body, **options):
    """Another file of the same length."""
    serve(handler, body[::-1], etag='"0"', **options)


size = st.integers(0, 3000)
faults = st.one_of(
    size.map(lambda n: play(sent=n)),
    size.map(lambda n: play(sent=n, etag="", Last_Modified=DATE)),
    size.map(lambda n: play(sent=n, ranges=False)),
    size.map(lambda n: play(reversed_serve, sent=n)),
    st.sampled_from([301, 302, 403, 416, 429, 500, 503]).map(lambda n: play(answer, status=n)),
    st.sampled_from([play(chunked), play(chunked, whole=False)]),
)
lies = size.map(lambda n: play(Content_Length=n))  # which no one can tell without a checksum


@settings(max_examples=20)
@given(st.lists(faults | lies, max_size=9), st.lists(faults, max_size=9))
def test_whatever_happens_a_file_is_right_or_not_there(course, nli):
    with serving() as server, tempfile.TemporaryDirectory() as name:
        server.plays = {"a.csv": course, NLI: nli}
        for _ in range(20):
            code, _, errors = run(server, Path(name), wait=0)
            there = {n: b for n, b in contents(Path(name)).items() if n.endswith(".csv")}
            assert there.items() <= FILES.items()
            assert code == (0 if there == FILES else 2)
            assert len(errors) == (code != 0)
            if code == 0:
                break
        assert contents(Path(name)) == FILES


# ---------------------------------------------------------------------------- refusals


def refused(server, folder: Path, name: str, reason: str, **limits: float) -> None:
    """Exit code 2, one line that says why, nothing left of that file, and all others."""
    code, _, errors = run(server, folder, **limits)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"download.py: error: {server.url}/{name}: {reason}")
    assert errors[0].endswith("go on with --data_dir data/sample")
    assert contents(folder) == others(name)


def test_wrong_bytes_are_not_kept(server, tmp_path):
    server.files["a.csv"] = b"<html>Please log in"
    refused(
        server,
        tmp_path,
        "a.csv",
        f"not the file expected: blob id {git_blob_id(b'<html>Please log in')}, not ",
    )
    assert len(asked(server, "a.csv")) == 1
    server.files[NLI] = b"<html>Please log in"
    (tmp_path / NLI).unlink()
    server.files["a.csv"] = FILES["a.csv"]
    refused(
        server,
        tmp_path,
        NLI,
        "not the file expected: starts with b'<html>Please log in', not b'sent0",
    )


@pytest.mark.parametrize("status", [401, 403, 404, 410, 204, 304, 300])
def test_what_asking_again_cannot_mend_is_asked_once(server, tmp_path, status):
    server.plays["a.csv"] = [play(answer, status=status)]
    refused(server, tmp_path, "a.csv", f"HTTP {status} ")
    assert len(asked(server, "a.csv")) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(server, tmp_path, status):
    server.plays["a.csv"] = [play(answer, status=status)] * 3
    assert run(server, tmp_path)[0] == 0
    server.plays["b.csv"] = [play(answer, status=status)] * 4
    (tmp_path / "b.csv").unlink()
    refused(server, tmp_path, "b.csv", f"HTTP {status} ")
    assert contents(tmp_path) == others("b.csv")


def test_waits_double(server, tmp_path, monkeypatch):
    """Here without jitter, which is by half."""
    jitter = []
    monkeypatch.setattr(fetch.random, "uniform", lambda *bounds: jitter.append(bounds) or 1.0)
    server.plays["a.csv"] = [play(answer, status=503)] * 3
    assert run(server, tmp_path, wait=0.04)[0] == 0
    waits = [b - a for a, b in itertools.pairwise(moments(server, "a.csv"))]
    assert all(wait >= least for wait, least in zip(waits, (0.04, 0.08, 0.16), strict=True))
    assert jitter == [(0.5, 1.5)] * 3


def test_retry_after_is_honoured(server, tmp_path):
    def until(handler, body):
        date = email.utils.formatdate(int(time.time()) + 2, usegmt=True)
        answer(handler, body, status=503, Retry_After=date)

    server.plays = {"a.csv": [play(answer, status=429, Retry_After=1)], "b.csv": [until]}
    assert run(server, tmp_path)[0] == 0
    for name in ("a.csv", "b.csv"):
        first, second = moments(server, name)
        assert second - first >= 1


@pytest.mark.parametrize("when", ["3", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_long_retry_after_is_left_to_the_user(server, tmp_path, when):
    server.plays["a.csv"] = [play(answer, status=429, Retry_After=when)]
    refused(server, tmp_path, "a.csv", "HTTP 429 Too Many Requests, wait ")
    assert len(asked(server, "a.csv")) == 1


@settings(max_examples=50)
@given(st.text() | st.from_regex(r"\A[0-9 :,A-Z+-]*\Z"))
def test_any_retry_after_is_a_time(text):
    assert fetch.retry_after(text) >= 0


# ---------------------------------------------------------------------------- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "place", ["{url}/elsewhere/a.csv", "elsewhere/a.csv", "/files/a.csv?\xe4 b"]
)
def test_redirects_are_followed_with_what_was_asked(server, tmp_path, status, place):
    place = place.format(url=server.url)
    server.plays["a.csv"] = [play(sent=700), play(answer, status=status, Location=place)]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES
    assert asked(server, "a.csv")[1] == ("bytes=700-", '"1"')
    # Twice, once of each address; other files come at the same time.
    assert [request[1:] for request in server.asked].count(("bytes=700-", '"1"')) == 2


@pytest.mark.parametrize(
    "place",
    ["file:///etc/passwd", "ftp://127.0.0.1/a.csv", "data:text/csv,a", "http://[", "HTTPX://a/b"],
)
def test_redirects_lead_only_to_http(server, tmp_path, place):
    server.plays["a.csv"] = [play(answer, status=302, Location=place)]
    refused(server, tmp_path, "a.csv", "")
    assert len(asked(server, "a.csv")) == 1


def test_redirects_end(server, tmp_path):
    server.plays["a.csv"] = [play(answer, status=302, Location="a.csv")] * 50
    refused(server, tmp_path, "a.csv", "redirected more than 5 times")
    assert len(asked(server, "a.csv")) == 6


def test_redirects_do_not_leave_https(monkeypatch):
    """With an answer made up, as no certificate is at hand."""

    class Opener:
        def open(self, request, timeout):
            head = "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/a.csv\r\n\r\n"
            ours, theirs = socket.socketpair()
            theirs.sendall(head.encode())
            answer = http.client.HTTPResponse(ours)
            answer.begin()
            return answer

    monkeypatch.setattr(fetch, "OPENER", Opener())
    with pytest.raises(fetch.Failure, match=r"redirected to http://127.0.0.1/a.csv, which is not"):
        fetch.open_url("https://127.0.0.1/a.csv", {}, fetch.Limits())


# ---------------------------------------------------------------------------- time and size


@pytest.mark.parametrize(
    "slow",
    [
        silent,
        play(stall, sent=700),
        play(trickle),
        play(trickle, start=b"HTTP/1.1 200 OK\r\nX: "),
        play(trickle, start=b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n"),
        play(trickle, start=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: "),
        play(trickle, start=b"HTTP/1.1 302 Found\r\nLocation: b.csv\r\nX: "),
    ],
)
def test_what_hangs_or_trickles_ends(server, tmp_path, slow):
    server.plays["a.csv"] = [slow]
    began = time.monotonic()
    code, _, errors = run(server, tmp_path, tries=1, timeout=0.3)
    assert time.monotonic() - began < 5
    assert (code, len(errors)) == (2, 1)
    assert re.search(r"nothing came for 0.3 s|timed out|slower than 2000 bytes/s", errors[0])
    assert contents(tmp_path).items() >= others("a.csv").items()
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_a_slow_but_steady_body_arrives(server, tmp_path):
    """Longer than the timeout, faster than the minimum speed."""

    def steady(handler, body):
        handler.head(200, Content_Length=len(body))
        for i in range(0, len(body), 300):
            handler.wfile.write(body[i : i + 300])
            time.sleep(0.04)

    server.plays["a.csv"] = [steady]
    assert run(server, tmp_path, tries=1, timeout=0.3, min_speed=500)[0] == 0
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    ("big", "reason"),
    [
        (play(flood), "longer than 100000 bytes"),
        (play(flood, Content_Length=10**12), "1000000000000 bytes long, more than 100000"),
        (play(flood, status=404), "HTTP 404 Not Found"),
    ],
)
def test_an_endless_body_ends(server, tmp_path, big, reason):
    server.plays["a.csv"] = [big]
    refused(server, tmp_path, "a.csv", reason)
    assert len(asked(server, "a.csv")) == 1


def test_an_endless_redirect_body_is_not_read(server, tmp_path):
    server.plays["a.csv"] = [play(flood, status=302, Location="a.csv")]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_a_wrong_length_is_noticed(server, tmp_path):
    server.plays["a.csv"] = [play(Content_Length=10)]
    refused(server, tmp_path, "a.csv", "not the file expected")
    server.plays["a.csv"] = [play(Content_Length=10**4, ranges=False)] * 4
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert f"cut off after {len(FILES['a.csv'])} of 10000 bytes" in errors[0]
    assert "a.csv" not in contents(tmp_path)
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_chunks_bring_a_file_that_has_a_checksum(server, tmp_path):
    server.plays["a.csv"] = [play(chunked, whole=False), play(chunked)]
    server.plays[NLI] = [chunked]
    refused(server, tmp_path, NLI, "the server does not say how long it is")


# ---------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", ["a.csv", NLI])
def test_a_file_that_differs_is_kept_without_force(server, tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"download.py: error: {tmp_path / name}: ")
    assert errors[0].endswith(": kept; move it away, or run data/download.py --force")
    assert contents(tmp_path) == others(name) | {name: b"mine"}
    assert asked(server, name) == []
    assert run(server, tmp_path, "--force")[0] == 0
    assert contents(tmp_path) == FILES
    assert len(server.asked) == len(FILES)


def test_force_replaces_nothing_by_what_is_wrong(server, tmp_path):
    (tmp_path / "a.csv").write_text("mine", encoding="utf-8")
    server.files["a.csv"] = b"wrong"
    assert run(server, tmp_path, "--force")[0] == 2
    assert contents(tmp_path) == others("a.csv") | {"a.csv": b"mine"}


def test_what_appears_during_the_download_is_kept(server, tmp_path):
    def meanwhile(handler, body):
        (tmp_path / "a.csv").write_text("mine", encoding="utf-8")
        serve(handler, body)

    server.plays["a.csv"] = [meanwhile]
    code, _, errors = run(server, tmp_path)
    assert code == 2
    assert "has appeared during the download, and is kept" in errors[0]
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "mine"


def test_a_folder_in_a_files_place_is_kept(server, tmp_path):
    (tmp_path / "a.csv").mkdir()
    code, _, errors = run(server, tmp_path)
    assert code == 2
    assert f"{tmp_path / 'a.csv'}: not a file: kept" in errors[0]
    code, _, errors = run(server, tmp_path, "--force")
    assert (code, len(errors)) == (2, 1)
    assert f"{tmp_path / 'a.csv'}: Is a directory" in errors[0]
    assert (tmp_path / "a.csv").is_dir()


def test_a_folder_that_vanishes(server, tmp_path):
    def vanish(handler, body):
        shutil.rmtree(tmp_path / "out")
        serve(handler, body)

    server.plays[NLI] = [vanish]
    code, _, errors = run(server, tmp_path / "out", parallel=1)
    assert (code, len(errors)) == (2, 1)
    assert re.search(r"/out/.*\.part.*: No such file or directory", errors[0])
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_cannot_be_a_folder(server, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    code, _, errors = run(server, tmp_path / "file")
    assert (code, errors) == (2, [f"download.py: error: {tmp_path / 'file'}: File exists"])
    assert server.asked == []


def obey_modes() -> None:
    """Take from root the right to write where the file's mode forbids it (Linux)."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_read_only_folder(server, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)
    process = start(server, out, preexec_fn=obey_modes)
    _, errors = process.communicate(timeout=10)
    out.chmod(0o755)
    assert process.returncode == 2
    assert re.fullmatch(r"download.py: error: .*\.part: Permission denied: .*\n", errors)
    assert server.asked == []
    assert run(server, out)[0] == 0
    out.chmod(0o555)
    process = start(server, out, preexec_fn=obey_modes)  # nothing to write
    process.communicate(timeout=10)
    assert process.returncode == 0
    out.chmod(0o755)


def test_a_full_disk_keeps_the_part(server, tmp_path):
    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    process = start(server, tmp_path, preexec_fn=small_files_only)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 2
    assert re.fullmatch(r"download.py: error: .*\.part: File too large: .*\n", errors)
    assert contents(tmp_path)["a.csv.part"] == FILES["a.csv"][:1500]
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


# ---------------------------------------------------------------------------- processes


def test_two_processes_at_once_fetch_each_file_once(server, tmp_path):
    def slow(handler, body):
        time.sleep(0.3)
        serve(handler, body)

    server.plays = {name: [slow] for name in FILES}
    processes = [start(server, tmp_path, limits=QUICK | {"timeout": 5}) for _ in range(2)]
    outputs = [process.communicate(timeout=20) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert contents(tmp_path) == FILES
    assert len(server.asked) == len(FILES)
    assert sum("waiting for another download" in out for out, _ in outputs) == 1
    assert sum(out.count("here already") for out, _ in outputs) == len(FILES)


@pytest.mark.parametrize("slow", [silent, play(stall, sent=1000)])
def test_ctrl_c_stops_promptly_and_keeps_parts(server, tmp_path, slow):
    server.plays["a.csv"] = [slow]
    process = start(server, tmp_path, limits={"timeout": 60})
    wait_for(lambda: len(server.asked) == len(FILES) and (tmp_path / NLI).exists())
    part = tmp_path / "a.csv.part"
    wait_for(lambda: part.exists() and part.stat().st_size == (0 if slow is silent else 1000))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    kept = f"; parts (*.part) are kept in {tmp_path}: run this again to go on with them"
    assert errors == f"download.py: interrupted{'' if slow is silent else kept}\n"
    assert part.exists() == (slow is not silent)
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_after_ctrl_c_nothing_new_is_begun(server, tmp_path):
    server.plays[NLI] = [silent]
    process = start(server, tmp_path, limits={"timeout": 60, "parallel": 1})
    wait_for(lambda: server.asked)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert [path for path, *_ in server.asked] == [f"/files/{NLI}"]


@pytest.mark.parametrize("what", ["fetched", "here already"])
def test_who_reads_may_leave(server, tmp_path, what):
    if what == "here already":
        assert run(server, tmp_path)[0] == 0
    ours, theirs = os.pipe()
    os.close(ours)
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = start(server, tmp_path, stdout=theirs, env=usual)
    os.close(theirs)
    assert (process.communicate(timeout=10)[1], process.returncode) == ("", 141)
    assert run(server, tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def test_no_network_names_the_sample_in_one_line(server, tmp_path):
    server.url = "http://127.0.0.1:9"
    code, lines, errors = run(server, tmp_path)
    assert (code, lines, len(errors)) == (2, [], 1)
    reason = "(Connection refused|http://127.0.0.1:9 does not answer)"
    assert re.fullmatch(
        f"download.py: error: http://127.0.0.1:9/[a-z_]+.csv: {reason}: check the network and run"
        r" this again, or go on with --data_dir data/sample \(and 2 more\)",
        errors[0],
    )
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("dead", ["a.csv", NLI])
def test_of_an_address_that_does_not_answer_one_file_is_tried(server, tmp_path, dead):
    """The other address is another matter."""
    server.plays[dead] = [lambda handler, body: None] * QUICK["tries"]
    flags = ["--nli_url", f"{server.url}/nli"]
    code, _, errors = run(server, tmp_path, *flags, parallel=1)
    assert code == 2
    assert "Remote end closed connection without response" in errors[0]
    assert len(asked(server, dead)) == QUICK["tries"]
    assert contents(tmp_path) == ({NLI: FILES[NLI]} if dead == "a.csv" else others(NLI))


@pytest.mark.parametrize("url", ["file:///etc", "ftp://127.0.0.1", "", "127.0.0.1/x"])
def test_only_web_addresses(server, tmp_path, url):
    server.url = url
    code, _, errors = run(server, tmp_path)
    assert code == 2
    assert errors == [
        f"download.py: error: --course_url {url}: expected an address that starts with https:// or"
        " http://"
    ]


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://127.0.0.1:x", "http://a b", "http://ä"]
)
def test_broken_addresses_are_one_line(server, tmp_path, url):
    server.url = url
    code, _, errors = run(server, tmp_path)
    assert (code, len(errors)) == (2, 1)
    assert contents(tmp_path) == {}
