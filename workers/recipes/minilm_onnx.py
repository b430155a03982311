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

from workers.recipes.graph_writer import GraphWriter

_LAYERS, _HEADS, _HIDDEN = 6, 12, 384
_EPSILON = 1e-12  # layer_norm_eps in the model's config.json
_MASKED = -1e9  # added to the scores of padding: their softmax is exactly zero in float32
_FLOAT = 1  # TensorProto.FLOAT

Weights = Mapping[str, np.ndarray]


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the graph of `inputs["weights"]` (safetensors); there are no options."""
    tensors = load_file(inputs["weights"])
    graph = GraphWriter()
    graph.input("input_ids", "INT64", ["batch", "tokens"])
    graph.input("attention_mask", "INT64", ["batch", "tokens"])
    hidden = _embed(graph, tensors)
    bias = _mask_bias(graph)
    for layer in range(_LAYERS):
        hidden = _layer(graph, hidden, bias, tensors, f"encoder.layer.{layer}")
    _pool(graph, hidden)
    graph.output("sentence_embedding", "FP32", ["batch", _HIDDEN])
    graph.save(output, "minilm")


def _embed(graph: GraphWriter, tensors: Weights) -> str:
    table = graph.constant("words", tensors["embeddings.word_embeddings.weight"])
    words = graph.node("Gather", [table, "input_ids"], "embeddings.words")
    # Every token is of type 0: its embedding is added to the positions' here, not at run time.
    places = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    length = graph.node("Shape", ["input_ids"], "tokens", start=1, end=2)
    here = graph.node("Slice", [graph.constant("places", places), _integers(graph, [0]), length], "embeddings.places")
    return _norm(graph, graph.node("Add", [words, here], "embeddings.sum"), tensors, "embeddings.LayerNorm")


def _mask_bias(graph: GraphWriter) -> str:
    """Shape (batch, 1, 1, tokens): 0 where a token counts, `_MASKED` where it is padding."""
    wide = graph.node("Unsqueeze", ["attention_mask", _integers(graph, [1, 2])], "mask.wide")
    counts = graph.node("Cast", [wide], "mask.counts", to=_FLOAT)
    absent = graph.node("Sub", [_number(graph, 1), counts], "mask.absent")
    return graph.node("Mul", [absent, _number(graph, _MASKED)], "mask.bias")


def _layer(graph: GraphWriter, hidden: str, bias: str, tensors: Weights, name: str) -> str:
    mixed = _dense(graph, _attention(graph, hidden, bias, tensors, name), tensors, f"{name}.attention.output.dense")
    summed = graph.node("Add", [mixed, hidden], f"{name}.attention.sum")
    hidden = _norm(graph, summed, tensors, f"{name}.attention.output.LayerNorm")
    wide = _gelu(graph, _dense(graph, hidden, tensors, f"{name}.intermediate.dense"), f"{name}.gelu")
    narrow = _dense(graph, wide, tensors, f"{name}.output.dense")
    return _norm(graph, graph.node("Add", [narrow, hidden], f"{name}.sum"), tensors, f"{name}.output.LayerNorm")


def _attention(graph: GraphWriter, hidden: str, bias: str, tensors: Weights, name: str) -> str:
    """Self-attention over all heads; query, key and value are one product."""
    parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    width = _HIDDEN // _HEADS
    scale = np.array([width**-0.5, 1, 1], np.float32)  # the query's weights carry the scores' scale
    weight = np.concatenate([tensors[f"{part}.weight"] * s for part, s in zip(parts, scale, strict=True)])
    offset = np.concatenate([tensors[f"{part}.bias"] * s for part, s in zip(parts, scale, strict=True)])
    every = _linear(graph, hidden, weight, offset, f"{name}.qkv")
    heads = graph.node("Reshape", [every, _integers(graph, [0, 0, 3 * _HEADS, width])], f"{name}.qkv.heads")
    turned = graph.node("Transpose", [heads], f"{name}.qkv.turned", perm=[0, 2, 1, 3])
    query, key, value = graph.nodes("Split", [turned], [f"{name}.query", f"{name}.key", f"{name}.value"], axis=1)
    across = graph.node("Transpose", [key], f"{name}.key.turned", perm=[0, 1, 3, 2])
    scores = graph.node("MatMul", [query, across], f"{name}.scores")
    masked = graph.node("Add", [scores, bias], f"{name}.scores.masked")
    share = graph.node("Softmax", [masked], f"{name}.share", axis=-1)
    mixed = graph.node("MatMul", [share, value], f"{name}.mixed")
    back = graph.node("Transpose", [mixed], f"{name}.mixed.turned", perm=[0, 2, 1, 3])
    return graph.node("Reshape", [back, _integers(graph, [0, 0, _HIDDEN])], f"{name}.context")


def _dense(graph: GraphWriter, value: str, tensors: Weights, name: str) -> str:
    return _linear(graph, value, tensors[f"{name}.weight"], tensors[f"{name}.bias"], name)


def _linear(graph: GraphWriter, value: str, weight: np.ndarray, bias: np.ndarray, name: str) -> str:
    product = graph.node("MatMul", [value, graph.constant(f"{name}.weight", weight.T)], f"{name}.product")
    return graph.node("Add", [product, graph.constant(f"{name}.bias", bias)], f"{name}.out")


def _norm(graph: GraphWriter, value: str, tensors: Weights, name: str) -> str:
    inputs = [value, *(graph.constant(f"{name}.{part}", tensors[f"{name}.{part}"]) for part in ("weight", "bias"))]
    return graph.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=_EPSILON)


def _gelu(graph: GraphWriter, value: str, name: str) -> str:
    """The exact form, with erf; ONNX Runtime fuses these nodes into one."""
    scaled = graph.node("Div", [value, _number(graph, 2**0.5)], f"{name}.scaled")
    gate = graph.node("Add", [graph.node("Erf", [scaled], f"{name}.erf"), _number(graph, 1)], f"{name}.gate")
    gated = graph.node("Mul", [value, gate], f"{name}.gated")
    return graph.node("Mul", [gated, _number(graph, 0.5)], f"{name}.out")


def _pool(graph: GraphWriter, hidden: str) -> None:
    """The sum over tokens, of unit length: the division by their number in the mean drops out."""
    wide = graph.node("Unsqueeze", ["attention_mask", _integers(graph, [2])], "pool.mask")
    counts = graph.node("Cast", [wide], "pool.counts", to=_FLOAT)
    kept = graph.node("Mul", [hidden, counts], "pool.kept")
    total = graph.node("ReduceSum", [kept, _integers(graph, [1])], "pool.total", keepdims=0)
    length = graph.node("ReduceL2", [total], "pool.length", axes=[1], keepdims=1)
    least = graph.node("Max", [length, _number(graph, 1e-12)], "pool.least")
    graph.node("Div", [total, least], "sentence_embedding")


def _integers(graph: GraphWriter, values: list[int]) -> str:
    return graph.constant(f"integers.{values}", np.array(values, np.int64))


def _number(graph: GraphWriter, value: float) -> str:
    return graph.constant(f"number.{value}", np.array(value, np.float32))
