"""Sentence embeddings from BERT, decoder heads, and the multitask model that shares one BERT.

Shapes: B rows (sentences or pairs), T tokens, D hidden size, C logits of a task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bert import BertModel
from datasets import TokenizedDataset
from engine import checkpoint
from engine.errors import UserError, reading
from hub.export import write_modules
from hub.models import resolve_model
from tasks import TASKS, Task, find_tasks
from tokenizer import BertTokenizer

POOLINGS = ("pooler", "cls", "mean")  # the first is the default, as in the paper
PAIR_ENCODINGS = ("separate", "joint")
LENGTH_STEP = 4  # on CPUs, bf16 batches are padded to a multiple of this many tokens


def pool(output: dict[str, Tensor], attention_mask: Tensor, pooling: str) -> Tensor:
    """One embedding (B, D) per sequence from BERT's output.

    `pooler`, the paper's choice: dense + tanh on the [CLS] token. `cls`: the hidden state of [CLS].
    `mean`: the average over all tokens except padding.
    """
    hidden_states = output["last_hidden_state"]  # (B, T, D)
    if pooling == "pooler":
        return output["pooler_output"]
    if pooling == "cls":
        return hidden_states[:, 0]
    if pooling == "mean":
        # Leave out padding: otherwise a text's embedding would depend on its batch.
        mask = attention_mask[:, :, None].to(hidden_states.dtype)  # (B, T, 1), 0 at padding
        wide = torch.promote_types(hidden_states.dtype, torch.float32)  # sum bf16 in fp32
        total = (hidden_states * mask).sum(1, dtype=wide)
        return total / mask.sum(1, dtype=wide).clamp(min=1)
    raise ValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")


# ---------------------------------------------------------------------------- decoder heads


class LinearHead(nn.Module):
    """logits = W dropout(u) + b, of one embedding: sentiment, and pairs encoded jointly."""

    num_embeddings = 1  # that `forward` takes

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, task.labels.num_logits)
        # The first predictions are in the middle of the range (see `Task.logit_range`).
        nn.init.constant_(self.dense.bias, sum(task.logit_range) / 2)

    def forward(self, u: Tensor) -> Tensor:
        """u (B, D) -> logits (B, C)."""
        # SOLUTION: self.dropout turns itself off at evaluation
        return self.dense(self.dropout(u))
        # END SOLUTION


class ConcatHead(LinearHead):
    """logits = W [u; v] + b: the paper's "concatenate" decoder."""

    num_embeddings = 2

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__(2 * width, task, dropout)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        return super().forward(torch.cat([u, v], dim=-1))


class DotHead(LinearHead):
    """logits = W (u * v) + b: the paper's "weighted dot product" decoder."""

    num_embeddings = 2

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        # W = 1 would be the dot product; a learned W weights the features.
        return super().forward(u * v)


