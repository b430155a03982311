"""MiniLM-L6 in JAX, over the tensors of its safetensors file by their names.

`input_ids` and `attention_mask`, int (batch, tokens) → `sentence_embedding`, float32 (batch, 384), of unit length.
The same network as `workers/recipes/minilm_onnx.py` writes; BERT (Devlin et al. 2019) with mean pooling.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_LAYERS, _HEADS, _HIDDEN = 6, 12, 384
_EPSILON = 1e-12  # layer_norm_eps in the model's config.json
_MASKED = -1e9  # added to the scores of padding: their softmax is exactly zero in float32

Tensors = Mapping[str, jax.Array]


def apply(weights: Tensors, inputs: Tensors) -> dict[str, jax.Array]:
    """The mean over the tokens that count, of unit length."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].astype(jnp.float32)
    places = weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    words = weights["embeddings.word_embeddings.weight"][tokens]
    summed = words + places + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = _norm(weights, "embeddings.LayerNorm", summed)
    bias = (1 - mask)[:, None, None, :] * _MASKED
    for layer in range(_LAYERS):
        hidden = _layer(weights, f"encoder.layer.{layer}", hidden, bias)
    total = (hidden * mask[:, :, None]).sum(axis=1)
    length = jnp.linalg.norm(total, axis=1, keepdims=True)
    return {"sentence_embedding": total / jnp.maximum(length, 1e-12)}


def _layer(weights: Tensors, name: str, hidden: jax.Array, bias: jax.Array) -> jax.Array:
    mixed = _dense(weights, f"{name}.attention.output.dense", _attention(weights, name, hidden, bias))
    hidden = _norm(weights, f"{name}.attention.output.LayerNorm", mixed + hidden)
    wide = jax.nn.gelu(_dense(weights, f"{name}.intermediate.dense", hidden), approximate=False)
    return _norm(weights, f"{name}.output.LayerNorm", _dense(weights, f"{name}.output.dense", wide) + hidden)


def _attention(weights: Tensors, name: str, hidden: jax.Array, bias: jax.Array) -> jax.Array:
    rows, tokens, _ = hidden.shape
    width = _HIDDEN // _HEADS
    query, key, value = (
        _dense(weights, f"{name}.attention.self.{part}", hidden).reshape(rows, tokens, _HEADS, width)
        for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * width**-0.5
    share = jax.nn.softmax(scores + bias, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", share, value).reshape(rows, tokens, _HIDDEN)


def _dense(weights: Tensors, name: str, value: jax.Array) -> jax.Array:
    return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Tensors, name: str, value: jax.Array) -> jax.Array:
    centred = value - value.mean(axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + _EPSILON)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
