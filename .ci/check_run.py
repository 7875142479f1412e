"""Check a finished run on the sample data: scores, prediction files, and the README's example.

python .ci/check_run.py RUN
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
FILES = {"sst": "ids-sst-{}.csv", "para": "quora-{}.csv", "sts": "sts-{}.csv"}
# Far below what a run reaches, and above guessing (the most frequent class, or no relation).
FLOORS = {"sst": ("accuracy", 0.5), "para": ("accuracy", 0.65), "sts": ("pearson", 0.6)}
VALID = {"sst": range(5), "para": (0.0, 1.0), "sts": None}


def main() -> None:
    """Leave with a message at the first thing that is wrong."""
    [run] = map(Path, sys.argv[1:])
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    for task, (metric, floor) in FLOORS.items():
        score = result["dev"][task][metric]
        if not floor < score <= 1:
            sys.exit(f"{run}: {task} {metric} is {score}, expected above {floor}")
        for split, suffix in (("dev", "dev"), ("test", "test-student")):
            path = run / "predictions" / f"{task}-{split}-output.csv"
            lines = path.read_text(encoding="utf-8").splitlines()[1:]
            found = [line.split(" , ") for line in lines]
            with open(SAMPLE / FILES[task].format(suffix), encoding="utf-8", newline="") as file:
                ids = [row["id"] for row in csv.DictReader(file, delimiter="\t")]
            if [row[0] for row in found] != ids:
                sys.exit(f"{path}: its ids are not those of the input, in order")
            values = [float(row[1]) for row in found]
            if len(set(values)) < 2 or (VALID[task] and not set(values) <= set(VALID[task])):
                sys.exit(f"{path}: predictions are constant or invalid")
    if not (run / "best" / "model.safetensors").is_file():
        sys.exit(f"{run}: no best/model.safetensors")
    if (run / "last").exists():
        sys.exit(f"{run}: the training state is still there after the end")
    command = [sys.executable, "evaluation.py", str(run), "--text", "A fine film."]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if not answer.startswith(("sst: positive", "sst: very positive")):
        sys.exit(f"the README's example, a praise, gives {answer!r}")
    command = [sys.executable, "evaluation.py", str(run), "--report"]
    page = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if "Missing from this report" in page.read_text(encoding="utf-8"):
        sys.exit(f"{page}: something is missing")
    print(f"{run}: scores, prediction files and report are sane")


if __name__ == "__main__":
    main()
