"""Recipe: an ONNX graph with its matrix products in int8, weights per channel and activations at run time.

Per channel, because per tensor loses too much: a cosine to float32 of 0.95 for MiniLM's embeddings.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def make(inputs: Mapping[str, Path], output: Path, options: Mapping[str, Any]) -> None:
    """Write the int8 form of `inputs["graph"]`; `options["operators"]` are the kinds of node that it covers."""
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime warns of a preparation that was done
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(inputs["graph"], prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            output,
            op_types_to_quantize=options.get("operators", ["MatMul"]),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
