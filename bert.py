"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), written out by hand.

    bert = BertModel.from_pretrained("bert-base-uncased")
    output = bert(input_ids, attention_mask)       # a dict
    output["last_hidden_state"], output["pooler_output"]

Shapes: B batch, T tokens, D hidden size, H heads, K = D / H head size, F feed-forward size.
"""

import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoint import (
    UserError,
    check_weight,
    model_folder,
    read_json,
    read_weights,
    write_json,
    write_tensors,
)
from exchange import read_pooler

ACTIVATIONS = {
    "gelu": F.gelu,  # x * Phi(x), Hendrycks & Gimpel 2016, exact
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
POOLINGS = ("pooler", "cls", "mean")
LARGEST = 10**8  # of any number in a config.json; beyond it, the file is damaged


@dataclass
class BertConfig:
    """The architecture, under the names of HuggingFace's `config.json`; defaults are BERT-base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    @classmethod
    def from_file(cls, path: Path) -> "BertConfig":
        """Read a model folder's `config.json`; UserError names what it asks for and we lack."""
        given = read_json(path)
        model_type = given.get("model_type", "bert" if "hidden_size" in given else None)
        if model_type != "bert":
            raise UserError(f"{path}: model_type is {model_type!r}; this code runs 'bert' models")
        unsupported = {
            "position_embedding_type": (None, "absolute"),
            "is_decoder": (None, False),
            "add_cross_attention": (None, False),
            "pruned_heads": (None, {}),
        }
        for key, accepted in unsupported.items():
            if given.get(key) not in accepted:
                raise UserError(f"{path}: {key} is {given[key]!r}, which is not supported")
        known = {field.name for field in fields(cls)}
        try:
            # A null means "the default", as it does to transformers.
            return cls(**{k: v for k, v in given.items() if k in known and v is not None})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (
                type(value) is not int or not (field.name != "pad_token_id") <= value <= LARGEST
            ):
                raise UserError(
                    f"{field.name} is {value!r}, expected a positive whole number up to {LARGEST:,}"
                )
            if field.type in (float, "float"):
                if type(value) not in (int, float) or not 0 <= value <= LARGEST:
                    raise UserError(
                        f"{field.name} is {value!r}, expected a number from 0 to {LARGEST:,}"
                    )
                if field.name.endswith("_prob") and value >= 1:
                    raise UserError(f"{field.name} is {value!r}, expected at least 0 and below 1")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act is {self.hidden_act!r}, expected {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into"
                f" num_attention_heads {self.num_attention_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise UserError(f"pad_token_id {self.pad_token_id} is outside the vocabulary")


def dropout(x: Tensor, rate: float) -> Tensor:
    """As `F.dropout`: a number is lost with probability `rate`, or else scaled by 1 / (1 - rate).

    PyTorch's own draws a double for each number on a CPU, a fifth of a training step's time. Here
    16 random bits decide: the rate is rounded to a multiple of 2^-16, and the scale is that rate's.
    """
    if x.device.type != "cpu" or not rate:
        return F.dropout(x, rate)
    lost = min(round(rate * 2**16), 2**16 - 1)  # of 2^16 equally likely values
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape).ge_(lost - 2**15)
    return x * keep.to(x.dtype).mul_(2**16 / (2**16 - lost))


class Dropout(nn.Dropout):
    """`dropout` as a module, at work in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        """x -> the same shape."""
        return dropout(x, self.p) if self.training else x


class Undrawn:
    """A module that draws no weights as long as they have no memory: they will be read.

    PyTorch would try to, and load its compiler for that, which takes seconds.
    """

    def reset_parameters(self) -> None:
        """As PyTorch's own, where there is memory."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(Undrawn, nn.Linear):
    """x W^T + b."""


class Embedding(Undrawn, nn.Embedding):
    """A row of weights for an index."""


def written_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rate: float
) -> Tensor:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(K) + bias) V (Vaswani et al. 2017, eq. 1).

    query, key, value: (B, H, T, K); bias: (B, 1, 1, T), 0 for a token and very negative for
    padding, which the softmax turns into a weight of 0; rate: probability of losing a weight.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))  # (B, H, T, T)
    weights = (scores + bias).softmax(dim=-1)
    return dropout(weights, rate) @ value  # (B, H, T, K)


