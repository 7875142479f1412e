"""Metrics of predictions and of embeddings, each computed over all rows at once."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def classification_metrics(
    num_classes: int, predicted: np.ndarray, gold: np.ndarray
) -> dict[str, object]:
    """Accuracy, macro F1 over the classes that occur, and the confusion matrix.

    predicted, gold: (N,) class numbers. Rows of the matrix are gold classes, columns predicted.
    """
    from sklearn import metrics  # takes a second to import; --help and training do not need it

    # `labels`: a matrix of the same size whichever classes occur.
    matrix = metrics.confusion_matrix(gold, predicted, labels=range(num_classes))
    return {
        "accuracy": float(metrics.accuracy_score(gold, predicted)),
        "macro_f1": float(metrics.f1_score(gold, predicted, average="macro")),
        "confusion": matrix.tolist(),
    }


def correlation_metrics(predicted: np.ndarray, gold: np.ndarray) -> dict[str, object]:
    """Pearson's r and Spearman's rho of (N,) scores; 0 if one side is constant."""
    # Correlation with a constant is undefined; 0 means that nothing was learnt.
    if len(gold) < 2 or np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    from scipy import stats  # half a second

    return {
        "pearson": float(stats.pearsonr(predicted, gold).statistic),
        "spearman": float(stats.spearmanr(predicted, gold).statistic),
    }


def alignment(u: Tensor, v: Tensor) -> float:
    """Mean squared distance between the normalized embeddings of positive pairs, (N, D) each.

    From 0 to 4, lower is better (Wang & Isola 2020, https://arxiv.org/abs/2005.10242, alpha = 2).
    """
    u, v = F.normalize(u.double(), dim=-1), F.normalize(v.double(), dim=-1)
    return (u - v).square().sum(dim=-1).mean().item()


def uniformity(x: Tensor) -> float:
    """log mean exp(-2 d^2) over all pairs of normalized embeddings x (N, D), d their distance.

    Lower is better (Wang & Isola 2020, t = 2).
    """
    x = F.normalize(x.double(), dim=-1)
    # d^2 = 2 - 2 cos for unit vectors; in blocks, to bound the memory.
    total = sum((4 * (block @ x.T) - 4).exp().sum().item() for block in x.split(1024))
    pairs = len(x) * (len(x) - 1)  # ordered pairs of different vectors
    return math.log((total - len(x)) / pairs)  # without each vector's distance to itself


def similarity_metrics(embeddings: Tensor, gold: Tensor) -> dict[str, float | None]:
    """Spearman's rho of the pairs' cosines, alignment and uniformity; nothing is trained.

    embeddings: (N, 2, D). gold: (N,) scores from 0 to 5; pairs of 4 or more are the positive pairs
    of alignment, as in SimCSE.
    """
    u, v = embeddings[:, 0], embeddings[:, 1]
    # In float64, because ranks must not depend on rounding.
    cosines = torch.cosine_similarity(u.double(), v.double(), dim=-1)
    positive = gold >= 4
    return {
        "spearman": correlation_metrics(cosines.numpy(), gold.numpy())["spearman"],
        "alignment": alignment(u[positive], v[positive]) if positive.any() else None,
        "uniformity": uniformity(embeddings.flatten(0, 1)),
    }


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of N rows, (N, D) and (N, E).

    ||Y'X||^2 / (||X'X|| ||Y'Y||) with centred columns and Frobenius norms: from 0 to 1, and the
    same if either is rotated or scaled (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414).
    """
    x, y = (v.double() - v.double().mean(dim=0) for v in (x, y))
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()
