"""Command lines: argument parser, flags that the training scripts share, and exit codes."""

import argparse
import io
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from engine import distributed
from engine.device import catch_out_of_memory
from engine.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help  # the help text says what happens without the flag
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with code 2."""

    def __init__(self, doc: str | None = None, **options: Any):
        # The first line of the script's docstring, which `python -OO` has removed.
        options.setdefault("description", (doc or "").partition("\n")[0])
        # Abbreviations could become ambiguous, or change meaning, when flags are added.
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line of an `@file`, as a shell splits them; `#` begins a comment."""
        try:
            words = shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"{arg_line!r}: {error}")
        # A file inside a file could be the same one again.
        if words and (not words[0].startswith("-") or any(w.startswith("@") for w in words)):
            self.error(f"{arg_line!r}: not a flag; a line of an @file is like --epochs 3")
        return words

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As the base class; refuses words that are not UTF-8, which cannot be recorded."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            if any("\ud800" <= c <= "\udfff" for c in word):
                self.error(f"{word!r} is not UTF-8; rename it")
            if self.fromfile_prefix_chars and word[:1] == "@" and not Path(word[1:]).exists():
                self.error(f"{word}: no such file; see recipes/")
        try:
            return super().parse_args(args, namespace)
        except UnicodeDecodeError:
            self.error(f"{next(w for w in words if w.startswith('@'))}: not a text file in UTF-8")

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        line = f"{self.prog}: error: {message} (--help lists the flags)\n"
        # All processes that torchrun starts have the same command line: one reports. (LOCAL_RANK
        # alone may be left over from another program.)
        rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
        self.exit(2, line if rank == "0" else "")


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """A flag type: a number from `low` to `high`; `above` and `below` exclude these ends."""
    expected = "a whole number" if kind is int else "a number"
    expected += f" {'above' if above else 'at least'} {low:g}"
    if high < math.inf:
        expected += f" and {'below' if below else 'at most'} {high:g}"

    def parse(text: str) -> float:
        with suppress(ValueError):  # not a number; NaN fails the comparisons
            value = kind(text)
            inside = low <= value <= high and value != math.inf
            if inside and not (above and value == low) and not (below and value == high):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse


def interval(text: str) -> str:
    """A flag type: a number of steps ("500"), or of minutes ("10m")."""
    if not re.fullmatch(r"[0-9]{1,9}m?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither steps (500) nor minutes (10m)")
    return text


POSITIVE_INT = number(int, 1, 10**6)
COUNT = number(int, 0, 10**9)
POSITIVE = number(float, 0, 1e6, above=True)
NON_NEGATIVE = number(float, 0, 1e6)
FRACTION = number(float, 0, 1, below=True)


