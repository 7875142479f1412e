"""Grade each exercise on its own against stored reference values.

    python grade.py                                  the project in this folder
    python grade.py --debug "encoder layer"          one test, with your prints and the traceback
    python grade.py FOLDER --json results.json       another folder; results for Gradescope

Each test runs in its own process with a time limit: code that hangs, exits or cannot be imported
loses only the points of its own tests. checks.py has the tests.
"""

import argparse
import json
import os
import select
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from checks import TESTS, Mistake, Test

GRADER = ("grade.py", "checks.py")
EXERCISES = (
    "bert.py",
    "optimizer.py",
    "tasks.py",
    "model.py",
    "multitask_classifier.py",
    "simcse.py",
)


def place(error: BaseException) -> str:
    """The last line of the student's own code that an error went through."""
    frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [f for f in frames if f[0].parent == Path(sys.path[0]) and f[0].name not in GRADER]
    return f" ({own[-1][0].name}, line {own[-1][1]})" if own else ""


def outcome(test: Test) -> str:
    """Run a test in this process: "passed", or a sentence that says what is wrong."""
    torch.manual_seed(0)
    try:
        test.run()
    except Mistake as mistake:
        return str(mistake)
    except BaseException as error:  # sys.exit is one of these
        text = " ".join(str(error).split())[:300]
        if isinstance(error, ModuleNotFoundError) and f"{error.name}.py" in EXERCISES:
            return f"{error.name}.py is missing"
        if isinstance(error, NotImplementedError):
            return f"not implemented yet{place(error)}: {text}"
        return f"{type(error).__name__}{place(error)}: {text}"
    return "passed"


def run_apart(test: Test, limit: float) -> str:
    """`outcome` in a child process, which may hang, crash, exit, or print what it likes."""
    reader, writer = os.pipe()
    child = os.fork()  # PyTorch is imported already: starting Python again would take a second
    if not child:
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            os.write(writer, outcome(test)[:1000].encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(writer)
    with suppress(OSError):
        os.setpgid(child, child)  # here too: the child may not have done it yet
    try:
        ready, _, _ = select.select([reader], [], [], limit)
        if not ready:
            return f"not finished after {limit:g} seconds"
        text = os.read(reader, 4096).decode(errors="replace")
        return text or "the process ended in the middle of the test"
    finally:  # also after Ctrl-C
        os.close(reader)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and all processes that it started
        os.waitpid(child, 0)


def report(results: dict[Test, str]) -> dict[str, Any]:
    """Print a line for each test and the sum; returns the same in Gradescope's format."""
    tests = []
    for test, text in results.items():
        score = test.points if text == "passed" else 0
        shown = "" if text == "passed" and test.points else f": {text}"
        print(f"{score:3} / {test.points:<3} {test.name}{shown}")
        entry = {"name": test.name, "score": score, "max_score": test.points, "output": text}
        tests.append({**entry, "status": "passed" if text == "passed" else "failed"})
    total = sum(test["score"] for test in tests)
    print(f"{total:3} / {sum(test.points for test in results)} points")
    return {"score": total, "tests": tests}


def refuse(message: str) -> NoReturn:
    """Exit with a one-line message and code 2."""
    print(f"grade.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Grade as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, here = parser.add_argument, Path(__file__).parent
    add("folder", nargs="?", type=Path, default=here, help="project folder (default: this file's)")
    add("--debug", metavar="NAME", help="run one test in this process, with its traceback")
    add("--json", type=Path, metavar="FILE", help="also write the results to this new file")
    add("--time_limit", type=float, default=10.0, help="seconds per test (default: 10)")
    args = parser.parse_args()
    tests = {test.name: test for test in TESTS}
    if not args.folder.is_dir():
        refuse(f"{args.folder}: no such folder")
    if not any((args.folder / name).is_file() for name in EXERCISES):
        refuse(f"{args.folder}: has none of {', '.join(EXERCISES)}; is it the project's folder?")
    if args.json and args.json.exists():
        refuse(f"{args.json}: exists and is not overwritten; name another file")
    if args.json and not args.json.absolute().parent.is_dir():
        refuse(f"{args.json}: its folder is missing")
    if not 0 < args.time_limit < 1e6:
        refuse(f"--time_limit {args.time_limit:g}: not a number of seconds above 0")
    if args.debug and args.debug not in tests:
        refuse(f"--debug {args.debug!r}: no such test; there are {', '.join(tests)}")
    sys.path[0] = str(args.folder.resolve())
    torch.set_num_threads(1)
    if args.debug:
        tests[args.debug].run()
        print("passed")
        return
    results = report({test: run_apart(test, args.time_limit) for test in TESTS})
    if args.json:
        draft = args.json.with_name(f".{args.json.name}.tmp")  # the file appears whole
        draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        draft.replace(args.json)


if __name__ == "__main__":
    main()
