"""The course's csv files as batches: read, tokenised once, grouped by length.

Which rows are trained on, in which order, is a pure function of (files, batch size, seed, epoch):
resuming needs only a step number, and a pass over a set sees every row exactly once.

The course lower-cases pairs and puts spaces around ". ? , '" before tokenising. We do not:
the tokenizer does both if the model is uncased, and a cased model should see the case.
"""

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine import distributed
from engine.csv_reader import read_rows
from engine.errors import UserError
from tasks import Task
from tokenizer import BertTokenizer

NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # premise, entailment, contradiction
CHUNK = 8192  # texts tokenised at a time; bounds the memory of the library's Encoding objects
POOL = 50  # batches sorted by length together: 3-5% padding, and shuffling stays thorough

Row = TypeVar("Row")


# ---------------------------------------------------------------------------- reading files


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its id, its one or two sentences, and its label (None in a test file)."""

    id: str
    texts: tuple[str, ...]
    label: float | None


def read_examples(
    path: Path, task: Task, labelled: bool | None = True, limit: int | None = None
) -> tuple[list[Example], int, str]:
    """Read one of the course's tab-separated files, whose rows `task` describes.

    labelled: whether rows have labels; None: only if the file has the column. Rows with an empty
    label, of which the course's files have some, are skipped.

    Returns the examples in file order, the number of skipped rows, and the file's sha256.
    """
    column = task.label_column
    required, optional = ([column] if labelled else []), ([column] if labelled is None else [])
    rows, checksum = read_rows(path, ["id", *task.text_columns, *required], "\t", optional)
    labelled = column in rows[0][1]
    examples = []
    lines: dict[str, int] = {}
    for line, row in rows:
        name, where = row["id"], f"{path}, line {line}"
        if not name.strip() or not name.isprintable():
            raise UserError(f"{where}: id is {name[:40]!r}; give it a printable id")
        if lines.setdefault(name, line) != line:
            raise UserError(f"{where}: id {name[:40]!r} is already in line {lines[name]}")
        label = _parse_label(row[column], task, where) if labelled else None
        if label is not None or not labelled:
            examples.append(Example(name, tuple(row[c] for c in task.text_columns), label))
    if not examples:
        raise UserError(f"{path}: none of its {len(rows)} rows has a label")
    return sample_rows(examples, limit), len(rows) - len(examples), checksum


def _parse_label(text: str, task: Task, where: str) -> float | None:
    """The label, None if it is empty; UserError if it is not one of the task's."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    labels = task.labels
    if not labels.low <= value <= labels.high or (labels.integer and value != int(value)):
        kind = "whole number" if labels.integer else "number"
        raise UserError(
            f"{where}: {task.label_column} is {text[:40]!r}; expected a {kind} from"
            f" {labels.low:g} to {labels.high:g}"
        )
    return value


