"""What a task is, and the model that shares one BERT between tasks.

A task is a row in `TASKS`: its files and columns, its label, its loss, its metric, its way of being
written to a leaderboard. A new task is a new row; nothing else changes.

Where the paper ("Evaluating fine-tuning methods for robust multi-task sentence embeddings") leaves
something open or prints a slip, this is what was chosen:

- Section 4.2.1 passes the five sentiment logits through a sigmoid "to get the probability
  distribution"; five sigmoids are no distribution. The loss here is cross-entropy over a softmax;
  the argmax, and so every prediction, is the same under both.
- Section 4.2.2 names no loss for similarity. It is the mean squared error on the 0-5 score, which
  is not squashed or rounded: Pearson's correlation is taken of the raw score.
- Section 4.2.3's "simply majority" is the threshold 0.5 on the probability, a logit of 0.
- Section 5.3 prints a learning rate of 1e-3 for fine-tuning, which destroys BERT's weights; it can
  only be that of the output layers. BERT has its own here (`--lr`, `--head_lr`).

Shapes: B sentences or pairs, T tokens, D hidden size, C logits of a task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bert import POOLINGS, BertModel, load_weights, pool
from checkpoint import (
    UserError,
    check_weight,
    model_folder,
    read_json,
    read_tensors,
    read_weights,
    whole_folder,
    write_json,
    write_tensors,
)
from exchange import write_modules
from tokenizer import TOKENISED_AT_ONCE, BertTokenizer

# ---------------------------------------------------------------------------- the table of tasks


def class_report(classes: int, predicted: np.ndarray, gold: np.ndarray) -> dict[str, object]:
    """Accuracy (the headline), macro F1 and the confusion matrix (rows gold, columns predicted).

    Macro F1 is over the classes that occur; the matrix has all of them.
    """
    from sklearn import metrics  # a second, which the first training step need not wait for

    return {
        "accuracy": float(metrics.accuracy_score(gold, predicted)),
        "macro_f1": float(metrics.f1_score(gold, predicted, average="macro")),
        "confusion": metrics.confusion_matrix(gold, predicted, labels=range(classes)).tolist(),
    }


def correlation_report(predicted: np.ndarray, gold: np.ndarray) -> dict[str, object]:
    """Pearson's r (the headline) and Spearman's rho; 0 where they are undefined, for a constant."""
    if len(gold) < 2 or np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    from scipy import stats  # a second, which the first training step need not wait for

    return {
        "pearson": float(stats.pearsonr(predicted, gold).statistic),
        "spearman": float(stats.spearmanr(predicted, gold).statistic),
    }


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: how flags and records call it.
        files: file name in the data folder, `{}` standing for train, dev or test-student.
        texts: the columns that hold the sentences, one or two.
        label: the label's column.
        dtype: of the labels: int64 for classes, float32 for 0/1 and scores.
        low, high: the smallest and largest valid label; labels of a class task are whole numbers.
        whole: whether a label must be a whole number.
        outputs: C, the number of logits.
        loss: (logits (B, C), labels (B,)) -> the loss of each row, (B,).
        decode: logits (B, C) -> predictions (B,), in the units of the labels.
        report: (predictions, labels) -> figures, the headline first.
        course_score: headline -> its share of the course's overall score, 0 to 1.
        header: the prediction column of a leaderboard file, as the leaderboard spells it.
        head: the default decoder.
        probabilities: logits (B, C) -> the probability of each class (B, classes), whose order is
            the labels'; None for a score.
        span: the logits of the least and the most similar pair, roughly. Heads start from it: at
            a learning rate of 1e-3, the bias of an STS head would take 2,500 steps to its mean.
    """

    name: str
    files: str
    texts: tuple[str, ...]
    label: str
    dtype: torch.dtype
    low: float
    high: float
    whole: bool
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    report: Callable[[np.ndarray, np.ndarray], dict[str, object]]
    course_score: Callable[[float], float]
    header: str
    head: str
    probabilities: Callable[[Tensor], Tensor] | None = None
    span: tuple[float, float] = (0.0, 0.0)


def _classes(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _rounded_probability(logits: Tensor) -> Tensor:
    return logits.squeeze(-1).sigmoid().round()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _complementary(logits: Tensor) -> Tensor:
    return torch.cat([(-logits).sigmoid(), logits.sigmoid()], dim=-1)


def _raw(logits: Tensor) -> Tensor:
    return logits.squeeze(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels, reduction="none")


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.squeeze(-1), labels, reduction="none")


def _identity(value: float) -> float:
    return value


def _unit_correlation(pearson: float) -> float:
    return (pearson + 1) / 2


