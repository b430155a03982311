"""MiniLM-L6 in torch: `torch.nn.TransformerEncoder` with the weights of its safetensors file.

`input_ids` and `attention_mask`, int64 (batch, tokens) → `sentence_embedding`, float32 (batch, 384), of unit length.
The same network as `workers/recipes/minilm_onnx.py` writes; BERT (Devlin et al. 2019) with mean pooling.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_LAYERS, _HEADS, _HIDDEN, _WIDE = 6, 12, 384, 1536
_WORDS, _PLACES = 30522, 512
_EPSILON = 1e-12  # layer_norm_eps in the model's config.json

_PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""What torch calls the parts of a layer, and what the file does."""


class MiniLm(nn.Module):
    """Tokens to a sentence's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _HIDDEN)
        self.places = nn.Embedding(_PLACES, _HIDDEN)
        self.norm = nn.LayerNorm(_HIDDEN, eps=_EPSILON)
        layer = nn.TransformerEncoderLayer(
            _HIDDEN, _HEADS, _WIDE, dropout=0.0, activation="gelu", layer_norm_eps=_EPSILON, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mean over the tokens that count, in float32 and of unit length."""
        hidden = self.norm(self.words(input_ids) + self.places.weight[: input_ids.shape[1]])
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        total = (hidden.float() * attention_mask[:, :, None]).sum(dim=1)
        return {"sentence_embedding": functional.normalize(total, dim=1)}


def build(weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with the weights of the safetensors file; those of BERT's pooler are not used.

    Raises:
        KeyError: a weight is missing.
    """
    words, places, types = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    state = {"words.weight": words, "places.weight": places + types[0]}  # every token is of type 0
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for layer in range(_LAYERS):
            ours, theirs = f"encoder.layers.{layer}", f"encoder.layer.{layer}"
            projections = [weights[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(projections)
            state |= {f"{ours}.{part}.{kind}": weights[f"{theirs}.{called}.{kind}"] for part, called in _PARTS.items()}
    with torch.device("meta"):
        network = MiniLm()
    network.load_state_dict(state, assign=True)
    return network