def fast_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rate: float) -> Tensor:
    """The same function as `written_attention`, by PyTorch's fused kernels where there are any.

    With dropout there is none for CPUs, and the written one is faster than PyTorch's substitute.
    """
    if rate and query.device.type == "cpu":
        return written_attention(query, key, value, bias, rate)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate)


def common_size(size: int) -> int:
    """`size` rounded up to one of eight sizes an octave, and to a multiple of 16.

    oneDNN, which multiplies in bf16 on CPUs, compiles a product anew for each size that it meets:
    it takes half a millisecond each time, and keeps half a megabyte.
    """
    step = max(16, 2 ** (size.bit_length() - 4))
    return -(-size // step) * step


class Packing:
    """A padded batch (B, T, D) as the rows of its N tokens alone, (N, D), and back.

    Everything but attention treats each token by itself, so padding there is work for nothing: a
    fifth of a batch of question pairs, a third of SimCSE's triples.

    With `common`, N is rounded up to a common size, and the rows past the tokens are of no use.
    """

    def __init__(self, attention_mask: Tensor, common: bool = False):
        self.shape = attention_mask.shape
        self.places = attention_mask.flatten().nonzero().squeeze(1)  # of the tokens, of B * T
        count = len(self.places)
        filled = common_size(count) if common else count
        self.filled = F.pad(self.places, (0, filled - count))  # (N,)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (N, D)."""
        return x.flatten(0, 1).index_select(0, self.filled)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, T, D), 0 at padding."""
        rows = x.new_zeros(self.shape.numel(), x.size(-1))
        rows = rows.index_copy(0, self.places, x[: len(self.places)])
        return rows.unflatten(0, self.shape)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention: every token looks at every token of its sentence."""

    attend = staticmethod(fast_attention)  # or written_attention: the one place that chooses

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def split(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """(B, T, D), or (N, D) if packed -> (B, H, T, K): each head gets its own K features."""
        x = packing.unpack(x) if packing and x.ndim == 2 else x
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, asking: Tensor, hidden_states: Tensor, bias: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """asking (B, A, D) looks at hidden_states (B, T, D), bias (B, 1, 1, T) -> (B, A, D).

        With `packing`, either may be packed, (N, D); what asks so is answered so.
        """
        query = self.split(self.query(asking), packing)
        key = self.split(self.key(hidden_states), packing)
        value = self.split(self.value(hidden_states), packing)
        rate = self.dropout if self.training else 0.0
        context = self.attend(query, key, value, bias.to(query.dtype), rate)
        context = context.transpose(1, 2).flatten(2)
        return self.output(packing.pack(context) if asking.ndim == 2 else context)


class BertLayer(nn.Module):
    """One encoder layer: attention, then feed-forward, each with residual and LayerNorm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertSelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F) -> (B, T, D)."""
        return self.output(self.activation(self.intermediate(x)))

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor,
        packing: Packing | None = None,
        first: int | None = None,
    ) -> Tensor:
        """hidden_states (B, T, D), bias (B, 1, 1, T) -> the same, or the `first` tokens of it.

        With `packing`, hidden_states are packed, (N, D); the `first` tokens are not.
        """
        x = hidden_states
        if first is not None:
            x = (packing.unpack(x) if packing else x)[:, :first]
        x = self.attention_norm(x + self.dropout(self.attention(x, hidden_states, bias, packing)))
        return self.output_norm(x + self.dropout(self.feed_forward(x)))


