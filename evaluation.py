"""Ask a saved run: evaluate it again, predict, pack for the leaderboard, compare, export.

    python evaluation.py runs/NAME                                      # the figures of result.json
    python evaluation.py runs/NAME --data FILE.csv --task sst --out PREDICTIONS.csv
    python evaluation.py runs/NAME --text "A fine film."                # --text twice for a pair
    python evaluation.py runs/NAME --submit FILE.zip
    python evaluation.py runs/NAME --compare runs/OTHER
    python evaluation.py runs/NAME --export onnx

Batch size, precision, pooling and pair encoding are the run's own, and so are its dev files.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from options import Parser, script

# What is asked -> the flags that go with it. Without any of these, the run is evaluated again.
ACTIONS = {
    "evaluate": {"data_dir", "device"},
    "data": {"task", "out", "device"},
    "text": {"device"},
    "submit": {"data_dir"},
    "compare": {"data_dir"},
    "export": {"out"},
}


def __getattr__(name: str) -> Any:
    """`from evaluation import predict`, and all else of `scoring`; --help stays quick."""
    if name.startswith("__"):  # Python asks every module for some
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import scoring

    return getattr(scoring, name)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked; `action` is the key of `ACTIONS`."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--data", type=Path, metavar="FILE", help="predict a csv file in the course's format")
    add("--text", action="append", help="predict a sentence, or a pair: --text A --text B")
    add("--submit", type=Path, metavar="ZIP", help="check the predictions, and pack them")
    add("--compare", type=Path, metavar="OTHER", help="another run folder, to compare with on dev")
    add("--export", choices=["onnx"], help="write the encoder for other software")
    add = parser.add_argument
    add("--task", help="whose columns --data has")
    add(
        "--out",
        type=Path,
        help="a new file: for --data its predictions, as the leaderboard has them; for --export the"
        " model (default: best/onnx/model.onnx in the run folder)",
    )
    add("--data_dir", type=Path, help="folder of the csv files (default: those that the run read)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="(default: the run's)")
    args = parser.parse_args(argv)
    asked = [action for action in ACTIONS if getattr(args, action, None) is not None]
    args.action = asked[0] if asked else "evaluate"
    for flag in set.union(*ACTIONS.values()) - ACTIONS[args.action]:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} does nothing {f'with --{asked[0]}' if asked else 'by itself'}")
    if args.data and not (args.task and args.out):
        parser.error("--data FILE needs --task NAME and --out FILE")
    if args.text and len(args.text) > 2:
        parser.error("--text: one sentence, or the two of a pair")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Answer what the command line asks."""
    args = parse(argv)
    import saved

    saved.answer(args)


if __name__ == "__main__":
    script(main)
