"""Fetch the course's csv files, and SimCSE's NLI triples, into this folder.

    python data/download.py            (./setup.sh --data does the same)

The course's files come from the public repository gpoesia/minbert-default-final-project and are
checked against their git blob ids; the triples from the data set princeton-nlp/datasets-for-simcse.
No checksum of the triples is known: they are checked to be as long as the server says, and to start
with the right header.

A file that is here and right is kept without a request. One that differs is kept too, and named,
unless --force is given. Each file appears whole and checked, or not at all; parts (*.part) stay and
are gone on with when this is run again.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from fetch import Failure, Fetcher, Limits

COURSE = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
HUB = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"  # as huggingface_hub has it
NLI = f"{HUB.rstrip('/')}/datasets/princeton-nlp/datasets-for-simcse/resolve/main"
NLI_FILE = "nli_for_simcse.csv"
NLI_HEADER = b"sent0,sent1,hard_neg"
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
LIMITS = Limits()


def blob_id(path: Path) -> str:
    """Git's name of a file's content: the sha1 of "blob SIZE\\0" and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fault(name: str, path: Path) -> str:
    """What is wrong with the file at `path`, meant to be the one called `name`; "" for nothing."""
    if not path.is_file():
        return "not a file"
    if name == NLI_FILE:
        with open(path, "rb") as file:
            header = file.readline(100).rstrip(b"\r\n")
        return "" if header == NLI_HEADER else f"starts with {header!r}, not {NLI_HEADER!r}"
    found = blob_id(path)
    return "" if found == BLOB_IDS[name] else f"blob id {found}, not {BLOB_IDS[name]}"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes never write the same partial file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another download into it to end", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems lock no folders; the checks still hold
        yield
    finally:
        os.close(handle)


def fetch_all(urls: dict[str, str], folder: Path, force: bool, limits: Limits) -> list[str]:
    """Bring the files that are missing, several at a time, a bar each.

    Args:
        urls: of each file, by its name in the folder.

    Returns the lines that say what failed, the most telling first.
    """
    wanted, kept, failed = [], [], []
    for name in urls:
        path = folder / name
        there = os.path.lexists(path)
        wrong = fault(name, path) if there else ""
        if wrong and not force:
            kept.append(f"{path}: {wrong}: kept; move it away, or run data/download.py --force")
        elif there and not wrong:
            print(f"{path}: here already")
        else:
            wanted.append(name)
    fetcher, jobs = Fetcher(limits), {}
    with ThreadPoolExecutor(limits.parallel) as pool:
        try:
            for name in wanted:
                path, check = folder / name, functools.partial(fault, name)
                exact = name in BLOB_IDS
                job = pool.submit(fetcher.fetch, urls[name], path, check, exact=exact, force=force)
                jobs[job] = path
            for job in as_completed(jobs):
                try:
                    job.result()
                    tqdm.write(f"{jobs[job]}: fetched")
                except Failure as error:
                    again = "check the network and run this again, or " if error.retry else ""
                    failed.append(f"{error}: {again}go on with --data_dir data/sample")
        finally:
            fetcher.stop.set()
            pool.shutdown(cancel_futures=True)
    return failed + kept


def fail(message: str) -> NoReturn:
    """Leave with one line on standard error."""
    print(f"download.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None, limits: Limits = LIMITS) -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).resolve().parent, help="the files' folder")
    add("--force", action="store_true", help="replace files there that differ from the course's")
    bases = {"course_url": COURSE, "nli_url": NLI}
    for flag, base in bases.items():
        variable = f"MINBERT_{flag.upper()}"
        default = os.environ.get(variable) or base
        add(
            f"--{flag}", default=default, help=f"fetch from there (default: ${variable}, or {base})"
        )
    args = parser.parse_args(argv)
    for flag in bases:
        url = getattr(args, flag)
        if not url.startswith(("https://", "http://")):
            fail(f"--{flag} {url}: expected an address that starts with https:// or http://")
    urls = {NLI_FILE: args.nli_url} | dict.fromkeys(BLOB_IDS, args.course_url)  # largest first
    urls = {name: f"{base.rstrip('/')}/{name}" for name, base in urls.items()}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with alone(args.out):
            failed = fetch_all(urls, args.out, args.force, limits)
        sys.stdout.flush()
    except KeyboardInterrupt:
        kept = f"; parts (*.part) are kept in {args.out}: run this again to go on with them"
        print(
            f"download.py: interrupted{kept if any(args.out.glob('*.part')) else ''}",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # who reads our standard output has left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    if failed:
        fail(failed[0] + (f" (and {len(failed) - 1} more)" if failed[1:] else ""))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold any bytes
    main()
