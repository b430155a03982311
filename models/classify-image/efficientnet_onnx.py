"""Recipe: EfficientNet-lite0's safetensors weights as an ONNX graph, batch norms folded into the convolutions.

Input of the graph: `pixels`, FP32 (batch, 224, 224, 3), red, green and blue from 0 to 1. Output: `logits`, FP32
(batch, 1000). The network is Tan and Le's EfficientNet (2019) in the form for small devices: ReLU6, no squeeze and
excitation. Its layers are named as in the checkpoint; padding is TensorFlow's SAME, where the weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from workers.recipes.graph_text import save_graph

_SIDE = 224
_EPSILON = 1e-3  # of the batch norms
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # blocks, and the stride of the first one

_BEGIN = """
efficientnet_lite0 (float[batch, 224, 224, 3] pixels) => (float[batch, 1000] logits) {
    mean = Constant <value_float = 0.49803922> ()
    deviation = Constant <value_float = 0.5019608> ()
    zero = Constant <value_float = 0.0> ()
    six = Constant <value_float = 6.0> ()
    centred = Sub (pixels, mean)
    scaled = Div (centred, deviation)
    image = Transpose <perm = [0, 3, 1, 2]> (scaled)
"""
"""127 and 128 of 255 are mean and deviation of the pixels that the weights were trained on."""

_END = """
    pooled = GlobalAveragePool ({0})
    features = Flatten (pooled)
    logits = Gemm <transB = 1> (features, fc_weight, fc_bias)
}}
"""


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the graph of `inputs["weights"]` (safetensors); there are no options."""
    network = _Network(load_file(inputs["weights"]))
    last = network.build()
    save_graph("".join([_BEGIN, *network.lines, _END.format(last)]), network.weights, output)


class _Network:
    """The lines of the convolutions, and their weights."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self._side, self._channels = _SIDE, 3
        self.lines: list[str] = []
        self.weights = {f"fc_{kind}": tensors[f"_fc.{kind}"] for kind in ("weight", "bias")}

    def build(self) -> str:
        """Add all convolutions; returns the name of what the last one gives."""
        x = self._convolve("image", "_conv_stem", "_bn0", stride=2)
        strides = [stride if first else 1 for blocks, stride in _STAGES for first in (True, *[False] * (blocks - 1))]
        for index, stride in enumerate(strides):
            x = self._block(x, f"_blocks.{index}", stride)
        return self._convolve(x, "_conv_head", "_bn1")

    def _block(self, x: str, name: str, stride: int) -> str:
        """An inverted residual: widen, filter each channel, narrow; added to its input where it has the same shape."""
        expands, filters = f"{name}._expand_conv", f"{name}._depthwise_conv"
        before = self._channels
        wide = self._convolve(x, expands, f"{name}._bn0") if f"{expands}.weight" in self._tensors else x
        filtered = self._convolve(wide, filters, f"{name}._bn1", stride=stride, deep=True)
        narrow = self._convolve(filtered, f"{name}._project_conv", f"{name}._bn2", clip=False)
        if stride > 1 or self._channels != before:
            return narrow
        self.lines.append(f"    {narrow}_summed = Add ({narrow}, {x})\n")
        return f"{narrow}_summed"

    def _convolve(self, x: str, name: str, norm: str, *, stride: int = 1, deep: bool = False, clip: bool = True) -> str:
        """A convolution that does what it and the batch norm after it did."""
        tensors, made = self._tensors, name.replace(".", "")
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + _EPSILON)
        weight = tensors[f"{name}.weight"] * scale[:, None, None, None]
        self.weights[f"{made}_weight"] = weight
        self.weights[f"{made}_bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        total = max((-(-self._side // stride) - 1) * stride + weight.shape[2] - self._side, 0)
        self._side, self._channels = -(-self._side // stride), len(weight)
        pads, strides = [total // 2] * 2 + [total - total // 2] * 2, [stride] * 2
        attributes = f"pads = {pads}, strides = {strides}, group = {len(weight) if deep else 1}"
        self.lines.append(f"    {made} = Conv <{attributes}> ({x}, {made}_weight, {made}_bias)\n")
        if clip:
            self.lines.append(f"    {made}_clipped = Clip ({made}, zero, six)\n")
        return f"{made}_clipped" if clip else made
