"""Recipe: an image classifier's ONNX graph with its convolutions in int8, weights per channel.

Activations get fixed scales, measured on the photographs that the recipe is given.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image, ImageOps

_SIDE = 224


class _Photographs(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no stubs
    """Each photograph's middle square once, as it is and mirrored."""

    def __init__(self, paths: list[Path]) -> None:
        self._batches = iter([batch for path in paths for batch in _views(path)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input of the graph; None after the last."""
        return next(self._batches, None)


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the int8 form of `inputs["graph"]`; every other input is a photograph to measure on."""
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime warns of a preparation that was done
    photographs = [path for name, path in sorted(inputs.items()) if name != "graph"]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(inputs["graph"], prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            output,
            _Photographs(photographs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Clip", "Add", "GlobalAveragePool", "Gemm"],
        )


def _views(path: Path) -> list[dict[str, np.ndarray]]:
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (_SIDE, _SIDE), Image.Resampling.BICUBIC)
    return [{"pixels": np.asarray(view, np.float32)[None] / 255} for view in (square, ImageOps.mirror(square))]
