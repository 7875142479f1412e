"""What the time of a fine-tuning step goes to, by kind of operation, ours and the plain loop's.

    python benchmarks/breakdown.py --data_dir DATA

Both are those of `train.py`, on SST, the plain loop in fp32 and ours in `--precision`, under
PyTorch's profiler, which makes every operation a little slower. An operation's time is its own,
without those that it calls; "Python, and the rest" is what no operation accounts for. The products
of linear layers are what no implementation can do without.
"""

import re
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # in this folder there is a train.py too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.harness import FLAGS, TEXTS, Work, table
from benchmarks.train import ours, peer_plain
from options import Parser, script

# The kind of an operation: the first whose pattern its name matches.
KINDS = {
    "products of linear layers": r"aten::(addmm|mm|linear)$",
    "AdamW": r"(?i)optimizer|adamw",
    "GELU": r"gelu",
    "LayerNorm": r"layer_norm",
    "attention": r"aten::_?(bmm|baddbmm|softmax|scaled_dot_product|efficient_attention|flash)",
    "dropout": r"dropout|bernoulli|random_|aten::ge_",
    "embeddings, leaving padding out": r"embedding|index|aten::nonzero",
    "casts, copies": r"aten::copy_$",
    "gradients' norm": r"norm",
}
OTHER, REST = "other operations", "Python, and the rest"
WHOLE = "a step"


def measure(make: Callable[[Namespace], Work], args: Namespace) -> Counter[str]:
    """Milliseconds of a step by kind, and of it all."""
    from torch.profiler import ProfilerActivity, profile

    work = make(args)
    work.run()  # warms up
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        work.run()
        seconds = time.perf_counter() - started
    steps = -(-work.units // args.batch_size)
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
        found[next(kinds, OTHER)] += event.self_cpu_time_total / 1000 / steps
    found[REST] = 1000 * seconds / steps - sum(found.values())
    found[WHOLE] = 1000 * seconds / steps
    return found


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked."""
    parser = Parser(__doc__.splitlines()[0])
    for name, default in {**TEXTS, "rows": 640, "batch_size": 32, "precision": "fp32"}.items():
        parser.add_argument(f"--{name}", default=default, **FLAGS[name])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both, and print a Markdown table."""
    from checkpoint import UserError, model_folder

    args = parse(argv)
    if not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such folder")
    args.model, args.device = str(model_folder(args.model)), "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        both = [
            measure(partial(ours, names=["sst"], precision=args.precision), args),
            measure(partial(peer_plain, names=["sst"]), args),
        ]
    rows = [
        [
            kind,
            *(text for of in both for text in (f"{of[kind]:.1f}", f"{of[kind] / of[WHOLE]:.0%}")),
        ]
        for kind in [*KINDS, OTHER, REST, WHOLE]
    ]
    print("\n".join(table(["ms", "ours", "", "plain loop", ""], rows)))


if __name__ == "__main__":
    script(main)