class BertModel(nn.Module):
    """Embeddings, the encoder's layers, and the pooler (dense + tanh on the first token).

    Built directly, its weights are random, drawn as BERT's were: normal with standard deviation
    `initializer_range`, biases 0.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        # padding_idx: the padding token's row gets no gradient, as in transformers.
        self.word_embedding = Embedding(config.vocab_size, width, config.pad_token_id)
        self.position_embedding = Embedding(config.max_position_embeddings, width)
        self.segment_embedding = Embedding(config.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embedding_dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(width, width)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if self.segment_embedding.weight.is_meta:  # without memory there is nothing to draw
            return
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the sum of word, position and segment embeddings, (B, T, D)."""
        length = input_ids.size(1)
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids have {length} tokens a row; the model's limit is"
                f" {self.config.max_position_embeddings}: truncate when tokenising"
            )
        if token_type_ids is None:
            segments = self.segment_embedding.weight[0]
        else:
            segments = self.segment_embedding(token_type_ids)
        x = self.word_embedding(input_ids) + segments + self.position_embedding.weight[:length]
        return self.embedding_dropout(self.embedding_norm(x))

    def encode(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        first: int | None = None,
        packed: bool = False,
    ) -> Tensor:
        """Embeddings (B, T, D) and mask (B, T) -> the last layer's hidden states (B, T, D)."""
        length, packing = attention_mask.size(1), None
        half = torch.is_autocast_enabled("cpu") or hidden_states.dtype == torch.bfloat16
        if packed and half and len(attention_mask) > 1:  # a sentence alone is quicker without
            more = common_size(length) - length
            attention_mask = F.pad(attention_mask, (0, more))
            hidden_states = F.pad(hidden_states, (0, 0, 0, more))
        if packed and not attention_mask.all():
            packing = Packing(attention_mask, half)
        # -1e9 rather than -inf: a row of padding alone stays finite, and bfloat16 holds it.
        bias = (1.0 - attention_mask[:, None, None, :].to(hidden_states.dtype)) * -1e9
        hidden_states = packing.pack(hidden_states) if packing else hidden_states
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, bias, packing)
        hidden_states = self.layers[-1](hidden_states, bias, packing, first)
        whole = packing.unpack(hidden_states) if hidden_states.ndim == 2 else hidden_states
        return whole[:, :length]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        first: int | None = None,
        packed: bool = False,
    ) -> dict[str, Tensor]:
        """Encode a batch of sentences (or sentence pairs).

        Args:
            input_ids: (B, T) int64, vocabulary indices.
            attention_mask: (B, T), 1 for a token, 0 for padding.
            token_type_ids: (B, T) int64, 0 for the first sentence and 1 for the second; all 0
                where None.
            first: the last layer computes the first so many tokens only; 1 is all that the pooler
                reads, and saves most of a layer. The others come out the same.
            packed: compute no padding (in bf16 little): its hidden states are then 0, and the
                tokens' the same.

        Returns:
            `last_hidden_state` (B, T, D) and `pooler_output` (B, D), tanh(W h_[CLS] + b).

        Raises:
            ValueError: more tokens than the model has positions.
        """
        embeddings = self.embed(input_ids, token_type_ids)
        hidden_states = self.encode(embeddings, attention_mask, first, packed)
        pooled = torch.tanh(self.pooler(hidden_states[:, 0]))
        return {"last_hidden_state": hidden_states, "pooler_output": pooled}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, local_files_only: bool = False, **overrides: Any
    ) -> "BertModel":
        """Load a HuggingFace BERT checkpoint, in fp32 and in evaluation mode.

        Args:
            name: a folder, a hub id, or an embedded model (`checkpoint.model_folder`).
            local_files_only: never ask the network.
            overrides: fields of `BertConfig` to change, such as `hidden_dropout_prob=0.3`; None
                leaves the checkpoint's own.

        Raises:
            UserError: no such model, an unsupported architecture, or weights that do not fit.
        """
        folder = model_folder(name, local_files_only=local_files_only)
        config = BertConfig.from_file(folder / "config.json")
        given = {name: value for name, value in overrides.items() if value is not None}
        config = BertConfig(**{**asdict(config), **given})
        tensors, source = read_weights(folder)
        if config.num_hidden_layers > len(tensors):
            raise UserError(
                f"{source}: holds {len(tensors)} tensors, too few for the"
                f" {config.num_hidden_layers:,} layers in config.json"
            )
        with torch.device("meta"):  # shapes without memory, until the weights are known to fit
            model = cls(config)
        found = match_weights(model, tensors, source)
        found |= read_pooler(folder, config.hidden_size)
        memory = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
        model.load_state_dict(memory, assign=True)
        fill_weights(model, found, source)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which `transformers.BertModel` loads."""
        folder = Path(folder)
        header = {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32"}
        write_json(folder / "config.json", {**header, **asdict(self.config)})
        tensors = {hub_name(name): tensor for name, tensor in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", tensors)


# ---------------------------------------------------------------------------- checkpoint names

# Our module -> HuggingFace's, `{}` standing for the layer's number.
NAMES = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers.{}.attention.query": "encoder.layer.{}.attention.self.query",
    "layers.{}.attention.key": "encoder.layer.{}.attention.self.key",
    "layers.{}.attention.value": "encoder.layer.{}.attention.self.value",
    "layers.{}.attention.output": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.intermediate": "encoder.layer.{}.intermediate.dense",
    "layers.{}.output": "encoder.layer.{}.output.dense",
    "layers.{}.output_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
# What checkpoints carry beside the encoder: the heads that transformers gives a BERT for
# pre-training, classification and question answering, and a constant buffer.
LEFT_OVER = re.compile(r"(cls|classifier|qa_outputs)\..*|embeddings\.position_ids")


def hub_name(name: str) -> str:
    """HuggingFace's name of our parameter: `pooler.weight` -> `pooler.dense.weight`."""
    module, kind = name.rsplit(".", 1)
    number = re.search(r"\d+", module)
    layer = number.group() if number else ""
    return NAMES[re.sub(r"\d+", "{}", module)].format(layer) + "." + kind