class CosineHead(nn.Module):
    """logits = w cos(u, v) + b; cosines of 0 and 1 start at the ends of the task's logit range.

    Without dropout, which would change the angle between the vectors that are compared.
    """

    num_embeddings = 2

    def __init__(self, width: int, task: Task, dropout: float):
        super().__init__()
        self.dense = nn.Linear(1, task.labels.num_logits)
        low, high = task.logit_range
        nn.init.constant_(self.dense.weight, high - low)
        nn.init.constant_(self.dense.bias, low)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u, v (B, D) -> logits (B, C)."""
        return self.dense(F.cosine_similarity(u, v, dim=-1)[:, None])


# The choices of every --{task}_decoder.
HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "concat": ConcatHead,
    "dot": DotHead,
    "cosine": CosineHead,
}


# ---------------------------------------------------------------------------- sentence encoder


class SentenceEncoder(nn.Module):
    """BERT with pooling: token ids or texts in, one embedding per sequence out."""

    def __init__(
        self, bert: BertModel, tokenizer: BertTokenizer | None = None, pooling: str = "pooler"
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if tokenizer is not None and tokenizer.vocab_size > bert.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but vocab_size in config.json is"
                f" {bert.config.vocab_size}: they are not of one model"
            )
        self.bert = bert  # the course's name, which students' code uses
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.decoders: dict[str, str] = {}  # task -> its head, a row of `HEADS`
        self.pair_encoding: dict[str, str] = {}  # task -> `joint`, if not separate
        # The precision of matrix products in BERT. bfloat16 means autocast: weights, embeddings,
        # heads and losses stay float32.
        self.dtype = torch.float32

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
        """Token ids and mask (B, T) -> float32 embeddings (B, D); default pooling: the model's."""
        output = self.run_bert(input_ids, attention_mask, token_type_ids)
        return pool(output, attention_mask, pooling or self.pooling).float()

    def autocast(self) -> torch.autocast:
        """The context in which matrix products have the precision `dtype`."""
        bf16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def run_bert(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """BERT's outputs for a batch (B, T), in the precision `dtype`."""
        length = input_ids.size(1)
        if self.dtype == torch.bfloat16 and input_ids.device.type == "cpu":
            # oneDNN compiles a kernel for every new length; rounding up makes lengths repeat.
            limit = self.bert.config.max_position_embeddings
            padding = min(-length % LENGTH_STEP, limit - length)
            input_ids = F.pad(input_ids, (0, padding), value=self.bert.config.pad_token_id)
            attention_mask = F.pad(attention_mask, (0, padding))
            if token_type_ids is not None:
                token_type_ids = F.pad(token_type_ids, (0, padding))
        with self.autocast():
            output = self.bert(input_ids, attention_mask, token_type_ids)
        return {**output, "last_hidden_state": output["last_hidden_state"][:, :length]}

    def encoding(self, task: Task) -> str:
        """How the sentences of a task's pairs are encoded: `separate` or `joint`."""
        return self.pair_encoding.get(task.name, "separate")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in evaluation mode, without gradients; weights are cast to bfloat16 only once.

        Autocast caches the weights that it casts until the outermost context ends, even if that
        context is a disabled one.
        """
        training = [module for module in self.modules() if module.training]
        if training:  # eval() takes a millisecond
            self.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=False):
                yield
        finally:
            for module in training:  # not train(): some parts may have been in evaluation mode
                module.training = True

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings of texts, a float32 array (N, D), in their order.

        Texts of similar length share a batch; those beyond the model's limit are truncated. For
        many small calls, wrap them in `with model.evaluating():` to cast the weights only once.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of str; for one sentence, encode([text])[0]")
        # `shard=False`: every process may encode its own texts.
        vectors = np.empty((len(texts), self.bert.config.hidden_size), dtype=np.float32)
        dataset = TokenizedDataset("", Path("texts"), [list(texts)], self.tokenizer)
        with self.evaluating():
            # Longest first, so that memory runs out at once or not at all.
            for batch in dataset.eval_batches(batch_size, shard=False):
                batch = batch.to(self.device)
                vectors[batch.rows] = self.embed(batch.input_ids, batch.attention_mask).cpu()
        return vectors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a HuggingFace folder of encoder and tokenizer, with the heads beside them.

        `transformers` and `sentence-transformers` load it, the latter with the same `encode`. The
        folder appears whole or not at all, and replaces one that this method wrote before.
        """
        folder = Path(folder).resolve()
        # Overwrite only what this method wrote, never another folder of the user's.
        ours = (folder / "heads.json").exists()
        if folder.exists() and not ours and any(folder.iterdir()):
            raise UserError(f"{folder}: contains something other than a model; left alone")
        with checkpoint.atomic_folder(folder) as draft:
            self._write(draft)

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of a pre-training head to save with BERT's; none here."""
        return {}

    def _write(self, folder: Path) -> None:
        self.bert.save_pretrained(folder, self.head_tensors())
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
            write_modules(folder, self.pooling, self.tokenizer.max_length, self.bert.pooler_dense)
        settings = {"pooling": self.pooling, "pair_encoding": self.pair_encoding}
        checkpoint.write_json(folder / "heads.json", {"decoders": self.decoders, **settings})


# ---------------------------------------------------------------------------- multitask model


class MultitaskBERT(SentenceEncoder):
    """One BERT shared by several tasks, with a decoder head for each.

    Pair encoding `separate` gives each sentence of a pair an embedding of its own (the paper's
    bi-encoder); `joint` encodes "[CLS] a [SEP] b [SEP]", and a `linear` head decides.
    """

    def __init__(
        self,
        bert: BertModel,
        tasks: Sequence[Task],  # the rows of the table that get a head
        decoders: dict[str, str] | None = None,  # task -> row of `HEADS`, if not its default
        pooling: str = "pooler",
        pair_encoding: str | dict[str, str] = "separate",  # for all tasks, or by task
        tokenizer: BertTokenizer | None = None,
    ):
        super().__init__(bert, tokenizer, pooling)
        if isinstance(pair_encoding, str):
            pair_encoding = dict.fromkeys((task.name for task in tasks), pair_encoding)
        for encoding in pair_encoding.values():
            if encoding not in PAIR_ENCODINGS:
                raise UserError(f"pair encoding {encoding!r}: expected separate or joint")
            if encoding == "joint" and bert.config.type_vocab_size < 2:
                raise UserError("pair encoding joint: this model has one segment (type_vocab_size)")
        self.pair_encoding = dict(pair_encoding)
        self.heads = nn.ModuleDict()
        for task in tasks:
            # A jointly encoded pair has one embedding: there is nothing to compare.
            default = "linear" if self.encoding(task) == "joint" else task.head
            name = (decoders or {}).get(task.name) or default
            if name not in HEADS:
                raise UserError(f"decoder {name!r} of {task.name}: expected {', '.join(HEADS)}")
            # `linear` takes one embedding, the others compare two.
            if HEADS[name].num_embeddings != self.embeddings_per_row(task):
                count = self.embeddings_per_row(task)
                fitting = [n for n, head in HEADS.items() if head.num_embeddings == count]
                raise UserError(
                    f"decoder {name!r} of {task.name}: does not fit the way its rows are encoded;"
                    f" use {', '.join(fitting)}"
                )
            self.decoders[task.name] = name
            # Heads have BERT's dropout probability.
            width, dropout = bert.config.hidden_size, bert.config.hidden_dropout_prob
            self.heads[task.name] = HEADS[name](width, task, dropout)

    def freeze(self, frozen: bool = True) -> None:
        """Linear probing: BERT's weights get no gradients, and its dropout stays off."""
        self.bert.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "MultitaskBERT":
        """Switch dropout on or off; a frozen BERT has none."""
        super().train(mode)
        # With dropout, a frozen BERT would give a sentence a different embedding in every epoch.
        self.bert.train(mode and any(p.requires_grad for p in self.bert.parameters()))
        return self

    def embeddings_per_row(self, task: Task) -> int:
        """2 for a pair whose sentences are encoded separately, else 1."""
        return 2 if len(task.text_columns) == 2 and self.encoding(task) == "separate" else 1

    def decode(self, task: str, embeddings: Tensor) -> Tensor:
        """Embeddings of a task's rows -> logits (B, C).

        For rows with two embeddings: all first sentences, then all second ones, (2 B, D).
        """
        # One tensor for a sentence; two for a pair, u and v in the heads.
        return self.heads[task](*embeddings.chunk(self.embeddings_per_row(TASKS[task])))

    def forward(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C) of a task's rows; pairs encoded separately are two sequences, (2 B, T)."""
        return self.decode(task, self.embed(input_ids, attention_mask, token_type_ids))

    # The course's own interface: ids and masks of a batch in, logits out.

    def predict_sentiment(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Five logits per sentence, (B, 5)."""
        # SOLUTION: embed the sentences, then decode them with the head of sst
        return self("sst", input_ids, attention_mask)
        # END SOLUTION

    def predict_paraphrase(
        self, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """One logit per pair, (B, 1); its sigmoid is the probability of a paraphrase."""
        # SOLUTION: embed both sides; decode takes all first sentences, then all second ones
        return self._predict_pair("para", ids_1, mask_1, ids_2, mask_2)
        # END SOLUTION

    def predict_similarity(
        self, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """One score per pair, (B, 1), from 0 to 5 but not clipped."""
        # SOLUTION: as for paraphrases, with another head
        return self._predict_pair("sts", ids_1, mask_1, ids_2, mask_2)
        # END SOLUTION

    # SOLUTION
    def _predict_pair(
        self, task: str, ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """Logits (B, C) of pairs tokenised separately, (B, T1) and (B, T2)."""
        pad = self.bert.config.pad_token_id
        # The course always tokenises the sentences of a pair separately.
        if self.encoding(TASKS[task]) == "joint":
            pairs = zip(ids_1, mask_1.bool(), ids_2, mask_2.bool(), strict=True)
            joined = [self._join(a[keep_a], b[keep_b]) for a, keep_a, b, keep_b in pairs]
            rows, types = zip(*joined, strict=True)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            ids = pad_sequence(rows, batch_first=True, padding_value=pad)
            return self(task, ids, mask, pad_sequence(types, batch_first=True))
        # Both sides in one forward pass, as in training: pad them to the same length.
        ids = pad_sequence([*ids_1, *ids_2], batch_first=True, padding_value=pad)
        return self(task, ids, pad_sequence([*mask_1, *mask_2], batch_first=True))

    def _join(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of "[CLS] a [SEP]" and of "[CLS] b [SEP]" -> ids and segment ids of the pair."""
        cls, sep, a, b = a[:1], a[-1:], a[1:-1], b[1:-1]  # take them apart
        limit = self.bert.config.max_position_embeddings
        room = (self.tokenizer.max_length if self.tokenizer else limit) - 3
        if len(a) + len(b) > room:  # truncate the longer one first, as the tokenizer does
            short = min(len(a), len(b), room // 2)
            kept = (short, room - short) if len(a) <= len(b) else (room - short, short)
            a, b = a[: kept[0]], b[: kept[1]]
        ids = torch.cat([cls, a, sep, b, sep])
        return ids, (torch.arange(len(ids), device=ids.device) >= len(a) + 2).long()

    # END SOLUTION
    def _write(self, folder: Path) -> None:
        super()._write(folder)
        checkpoint.write_tensors(folder / "heads.safetensors", self.heads.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MultitaskBERT":
        """Load a trained model: a run folder (its best/), or what `save_pretrained` wrote."""
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such run folder or model folder")
        folder = resolve_model(folder)
        path = folder / "heads.json"
        settings = checkpoint.read_json(path)
        bert = BertModel.from_pretrained(folder)
        tokenizer = BertTokenizer.from_pretrained(folder)
        try:
            with reading(path, "the settings of a trained model"):
                decoders: dict[str, Any] = settings["decoders"]
                model = cls(
                    bert,
                    find_tasks(list(decoders)),
                    decoders,
                    settings["pooling"],
                    settings["pair_encoding"],
                    tokenizer,
                )
        except UserError as error:  # of the constructor, which does not know the file
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        if decoders:
            path = folder / "heads.safetensors"
            tensors = checkpoint.read_tensors(path)
            for name, tensor in tensors.items():
                checkpoint.check_weight(name, tensor, path)
            with reading(path, "the weights of the heads in heads.json"):
                model.heads.load_state_dict(tensors)
        return model.eval()
