"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), written from scratch.

    bert = BertModel.from_pretrained("bert-base-uncased")
    output = bert(input_ids, attention_mask)
    output["last_hidden_state"], output["pooler_output"]

Shapes: B batch, T tokens, D hidden size, H attention heads, K = D / H head size, F feed-forward
size. Attribute names are those of the CS224N course, file formats those of HuggingFace.
"""

import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.checkpoint import read_json, write_json, write_tensors
from engine.errors import UserError, reading
from hub.export import read_pooler
from hub.models import read_weights, resolve_model
from hub.weights import load_weights

ACTIVATIONS = {
    "gelu": F.gelu,  # x Phi(x), exact (Hendrycks & Gimpel 2016)
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# Settings of other architectures, which are not supported, and their values in plain BERT.
UNSUPPORTED = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}


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
        """Read a model's `config.json`; UserError names an unsupported setting."""
        content = read_json(path)
        model_type = content.get("model_type", "bert" if "hidden_size" in content else None)
        if model_type != "bert":
            raise UserError(f"{path}: model_type is {model_type!r}; this code runs 'bert' models")
        for key, accepted in UNSUPPORTED.items():
            if content.get(key) not in accepted:
                raise UserError(f"{path}: {key} is {content[key]!r}, which is not supported")
        names = {field.name for field in fields(cls)}
        with reading(path, "a BERT configuration"):
            # null means the default, as in transformers.
            return cls(**{k: v for k, v in content.items() if k in names and v is not None})

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            low, high = (0, 1) if kind is float else (1, math.inf)
            if field.name == "pad_token_id":  # an id, so it may be 0
                low = 0
            if kind is not str and not (type(value) in (int, kind) and low <= value < high):
                expected = f"{kind.__name__} in [{low}, {high})"
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected {list(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads"
                f" {self.num_attention_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside the vocabulary")


class Dropout(nn.Dropout):
    """Dropout that is fast on CPUs, where PyTorch's draws a float64 per element: 20% of a step.

    Here 16 random bits per element decide; the probability is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x -> x with elements zeroed at probability p, the others scaled by 1 / (1 - p)."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        # An element is dropped if its 16 random bits, read as a number, are among the `dropped`
        # smallest of the 2^16 possible ones. One int64 has the bits of four elements.
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape).ge_(dropped - 2**15)
        # (A bool mask would take less memory, but multiplying mixed types is half as fast.)
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


# ---------------------------------------------------------------------------- the model


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: nn.Module
) -> Tensor:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(K) + mask) V (Vaswani et al. 2017, eq. 1).

    query, key, value: (B, H, T, K). mask: (B, 1, 1, T), 0 for a token and very negative for
    padding, whose attention weights become 0. dropout: applied to the weights.
    """
    # SOLUTION: three lines: scores (B, H, T, T), weights of the same shape, context (B, H, T, K)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))  # (B, H, T, T)
    weights = (scores + mask).softmax(dim=-1)
    return dropout(weights) @ value  # (B, H, T, K)
    # END SOLUTION


class BertSelfAttention(nn.Module):
    """Multi-head self-attention: every token attends to every token of its sentence."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K)."""
        # Each head gets its own K of the D features, and becomes a batch dimension.
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, K) each and the mask (B, 1, 1, T) -> the attention's output (B, H, T, K)."""
        # SOLUTION
        # PyTorch's fused kernel computes the same. On CPUs it does not support dropout.
        dropout = self.dropout.p if self.training else 0.0
        if not dropout or query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, mask, dropout)
        # END SOLUTION
        return eager_attention(query, key, value, mask, self.dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden_states (B, T, D), additive attention_mask (B, 1, 1, T) -> (B, T, D)."""
        query = self.split_heads(self.query(hidden_states))
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))
        context = self.attention(query, key, value, attention_mask.to(query.dtype))
        return context.transpose(1, 2).flatten(2)  # concatenate the heads


class BertLayer(nn.Module):
    """Self-attention and a feed-forward network, each with residual connection and LayerNorm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = BertSelfAttention(config)
        self.attention_dense = nn.Linear(width, width)
        self.attention_layer_norm = nn.LayerNorm(width, eps=eps)
        self.attention_dropout = Dropout(config.hidden_dropout_prob)
        self.interm_dense = nn.Linear(width, config.intermediate_size)
        self.interm_af = ACTIVATIONS[config.hidden_act]
        self.out_dense = nn.Linear(config.intermediate_size, width)
        self.out_layer_norm = nn.LayerNorm(width, eps=eps)
        self.out_dropout = Dropout(config.hidden_dropout_prob)

    def add_norm(
        self,
        input: Tensor,
        output: Tensor,
        dense_layer: nn.Module,
        dropout: nn.Module,
        ln_layer: nn.Module,
    ) -> Tensor:
        """The end of a sublayer: dense layer, dropout, residual connection, LayerNorm.

        input: the sublayer's input, (B, T, D). output: the sublayer's output, which `dense_layer`
        maps to (B, T, D); `dropout` is applied before it is added to `input`.
        """
        # SOLUTION: BERT normalizes last, after the residual connection
        # (Newer transformers normalize the sublayer's input instead.)
        return ln_layer(input + dropout(dense_layer(output)))
        # END SOLUTION

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden_states (B, T, D), additive attention_mask (B, 1, 1, T) -> (B, T, D)."""
        # SOLUTION: self_attention and add_norm, then interm_dense, interm_af and add_norm again
        # Tokens exchange information, ...
        attended = self.self_attention(hidden_states, attention_mask)
        modules = (self.attention_dense, self.attention_dropout, self.attention_layer_norm)
        x = self.add_norm(hidden_states, attended, *modules)
        # ... then each is processed by itself: (B, T, D) -> (B, T, F) -> (B, T, D).
        fed_forward = self.interm_af(self.interm_dense(x))
        return self.add_norm(x, fed_forward, self.out_dense, self.out_dropout, self.out_layer_norm)
        # END SOLUTION


class BertModel(nn.Module):
    """Embeddings, encoder layers, and the pooler: a dense layer and tanh on the [CLS] token.

    A model constructed directly has random weights, initialized as in BERT: normal with standard
    deviation `initializer_range`, biases 0.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        # padding_idx: the embedding of [PAD] gets no gradient, as in transformers.
        self.word_embedding = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embed_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = Dropout(config.hidden_dropout_prob)
        position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
        self.register_buffer("position_ids", position_ids)
        self.bert_layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler_dense = nn.Linear(width, width)
        self.pooler_af = nn.Tanh()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the sum of word, position and segment embeddings, (B, T, D)."""
        length, limit = input_ids.size(1), self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens a row; the model's limit is {limit}: truncate them")
        if token_type_ids is None:  # one sentence: segment 0
            token_type_ids = torch.zeros_like(input_ids)
        # SOLUTION: self.position_ids holds the positions; LayerNorm and dropout come last
        # Attention does not see the order of tokens; position embeddings add it. They are learned,
        # and end at max_position_embeddings.
        x = self.word_embedding(input_ids) + self.pos_embedding(self.position_ids[:, :length])
        x = x + self.tk_type_embedding(token_type_ids)
        return self.embed_dropout(self.embed_layer_norm(x))
        # END SOLUTION

    def encode(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings (B, T, D) and mask (B, T) -> the last layer's hidden states (B, T, D)."""
        # -1e9, not -inf: a row with only padding stays finite, and bfloat16 can represent it.
        additive = (1.0 - attention_mask[:, None, None, :].to(hidden_states.dtype)) * -1e9
        for layer in self.bert_layers:
            hidden_states = layer(hidden_states, additive)
        return hidden_states

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode a batch of sentences or sentence pairs.

        input_ids, token_type_ids: (B, T) int64; segment 0 is the first sentence (the default), 1
        the second. attention_mask: (B, T), 1 for a token, 0 for padding.
        """
        hidden_states = self.encode(self.embed(input_ids, token_type_ids), attention_mask)
        # [CLS] is the first token. The pooler was pre-trained on next-sentence prediction.
        pooled = self.pooler_af(self.pooler_dense(hidden_states[:, 0]))
        return {"last_hidden_state": hidden_states, "pooler_output": pooled}  # (B, T, D), (B, D)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: BertConfig | str | Path | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        **overrides: Any,
    ) -> "BertModel":
        """Load a HuggingFace BERT checkpoint, in float32 and evaluation mode.

        name: a folder, a hub id (`cache_dir`, `revision` and `local_files_only` are for these), or
        a bundled model. config: a configuration, or its path, to use instead of the checkpoint's.
        overrides: fields of `BertConfig` to change, such as `hidden_dropout_prob=0.3`; None keeps
        the checkpoint's own.
        """
        for key in set(overrides) - {field.name for field in fields(BertConfig)}:
            raise TypeError(f"BertModel.from_pretrained: {key} is not supported")
        options = {"local_files_only": local_files_only, "cache_dir": cache_dir}
        folder = resolve_model(name, revision=revision, **options)
        if not isinstance(config, BertConfig):
            config = BertConfig.from_file(Path(config or folder / "config.json"))
        overrides = {name: value for name, value in overrides.items() if value is not None}
        config = BertConfig(**{**asdict(config), **overrides})
        tensors, source = read_weights(folder)
        if config.num_hidden_layers > len(tensors):  # do not build what cannot fit
            raise UserError(f"{source}: {len(tensors)} tensors do not fit config.json")
        with reading(folder / "config.json", "a model that fits into memory"):
            model = cls(config)
        weights = {hub_name(name): p for name, p in model.named_parameters()}
        load_weights(weights, tensors, source, read_pooler(folder, config.hidden_size))
        return model.eval()

    def save_pretrained(self, folder: str | Path, head: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors`, which `transformers.BertModel` loads.

        With the tensors of a pre-training head, the files hold a `BertForMaskedLM`.
        """
        folder, prefix = Path(folder), "bert." if head else ""
        architecture = "BertForMaskedLM" if head else "BertModel"
        header = {"architectures": [architecture], "model_type": "bert", "dtype": "float32"}
        write_json(folder / "config.json", {**header, **asdict(self.config)})
        tensors = {prefix + hub_name(name): p for name, p in self.named_parameters()}
        write_tensors(folder / "model.safetensors", {**tensors, **(head or {})})


# ---------------------------------------------------------------------------- checkpoint names

# Our module -> HuggingFace's; {} is the number of the layer.
HUB_NAMES = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "bert_layers.{}.self_attention.query": "encoder.layer.{}.attention.self.query",
    "bert_layers.{}.self_attention.key": "encoder.layer.{}.attention.self.key",
    "bert_layers.{}.self_attention.value": "encoder.layer.{}.attention.self.value",
    "bert_layers.{}.attention_dense": "encoder.layer.{}.attention.output.dense",
    "bert_layers.{}.attention_layer_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "bert_layers.{}.interm_dense": "encoder.layer.{}.intermediate.dense",
    "bert_layers.{}.out_dense": "encoder.layer.{}.output.dense",
    "bert_layers.{}.out_layer_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler_dense": "pooler.dense",
}


def hub_name(name: str) -> str:
    """HuggingFace's name of a parameter: `pooler_dense.weight` -> `pooler.dense.weight`."""
    module, kind = name.rsplit(".", 1)
    layer = "".join(re.findall(r"\d+", module))
    return HUB_NAMES[re.sub(r"\d+", "{}", module)].format(layer) + "." + kind


def layer_group(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    layer = re.match(r"bert_layers\.(\d+)\.(self_attention|attention)?", name)
    if layer:
        return f"layer {layer[1]} {'attention' if layer[2] else 'feed-forward'}"
    return "pooler" if name.startswith("pooler") else "embeddings"
