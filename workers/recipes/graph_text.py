"""Writes an ONNX graph from its text, in ONNX's own syntax (docs/Syntax.md there), and its weights by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

_OPSET = 17  # the first with everything used here; older runtimes read it too
_IR_VERSION = 8  # what opset 17 came with


def save_graph(text: str, weights: Mapping[str, np.ndarray], path: Path) -> None:
    """Write the graph; tensors that no line of the text gives are among `weights`."""
    graph = parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items())
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="taxiway")
    onnx.save_model(model, str(path))
