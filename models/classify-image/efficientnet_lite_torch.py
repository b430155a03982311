"""EfficientNet-lite0 for torch: Tan and Le (2019) in the form for small devices, ReLU6 and no squeeze and excitation.

The weights carry the checkpoint's names. Padding is TensorFlow's SAME, where they come from: an odd zero goes after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_SIDE = 224
_MEAN, _DEVIATION = 127 / 255, 128 / 255  # of the pixels that the weights were trained on
_EPSILON = 1e-3  # of the batch norms
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # blocks, and the stride of the first one


class EfficientNetLite(nn.Module):
    """Pixels to logits."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = Convolution(weights, "_conv_stem", "_bn0", side=_SIDE, stride=2)
        self.blocks = nn.Sequential(*_blocks(weights))
        self.head = Convolution(weights, "_conv_head", "_bn1", side=_SIDE // 32)
        self.weight = nn.Parameter(weights["_fc.weight"], requires_grad=False)
        self.bias = nn.Parameter(weights["_fc.bias"], requires_grad=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """`logits` (n, 1000) for `pixels` (n, 224, 224, 3), red, green and blue from 0 to 1."""
        x = ((pixels - _MEAN) / _DEVIATION).permute(0, 3, 1, 2)
        features = self.head(self.blocks(self.stem(x))).mean((2, 3))
        return {"logits": functional.linear(features, self.weight, self.bias)}


class InvertedResidual(nn.Module):
    """An inverted residual: widen, filter each channel, narrow; added to its input where that has the same shape."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, *, side: int, stride: int) -> None:
        super().__init__()
        widens = f"{name}._expand_conv.weight" in weights
        self.expand = Convolution(weights, f"{name}._expand_conv", f"{name}._bn0", side=side) if widens else None
        self.filter = Convolution(weights, f"{name}._depthwise_conv", f"{name}._bn1", side=side, stride=stride)
        self.project = Convolution(weights, f"{name}._project_conv", f"{name}._bn2", side=side, clip=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, channels, side, side) one block on."""
        wide = self.expand(x) if self.expand else x
        narrow: Tensor = self.project(self.filter(wide))
        return narrow + x if narrow.shape == x.shape else narrow


class Convolution(nn.Module):
    """A convolution with the batch norm after it folded in, and ReLU6 where `clip`; `side` is its input's."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, norm: str, *, side: int, stride: int = 1, clip: bool = True
    ) -> None:
        super().__init__()
        kernel = weights[f"{name}.weight"]
        scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        laid = (kernel * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(laid, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        total = max((-(-side // stride) - 1) * stride + kernel.shape[2] - side, 0)
        self.padding = (total // 2, total - total // 2) * 2
        self.stride = stride
        self.groups = len(kernel) if name.endswith("_depthwise_conv") else 1
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, channels, side, side) convolved."""
        padded = functional.pad(x, self.padding)
        out = functional.conv2d(padded, self.weight, self.bias, stride=self.stride, groups=self.groups)
        return functional.relu6(out) if self.clip else out


def _blocks(weights: Mapping[str, Tensor]) -> Iterator[InvertedResidual]:
    side, index = _SIDE // 2, 0
    for blocks, first_stride in _STAGES:
        for block in range(blocks):
            stride = 1 if block else first_stride
            yield InvertedResidual(weights, f"_blocks.{index}", side=side, stride=stride)
            side, index = side // stride, index + 1


def build(weights: Mapping[str, Tensor]) -> EfficientNetLite:
    """The network over these weights."""
    return EfficientNetLite(weights)
