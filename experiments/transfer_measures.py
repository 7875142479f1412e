"""The scores that `transfer` measures, with and without heads, on the sets in `SETS`."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from datasets import Batch, TaskDataset, TokenizedDataset, read_examples, sample_rows
from engine.metrics import correlation_metrics, linear_cka, similarity_metrics
from model import SentenceEncoder, pool
from prediction import compute_rows, embed_dataset, predict
from tasks import TASKS

CKA_SENTENCES = 1000


@dataclass(frozen=True)
class EvalSet:
    """Labelled rows that no run was trained on."""

    title: str
    task: str  # its columns and labels describe the files
    files: tuple[str, ...]  # in --data_dir
    in_domain: bool = False

    @property
    def head(self) -> str:
        """The task whose head predicts the rows."""
        return "sst" if self.task == "cfimdb" else self.task


SETS = (
    EvalSet("SST", "sst", ("ids-sst-dev.csv",), in_domain=True),
    # All labelled rows, because no run was trained on any.
    EvalSet("CFIMDB", "cfimdb", ("ids-cfimdb-train.csv", "ids-cfimdb-dev.csv")),
    EvalSet("Quora", "para", ("quora-dev.csv",), in_domain=True),
    EvalSet("MRPC", "para", ("ood/mrpc.csv",)),
    EvalSet("PAWS", "para", ("ood/paws.csv",)),
    EvalSet("STS", "sts", ("sts-dev.csv",), in_domain=True),
    EvalSet("SICK-R", "sts", ("ood/sick-r.csv",)),
    EvalSet("STS12 OnWN", "sts", ("ood/sts12-onwn.csv",)),
    EvalSet("STS12 SMTnews", "sts", ("ood/sts12-smtnews.csv",)),
    EvalSet("STS14 tweet-news", "sts", ("ood/sts14-tweet-news.csv",)),
    EvalSet("STS16 plagiarism", "sts", ("ood/sts16-plagiarism.csv",)),
)
PAIR_FILES = {"para": "quora-train.csv", "sts": "sts-train.csv"}  # that runs are trained on
FILES = ("ids-sst-train.csv", *PAIR_FILES.values(), *(file for s in SETS for file in s.files))


def pair_key(texts: Sequence[str]) -> frozenset[str]:
    """The sentences of a row, whatever their order, case and punctuation."""
    return frozenset(" ".join(re.findall(r"\w+", text.lower())) for text in texts)


@cache
def trained_pairs(data_dir: Path) -> set[frozenset[str]]:
    """The pairs of the training files: STS has rows from MRPC and SICK."""
    return {
        pair_key(example.texts)
        for task, file in PAIR_FILES.items()
        for example in read_examples(data_dir / file, TASKS[task])[0]
    }


def polarity(logits: Tensor) -> Tensor:
    """Logits (N, 5) of SST's classes -> 0 negative or 1 positive, (N,) int64.

    Classes 0 and 1 are negative, 3 and 4 positive; class 2 goes to the side that is more probable.
    """
    probabilities, predicted = logits.softmax(dim=-1), logits.argmax(dim=-1)
    positive = probabilities[:, 3:].sum(dim=-1) > probabilities[:, :2].sum(dim=-1)
    return torch.where(predicted == 2, positive, predicted > 2).long()


def evaluate_set(data: EvalSet, values: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Metrics of predicted classes, logits of a paraphrase, or similarities, (N,) each."""
    if data.head == "sts":
        return correlation_metrics(values, gold)
    if data.head == "sst":
        return {"accuracy": float(np.mean(values == gold))}
    # A threshold that fits Quora may not fit here; average precision needs none.
    precision = float(average_precision_score(gold, values))
    return {"accuracy": float(np.mean((values > 0) == gold)), "average precision": precision}


def features(vectors: Tensor) -> np.ndarray:
    """Embeddings (N, 1, D) -> (N, D); of pairs, (N, 2, D) -> [|u - v|; u * v], (N, 2 D).

    As in SentEval (Conneau & Kiela 2018, https://arxiv.org/abs/1803.05449).
    """
    if vectors.size(1) == 1:
        return vectors[:, 0].numpy()
    u, v = vectors.unbind(dim=1)
    return torch.cat([(u - v).abs(), u * v], dim=-1).numpy()


def logistic_accuracy(
    x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> float:
    """Test accuracy of a logistic regression of features (N, F) and classes (N,).

    The strength of its L2 regularisation is chosen by 5-fold cross-validation on x and y.
    """
    # Standardised: the embeddings of one encoder may be much longer than another's.
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1]}
    return float(GridSearchCV(pipeline, grid, cv=5).fit(x, y).score(test_x, test_y))


def layer_means(encoder: SentenceEncoder, dataset: TokenizedDataset, batch_size: int) -> Tensor:
    """Token means of BERT's embeddings and of each layer's output, (N, layers + 1, D)."""
    layers = encoder.bert.bert_layers
    states: list[Tensor] = []

    def means(batch: Batch) -> Tensor:
        states.clear()
        mask, length = batch.attention_mask, batch.input_ids.size(1)
        encoder.run_bert(batch.input_ids, mask)  # in bf16 it may pad the batch further
        outputs = [{"last_hidden_state": x[:, :length]} for x in states]
        return torch.stack([pool(x, mask, "mean") for x in outputs], dim=1)

    with ExitStack() as hooks:  # removed at the end of the block
        embeddings = layers[0].register_forward_pre_hook(lambda _, x: states.append(x[0]))
        hooks.enter_context(embeddings)
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda _, __, x: states.append(x)))
        size = (len(layers) + 1, encoder.bert.config.hidden_size)
        return compute_rows(encoder, dataset, batch_size, means, size, title="layers").cpu()


