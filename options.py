"""The command line that the training scripts share: flags, their checks, and how a script ends.

Nothing heavy is imported here before the arguments are parsed, so that `--help` answers at once.
"""

import argparse
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_LR = 5e-5  # of BERT
DEFAULT_HEAD_LR = 1e-2  # of the heads, frozen BERT or not; LOG.md has the measurement
DEFAULT_EPOCHS = {"pretrain": 10, "finetune": 3, "lpft": 3}


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def __init__(self, description: str, **more: Any):
        super().__init__(
            description=description, formatter_class=Formatter, allow_abbrev=False, **more
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As the base class; a word that no text file could record is refused."""
        for word in sys.argv[1:] if args is None else args:
            if any("\ud800" <= c <= "\udfff" for c in word):
                self.error(f"{word!r} is not UTF-8; rename it")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message, and leave with exit code 2."""
        line = f"{self.prog}: error: {message} (--help lists the flags)\n"
        # The processes that torchrun starts on a machine have one command line: one complains.
        self.exit(2, line if os.environ.get("LOCAL_RANK", "0") == "0" else "")


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """A flag's type: a number from `low` to `high`, strictly `above` or `below` them where said."""

    def parse(text: str) -> float:
        bounds = f"{'above' if above else 'at least'} {low:g}"
        if high < math.inf:
            bounds += f" and {'below' if below else 'at most'} {high:g}"
        word = "a whole number" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        inside = low <= value <= high and value != math.inf
        if not inside or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {word} {bounds}")
        return value

    return parse


def period(text: str) -> str:
    """A flag's type: a number of steps, or of minutes with an m."""
    if not re.fullmatch(r"[0-9]{1,9}m?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither steps (500) nor minutes (10m)")
    return text


POSITIVE = number(int, 1, 10**6)
COUNT = number(int, 0, 10**9)
RATE = number(float, 0, 1e6, above=True)
AMOUNT = number(float, 0, 1e6)
DROPOUT = number(float, 0, 1, below=True)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that trains: the course's names and, mostly, defaults."""
    add = parser.add_argument
    add("--model", default="bert-base-uncased", help="a folder, a hub id, or all-MiniLM-L6-v2")
    add("--data_dir", type=Path, default=Path("data"), help="folder of the csv files")
    add(
        "--run_dir",
        type=Path,
        help="a new folder for all that the run writes (default: under runs/, named by the time)",
    )
    add("--batch_size", type=POSITIVE, default=32, help="rows in a batch, over all processes")
    add("--accumulate", type=POSITIVE, default=1, help="batches in a step")
    add("--schedule", choices=["linear", "constant"], default="linear", help="after the warm-up")
    add("--warmup", type=DROPOUT, default=0.1, help="fraction of the steps")
    add("--weight_decay", type=AMOUNT, default=0.01, help="not on biases and LayerNorm")
    add("--clip", type=AMOUNT, default=1.0, help="global gradient norm, 0 for no clipping")
    add(
        "--hidden_dropout_prob",
        type=DROPOUT,
        help="in BERT and before the heads (default: the checkpoint's own)",
    )
    add("--pooling", choices=["pooler", "cls", "mean"], default="pooler", help="sentence embedding")
    add("--seed", type=number(int, 0, 2**63 - 1), default=11711)
    add("--use_gpu", action="store_true", help="the same as --device cuda")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of matrix products; auto: bf16 where it is faster",
    )
    add("--limit", type=number(int, 1), help="rows of each file, always the same random ones")
    add("--eval_every", type=COUNT, default=0, help="also evaluate every so many steps")
    add(
        "--save_every",
        type=period,
        default="10m",
        help="save the state to resume from every so many steps, or minutes (10m), besides each"
        " evaluation; 0: only there",
    )
    add("--resume", action="store_true", help="go on with the run in --run_dir, or the latest such")
    add("--patience", type=COUNT, default=0, help="evaluations without a better score; 0: no limit")


