"""Recipe: SmolLM2's GGUF weights as an ONNX graph that reads tokens into a cache and gives the next one's logits.

Inputs of the graph, for b rows of up to t new tokens each:
    input_ids    INT64 (b, t), each row padded at its right
    last         INT32 (b,), the position in the context of each row's last real token
    past.{i}.key, past.{i}.value    FP32 (b, kv heads, capacity, head width), the cache of layer i
Outputs:
    logits       FP32 (b, vocabulary), after each row's last real token
    present.{i}.key, present.{i}.value    the caches with the new entries
Attention writes those in place where a present shares its past's memory: the graph's note `in_place` maps one to the
other. A row reads its whole prompt in its first call and one token in each later one.

The network is Llama's (Touvron et al. 2023) with grouped queries, and input and output embeddings in one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from workers.recipes.gguf_weights import Decoder, read_gguf
from workers.recipes.graph_writer import GraphWriter

_CONTEXT = 2048  # tokens that the rotation tables cover: the catalogue's limit; the model was trained on 8192
_BLOCK = 32
"""Weights that share a scale, as in the GGUF file.

Against float32's logits over 152 tokens: mean cosine 0.9990 and 98 % of the same tokens; with 64, 0.9973 and 94 %, for
15 % more tokens a second. One scale a row of activations and of weights (MatMulInteger) gave 0.990 and 88 % at 1.5
times the speed, and one a batch (DynamicQuantizeLinear) 0.925 and 81 %, with answers that depend on batch mates.
"""
_ZERO = 128  # what stands for 0 in MatMulNBits' unsigned bytes
_MICROSOFT = "com.microsoft"
_FLOAT, _INT64 = 1, 7  # TensorProto's numbers

Weights = Mapping[str, np.ndarray]


class Precision(Protocol):
    """How the graph holds a weight matrix of shape (out features, in features)."""

    def product(self, graph: GraphWriter, x: str, weight: np.ndarray, name: str) -> str:
        """The rows of `x` times the matrix."""

    def rows(self, graph: GraphWriter, ids: str, weight: np.ndarray, name: str) -> str:
        """The matrix's rows of the numbers `ids`, as floats; the matrix is shared with a product of that name."""


class Float32:
    """Every weight, unchanged."""

    def product(self, graph: GraphWriter, x: str, weight: np.ndarray, name: str) -> str:
        """The rows of `x` times the matrix."""
        return graph.node("MatMul", [x, graph.constant(f"{name}.weight", weight.T)], f"{name}.product")

    def rows(self, graph: GraphWriter, ids: str, weight: np.ndarray, name: str) -> str:
        """The matrix's rows, gathered from its columns: it is kept transposed for the product."""
        table = graph.constant(f"{name}.weight", weight.T)
        columns = graph.node("Gather", [table, ids], f"{name}.columns", axis=1)
        return graph.node("Transpose", [columns], f"{name}.rows", perm=[1, 2, 0])


class Int8:
    """Weights as bytes with a scale a block; a product quantises each row of `x` by block too, and no row by others."""

    def product(self, graph: GraphWriter, x: str, weight: np.ndarray, name: str) -> str:
        """The rows of `x` times the matrix."""
        rows, columns = weight.shape
        sizes = {"N": rows, "K": columns, "bits": 8, "block_size": _BLOCK, "accuracy_level": 4}
        inputs = [x, *self._constants(graph, weight, name)]
        return graph.node("MatMulNBits", inputs, f"{name}.product", domain=_MICROSOFT, **sizes)

    def rows(self, graph: GraphWriter, ids: str, weight: np.ndarray, name: str) -> str:
        """The matrix's rows as floats."""
        table, scales = self._constants(graph, weight, name)
        blocks = graph.node("Gather", [table, ids], f"{name}.blocks")
        scale = graph.node(
            "Unsqueeze", [graph.node("Gather", [scales, ids], f"{name}.scale"), "minus one"], f"{name}.by"
        )
        number = graph.node("Cast", [blocks], f"{name}.numbers", to=_FLOAT)
        signed = graph.node("Sub", [number, graph.constant("zero", np.array(_ZERO, np.float32))], f"{name}.signed")
        shape = graph.constant("joined", np.array([0, 0, -1], np.int64))
        return graph.node("Reshape", [graph.node("Mul", [signed, scale], f"{name}.floats"), shape], f"{name}.rows")

    def _constants(self, graph: GraphWriter, weight: np.ndarray, name: str) -> tuple[str, str]:
        graph.constant("minus one", np.array([-1], np.int64))
        blocks = weight.reshape(len(weight), -1, _BLOCK)
        scale = np.maximum(np.abs(blocks).max(axis=2) / 127, np.finfo(np.float32).tiny)
        bytes_ = (np.rint(blocks / scale[..., None]) + _ZERO).astype(np.uint8)
        return graph.constant(f"{name}.bytes", bytes_), graph.constant(f"{name}.scales", scale)


