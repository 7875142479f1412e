"""BERT's pre-training objective, masked language modelling (Devlin et al. 2018, section 3.1).

Some tokens of a sentence are hidden, and BERT predicts them from the others.

Shapes: B sequences, T tokens, D hidden size, V vocabulary size, N hidden tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bert import ACTIVATIONS, BertConfig, BertModel
from engine import checkpoint
from engine.errors import UserError
from hub.models import read_weights, resolve_model
from hub.weights import plain_name
from model import SentenceEncoder
from tokenizer import BertTokenizer

# Our module of the head -> its name in HuggingFace's BertForMaskedLM.
HEAD_NAMES = {
    "dense": "cls.predictions.transform.dense",
    "layer_norm": "cls.predictions.transform.LayerNorm",
}
BIAS = "cls.predictions.bias"
KEPT_SHARE, RANDOM_SHARE = 0.1, 0.1  # of the hidden tokens; the others become [MASK]


def hide_tokens(
    ids: np.ndarray,
    continues: np.ndarray,
    special: np.ndarray,
    mask_id: int,
    probability: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose what to hide in one sequence: ids (T,) -> the input (T,), and where to predict (T,).

    A fraction `probability` of its tokens, at least one, is to be predicted: 80% of these become
    [MASK], 10% a random token and 10% stay, because there is no [MASK] at test time. special: (V,)
    bool, tokens that are never hidden. continues: (V,) bool, word pieces ("##...") that are hidden
    with their word.
    """
    candidates = np.flatnonzero(~special[ids])
    hidden = np.zeros(len(ids), dtype=bool)
    if not len(candidates):  # an empty sentence
        return ids, hidden
    words = (~continues[ids[candidates]]).cumsum()  # the number of each candidate's word
    # Stop at the wanted number; the last word may exceed it by a piece or two.
    wanted = max(1, round(probability * len(candidates)))
    for word in rng.permutation(np.unique(words)):
        if hidden.sum() >= wanted:
            break
        hidden[candidates[words == word]] = True
    masked, draws = ids.copy(), rng.random(len(ids))
    masked[hidden & (draws >= KEPT_SHARE + RANDOM_SHARE)] = mask_id
    randomised = hidden & (draws < RANDOM_SHARE)
    masked[randomised] = rng.choice(np.flatnonzero(~special), randomised.sum())
    return masked, hidden


class MaskedLMHead(nn.Module):
    """A dense layer, LayerNorm, and an output layer whose matrix is the word embedding."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden_states: Tensor, word_embedding: Tensor) -> Tensor:
        """hidden_states (N, D), word_embedding (V, D) -> logits (N, V)."""
        # Tied: the embedding of a token is also the direction that predicts it.
        x = self.layer_norm(self.activation(self.dense(hidden_states)))
        return F.linear(x, word_embedding, self.bias)


class MaskedLM(SentenceEncoder):
    """BERT with its pre-training head; still a sentence encoder."""

    def __init__(self, bert: BertModel, tokenizer: BertTokenizer, pooling: str = "pooler"):
        super().__init__(bert, tokenizer, pooling)
        self.head = MaskedLMHead(bert.config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, hidden: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Token ids and masks (B, T) -> float32 logits (N, V) of the hidden tokens.

        hidden: a mask of them, (B, T) bool, or the pair of their rows (N,) and columns (N,).
        """
        states = self.run_bert(input_ids, attention_mask)["last_hidden_state"]
        with self.autocast():
            return self.head(states[hidden], self.bert.word_embedding.weight).float()

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: float | None) -> "MaskedLM":
        """Load BERT and its pre-training head; a missing head starts at random, with a note.

        options: fields of `BertConfig` to change.
        """
        folder = resolve_model(name)
        bert = BertModel.from_pretrained(folder, **options)
        model = cls(bert, BertTokenizer.from_pretrained(folder))
        # Loading BERT has skipped the head's tensors.
        tensors, source = read_weights(folder)
        found = {plain_name(name): tensor for name, tensor in tensors.items()}
        state = {}
        for name, parameter in model.head.named_parameters():
            stored = head_name(name)
            if stored not in found:
                continue
            if found[stored].shape != parameter.shape:
                raise UserError(f"{source}: {stored} has shape {tuple(found[stored].shape)}")
            checkpoint.check_weight(stored, found[stored], source)
            state[name] = found[stored]
        if state.keys() == model.head.state_dict().keys():
            model.head.load_state_dict(state)
        else:
            print(
                f"note: {source} has no head for masked tokens; it is drawn at random",
                file=sys.stderr,
            )
        return model.eval()

    def head_tensors(self) -> dict[str, Tensor]:
        """The head under HuggingFace's names; its matrix is the word embedding, which BERT has."""
        return {head_name(name): p for name, p in self.head.named_parameters()}

    def fill(self, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """The most probable tokens, with probabilities, for each [MASK] in a text."""
        batch = self.tokenizer([text], truncation=True, return_tensors="pt").to(self.device)
        hidden = batch.input_ids == self.tokenizer.mask_token_id
        if not hidden.any():
            raise UserError(f"{text!r} has no {self.tokenizer.mask_token} to fill in")
        with self.evaluating():
            logits = self(batch.input_ids, batch.attention_mask, hidden)
        values, ids = logits.softmax(-1).topk(count)
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        tokens = self.tokenizer.convert_ids_to_tokens
        return [list(zip(tokens(row), probabilities, strict=True)) for row, probabilities in rows]


def head_name(name: str) -> str:
    """HuggingFace's name of a parameter of the head."""
    module, _, kind = name.rpartition(".")
    return f"{HEAD_NAMES[module]}.{kind}" if module else BIAS
