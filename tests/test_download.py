"""`data/download.py` against a local server."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "download.py"
sys.path.insert(0, str(SCRIPT.parent))
import download  # noqa: E402


@pytest.fixture
def server():
    """A server that answers every path with `server.body`, promising `server.promise` bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(self.server.promise or len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.body, server.promise, server.asked = 200, b"a\tb\n", 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/files"
    yield server
    server.shutdown()
    server.server_close()


def run(folder: Path, url: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(folder), "--course_url", url, "--nli_url", url],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def refused(done: subprocess.CompletedProcess, folder: Path, expected: str) -> None:
    """Exit code 2, one line that says what is wrong (after any progress bars), no new file."""
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert expected in done.stderr.splitlines()[-1]
    assert [p.name for p in folder.iterdir() if p.name.startswith((".", "ids"))] == []


def test_blob_ids_are_gits(tmp_path):
    (tmp_path / "f").write_bytes(b"what is up, doc?")
    assert download.blob_id(tmp_path / "f") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_a_file_appears_whole_and_checked(tmp_path, server, monkeypatch):
    (tmp_path / "same").write_bytes(server.body)
    expected = download.blob_id(tmp_path / "same")
    download.download(f"{server.url}/x.csv", tmp_path / "x.csv", expected)
    assert (tmp_path / "x.csv").read_bytes() == server.body
    assert server.asked == ["/files/x.csv"]


def test_wrong_bytes_a_cut_connection_and_errors_keep_nothing(tmp_path, server):
    refused(run(tmp_path, server.url), tmp_path, "not the file that was expected")
    server.promise = 1000
    refused(run(tmp_path, server.url), tmp_path, "ids-sst-train.csv: ")
    server.status = 404
    refused(run(tmp_path, server.url), tmp_path, "404")


def test_no_network_names_the_sample(tmp_path):
    done = run(tmp_path, "http://127.0.0.1:9/none")
    refused(done, tmp_path, "go on with --data_dir data/sample")
    assert len(done.stderr.splitlines()) == 1


def test_a_users_own_file_is_kept(tmp_path, server):
    (tmp_path / "ids-sst-train.csv").write_text("mine", encoding="utf-8")
    done = run(tmp_path, server.url)
    assert done.returncode == 2
    assert "differs from the course's file and is kept" in done.stderr
    assert (tmp_path / "ids-sst-train.csv").read_text(encoding="utf-8") == "mine"
    assert server.asked == []