def add_training_flags(parser: argparse.ArgumentParser, poolings: Sequence[str]) -> None:
    """The flags of every script that trains, under the course's names, in groups."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="bert-base-uncased", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--data_dir", type=Path, default=Path("data"), help="folder of the csv files")
    pooling_help = "how BERT's output becomes a sentence embedding"
    add("--pooling", choices=poolings, default=poolings[0], help=pooling_help)
    limit_help = "use a fixed random subset of N rows per file"
    add("--limit", type=number(int, 1), metavar="N", help=limit_help)
    add("--hidden_dropout_prob", type=FRACTION, help="in BERT and heads (default: the model's own)")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=POSITIVE_INT, default=32, help="rows per batch, over all processes")
    add("--accumulate", type=POSITIVE_INT, default=1, help="batches per optimizer step")
    schedule_help = "learning-rate schedule after the warm-up"
    add("--schedule", choices=["linear", "constant"], default="linear", help=schedule_help)
    add("--warmup", type=FRACTION, default=0.1, help="fraction of steps in which lr rises")
    add("--weight_decay", type=NON_NEGATIVE, default=0.01, help="not for biases and LayerNorm")
    add("--clip", type=NON_NEGATIVE, default=1.0, help="maximum gradient norm; 0: no clipping")
    add("--seed", type=number(int, 0, 2**63 - 1), default=11711, help="seed of all random numbers")
    add = parser.add_argument_group("hardware").add_argument
    add("--use_gpu", action="store_true", help="the same as --device cuda")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to run on")
    precisions = ["auto", "fp32", "bf16"]
    precision_help = "precision of matrix products; auto: bf16 where it is faster"
    add("--precision", choices=precisions, default="auto", help=precision_help)
    add = parser.add_argument_group("run folder and evaluation").add_argument
    add("--run_dir", type=Path, help="new folder for all output (default: runs/NAME-TIME)")
    add("--resume", action="store_true", help="continue the run in --run_dir, or the latest one")
    save_help = "also save the state every N steps, or minutes (10m); 0: before evaluations only"
    add("--save_every", type=interval, default="10m", metavar="N", help=save_help)
    add("--keep_last", action="store_true", help="keep the training state (last/) after the run")
    eval_help = "also evaluate every N steps; 0: after each epoch"
    add("--eval_every", type=COUNT, default=0, metavar="N", help=eval_help)
    patience_help = "stop after N evaluations without a better score; 0: never"
    add("--patience", type=COUNT, default=0, metavar="N", help=patience_help)
    final_help = "evaluate and keep only the last weights: nothing is chosen on dev"
    add("--final_only", action="store_true", help=final_help)


def complete_training_args(
    args: argparse.Namespace, parser: argparse.ArgumentParser, name: str
) -> None:
    """Resolve --use_gpu and the default --run_dir, `runs/NAME-TIME`, in place."""
    if args.use_gpu and args.device not in ("auto", "cuda"):
        parser.error(f"--use_gpu contradicts --device {args.device}; give one of them")
    if args.use_gpu:
        args.device = "cuda"
    for flag in ("eval_every", "patience"):
        if args.final_only and getattr(args, flag):
            parser.error(f"--{flag} contradicts --final_only; give one of them")
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if args.resume:
            args.run_dir = _latest_run(name) or args.run_dir


def _latest_run(name: str) -> Path | None:
    """The latest unfinished run of that name under runs/, or else the latest."""
    # Only default names, which end with a time: a user's own name may begin like them.
    names = Path("runs").glob(f"{name}-[0-9]*-[0-9]*/config.json")
    runs = [path.parent for path in names]
    unfinished = [run for run in runs if not (run / "result.json").exists()]

    def begun(run: Path) -> float:
        # Not the time in its name, which is local: time zones differ, and clocks change.
        return (run / "config.json").stat().st_mtime

    return max(unfinished or runs, key=begun, default=None)


def print_error(message: str) -> None:
    """Print a line to standard error, unless another process of the run has printed it."""
    if not distributed.already_reported(message):
        print(message, file=sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard what a stream still holds: writing it at exit would fail again."""
    with suppress(OSError):
        stream.flush()
    with suppress(OSError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_script(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a script's `main` and exit: with 0, or with a one-line error and its exit code."""
    # The exit codes of the shell: 130 after Ctrl-C, 141 after a broken pipe, 2 for usage errors.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    path = Path(sys.argv[0])
    program = f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name
    try:
        with catch_out_of_memory():
            main(None)
        sys.stdout.flush()  # here, where a broken pipe is handled
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the message below must get out
        print_error(str(stop) or "interrupted; --resume continues a run that had begun")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our standard output has exited, as in `| head`
        _discard(sys.stdout)
        sys.exit(141)
    except OSError as error:  # such as a full disk
        # All files that we write have a name, except the streams, as with `> /dev/full`.
        where = error.filename or ("standard output or error" if error.errno else "")
        reason = error.strerror or str(error) or type(error).__name__
        with suppress(OSError):  # standard error may be full too
            print_error(f"{program}: error: {where}{': ' * bool(where)}{reason}")
        _discard(sys.stdout)
        sys.exit(2)
    except UserError as error:
        print_error(f"{program}: {'error: ' if error.exit_code else ''}{error}")
        sys.exit(error.exit_code)
    sys.exit(0)
