"""The table of tasks. A new task is a new row in `TASKS`; nothing else changes.

Where the paper leaves a loss or a threshold open, docs/training.md explains the choice.

Shapes: B rows (sentences or pairs), C logits per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import UserError
from engine.metrics import classification_metrics, correlation_metrics


class Classification:
    """One of several classes, 0, 1, ...; the primary metric is accuracy."""

    dtype = torch.int64  # of the labels
    integer = True  # labels are whole numbers

    def __init__(self, num_classes: int):
        self.num_logits = self.num_classes = num_classes
        self.low, self.high = 0, num_classes - 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, C), labels (B,) -> cross-entropy of each row, (B,)."""
        # SOLUTION: minus the log-probability of the label, by log_softmax or F.cross_entropy
        return F.cross_entropy(logits, labels, reduction="none")
        # END SOLUTION

    def predict(self, logits: Tensor) -> Tensor:
        """logits (B, C) -> the most probable class, (B,) int64."""
        return logits.argmax(dim=-1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """logits (B, C) -> logarithms of the class probabilities (B, C)."""
        return logits.log_softmax(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits -> class probabilities (B, C)."""
        return self.log_probabilities(logits).exp()

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits of two passes -> the symmetric KL divergence of their predictions, (B,)."""
        # (KL(p|q) + KL(q|p)) / 2 = sum (p - q) (log p - log q) / 2
        log_p, log_q = self.log_probabilities(first), self.log_probabilities(second)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1) / 2

    def metrics(self, predicted: np.ndarray, gold: np.ndarray) -> dict[str, object]:
        """Metrics of (N,) predictions, the primary one first."""
        return classification_metrics(self.num_classes, predicted, gold)

    def course_score(self, accuracy: float) -> float:
        """The task's share of the course's overall score, 0 to 1."""
        return accuracy


class BinaryClassification(Classification):
    """No or yes, 0 or 1, from a single logit."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__(num_classes=2)
        self.num_logits = 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, 1), labels (B,) -> binary cross-entropy of each row, (B,)."""
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels, reduction="none")

    def predict(self, logits: Tensor) -> Tensor:
        """logits (B, 1) -> the rounded probability, (B,) float32."""
        return logits.squeeze(-1).sigmoid().round()  # 1.0 where the probability is above 1/2

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """logits (B, 1) -> logarithms of the probabilities of no and yes, (B, 2)."""
        # Not log(1 - sigmoid(x)): 1 - sigmoid(x) is 0 in float32 from x = 17 on.
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)


class Regression:
    """A real score from `low` to `high`; predictions are not clipped. Primary metric: Pearson."""

    dtype = torch.float32
    integer = False
    num_logits = 1

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, 1), labels (B,) -> squared error of each row, (B,)."""
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")

    def predict(self, logits: Tensor) -> Tensor:
        """logits (B, 1) -> scores (B,)."""
        return logits.squeeze(-1)

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits (B, 1) of two passes -> their squared difference, (B,)."""
        return (first - second).square().squeeze(-1)

    def metrics(self, predicted: np.ndarray, gold: np.ndarray) -> dict[str, object]:
        """Metrics of (N,) scores, the primary one first."""
        return correlation_metrics(predicted, gold)

    def course_score(self, pearson: float) -> float:
        """The task's share of the course's overall score, 0 to 1."""
        return (pearson + 1) / 2


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    name: str  # in flags and records
    title: str  # for display
    files: str  # file name in the data folder; {} is train, dev or test-student
    text_columns: tuple[str, ...]  # of the one or two sentences
    label_column: str
    labels: Classification | Regression  # their kind, which has loss, predictions, metrics
    header: str  # the prediction column of a leaderboard file, as the leaderboard spells it
    head: str  # the default decoder head, a row of `model.HEADS`
    # Typical logits of the least and the most similar pair. Heads start in this range: AdamW moves
    # a bias by about the learning rate per step, so at 1e-2 it would need 250 steps to reach 2.5.
    logit_range: tuple[float, float] = (0.0, 0.0)
    class_names: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, or else their numbers; none for scores."""
        numbers = range(self.labels.num_classes) if self.labels.integer else ()
        return self.class_names or tuple(map(str, numbers))

    def file(self, split: str) -> str:
        """The name of its train, dev or test file in the data folder."""
        return self.files.format("test-student" if split == "test" else split)


TASKS: dict[str, Task] = {
    "sst": Task(
        name="sst",
        title="SST sentiment",
        files="ids-sst-{}.csv",
        text_columns=("sentence",),
        label_column="sentiment",
        labels=Classification(5),
        header="Predicted_Sentiment",
        head="linear",
        class_names=("very negative", "negative", "neutral", "positive", "very positive"),
    ),
    "cfimdb": Task(
        name="cfimdb",
        title="CFIMDB sentiment",
        files="ids-cfimdb-{}.csv",
        text_columns=("sentence",),
        label_column="sentiment",
        labels=Classification(2),
        header="Predicted_Sentiment",
        head="linear",
        class_names=("negative", "positive"),
    ),
    "para": Task(
        name="para",
        title="Quora paraphrase",
        files="quora-{}.csv",
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        labels=BinaryClassification(),
        header="Predicted_Is_Paraphrase",
        head="dot",
        logit_range=(-5.0, 5.0),
        class_names=("not a paraphrase", "paraphrase"),
    ),
    "sts": Task(
        name="sts",
        title="STS similarity",
        files="sts-{}.csv",
        text_columns=("sentence1", "sentence2"),
        label_column="similarity",
        labels=Regression(0, 5),
        header="Predicted_Similiary",  # (sic)
        head="dot",
        logit_range=(0.0, 5.0),
    ),
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The rows of `TASKS` with these names; UserError for an unknown name."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"{name}: no such task; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in names]
