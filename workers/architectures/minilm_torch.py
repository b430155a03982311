"""MiniLM-L6 in torch, with the submodules named as its safetensors weights are.

`input_ids` and `attention_mask`, int64 (batch, tokens) → `sentence_embedding`, float32 (batch, 384), of unit length.
The same network as `workers/recipes/minilm_onnx.py` writes; BERT (Devlin et al. 2019) with mean pooling.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_LAYERS, _HEADS, _HIDDEN, _WIDE = 6, 12, 384, 1536
_WORDS, _PLACES, _TYPES = 30522, 512, 2
_EPSILON = 1e-12  # layer_norm_eps in the model's config.json


class Embeddings(nn.Module):
    """Words, places and the type of token 0, summed and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(_WORDS, _HIDDEN)
        self.position_embeddings = nn.Embedding(_PLACES, _HIDDEN)
        self.token_type_embeddings = nn.Embedding(_TYPES, _HIDDEN)
        self.LayerNorm = nn.LayerNorm(_HIDDEN, eps=_EPSILON)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) → (batch, tokens, 384)."""
        places = self.position_embeddings.weight[: input_ids.shape[1]] + self.token_type_embeddings.weight[0]
        summed: Tensor = self.LayerNorm(self.word_embeddings(input_ids) + places)
        return summed


class SelfAttention(nn.Module):
    """Attention of every token to the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_HIDDEN, _HIDDEN)
        self.key = nn.Linear(_HIDDEN, _HIDDEN)
        self.value = nn.Linear(_HIDDEN, _HIDDEN)

    def forward(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """`hidden` (batch, tokens, 384); `counts` boolean, (batch, 1, 1, tokens)."""
        query, key, value = (
            part(hidden).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=counts)
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A product added to what came before it, normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, _HIDDEN)
        self.LayerNorm = nn.LayerNorm(_HIDDEN, eps=_EPSILON)

    def forward(self, value: Tensor, before: Tensor) -> Tensor:
        """`value` (batch, tokens, width), `before` (batch, tokens, 384)."""
        summed: Tensor = self.LayerNorm(self.dense(value) + before)
        return summed


class Layer(nn.Module):
    """One layer: attention, then the wide product."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(), "output": Output(_HIDDEN)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(_HIDDEN, _WIDE)})
        self.output = Output(_WIDE)

    def forward(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """(batch, tokens, 384) → the same shape."""
        hidden = self.attention["output"](self.attention["self"](hidden, counts), hidden)
        after: Tensor = self.output(functional.gelu(self.intermediate["dense"](hidden)), hidden)
        return after


class MiniLm(nn.Module):
    """Tokens to a sentence's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(_LAYERS))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mean over the tokens that count, in float32 and of unit length."""
        hidden = self.embeddings(input_ids)
        counts = attention_mask.bool()[:, None, None, :]
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, counts)
        total = (hidden.float() * attention_mask[:, :, None]).sum(dim=1)
        return {"sentence_embedding": functional.normalize(total, dim=1)}


def build(weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with the weights of the safetensors file; those of BERT's pooler are not used.

    Raises:
        KeyError: a weight is missing.
    """
    with torch.device("meta"):
        network = MiniLm()
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, assign=True)
    return network