def sample_rows(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """All rows, or a fixed random subset of `limit` rows, in their original order.

    Not the first rows: the course's SST file begins with its positive sentences.
    (Reservoir sampling: Vitter 1985, https://doi.org/10.1145/3147.3165, algorithm R.)
    """
    kept = list(range(len(rows)))[:limit]
    # Row number n replaces a kept one with probability limit / (n + 1): in the end each row has
    # been kept with the same probability.
    rng = random.Random(0)
    for number in range(len(kept), len(rows)):
        if (place := rng.randrange(number + 1)) < len(kept):
            kept[place] = number
    return [rows[i] for i in sorted(kept)]


def read_triples(path: Path, limit: int | None = None) -> tuple[list[tuple[str, ...]], str]:
    """The (premise, entailment, contradiction) rows of SimCSE's NLI file, and its sha256."""
    rows, checksum = read_rows(path, NLI_COLUMNS, ",")
    for line, row in rows:
        for column, text in row.items():
            if not text.strip():
                raise UserError(f"{path}, line {line}: {column} is empty; write a sentence there")
    return sample_rows([tuple(row.values()) for _, row in rows], limit), checksum


# ---------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Rows of one task as tensors.

    Pairs that are encoded separately are (2 B, T): all first sentences, then all second ones, so
    that a pair takes one forward pass.
    """

    dataset: "TokenizedDataset"
    rows: np.ndarray  # B row numbers of the dataset
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 at padding
    token_type_ids: Tensor | None  # (B, T) int64 for pairs encoded jointly
    labels: Tensor | None  # (B,) in the task's dtype; None in a test set
    # Row numbers of the batch over all processes. `rows` is this process's `distributed.rank_slice`
    # of them, which may be empty.
    global_rows: np.ndarray

    @property
    def task(self) -> str:
        """The name of the rows' task."""
        return self.dataset.name

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"task {self.task}, {self.dataset.describe_rows(self.global_rows)}"

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return replace(self, **moved)


class TokenizedDataset:
    """Rows of one or several sentences each, tokenised once."""

    labels: Tensor | None = None

    def __init__(
        self,
        name: str,  # of the task
        path: Path,
        columns: Sequence[Sequence[str]],  # the first sentence of every row, the second, ...
        tokenizer: BertTokenizer,
        joint: bool = False,  # encode two sentences as one sequence, "[CLS] a [SEP] b [SEP]"
        unit: str = "rows",  # the word for rows in messages
        min_batch_size: int = 1,  # a smaller last training batch joins the one before
        checksum: str = "",  # sha256 of the file
    ):
        self.name = name
        self.path = path
        self.checksum = checksum
        self.unit = unit
        self.min_batch_size = min_batch_size
        self.pad_token_id = tokenizer.pad_token_id
        self.embeddings_per_row = 1 if joint else len(columns)
        self.token_ids: list[list[np.ndarray]] = [[] for _ in range(self.embeddings_per_row)]
        self.first_lengths: list[int] | None = [] if joint else None  # tokens of segment 0
        self.truncated = 0  # rows cut at the model's limit
        # Token ids take a fraction of the memory of the tokenizer's own objects.
        for start in range(0, len(columns[0]), CHUNK):
            self._tokenize([column[start : start + CHUNK] for column in columns], tokenizer)
        # (N,), tokens of each row's longest sequence.
        self.lengths = np.array([[len(ids) for ids in c] for c in self.token_ids]).max(axis=0)

    def _tokenize(self, columns: Sequence[Sequence[str]], tokenizer: BertTokenizer) -> None:
        limit = tokenizer.max_length
        if self.first_lengths is not None:
            encoded = [tokenizer.encode_batch(*columns, max_length=limit)]
            self.first_lengths += [e.type_ids.count(0) for e in encoded[0]]
        else:
            encoded = [tokenizer.encode_batch(column, max_length=limit) for column in columns]
        for ids, encodings in zip(self.token_ids, encoded, strict=True):
            ids.extend(np.array(e.ids, dtype=np.int32) for e in encodings)
        self.truncated += sum(any(e.overflowing for e in row) for row in zip(*encoded, strict=True))

    def __len__(self) -> int:
        return len(self.token_ids[0])

    def __str__(self) -> str:
        truncated = f", {self.truncated} truncated to the model's limit" if self.truncated else ""
        return f"{self.path}: {len(self):,} {self.unit}{truncated}"

    def describe_rows(self, rows: np.ndarray) -> str:
        """These rows, for a message."""
        return f"{self.unit} " + " ".join(str(row + 1) for row in rows)

    def batch(self, rows: np.ndarray, global_rows: np.ndarray | None = None) -> Batch:
        """The batch of these row numbers, padded to its longest sentence."""
        sentences = [column[row] for column in self.token_ids for row in rows]
        width = max(map(len, sentences), default=0)
        # All first sentences, then all second ones, padded on the right.
        input_ids = np.full((len(sentences), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(sentences), width), dtype=np.int64)
        for i, ids in enumerate(sentences):
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
        types = None
        if self.first_lengths is not None:
            firsts = np.array([self.first_lengths[row] for row in rows])[:, None]
            # 1 from the second sentence on, 0 before it and at padding.
            types = torch.from_numpy((np.arange(width) >= firsts) * attention_mask)
        return Batch(
            self,
            rows,
            torch.from_numpy(input_ids),
            torch.from_numpy(attention_mask),
            types,
            None if self.labels is None else self.labels[torch.from_numpy(rows)],
            rows if global_rows is None else global_rows,
        )

    def num_batches(self, batch_size: int) -> int:
        """The number of training batches in a pass over the set."""
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 0 and (rest >= self.min_batch_size or not full))

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Row numbers of each batch of one pass: shuffled, and each batch of similar lengths."""
        # Batches of similar length waste little on padding; shuffling before sorting in pools, and
        # shuffling the batches, keeps the order random.
        rng = np.random.default_rng([seed, epoch, zlib.crc32(self.name.encode())])
        order = rng.permutation(len(self))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), POOL * batch_size):
            pool = order[start : start + POOL * batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        # The last batch may be too short to train on alone.
        if len(batches) > self.num_batches(batch_size):
            batches[-2:] = [np.concatenate(batches[-2:])]
        return [batches[i] for i in rng.permutation(len(batches))]

    def eval_batches(
        self, batch_size: int, rows: np.ndarray | None = None, shard: bool = True
    ) -> Iterator[Batch]:
        """Every row (or each of `rows`) once, longest first: too large a batch fails at once.

        With `shard`, the processes take turns at the batches.
        """
        rank, world_size = (distributed.rank(), distributed.world_size()) if shard else (0, 1)
        order = np.arange(len(self)) if rows is None else rows
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        for start in range(rank * batch_size, len(order), world_size * batch_size):
            yield self.batch(order[start : start + batch_size])


class TaskDataset(TokenizedDataset):
    """One file of one task. Attributes: `task`, `examples`, `unlabelled` (skipped rows)."""

    def __init__(
        self,
        path: Path,
        task: Task,
        tokenizer: BertTokenizer,
        pair_encoding: str = "separate",
        labelled: bool | None = True,
        limit: int | None = None,
    ):
        self.task = task
        self.examples, self.unlabelled, checksum = read_examples(path, task, labelled, limit)
        columns = list(zip(*(example.texts for example in self.examples), strict=True))
        joint = len(columns) == 2 and pair_encoding == "joint"
        super().__init__(task.name, path, columns, tokenizer, joint, checksum=checksum)
        if self.examples[0].label is not None:
            self.labels = torch.tensor([e.label for e in self.examples], dtype=task.labels.dtype)

    def __str__(self) -> str:
        note = f", {self.unlabelled} without a label left out" if self.unlabelled else ""
        return super().__str__() + note

    def describe_rows(self, rows: np.ndarray) -> str:
        """The rows by their ids."""
        return "rows with ids " + " ".join(self.examples[row].id for row in rows)