_PRECISIONS: Mapping[str, Precision] = {"fp32": Float32(), "int8": Int8()}


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the graph of `inputs["weights"]` (GGUF); `options["precision"]` is `fp32` or `int8`."""
    sizes, weights = read_gguf(inputs["weights"])
    writer = _DecoderWriter(sizes, weights, _PRECISIONS[options["precision"]])
    writer.write()
    writer.graph.save(output, "smollm2", {"in_place": json.dumps(writer.caches)})


class _DecoderWriter:
    """Writes the decoder's layers; `caches` maps each present output to the past input whose memory it may share."""

    def __init__(self, sizes: Decoder, weights: Weights, precision: Precision) -> None:
        self.graph = GraphWriter()
        self.caches: dict[str, str] = {}
        self._sizes = sizes
        self._weights = weights
        self._precision = precision

    def write(self) -> None:
        """The whole graph."""
        table = self._weights["model.embed_tokens.weight"]
        self._inputs()
        residual = self._precision.rows(self.graph, "input_ids", table, "table")
        hidden = self._first_norm(residual)
        for layer in range(self._sizes.layers):
            name = f"model.layers.{layer}"
            mixed = self._attention(hidden, layer)
            hidden, residual = self._add_norm(mixed, residual, f"{name}.post_attention_layernorm")
            moved = self._feed_forward(hidden, f"{name}.mlp")
            following = f"model.layers.{layer + 1}.input_layernorm"
            last = layer + 1 == self._sizes.layers
            hidden, residual = self._add_norm(moved, residual, "model.norm" if last else following)
        product = self._precision.product(self.graph, self._pick(hidden), table, "table")
        self.graph.output(self.graph.node("Identity", [product], "logits"), "FP32", ["b", len(table)])

    def _inputs(self) -> None:
        """Tokens, positions and rotation tables; `total` is the longest context in the batch."""
        graph, half = self.graph, self._sizes.head_width // 2
        graph.input("input_ids", "INT64", ["b", "t"])
        graph.input("last", "INT32", ["b"])
        frequency = self._sizes.rope_base ** (-np.arange(half) / half)
        angle = np.arange(_CONTEXT)[:, None] * frequency
        graph.constant("cos", np.cos(angle).astype(np.float32))
        graph.constant("sin", np.sin(angle).astype(np.float32))
        longest = graph.node("ReduceMax", ["last"], "longest", keepdims=0)
        graph.node("Add", [longest, graph.constant("one", np.array(1, np.int32))], "total")

    def _first_norm(self, x: str) -> str:
        name = "model.layers.0.input_layernorm"
        scale = self.graph.constant(name, self._weights[f"{name}.weight"])
        epsilon = self._sizes.epsilon
        return self.graph.node("SimplifiedLayerNormalization", [x, scale], f"{name}.out", axis=-1, epsilon=epsilon)

    def _add_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """The sum of `x` and the residual, normalised, and the sum itself."""
        inputs = [x, residual, self.graph.constant(name, self._weights[f"{name}.weight"])]
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        kind = "SkipSimplifiedLayerNormalization"
        self.graph.nodes(kind, inputs, outputs, domain=_MICROSOFT, epsilon=self._sizes.epsilon)
        return outputs[0], outputs[3]

    def _attention(self, hidden: str, layer: int) -> str:
        """Rotation, cache and attention in one operation, between two products."""
        name, sizes = f"model.layers.{layer}.self_attn", self._sizes
        packed = self._precision.product(self.graph, hidden, self._joined(name, "qkv"), f"{name}.qkv")
        shape: list[str | int] = ["b", sizes.kv_heads, "capacity", sizes.head_width]
        pasts = [self.graph.input(f"past.{layer}.{part}", "FP32", shape) for part in ("key", "value")]
        presents = [past.replace("past", "present") for past in pasts]
        inputs = [packed, "", "", *pasts, "last", "total", "cos", "sin"]
        outputs = [f"{name}.mixed", *presents]
        heads = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "do_rotary": 1}
        self.graph.nodes("GroupQueryAttention", inputs, outputs, domain=_MICROSOFT, **heads)
        for past, present in zip(pasts, presents, strict=True):
            self.graph.output(present, "FP32", shape)
            self.caches[present] = past
        weight = self._weights[f"{name}.o_proj.weight"]
        return self._precision.product(self.graph, outputs[0], weight, f"{name}.o_proj")

    def _feed_forward(self, hidden: str, name: str) -> str:
        """SwiGLU (Shazeer 2020); QuickGelu with alpha 1 is the gate's x·sigmoid(x)."""
        joined = self._joined(name, ("gate", "up"))
        both = self._precision.product(self.graph, hidden, joined, f"{name}.both")
        gate, up = self.graph.nodes("Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1)
        opened = self.graph.node("QuickGelu", [gate], f"{name}.opened", domain=_MICROSOFT, alpha=1.0)
        inner = self.graph.node("Mul", [opened, up], f"{name}.inner")
        return self._precision.product(self.graph, inner, self._weights[f"{name}.down_proj.weight"], f"{name}.down")

    def _joined(self, name: str, parts: str | tuple[str, ...]) -> np.ndarray:
        return np.concatenate([self._weights[f"{name}.{part}_proj.weight"] for part in parts])

    def _pick(self, hidden: str) -> str:
        """Each row's last real token: logits after the others would be a fifth of a prompt's work for nothing."""
        graph = self.graph
        width = graph.node("Shape", ["input_ids"], "width", start=1)
        final = graph.node("Sub", [width, graph.constant("one wide", np.array([1], np.int64))], "final")
        place = graph.node("Min", [graph.node("Cast", ["last"], "last wide", to=_INT64), final], "place")
        axis = graph.constant("axis", np.array([1], np.int64))
        return graph.node(
            "GatherND", [hidden, graph.node("Unsqueeze", [place, axis], "places")], "picked", batch_dims=1
        )
