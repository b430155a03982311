"""Recipe: EfficientNet-lite0's safetensors weights as an ONNX graph, batch norms folded into the convolutions.

Input of the graph: `pixels`, FP32 (batch, 224, 224, 3), red, green and blue from 0 to 1. Output: `logits`, FP32
(batch, 1000). The network is Tan and Le's EfficientNet (2019) in the form for small devices: ReLU6, no squeeze and
excitation. Its layers are named as in the checkpoint; padding is TensorFlow's SAME, where the weights come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from workers.recipes.graph_writer import GraphWriter

_SIDE = 224
_MEAN, _DEVIATION = 127 / 255, 128 / 255  # of the pixels that the weights were trained on
_EPSILON = 1e-3  # of the batch norms
_STAGES = (
    # repeats, kernel, stride, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Residual:
    """One inverted residual: widen by `expansion`, filter each channel, narrow; added to its input where `skip`."""

    kernel: int
    stride: int
    expansion: int
    skip: bool


def blocks() -> Iterator[Residual]:
    """The network's blocks in order."""
    for repeats, kernel, stride, expansion, before, after in _STAGES:
        yield Residual(kernel, stride, expansion, stride == 1 and before == after)
        for _ in range(repeats - 1):
            yield Residual(kernel, 1, expansion, True)


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the graph of `inputs["weights"]` (safetensors); there are no options."""
    writer = _NetworkWriter(load_file(inputs["weights"]))
    writer.write()
    writer.graph.save(output, "efficientnet_lite0")


class _NetworkWriter:
    def __init__(self, weights: Weights) -> None:
        self.graph = GraphWriter()
        self._weights = weights
        self._side = _SIDE

    def write(self) -> None:
        graph = self.graph
        pixels = graph.input("pixels", "FP32", ["batch", _SIDE, _SIDE, 3])
        centred = graph.node("Sub", [pixels, self._number(_MEAN)], "centred")
        scaled = graph.node("Div", [centred, self._number(_DEVIATION)], "scaled")
        x = graph.node("Transpose", [scaled], "channels first", perm=[0, 3, 1, 2])
        x = self._convolve(x, "_conv_stem", "_bn0", stride=2)
        for index, block in enumerate(blocks()):
            x = self._block(x, block, f"_blocks.{index}")
        x = self._convolve(x, "_conv_head", "_bn1")
        pooled = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pooled")], "features")
        head = [graph.constant(name, self._weights[name]) for name in ("_fc.weight", "_fc.bias")]
        graph.output(graph.node("Gemm", [pooled, *head], "logits", transB=1), "FP32", ["batch", 1000])

    def _block(self, x: str, block: Residual, name: str) -> str:
        wide = x if block.expansion == 1 else self._convolve(x, f"{name}._expand_conv", f"{name}._bn0")
        filtered = self._convolve(wide, f"{name}._depthwise_conv", f"{name}._bn1", stride=block.stride, deep=True)
        narrow = self._convolve(filtered, f"{name}._project_conv", f"{name}._bn2", clip=False)
        return self.graph.node("Add", [narrow, x], f"{name}.sum") if block.skip else narrow

    def _convolve(self, x: str, name: str, norm: str, *, stride: int = 1, deep: bool = False, clip: bool = True) -> str:
        weight, bias = folded(self._weights, name, norm)
        kernel = weight.shape[2]
        before, after = same_padding(self._side, kernel, stride)
        self._side = -(-self._side // stride)
        inputs = [x, self.graph.constant(f"{name}.weight", weight), self.graph.constant(f"{name}.bias", bias)]
        out = self.graph.node(
            "Conv",
            inputs,
            f"{name}.out",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=len(weight) if deep else 1,
        )
        if not clip:
            return out
        return self.graph.node("Clip", [out, self._number(0), self._number(6)], f"{name}.relu6")

    def _number(self, value: float) -> str:
        return self.graph.constant(f"number {value}", np.array(value, np.float32))


def folded(weights: Weights, name: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """A convolution's weight and bias that do what it and the batch norm after it did."""
    scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return weights[f"{name}.weight"] * scale[:, None, None, None], bias


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `side` so that ceil(side / stride) places come out; the odd one goes after."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2
