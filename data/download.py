"""Fetch the course's csv files, and SimCSE's NLI triples, into this folder.

    python data/download.py            (./setup.sh --data does the same)

The course's files come from the public repository gpoesia/minbert-default-final-project and are
checked against their git blob ids; the triples from the data set princeton-nlp/datasets-for-simcse.
A file that is here already is kept; one that differs is never overwritten. Each file appears whole
or not at all.
"""

import argparse
import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

COURSE = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data/"
NLI = "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/"
NLI_FILE = "nli_for_simcse.csv"
BLOB_IDS = {
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
TIMEOUT = 30  # seconds without a byte


def blob_id(path: Path) -> str:
    """Git's name of a file's content: the sha1 of "blob SIZE\\0" and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fail(message: str) -> NoReturn:
    """Leave with one line on standard error."""
    print(f"download.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def download(url: str, path: Path, expected: str | None) -> None:
    """Fetch `url` to `path`, checked against its blob id where one is known."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(draft, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True) as bar:
                while chunk := answer.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if size and draft.stat().st_size != size:
            fail(f"{url}: the connection ended early: run this again")
        if expected is not None and blob_id(draft) != expected:
            fail(f"{url}: not the file that was expected (blob id {blob_id(draft)}): nothing kept")
        os.replace(draft, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        fail(f"{url}: {error}: check the network, or go on with --data_dir data/sample")
    finally:
        draft.unlink(missing_ok=True)


def main() -> None:
    """Fetch what is missing, a line or a bar a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--course_url", default=COURSE, help="where the course's files are")
    parser.add_argument("--nli_url", default=NLI, help=f"where {NLI_FILE} is")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: cannot be a folder ({error.strerror})")
    for flag, url in (("course_url", args.course_url), ("nli_url", args.nli_url)):
        if not url.startswith(("https://", "http://")):
            fail(f"--{flag} {url}: expected an address that starts with https:// or http://")
    for name in [*BLOB_IDS, NLI_FILE]:
        path, expected = args.out / name, BLOB_IDS.get(name)
        if not path.exists():
            base = args.nli_url if name == NLI_FILE else args.course_url
            download(base.rstrip("/") + "/" + name, path, expected)
        elif expected is not None and blob_id(path) != expected:
            fail(f"{path}: differs from the course's file and is kept; move it away to fetch that")
        else:
            print(f"{path}: here already")


if __name__ == "__main__":
    main()