def _sentiment(name: str, files: str, classes: int) -> Task:
    return Task(
        name=name,
        files=files,
        texts=("sentence",),
        label="sentiment",
        dtype=torch.int64,
        low=0,
        high=classes - 1,
        whole=True,
        outputs=classes,
        loss=_cross_entropy,
        decode=_classes,
        report=partial(class_report, classes),
        course_score=_identity,
        header="Predicted_Sentiment",
        head="linear",
        probabilities=_softmax,
    )


TASKS: dict[str, Task] = {
    "sst": _sentiment("sst", "ids-sst-{}.csv", classes=5),
    "cfimdb": _sentiment("cfimdb", "ids-cfimdb-{}.csv", classes=2),
    "para": Task(
        name="para",
        files="quora-{}.csv",
        texts=("sentence1", "sentence2"),
        label="is_duplicate",
        dtype=torch.float32,
        low=0,
        high=1,
        whole=True,
        outputs=1,
        loss=_binary_cross_entropy,
        decode=_rounded_probability,
        report=partial(class_report, 2),
        course_score=_identity,
        header="Predicted_Is_Paraphrase",
        head="dot",
        probabilities=_complementary,
        span=(-5.0, 5.0),
    ),
    "sts": Task(
        name="sts",
        files="sts-{}.csv",
        texts=("sentence1", "sentence2"),
        label="similarity",
        dtype=torch.float32,
        low=0,
        high=5,
        whole=False,
        outputs=1,
        loss=_squared_error,
        decode=_raw,
        report=correlation_report,
        course_score=_unit_correlation,
        header="Predicted_Similiary",
        head="dot",
        span=(0.0, 5.0),
    ),
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The rows of `TASKS` with these names; UserError for a name that has none."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: no such task; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


# ---------------------------------------------------------------------------- decoder heads


class Linear(nn.Module):
    """logits = W dropout(u) + b, of one embedding: sentiment, and pairs encoded jointly."""

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, task.outputs)
        nn.init.constant_(self.dense.bias, sum(task.span) / 2)

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        """u (B, D) -> logits (B, C)."""
        return self.dense(self.dropout(u))


class Concat(Linear):
    """logits = W [u; v] + b: the paper's "concatenate" decoder."""

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__(2 * width, task, dropout)

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        return super().forward(torch.cat([u, v], dim=-1))


class Dot(Linear):
    """logits = W (u * v) + b: the paper's "weighted dot product" decoder."""

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        return super().forward(u * v)


class Cosine(nn.Module):
    """logits = w cos(u, v) + b, where cosines of 0 and 1 start at the ends of the task's span.

    No dropout: it would change the angle between the very vectors that are compared.
    """

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__()
        self.dense = nn.Linear(1, task.outputs)
        low, high = task.span
        nn.init.constant_(self.dense.weight, high - low)
        nn.init.constant_(self.dense.bias, low)

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        return self.dense(F.cosine_similarity(u, v, dim=-1)[:, None])


HEADS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "concat": Concat,
    "dot": Dot,
    "cosine": Cosine,
}
PAIR_ENCODINGS = ("separate", "joint")


# ---------------------------------------------------------------------------- the model