def load_weights(model: BertModel, tensors: dict[str, Tensor], source: Path) -> None:
    """Fill every parameter of `model` exactly once from HuggingFace tensors, or raise UserError."""
    fill_weights(model, match_weights(model, tensors, source), source)


def match_weights(model: BertModel, tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """HuggingFace tensors by HuggingFace's plain names, each of the shape that `model` has.

    A `bert.` prefix and TensorFlow's `gamma`/`beta` are understood; left-overs are allowed only by
    name (`LEFT_OVER`). The whole pooler may be missing.

    Raises:
        UserError: a tensor that is missing, extra, given twice, of another shape or not of finite
            numbers, by name.
    """
    wanted = {hub_name(name): parameter for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original.removeprefix("bert.")
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if LEFT_OVER.fullmatch(name):
            continue
        if name not in wanted:
            raise UserError(f"{source}: {original} is no weight of the model in its config.json")
        if name in found:
            raise UserError(f"{source}: {original} is there twice, under two names")
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{source}: {original} has shape {tuple(tensor.shape)}, but config.json makes it"
                f" {tuple(wanted[name].shape)}"
            )
        check_weight(original, tensor, source)
        found[name] = tensor
    missing = [name for name in wanted if name not in found]
    if missing and missing != [name for name in wanted if name.startswith("pooler.")]:
        raise UserError(f"{source}: {missing[0]} is missing")
    return found


def fill_weights(model: BertModel, found: dict[str, Tensor], source: Path) -> None:
    """Copy what `match_weights` found; a missing pooler is drawn at random, said aloud."""
    if not any(name.startswith("pooler.") for name in found):
        print(f"note: {source} has no pooler; its weights are drawn at random", file=sys.stderr)
        model.pooler.apply(model._initialise)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if hub_name(name) in found:
                parameter.copy_(found[hub_name(name)])


def pool(output: dict[str, Tensor], attention_mask: Tensor, how: str) -> Tensor:
    """One embedding a sentence, (B, D), from BERT's output.

    `pooler` is dense + tanh on the first token (the paper's choice); `cls` the first token's hidden
    state before it; `mean` the average over the tokens, padding left out.
    """
    if how == "pooler":
        return output["pooler_output"]
    hidden_states = output["last_hidden_state"]  # (B, T, D)
    if how == "cls":
        return hidden_states[:, 0]
    if how == "mean":
        mask = attention_mask[:, :, None].to(hidden_states.dtype)
        wide = torch.promote_types(mask.dtype, torch.float32)
        return (hidden_states * mask).sum(1, dtype=wide) / mask.sum(1, dtype=wide).clamp(min=1)
    raise ValueError(f"pooling {how!r}: expected one of {', '.join(POOLINGS)}")
