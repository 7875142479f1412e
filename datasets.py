"""The course's csv files as batches: read, tokenised once, batched by length, tasks mixed.

Which rows are trained on, in which order, is a pure function of (files, batch size, seed, epoch):
it needs no state beyond a step number, and every row is seen exactly once in a pass over its set.

The course lower-cases pairs and spaces ". ? , '" apart before tokenising. That is left out: the
tokenizer does both where the model is uncased, and a cased model is meant to see the case.
"""

import csv
import hashlib
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor

import distributed
from checkpoint import UserError, check_file, digest, read_tensors, unchanged, write_tensors
from tasks import Task
from tokenizer import TOKENISED_AT_ONCE, BertTokenizer

POOL = 50  # batches that are sorted by length together: 3-5% padding, and shuffling stays thorough
DELIMITERS = {"\t": "tab", ",": "comma"}

LONGEST = 10**6  # characters of a line or a field; what is longer is no csv file of sentences
NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and (by surrogateescape) bytes beyond UTF-8

csv.field_size_limit(LONGEST)
Row = TypeVar("Row")


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its id, its one or two sentences, its label (None in a test file)."""

    id: str
    texts: tuple[str, ...]
    label: float | None


def read_rows(
    path: Path, wanted: Sequence[str], delimiter: str, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row of a csv file (a header line, default csv quoting, UTF-8), after its line's number.

    A byte-order mark, any kind of line ends, blank lines, columns in another order and columns
    beside those wanted do no harm. Everything else does: column names are as the course writes
    them, capitals too, and every row has as many columns as the header.

    Args:
        path: the file. At most about `LONGEST` characters of it are in memory at a time.
        wanted: the columns that are returned.
        delimiter: between columns.
        optional: columns that are returned too where the file has them.

    Raises:
        UserError: what cannot be read, by file and line.
    """
    start = 1  # the line that the next row starts in
    try:
        check_file(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
            header = next(filter(None, rows), None)
            there = [column for column in optional if column in (header or [])]
            places = _find_columns(path, header, [*wanted, *there], delimiter)
            start = rows.line_num + 1
            for row in rows:
                line, start = start, rows.line_num + 1
                if not row:
                    continue
                if fault := _fault(row, len(header), start - line, delimiter):
                    raise UserError(f"{path}, line {line}: {fault}")
                yield line, {column: row[place] for column, place in places.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file: fetch the course's data with ./setup.sh --data, or try the"
            " sample with --data_dir data/sample"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a csv file") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: not csv ({error}); mend its quotes") from None


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a text file; UserError for one that is too long or not UTF-8, by number."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), start=1):
        if len(line) > LONGEST:
            raise UserError(
                f"{path}, line {number}: longer than {LONGEST:,} characters; expected a csv file"
                " with a row a line"
            )
        if bad := NOT_TEXT.search(line):
            byte = ord(bad.group()) & 0xFF
            raise UserError(
                f"{path}, line {number}: not UTF-8 (byte {byte:#04x}): save it as UTF-8 text"
            )
        yield line


def _find_columns(
    path: Path, header: list[str] | None, wanted: Sequence[str], delimiter: str
) -> dict[str, int]:
    """The place of each column that is wanted; UserError where the header lacks it, or has two."""
    if header is None:
        raise UserError(f"{path}: empty; expected a header line and rows")
    counts = [header.count(column) for column in wanted]
    if 0 in counts and len(header) == 1:
        name = DELIMITERS[delimiter]
        raise UserError(
            f"{path}, line 1: no {name} in the header {header[0][:60]!r}; columns must be"
            f" separated by {name}s"
        )
    for column, count in zip(wanted, counts, strict=True):
        if count != 1:
            found = ", ".join(map(repr, header))
            raise UserError(
                f"{path}, line 1: {count or 'no'} column{'s' * (count > 1)} {column!r}; found"
                f" {found[:200]}; name it so, once"
            )
    return {column: header.index(column) for column in wanted}


def _fault(row: list[str], columns: int, lines: int, delimiter: str) -> str | None:
    """What is wrong with a row that was written over so many lines; None where nothing is."""
    if lines > 1 and any(delimiter in field and re.search("[\n\r]", field) for field in row):
        return f"a quoted field swallows {lines} lines; close its quote, or take its line ends out"
    if len(row) != columns:
        return (
            f"has not the {columns} columns of the header, but {len(row)}; is a"
            f" {DELIMITERS[delimiter]} or a quote missing?"
        )
    return None


def read(
    path: Path, task: Task, labelled: bool | None = True, limit: int | None = None
) -> tuple[list[Example], int]:
    """Read a tab-separated file of the course.

    Every row has an id of its own, by which a leaderboard file names it. An empty sentence is a
    sentence. A row whose label is empty is left out, and counted: the course's own files have some.

    Args:
        path: the file.
        task: says which columns hold the id, the sentences and the label.
        labelled: whether rows carry labels, None where the header decides.
        limit: give so many of the rows (`some`).

    Returns:
        The examples in file order, and the number of rows left out for want of a label.

    Raises:
        UserError: what cannot be read, by file and line.
    """
    unlabelled = 0

    def all_examples() -> Iterator[Example]:
        nonlocal unlabelled, labelled
        lines: dict[str, int] = {}  # id -> where it is
        wanted = ["id", *task.texts, *([task.label] if labelled else [])]
        optional = [task.label] if labelled is None else []
        for line, row in read_rows(path, wanted, "\t", optional):
            if labelled is None:
                labelled = task.label in row
            name = row["id"]
            if not name.strip() or not name.isprintable():
                raise UserError(
                    f"{path}, line {line}: id is {name[:40]!r}; give the row a printable id"
                )
            if lines.setdefault(name, line) != line:
                raise UserError(
                    f"{path}, line {line}: id {name[:40]!r} is line {lines[name]}'s; give each its"
                    " own"
                )
            label = None
            if labelled:
                try:
                    label = _label(row[task.label], task)
                except UserError as error:
                    raise UserError(f"{path}, line {line}: {error}") from None
                if label is None:
                    unlabelled += 1
                    continue
            yield Example(name, tuple([row[column] for column in task.texts]), label)

    examples = some(all_examples(), limit)
    if not examples:
        what = f"none of its {unlabelled} rows has a label" if unlabelled else "no rows"
        raise UserError(f"{path}: {what}; expected a header and at least one row")
    return examples, unlabelled


def some(rows: Iterable[Row], limit: int | None) -> list[Row]:
    """All rows, or `limit` of them, in their order: any as likely as any other, always the same.

    The first ones would not do: the course's SST has its positive sentences first. No more than
    `limit` rows are held (Vitter 1985, https://doi.org/10.1145/3147.3165, algorithm R).
    """
    if limit is None:
        return list(rows)
    kept: list[tuple[int, Row]] = []
    rng = random.Random(0)
    for number, row in enumerate(rows):
        if number < limit:
            kept.append((number, row))
        elif (place := rng.randrange(number + 1)) < limit:
            kept[place] = number, row
    return [row for _, row in sorted(kept, key=itemgetter(0))]


def _label(text: str, task: Task) -> float | None:
    """The label that `text` spells, None where it is empty; UserError where it is invalid."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not task.low <= value <= task.high or (task.whole and value != int(value)):
        kind = "whole number" if task.whole else "number"
        raise UserError(
            f"{task.label} is {text[:40]!r}; expected a {kind} from {task.low:g} to {task.high:g}"
        )
    return value


# ---------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Rows of one task as tensors.

    `input_ids`, `attention_mask` (and `token_type_ids`, for jointly encoded pairs): (B, T); for
    separately encoded pairs (2 B, T), all first sentences and then all second ones, so that a pair
    goes through BERT in one forward pass. `labels`: (B,) in the task's dtype, None in a test set.
    `rows`: the B row numbers in `source`. `whole`: those of the batch over all processes, of which
    these are a share (`distributed.own`), maybe none.
    """

    source: "Sentences"
    rows: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor | None
    whole: np.ndarray

    @property
    def task(self) -> str:
        """The name of the rows' task."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"task {self.task}, {self.source.names(self.whole)}"

    def complete(self) -> "Batch":
        """The batch over all processes."""
        if len(self.rows) == len(self.whole):
            return self
        return self.source.batch(self.whole).to(self.input_ids.device)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "attention_mask", "token_type_ids", "labels")
        tensors = {name: getattr(self, name) for name in names}
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return replace(self, **moved)


class Sentences:
    """Rows of one or several sentences, tokenised once: what batches are made of.

    Args:
        name: of the rows' task.
        path: the file that they are from.
        columns: the first sentence of every row, the second of every row, ...
        joint: whether two sentences become one sequence, "[CLS] a [SEP] b [SEP]".
        unit: what messages call the rows.
        least: rows of the smallest batch for training; a shorter last one joins the one before.
        tokens: a folder where `save_tokens` leaves these sentences' token ids, or has left them.

    Attributes: `truncated` (rows with a sentence beyond the model's limit), `width` (embeddings a
    row), `lengths` (tokens of each row's longest sequence), `labels` (none here), `digest` (the
    file's sha256, where it is known).
    """

    labels: Tensor | None = None
    digest: str | None = None

    def __init__(
        self,
        name: str,
        path: Path,
        columns: Sequence[Sequence[str]],
        tokenizer: BertTokenizer,
        joint: bool = False,
        unit: str = "rows",
        least: int = 1,
        tokens: Path | None = None,
    ):
        self.name = name
        self.unit = unit
        self.least = least
        self.path = path
        self.pad_token_id = tokenizer.pad_token_id
        self.width = 1 if joint else len(columns)
        # Token ids of each embedding, ids[k][row]. Jointly encoded pairs have one list.
        self.ids: list[list[np.ndarray]] = [[] for _ in range(self.width)]
        self.first_lengths: list[int] | None = [] if joint else None
        self.truncated = 0
        self.tokens = tokens and tokens / _tokens_name(columns, tokenizer, joint)
        if not self.tokens or not self._recall(len(columns[0]), tokenizer.vocab_size):
            for start in range(0, len(columns[0]), TOKENISED_AT_ONCE):
                chunk = [column[start : start + TOKENISED_AT_ONCE] for column in columns]
                self._tokenise(chunk, tokenizer)
        self.lengths = np.array([[len(ids) for ids in column] for column in self.ids]).max(axis=0)

    def _tokenise(self, columns: list[Sequence[str]], tokenizer: BertTokenizer) -> None:
        limit = tokenizer.max_length
        if self.first_lengths is not None:
            encoded = [tokenizer.encode_batch(*columns, max_length=limit)]
            self.first_lengths += [e.type_ids.count(0) for e in encoded[0]]
        else:
            encoded = [tokenizer.encode_batch(column, max_length=limit) for column in columns]
        for ids, encodings in zip(self.ids, encoded, strict=True):
            ids.extend(np.array(e.ids, dtype=np.int32) for e in encodings)
        self.truncated += sum(any(e.overflowing for e in row) for row in zip(*encoded, strict=True))

    def save_tokens(self) -> None:
        """Leave the token ids in the folder `tokens`, for who reads the same sentences again."""
        if self.tokens.exists():
            return
        tensors = {"truncated": torch.tensor([self.truncated])}
        for k, column in enumerate(self.ids):
            tensors[f"ids.{k}"] = torch.from_numpy(np.concatenate(column))
            tensors[f"lengths.{k}"] = torch.tensor([len(ids) for ids in column])
        if self.first_lengths is not None:
            tensors["first_lengths"] = torch.tensor(self.first_lengths)
        write_tensors(self.tokens, tensors)

    def _recall(self, rows: int, vocab_size: int) -> bool:
        """Take up what `save_tokens` left; False where it is not there, or damaged."""
        try:
            found = {name: t.numpy() for name, t in read_tensors(self.tokens).items()}
            columns = []
            for k in range(self.width):
                flat, lengths = found[f"ids.{k}"], found[f"lengths.{k}"]
                fits = len(lengths) == rows and lengths.min() > 0 and lengths.sum() == len(flat)
                if not fits or flat.min() < 0 or flat.max() >= vocab_size:
                    return False
                columns.append(np.split(flat, np.cumsum(lengths)[:-1]))
            firsts = found["first_lengths"].tolist() if self.first_lengths is not None else None
            truncated = int(found["truncated"][0])
        except (UserError, KeyError, ValueError, TypeError, IndexError):
            return False
        self.ids, self.first_lengths, self.truncated = columns, firsts, truncated
        return True

    def __len__(self) -> int:
        return len(self.ids[0])

    def __str__(self) -> str:
        notes = [f"{self.path}: {len(self):,} {self.unit}", *self.notes()]
        if self.truncated:
            notes.append(f"{self.truncated} truncated to the model's limit")
        return ", ".join(notes)

    def notes(self) -> list[str]:
        """What else there is to say of the rows."""
        return []

    def names(self, rows: np.ndarray) -> str:
        """How a message calls these rows."""
        return f"{self.unit} " + " ".join(str(row + 1) for row in rows)

    def batch(self, rows: np.ndarray, whole: np.ndarray | None = None) -> Batch:
        """The batch of these row numbers, padded to its longest sentence; or a share of a whole."""
        sentences = [column[row] for column in self.ids for row in rows]
        width = max(map(len, sentences), default=0)
        input_ids = np.full((len(sentences), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(sentences), width), dtype=np.int64)
        for i, ids in enumerate(sentences):
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
        types = None
        if self.first_lengths is not None:
            firsts = np.array([self.first_lengths[row] for row in rows])[:, None]
            types = torch.from_numpy((np.arange(width) >= firsts) * attention_mask)
        return Batch(
            self,
            rows,
            torch.from_numpy(input_ids),
            torch.from_numpy(attention_mask),
            types,
            None if self.labels is None else self.labels[torch.from_numpy(rows)],
            rows if whole is None else whole,
        )

    def share(self, whole: np.ndarray) -> Batch:
        """This process's share of the batch of these row numbers."""
        return self.batch(whole[distributed.own(len(whole))], whole)

    def batch_count(self, batch_size: int) -> int:
        """The number of batches in a pass over the set."""
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest > 0 and (rest >= self.least or not whole))

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Row numbers of each batch of a pass over the set: shuffled, of like length."""
        rng = np.random.default_rng([seed, epoch, zlib.crc32(self.name.encode())])
        order = rng.permutation(len(self))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), POOL * batch_size):
            pool = order[start : start + POOL * batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        if len(batches) > self.batch_count(batch_size):
            batches[-2:] = [np.concatenate(batches[-2:])]
        return [batches[i] for i in rng.permutation(len(batches))]

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, longest first (a batch too large for the memory then fails at once).

        Of several processes each gets every so-many-th batch, with the padding that it always has.
        """
        order = np.argsort(-self.lengths, kind="stable")
        first = distributed.rank() * batch_size
        for start in range(first, len(order), distributed.size() * batch_size):
            yield self.batch(order[start : start + batch_size])


def _tokens_name(columns: Sequence[Sequence[str]], tokenizer: BertTokenizer, joint: bool) -> str:
    """A file name for all that decides the token ids of these sentences."""
    found = hashlib.sha256(f"{joint} {tokenizer.fingerprint()}".encode())
    for column in columns:
        for text in column:  # each after its length, or two could look like one
            encoded = text.encode("utf-8", "surrogatepass")
            found.update(b"%d " % len(encoded) + encoded)
        found.update(b"end ")
    return found.hexdigest()[:32] + ".safetensors"


class TaskData(Sentences):
    """One file of one task. Attributes: `task`, `examples`, `unlabelled` (rows left out)."""

    def __init__(
        self,
        path: Path,
        task: Task,
        tokenizer: BertTokenizer,
        pair_encoding: str = "separate",
        labelled: bool | None = True,
        limit: int | None = None,
        tokens: Path | None = None,
    ):
        self.task = task
        with unchanged(path):
            self.examples, self.unlabelled = read(path, task, labelled, limit)
            self.digest = digest(path)
        columns = list(zip(*(example.texts for example in self.examples), strict=True))
        joint = len(columns) == 2 and pair_encoding == "joint"
        super().__init__(task.name, path, columns, tokenizer, joint, tokens=tokens)
        if self.examples[0].label is not None:
            self.labels = torch.tensor([e.label for e in self.examples], dtype=task.dtype)

    def notes(self) -> list[str]:
        """How many rows were left out."""
        return [f"{self.unlabelled} without a label left out"] if self.unlabelled else []

    def names(self, rows: np.ndarray) -> str:
        """The rows by their ids."""
        return "rows with ids " + " ".join(self.examples[row].id for row in rows)


NLI_COLUMNS = ("sent0", "sent1", "hard_neg")  # premise, entailment, contradiction


def read_triples(path: Path, limit: int | None = None) -> list[tuple[str, ...]]:
    """The (premise, entailment, contradiction) rows of a comma-separated file like SimCSE's.

    Raises:
        UserError: what cannot be read, by file and line; a sentence that is empty.
    """

    def all_triples() -> Iterator[tuple[str, ...]]:
        for line, row in read_rows(path, NLI_COLUMNS, ","):
            for column in NLI_COLUMNS:
                if not row[column].strip():
                    raise UserError(
                        f"{path}, line {line}: {column} is empty; a triple needs its three"
                        " sentences"
                    )
            yield tuple(row[column] for column in NLI_COLUMNS)

    triples = some(all_triples(), limit)
    if not triples:
        raise UserError(f"{path}: no rows; expected a header and at least one row")
    return triples


# ---------------------------------------------------------------------------- mixing tasks

SAMPLINGS = ("roundrobin", "proportional", "annealed")


class Mixture:
    """The steps of a training run over one or several tasks.

    A step is a list of batches of one task: one batch, or `accumulate` of them; a process gets its
    share of each. Each task is an endless stream of steps, pass after pass over its set, and an
    epoch takes the next few of each:

    - `roundrobin`: the tasks in turn (the paper). An epoch is one pass over the smallest set; the
      larger ones go on in the next epoch where they stopped.
    - `proportional`: an epoch is one pass over every set, in random order.
    - `annealed`: as many steps as `proportional`, shared out by (set size)^a, where a falls from 1
      in the first epoch to 0.2 in the last (Stickland & Murray 2019, section 4.2).

    With `together`, each step of `roundrobin` has the batches of every task, as is needed where
    their gradients are compared.
    """

    def __init__(
        self,
        sets: Sequence[Sentences],
        batch_size: int,
        seed: int,
        epochs: int,
        sampling: str = "roundrobin",
        accumulate: int = 1,
        together: bool = False,
    ):
        if sampling not in SAMPLINGS:
            raise UserError(f"--sampling {sampling}: expected one of {', '.join(SAMPLINGS)}")
        if together and sampling != "roundrobin":
            raise UserError(f"--sampling {sampling}: steps with all tasks are roundrobin's alone")
        self.sets = list(sets)
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.sampling = sampling
        self.accumulate = accumulate
        self.together = together
        # Steps in one pass over each set.
        self.passes = [math.ceil(s.batch_count(batch_size) / accumulate) for s in self.sets]

    def shares(self, epoch: int) -> list[int]:
        """How many steps of each task the epoch takes."""
        if self.sampling == "roundrobin":
            return [min(self.passes)] * len(self.passes)
        if self.sampling == "proportional":
            return self.passes
        exponent = 1 - 0.8 * epoch / max(1, self.epochs - 1)
        weights = np.array([len(s) for s in self.sets], dtype=float) ** exponent
        exact = weights / weights.sum() * sum(self.passes)
        shares = np.floor(exact).astype(int)
        # The steps lost to rounding down go to the largest remainders.
        for i in np.argsort(shares - exact, kind="stable")[: sum(self.passes) - shares.sum()]:
            shares[i] += 1
        return shares.tolist()

    def steps_in(self, epoch: int) -> int:
        """The number of steps in an epoch."""
        shares = self.shares(epoch)
        return shares[0] if self.together else sum(shares)

    def order(self, epoch: int) -> list[list[int]]:
        """Which sets each step of the epoch draws from."""
        shares = self.shares(epoch)
        if self.sampling == "roundrobin":
            everyone = list(range(len(shares)))
            return [everyone] * shares[0] if self.together else [[i] for i in everyone] * shares[0]
        rng = np.random.default_rng([self.seed, epoch])
        drawn = rng.permutation(np.repeat(np.arange(len(shares)), shares))
        return [[i] for i in drawn.tolist()]

    def steps(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """The epoch's steps from the `first` on; those before it cost nothing."""
        earlier = [self.shares(e) for e in range(epoch)]
        order = self.order(epoch)
        passed_over = Counter(i for step in order[:first] for i in step)
        position = [
            sum(share[i] for share in earlier) + passed_over[i] for i in range(len(self.sets))
        ]
        rows: dict[int, tuple[int, list[np.ndarray]]] = {}  # set -> (pass, its batches)
        for step in order[first:]:
            batches: list[Batch] = []
            for i in step:
                number, place = divmod(position[i], self.passes[i])
                position[i] += 1
                if i not in rows or rows[i][0] != number:
                    passed = self.sets[i].training_batches(self.batch_size, self.seed, number)
                    rows[i] = number, passed
                start = place * self.accumulate
                chosen = rows[i][1][start : start + self.accumulate]
                batches += [self.sets[i].share(r) for r in chosen]
            yield batches
