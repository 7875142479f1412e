"""Pre-train BERT for sentence embeddings by contrast (SimCSE, Gao et al. 2021).

    python simcse.py --use_gpu
    python multitask_classifier.py --option finetune --use_gpu --model runs/NAME/best

Supervised: an NLI premise is drawn to its entailment, and away from its contradiction and the other
rows' sentences. Unsupervised: a sentence is drawn to itself under another dropout mask. The run
folder gets what the other scripts' does, but for predictions; best/ is a HuggingFace folder.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from options import POSITIVE, RATE, Parser, add_training_flags, complete, script


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked and completed."""
    parser = Parser(__doc__.splitlines()[0])
    add_training_flags(parser)
    add = parser.add_argument
    add("--mode", choices=["supervised", "unsupervised"], default="supervised")
    add("--epochs", type=POSITIVE, default=3, help="passes over the triples, or sentences")
    add("--lr", type=RATE, default=5e-5, help="peak learning rate")
    add("--temperature", type=RATE, default=0.05, help="0.05 is SimCSE's, 1 the paper's")
    add(
        "--hard_negative_weight",
        type=RATE,
        help="of a row's own contradiction among its negatives (default: 1)",
    )
    add("--nli", type=Path, help="triples (default: nli_for_simcse.csv in --data_dir)")
    add("--sts_dev", type=Path, help="pairs to evaluate on (default: sts-dev.csv in --data_dir)")
    args = parser.parse_args(argv)
    complete(args, parser, f"simcse-{args.mode}")
    if args.mode == "unsupervised" and args.hard_negative_weight:
        parser.error("--hard_negative_weight: there are none with --mode unsupervised")
    args.hard_negative_weight = args.hard_negative_weight or 1.0
    if min(args.batch_size, args.limit or 2) < 2:
        parser.error("a contrastive loss needs two rows in a batch: raise --batch_size or --limit")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate as the command line says."""
    args = parse(argv)
    import distributed
    from contrastive import fit

    with distributed.joined(args):
        fit(args)


if __name__ == "__main__":
    script(main)
