"""Recipe: MiniLM-L6's safetensors weights as an ONNX graph from tokens to a sentence's embedding.

Inputs of the graph: `input_ids` and `attention_mask`, INT64 (batch, tokens). Output: `sentence_embedding`, FP32
(batch, 384), the mean of the last layer over the tokens that count, of unit length. The network is BERT's (Devlin
et al. 2019); the pooling is that of sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from workers.recipes.graph_text import save_graph

_LAYERS = 6

_BEGIN = """
minilm (int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask) => (float[batch, 384] sentence_embedding) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    word = Gather (words, input_ids)
    length = Shape <start = 1, end = 2> (input_ids)
    place = Slice (places, zero, length)
    embedded = Add (word, place)
    hidden0 = LayerNormalization <axis = -1, epsilon = 1e-12> (embedded, norm_weight, norm_bias)

    counts = Cast <to = 1> (attention_mask)
    row = Unsqueeze (counts, one)
    wide = Unsqueeze (row, two)
    unit = Constant <value_float = 1.0> ()
    absent = Sub (unit, wide)
    masked = Constant <value_float = -1e9> ()
    bias = Mul (absent, masked)

    heads = Constant <value_ints = [0, 0, 36, 32]> ()
    joined = Constant <value_ints = [0, 0, 384]> ()
    root = Constant <value_float = 1.4142135> ()
    half = Constant <value_float = 0.5> ()
"""
"""`masked` is added to the scores of padding: their softmax is exactly zero in float32."""

_LAYER = """
    all{0} = MatMul (hidden{0}, qkv{0}_weight)
    all_biased{0} = Add (all{0}, qkv{0}_bias)
    split{0} = Reshape (all_biased{0}, heads)
    turned{0} = Transpose <perm = [0, 2, 1, 3]> (split{0})
    query{0}, key{0}, value{0} = Split <axis = 1> (turned{0})
    across{0} = Transpose <perm = [0, 1, 3, 2]> (key{0})
    scores{0} = MatMul (query{0}, across{0})
    biased{0} = Add (scores{0}, bias)
    share{0} = Softmax <axis = -1> (biased{0})
    mixed{0} = MatMul (share{0}, value{0})
    back{0} = Transpose <perm = [0, 2, 1, 3]> (mixed{0})
    context{0} = Reshape (back{0}, joined)
    attended{0} = MatMul (context{0}, attention{0}_weight)
    attended_biased{0} = Add (attended{0}, attention{0}_bias)
    middle{0} = Add (attended_biased{0}, hidden{0})
    normed{0} = LayerNormalization <axis = -1, epsilon = 1e-12> (middle{0}, middle_norm{0}_weight, middle_norm{0}_bias)
    wide{0} = MatMul (normed{0}, intermediate{0}_weight)
    wide_biased{0} = Add (wide{0}, intermediate{0}_bias)
    scaled{0} = Div (wide_biased{0}, root)
    erf{0} = Erf (scaled{0})
    gate{0} = Add (erf{0}, unit)
    gated{0} = Mul (wide_biased{0}, gate{0})
    gelu{0} = Mul (gated{0}, half)
    narrow{0} = MatMul (gelu{0}, output{0}_weight)
    narrow_biased{0} = Add (narrow{0}, output{0}_bias)
    summed{0} = Add (narrow_biased{0}, normed{0})
    hidden{1} = LayerNormalization <axis = -1, epsilon = 1e-12> (summed{0}, last_norm{0}_weight, last_norm{0}_bias)
"""
"""A layer; ONNX Runtime fuses the nodes of the exact GELU into one."""

_END = """
    column = Unsqueeze (counts, two)
    kept = Mul (hidden6, column)
    total = ReduceSum <keepdims = 0> (kept, one)
    norm = ReduceL2 <axes = [1], keepdims = 1> (total)
    least = Constant <value_float = 1e-12> ()
    divisor = Max (norm, least)
    sentence_embedding = Div (total, divisor)
}
"""
"""The sum over tokens, of unit length: the division by their number in the mean drops out."""

_PARTS = {
    "attention": "attention.output.dense",
    "middle_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "last_norm": "output.LayerNorm",
}
"""What the parts of a layer are called above, and in the file."""


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the graph of `inputs["weights"]` (safetensors); there are no options."""
    tensors = load_file(inputs["weights"])
    # Every token is of type 0: its embedding is added to the positions' here, not at run time.
    places = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    weights = {"words": tensors["embeddings.word_embeddings.weight"], "places": places}
    for kind in ("weight", "bias"):
        weights[f"norm_{kind}"] = tensors[f"embeddings.LayerNorm.{kind}"]
        for layer in range(_LAYERS):
            weights |= _weights_of(tensors, layer, kind)
    layers = [_LAYER.format(layer, layer + 1) for layer in range(_LAYERS)]
    save_graph("".join([_BEGIN, *layers, _END]), weights, output)


def _weights_of(tensors: Mapping[str, np.ndarray], layer: int, kind: str) -> dict[str, np.ndarray]:
    """The weights or biases of a layer. Query, key and value are one product; the query's have the scores' scale."""
    name = f"encoder.layer.{layer}"
    query, *others = (tensors[f"{name}.attention.self.{part}.{kind}"] for part in ("query", "key", "value"))
    found = {f"qkv{layer}_{kind}": np.concatenate([query * np.float32(32**-0.5), *others]).T}
    return found | {f"{ours}{layer}_{kind}": tensors[f"{name}.{theirs}.{kind}"].T for ours, theirs in _PARTS.items()}
