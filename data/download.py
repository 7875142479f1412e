"""Download the course's csv files and SimCSE's NLI triples into this folder.

    python data/download.py            (./setup.sh --data does the same)

A file appears only once its checksum is right, so it is there whole or not at all. Files that are
already right are kept without a request. A file that differs is kept too, and reported, unless
--force is given. An interrupted download leaves NAME.part, and the next run continues it.
"""

import argparse
import hashlib
import http.client
import os
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

COURSE_URL = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
NLI_PATH = "datasets/princeton-nlp/datasets-for-simcse/resolve/main"  # on the HuggingFace Hub
# Git blob ids: how the course's repository itself identifies these files.
COURSE_FILES = {
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "ids-cfimdb-train.csv": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d",
    "ids-cfimdb-dev.csv": "8a0f5dcf3d40189b96c801a12cd79bf8003e61de",
    "ids-cfimdb-test-student.csv": "1e789c709b3ca0511f027a309b6d8bd21cde41b2",
    "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
    "quora-dev.csv": "de7cfa32428fd470b93f778fccc45a619e01336f",
    "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
}
NLI_FILES = {  # the SHA-256 that the Hub shows
    "nli_for_simcse.csv": "0747687ec3594fa449d2004fd3757a56c24bf5f7428976fb5b67176775a68d48",
}
TIMEOUT = 20  # seconds without a byte
WAITS = (1, 2, 4)  # seconds before each retry
NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


class DownloadError(Exception):
    """The server answers, but not with the right file."""


class Unreachable(DownloadError):
    """Every retry failed, so the other files of the same server would fail too."""


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has this checksum: a git blob id (40 digits) or a SHA-256 (64 digits)."""
    if len(checksum) == 40:  # git hashes "blob SIZE\0" before the content
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == checksum


def download(url: str, part: Path) -> None:
    """Append to `part` what it still lacks of the file at `url`."""
    start = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing is missing: the checksum decides
            return
        raise
    with response:
        if response.status != 206:  # the server ignored Range and sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = {"desc": part.stem, "initial": start, "leave": False, "disable": None}
        with (
            open(part, "ab" if start else "wb") as raw,
            tqdm.wrapattr(raw, "write", total, **bar) as file,
        ):
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                file.flush()  # a killed process loses nothing that has arrived
            os.fsync(file.fileno())
            if total is not None and file.tell() < total:  # http.client does not report this
                raise ConnectionError(f"cut off after {file.tell()} of {total} bytes")


def fetch(url: str, path: Path, checksum: str) -> None:
    """Download `url` to `path`, with retries; the file appears once its checksum is right."""
    part = path.with_name(f"{path.name}.part")
    for wait in (*WAITS, None):
        resumed = part.exists()
        try:
            download(url, part)
        except HTTPError as error:
            problem = error
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url}: {error}") from error
        except (ValueError, http.client.InvalidURL) as error:
            raise DownloadError(f"{url}: {error}") from error
        except NETWORK_ERRORS as error:
            problem = getattr(error, "reason", error)
        else:
            if has_checksum(part, checksum):
                os.replace(part, path)
                return
            part.unlink()
            problem = "not the expected file (wrong checksum)"
            if not resumed:  # a login page, say; a retry would bring the same
                raise DownloadError(f"{url}: {problem}")
        if wait is not None:
            print(f"{path}: {problem}; retrying in {wait} s", flush=True)
            time.sleep(wait)
    raise Unreachable(f"{url}: {problem}: check the network and run this again")


def fetch_all(base: str, checksums: dict[str, str], folder: Path, force: bool) -> list[str]:
    """Fetch the files under a base URL that are missing; returns a line for each problem."""
    problems = []
    for name, checksum in checksums.items():
        path, url = folder / name, f"{base.rstrip('/')}/{name}"
        if path.exists() and has_checksum(path, checksum):
            print(f"{path}: already here", flush=True)
        elif path.exists() and not force:
            problems.append(f"{path}: kept, but differs: move it or run data/download.py --force")
        else:
            print(f"{path}: fetching {url}", flush=True)
            try:
                fetch(url, path, checksum)
            except DownloadError as error:
                problems.append(f"{error}, or use the sample with --data_dir data/sample")
                if isinstance(error, Unreachable):
                    break
    return problems


def fail(message: str) -> NoReturn:
    """Exit with a one-line error."""
    print(f"download.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch what is missing."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"  # as huggingface_hub does
    course_url = os.environ.get("MINBERT_COURSE_URL") or COURSE_URL
    nli_url = os.environ.get("MINBERT_NLI_URL") or f"{hub.rstrip('/')}/{NLI_PATH}"
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.error = fail  # one line, without the usage
    default = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=default, help="folder (default: data/)")
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        problems = fetch_all(course_url, COURSE_FILES, args.out, args.force)
        problems += fetch_all(nli_url, NLI_FILES, args.out, args.force)
    except KeyboardInterrupt:
        print("download.py: interrupted: run this again to continue", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # of the disk; fetch() handles the network's
        fail(f"{error.filename or args.out}: {error.strerror or error}")
    if problems:
        fail(problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
    print(f"{args.out}: all files are here")


if __name__ == "__main__":
    main()