@dataclass
class Measurement:
    """Scores of one encoder, "how/set/metric" -> value."""

    encoder: SentenceEncoder
    batch_size: int
    data_dir: Path
    limit: int | None
    scores: dict[str, float | None] = field(default_factory=dict)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    embedded: dict[str, tuple[Tensor, np.ndarray]] = field(default_factory=dict)  # by file
    unseen: dict[str, np.ndarray] = field(default_factory=dict)  # file -> (N,) bool

    def read(self, file: str, task: str, encoding: str = "separate") -> TaskDataset:
        """The rows of a file, or `limit` of them; `unseen` says which no run was trained on."""
        path, tokenizer = self.data_dir / file, self.encoder.tokenizer
        dataset = TaskDataset(path, TASKS[task], tokenizer, encoding, limit=self.limit)
        outside = file.startswith("ood/")
        trained = trained_pairs(self.data_dir) if outside else set()
        keys = map(pair_key, (example.texts for example in dataset.examples))
        self.unseen[file] = np.array([key not in trained for key in keys])
        return dataset

    def embed(self, file: str, task: str) -> tuple[Tensor, np.ndarray]:
        """Embeddings of the unseen rows, (N, 1, D), or of pairs, (N, 2, D), and labels (N,)."""
        if file not in self.embedded:
            dataset = self.read(file, task)
            vectors = embed_dataset(self.encoder, dataset, self.batch_size).cpu()
            keep = self.unseen[file]
            self.embedded[file] = vectors[keep], dataset.labels.numpy()[keep]
        return self.embedded[file]

    def add_set(self, data: EvalSet) -> None:
        """Scores of the head, if there is one, and of the cosine, if the rows are pairs."""
        parts = [self.embed(file, data.task) for file in data.files]
        vectors, gold = torch.cat([v for v, _ in parts]), np.concatenate([g for _, g in parts])
        seen = sum(int((~self.unseen[file]).sum()) for file in data.files)
        self.rows[data.title] = {"rows": len(gold), "left out": seen}
        if data.head == "para" or data.task == "cfimdb":  # the scores of chance
            self.rows[data.title]["positive"] = float(gold.mean())
        found: dict[str, Tensor] = {}
        if data.head in self.encoder.decoders:
            logits = self.head_logits(data, vectors)
            found["head"] = TASKS[data.head].labels.predict(logits)
            if data.task == "cfimdb":
                found["head"] = polarity(logits)
            elif data.task == "para":
                found["head"] = logits[:, 0]
        if vectors.size(1) == 2:
            u, v = vectors.double().unbind(dim=1)  # ranks must not depend on rounding
            found["cosine"] = torch.cosine_similarity(u, v, dim=-1)
        for how, values in found.items():
            for metric, score in evaluate_set(data, values.numpy(), gold).items():
                # A cosine has no threshold, and no reason to be linear in the gold score.
                if how == "head" or metric in ("average precision", "spearman"):
                    self.scores[f"{how}/{data.title}/{metric}"] = score

    def head_logits(self, data: EvalSet, vectors: Tensor) -> Tensor:
        """Logits (N, C) of the rows whose sentences have these embeddings."""
        model, task = self.encoder, TASKS[data.head]
        if model.embeddings_per_row(task) == vectors.size(1):
            with model.evaluating():
                # All first sentences, then all second ones.
                stacked = vectors.to(model.device).transpose(0, 1).flatten(0, 1)
                return model.decode(task.name, stacked).cpu()
        datasets = [self.read(file, data.task, "joint") for file in data.files]
        logits = [predict(model, dataset, self.batch_size) for dataset in datasets]
        return torch.cat([x[self.unseen[f]] for x, f in zip(logits, data.files, strict=True)])

    def add_logistic(self) -> None:
        """Logistic regressions on embeddings: SST and CFIMDB on dev, MRPC on a quarter of it."""
        for title, task in (("SST", "sst"), ("CFIMDB", "cfimdb")):
            (x, y), (test_x, test_y) = (
                self.embed(TASKS[task].file(split), task) for split in ("train", "dev")
            )
            accuracy = logistic_accuracy(features(x), y, features(test_x), test_y)
            self.scores[f"logistic/{title}/accuracy"] = accuracy
        vectors, gold = self.embed("ood/mrpc.csv", "para")
        options = {"test_size": 0.25, "stratify": gold, "random_state": 0}
        x, test_x, y, test_y = train_test_split(features(vectors), gold, **options)
        self.scores["logistic/MRPC/accuracy"] = logistic_accuracy(x, y, test_x, test_y)

    def add_geometry(self) -> None:
        """Alignment and uniformity of the pairs of STS dev."""
        vectors, gold = self.embed("sts-dev.csv", "sts")
        metrics = similarity_metrics(vectors, torch.from_numpy(gold))
        self.scores |= {f"geometry/STS/{k}": metrics[k] for k in ("alignment", "uniformity")}

    def cka(self, untouched: SentenceEncoder) -> list[float]:
        """Linear CKA to the untouched encoder, by layer, of sentences of STS dev."""
        path = self.data_dir / "sts-dev.csv"
        examples, _, _ = read_examples(path, TASKS["sts"], limit=self.limit)
        texts = sample_rows([text for e in examples for text in e.texts], CKA_SENTENCES)
        dataset = TokenizedDataset("sts", path, [texts], self.encoder.tokenizer)
        mine, theirs = (layer_means(e, dataset, self.batch_size) for e in (self.encoder, untouched))
        return list(map(linear_cka, mine.unbind(dim=1), theirs.unbind(dim=1)))
