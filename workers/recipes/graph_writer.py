"""Writes an ONNX graph node by node: what the recipes that build graphs from weights share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 17  # the first with everything used here; older runtimes read it too
_IR_VERSION = 8  # what opset 17 came with
_TYPES = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64, "INT32": TensorProto.INT32}


class GraphWriter:
    """A graph under construction: `node` and `constant` give the name of a tensor that later nodes take."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, datatype: str, shape: Sequence[str | int]) -> str:
        """Declare a graph input; text in `shape` names an axis that may vary."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[datatype], list(shape)))
        return name

    def output(self, name: str, datatype: str, shape: Sequence[str | int]) -> None:
        """Declare the tensor `name` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[datatype], list(shape)))

    def constant(self, name: str, value: np.ndarray) -> str:
        """The tensor `name` with a fixed value; the first value given to a name stays."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """One operation with one output, which is also its result."""
        return self.nodes(kind, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """One operation with several outputs, which are also its result; an empty name leaves one out."""
        name = next(output for output in outputs if output)
        self._nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return list(outputs)

    def save(self, path: Path, name: str, notes: Mapping[str, str] | None = None) -> None:
        """Write the graph; `notes` become its metadata."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._constants.values()))
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="taxiway")
        helper.set_model_props(model, dict(notes or {}))
        onnx.save_model(model, str(path))
