"""What a bag of words reaches on each task: the floor that an encoder must clear.

    python benchmarks/bag_of_words.py --data_dir data/sample

Sentiment: logistic regression on word counts. Pairs: on |a - b| and min(a, b) of the two
sentences' counts, logistic regression for paraphrase and ridge regression for similarity. The
regularisation is chosen by cross-validation on the training set.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Example, read
from options import script
from scoring import headline
from tasks import TASKS, Task


def features(examples: list[Example], vectorizer: CountVectorizer) -> sparse.csr_matrix:
    """Word counts of a sentence, or the differences and overlaps of a pair's counts."""
    columns = list(zip(*(e.texts for e in examples), strict=True))
    counts = [vectorizer.transform(column) for column in columns]
    if len(counts) == 1:
        return counts[0]
    a, b = counts
    return sparse.hstack([abs(a - b), a.minimum(b)]).tocsr()


def score(task: Task, data_dir: Path) -> float:
    """The headline figure on dev (accuracy, or Pearson's r) after training on train."""
    train, _ = read(data_dir / task.files.format("train"), task)
    dev, _ = read(data_dir / task.files.format("dev"), task)
    vectorizer = CountVectorizer().fit(text for e in train for text in e.texts)
    if task.whole:
        search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": [0.01, 0.1, 1, 10]}, cv=3)
    else:
        search = GridSearchCV(Ridge(), {"alpha": [1, 10, 100, 1000]}, cv=3)
    search.fit(features(train, vectorizer), [e.label for e in train])
    predicted = search.predict(features(dev, vectorizer))
    return headline(task.report(predicted, np.array([e.label for e in dev])))


def main() -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("data/sample"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    args = parser.parse_args()
    for name in args.tasks:
        print(f"{name:8} {score(TASKS[name], args.data_dir):.3f}", flush=True)


if __name__ == "__main__":
    script(lambda _: main())