def add_supervised_flags(parser: argparse.ArgumentParser) -> None:
    """`add_training_flags`, and those of training heads on labels."""
    add_training_flags(parser)
    add = parser.add_argument
    add(
        "--option",
        choices=["pretrain", "finetune", "lpft"],
        default="pretrain",
        help="pretrain: BERT is frozen and the heads are trained on it (linear probing);"
        " finetune: BERT is trained too; lpft: first the one until it converges, then the other"
        " from its heads (Kumar et al. 2022)",
    )
    add("--epochs", type=POSITIVE, help="(default: 10 for pretrain, else 3)")
    add("--lr", type=RATE, help="peak learning rate (default: 1e-2 for pretrain, else 5e-5)")
    add(
        "--head_lr",
        type=RATE,
        help="of the heads when BERT is trained too (default: 1e-2); with lpft, in the probe",
    )
    add("--no_test", action="store_true", help="neither read nor predict the test files")
    add(
        "--features",
        type=Path,
        help="keep a frozen BERT's embeddings in this folder, and use what is there of them",
    )


def add_file_flags(parser: argparse.ArgumentParser, prefix: str, what: str) -> None:
    """A task's three input files and two output files, under the course's flag names."""
    for split in ("train", "dev", "test"):
        parser.add_argument(
            f"--{prefix}{split}", type=Path, help=f"{what} (default: in --data_dir)"
        )
    for split in ("dev", "test"):
        parser.add_argument(
            f"--{prefix}{split}_out",
            type=Path,
            help="its predictions (default: predictions/ in --run_dir)",
        )


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser, name: str) -> None:
    """Fill in the defaults that depend on other flags; refuse flags that contradict each other.

    Args:
        args: what was parsed; changed in place.
        parser: to complain through.
        name: of the kind of run, the start of its folder's name.
    """
    if args.use_gpu and args.device not in ("auto", "cuda"):
        parser.error(f"--use_gpu contradicts --device {args.device}; give one of them")
    if args.use_gpu:
        args.device = "cuda"
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if args.resume:
            args.run_dir = latest(name) or args.run_dir


def latest(name: str) -> Path | None:
    """The newest unfinished run of that name with a time in the default place, or the newest."""
    runs = sorted(path.parent for path in Path("runs").glob(f"{name}-*-*/config.json"))
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    return max(unfinished or runs, default=None)


def complete_supervised(
    args: argparse.Namespace, parser: argparse.ArgumentParser, name: str
) -> None:
    """`complete`, and the learning rates and epochs that `--option` decides."""
    complete(args, parser, f"{name}-{args.option}")
    if args.option == "pretrain" and args.lr and args.head_lr:
        parser.error("--lr and --head_lr are the same with --option pretrain; give one of them")
    if args.option == "finetune" and args.features:
        parser.error("--features is for a frozen BERT: give --option pretrain or lpft")
    for name in [name for name in vars(args) if name.endswith(("test", "test_out"))]:
        if args.no_test and name != "no_test" and getattr(args, name) is not None:
            parser.error(f"--{name} contradicts --no_test; give one of them")
    if args.option == "pretrain":
        args.head_lr = args.head_lr or args.lr or DEFAULT_HEAD_LR
    else:
        args.lr = args.lr or DEFAULT_LR
        args.head_lr = args.head_lr or DEFAULT_HEAD_LR
    args.epochs = args.epochs or DEFAULT_EPOCHS[args.option]


def say(message: str) -> None:
    """Print a line on standard error; of several processes that would, only the first does."""
    joined = sys.modules.get("distributed")
    if joined is None or not joined.said(message):
        print(message, file=sys.stderr)


def script(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a script's `main` and leave: 0, or one line on standard error and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        main(None)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the last words are to be heard
        say(str(stop) or "interrupted; if the run had begun, the same with --resume goes on")
        sys.exit(130)
    except BrokenPipeError:  # who reads our standard output has left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that has gone or may not be written to
        reason = error.strerror or type(error).__name__
        say(f"{Path(sys.argv[0]).name}: error: {error.filename}: {reason}")
        sys.exit(2)
    except Exception as error:
        from checkpoint import UserError

        if not isinstance(error, UserError):
            raise
        label = "error: " if error.exit_code else ""
        say(f"{Path(sys.argv[0]).name}: {label}{error}")
        sys.exit(error.exit_code)
    sys.exit(0)