def pad_rows(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Rows of different lengths, each (t,) -> (B, T), filled up with `value`."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


class MultitaskBERT(nn.Module):
    """One BERT, and a head for each task.

    Args:
        bert: the shared encoder.
        tasks: the rows of the table that get a head.
        decoders: task name -> head name, where it is not the task's default.
        pooling: `pooler`, `cls` or `mean` (`bert.pool`).
        pair_encoding: `separate` gives each sentence of a pair its own embedding (the paper's
            bi-encoder); `joint` reads "[CLS] a [SEP] b [SEP]" and a `linear` head decides.
        tokenizer: needed by `encode` and `save_pretrained` only.

    `precision` is the dtype in which the encoder multiplies matrices: torch.float32, or
    torch.bfloat16, by autocast (weights, embeddings handed on, heads and losses stay float32);
    where nothing is trained, by a copy of the encoder in bf16.
    """

    def __init__(
        self,
        bert: BertModel,
        tasks: Sequence[Task],
        decoders: dict[str, str] | None = None,
        pooling: str = "pooler",
        pair_encoding: str = "separate",
        tokenizer: BertTokenizer | None = None,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if pair_encoding not in PAIR_ENCODINGS:
            raise UserError(f"pair encoding {pair_encoding!r}: expected separate or joint")
        if tokenizer is not None and tokenizer.vocab_size > bert.config.vocab_size:
            raise UserError(
                f"--model: its tokenizer has {tokenizer.vocab_size} tokens, but vocab_size in its"
                f" config.json is {bert.config.vocab_size}: they are not of one model"
            )
        if pair_encoding == "joint" and bert.config.type_vocab_size < 2:
            raise UserError("--pair_encoding joint: this model has one segment (type_vocab_size)")
        self.bert = bert
        self.pooling = pooling
        self.pair_encoding = pair_encoding
        self.tokenizer = tokenizer
        self.precision = torch.float32
        self._rounded: tuple[list[tuple[int, int]], BertModel] | None = None
        self.decoders = {}
        self.heads = nn.ModuleDict()
        for task in tasks:
            default = "linear" if pair_encoding == "joint" else task.head
            name = (decoders or {}).get(task.name) or default
            if name not in HEADS:
                raise UserError(f"decoder {name!r} of {task.name}: expected {', '.join(HEADS)}")
            if (name == "linear") != (self.embeddings_per_row(task) == 1):
                raise UserError(
                    f"decoder {name!r} of {task.name}: linear reads one embedding, the other"
                    f" decoders two, and here there are {self.embeddings_per_row(task)}"
                )
            self.decoders[task.name] = name
            self.heads[task.name] = HEADS[name](
                bert.config.hidden_size, task, bert.config.hidden_dropout_prob
            )

    def freeze(self, frozen: bool = True) -> None:
        """Linear probing: the encoder's weights get no gradients, and its dropout stays off."""
        self.bert.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "MultitaskBERT":
        """Switch dropout on or off; a frozen encoder has none."""
        super().train(mode)
        self.bert.train(mode and self.bert.word_embedding.weight.requires_grad)
        self._rounded = None  # what is written into `parameter.data` is not counted as a change
        return self

    def embeddings_per_row(self, task: Task) -> int:
        """2 for a pair whose sentences are encoded separately, else 1."""
        return 2 if len(task.texts) == 2 and self.pair_encoding == "separate" else 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bert.word_embedding.weight.device

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        pooling: str | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> embeddings (B, D), float32, by the model's pooling or another."""
        pooling = pooling or self.pooling
        device, half = input_ids.device.type, self.precision == torch.bfloat16
        # What neither trains nor draws dropout can do with weights that were rounded before.
        rounded = half and not torch.is_grad_enabled() and not self.bert.training
        bert = self.rounded_bert() if rounded else self.bert
        with torch.autocast(device, torch.bfloat16, enabled=half and not rounded):
            first = None if pooling == "mean" else 1
            packed = device == "cpu"  # to count the tokens, a GPU would have to be waited for
            output = bert(input_ids, attention_mask, token_type_ids, first, packed)
            return pool(output, attention_mask, pooling).float()

    def rounded_bert(self) -> BertModel:
        """The encoder in bf16, hidden states and LayerNorm too, for evaluation.

        It is a model of its own, without the hooks of `bert`, and takes half of its memory. It is
        made anew when a weight or the mode has changed; who writes into `parameter.data`, or
        broadcasts into it, switches the mode (`train`, `eval`) after that.
        """
        named = dict(self.bert.named_parameters())
        counted = not any(p.is_inference() for p in named.values())
        weights = [(p.data_ptr(), p._version) for p in named.values()] if counted else None
        if self._rounded is not None and counted and self._rounded[0] == weights:
            return self._rounded[1]
        with torch.device("meta"):
            bert = BertModel(self.bert.config)
        half = {name: p.detach().to(torch.bfloat16) for name, p in named.items()}
        bert.load_state_dict(half, assign=True)
        self._rounded = (weights, bert.eval()) if counted else None
        return bert

    def decode(self, task: str, embeddings: Tensor) -> Tensor:
        """Embeddings of a task's rows -> logits (B, C).

        Rows with two embeddings hold all first sentences, then all second ones: (2 B, D).
        """
        if self.embeddings_per_row(TASKS[task]) == 2:
            return self.heads[task](*embeddings.chunk(2))
        return self.heads[task](embeddings)

    def forward(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C) of a task's rows; a separately encoded pair is two rows, (2 B, T)."""
        return self.decode(task, self.embed(input_ids, attention_mask, token_type_ids))

    # The course's own interface: ids and masks of a batch in, logits out.

    def predict_sentiment(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Five logits a sentence, (B, 5)."""
        return self("sst", input_ids, attention_mask)

    def predict_paraphrase(self, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor):
        """A logit a pair, (B, 1); its sigmoid is the probability of a paraphrase."""
        return self._predict_pair("para", ids_1, mask_1, ids_2, mask_2)

    def predict_similarity(self, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor):
        """A score a pair, (B, 1), in the units of the labels (0 to 5, not clipped)."""
        return self._predict_pair("sts", ids_1, mask_1, ids_2, mask_2)

    def _predict_pair(
        self, task: str, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """Logits of pairs that were tokenised apart: (B, T1) and (B, T2) -> (B, C)."""
        if self.pair_encoding == "separate":
            pad = self.bert.config.pad_token_id
            width = max(ids_1.size(1), ids_2.size(1))
            ids = [F.pad(x, (0, width - x.size(1)), value=pad) for x in (ids_1, ids_2)]
            masks = [F.pad(x, (0, width - x.size(1))) for x in (mask_1, mask_2)]
            return self(task, torch.cat(ids), torch.cat(masks))
        known = self.tokenizer is not None
        limit = self.tokenizer.max_length if known else self.bert.config.max_position_embeddings
        room = limit - 3  # [CLS] and two [SEP]
        rows, types = [], []
        for a, keep_a, b, keep_b in zip(ids_1, mask_1, ids_2, mask_2, strict=True):
            a, b = a[keep_a.bool()], b[keep_b.bool()]
            cls, sep, a, b = a[:1], a[-1:], a[1:-1], b[1:-1]
            if len(a) + len(b) > room:  # cut the longer first, as the tokenizer does
                short = min(len(a), len(b), room // 2)
                kept = (short, room - short) if len(a) <= len(b) else (room - short, short)
                a, b = a[: kept[0]], b[: kept[1]]
            rows.append(torch.cat([cls, a, sep, b, sep]))
            types.append((torch.arange(len(rows[-1]), device=a.device) >= len(a) + 2).long())
        input_ids = pad_rows(rows, self.bert.config.pad_token_id)
        mask = pad_rows([torch.ones_like(row) for row in rows])
        return self(task, input_ids, mask, pad_rows(types))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Sentence embeddings, a float32 array (N, D), in the order of `texts`.

        Sentences of like length share a batch; those beyond the model's limit are truncated.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of str; for one sentence, encode([text])[0]")
        was_training = self.training
        # For one sentence, eval() would be a tenth of the time.
        if any(module.training for module in self.modules()):
            self.eval()
        texts = list(texts)
        vectors = np.empty((len(texts), self.bert.config.hidden_size), dtype=np.float32)
        ids = []
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            chunk = texts[start : start + TOKENISED_AT_ONCE]
            encodings = self.tokenizer.encode_batch(chunk, max_length=self.tokenizer.max_length)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            sentences = [torch.from_numpy(ids[i]).long() for i in rows]
            input_ids = pad_rows(sentences, self.bert.config.pad_token_id)
            mask = pad_rows([torch.ones_like(sentence) for sentence in sentences])
            vectors[rows] = self.embed(input_ids.to(self.device), mask.to(self.device)).cpu()
        if was_training:
            self.train()
        return vectors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a HuggingFace folder of the encoder and tokenizer, with the heads beside it.

        `transformers` and `sentence-transformers` load it, the latter to `encode` as is done here.
        The folder appears whole or not at all, in place of an older one that was written so.

        Raises:
            UserError: the folder holds something else.
        """
        folder = Path(folder).resolve()
        ours = not folder.exists() or (folder / "heads.json").exists()
        if not ours and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder}: holds something other than a model; it is left alone")
        with whole_folder(folder) as draft:
            self.bert.save_pretrained(draft)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(draft)
                limit = self.tokenizer.max_length
                write_modules(draft, self.pooling, limit, self.bert.pooler)
            write_tensors(draft / "heads.safetensors", self.heads.state_dict())
            write_json(
                draft / "heads.json",
                {
                    "decoders": self.decoders,
                    "pooling": self.pooling,
                    "pair_encoding": self.pair_encoding,
                },
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MultitaskBERT":
        """Load a trained model: a run folder (its `best/`), or what `save_pretrained` wrote.

        Raises:
            UserError: no such folder, a damaged file, or a task that is not in `TASKS`.
        """
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such run folder or model folder")
        folder = model_folder(folder)
        path = folder / "heads.json"
        settings = read_json(path)
        absent = {"decoders", "pooling", "pair_encoding"} - set(settings)
        if absent:
            raise UserError(f"{path}: has no {min(absent)}")
        decoders = settings["decoders"]
        if not isinstance(decoders, dict) or set(map(type, decoders.values())) - {str}:
            raise UserError(f"{path}: decoders is {decoders!r}, expected a decoder for each task")
        bert = BertModel.from_pretrained(folder)
        tokenizer = BertTokenizer.from_pretrained(folder)
        try:
            model = cls(
                bert,
                find_tasks(list(decoders)),
                decoders,
                settings["pooling"],
                settings["pair_encoding"],
                tokenizer,
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        model.load_heads(folder / "heads.safetensors")
        return model.eval()

    def load(self, folder: Path) -> None:
        """Take over the weights that `save_pretrained` wrote for a model of the same shape."""
        load_weights(self.bert, *read_weights(folder))
        self.load_heads(folder / "heads.safetensors")

    def load_heads(self, path: Path) -> None:
        """Read the heads' weights; UserError for other names, shapes, or numbers not finite."""
        tensors = read_tensors(path)
        for name, tensor in tensors.items():
            check_weight(name, tensor, path)
        try:
            self.heads.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: does not fit the heads in heads.json ({reason})") from None
