"""Small ONNX graphs, and models of them, for tests."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import yaml
from onnx import TensorProto, helper

VAD_SPECS: dict[str, Any] = {
    "inputs": [
        {"name": "input", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "state", "datatype": "FP32", "shape": [2, -1, 128], "batch_axis": 1},
        {"name": "sr", "datatype": "INT64", "shape": [], "batch_axis": None},
    ],
    "outputs": [
        {"name": "output", "datatype": "FP32", "shape": [-1, 1]},
        {"name": "stateN", "datatype": "FP32", "shape": [2, -1, 128], "batch_axis": 1},
    ],
}
"""The inputs and outputs of silero-vad: a state with the batch on its second axis, and one sample rate for all rows."""


def vad_graph() -> bytes:
    """A graph with these: `output` is the mean of a row's input plus its state's first number plus the sample rate."""
    nodes = [
        helper.make_node("ReduceMean", ["input", "ones"], ["mean"], keepdims=1),
        helper.make_node("Slice", ["state", "zeros3", "ends3", "axes3"], ["slice"]),
        helper.make_node("Squeeze", ["slice", "zero"], ["first"]),
        helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
        helper.make_node("Sum", ["mean", "first", "rate"], ["output"]),
        helper.make_node("Add", ["state", "step"], ["stateN"]),
    ]
    constants = [
        helper.make_tensor("ones", TensorProto.INT64, [1], [1]),
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("zeros3", TensorProto.INT64, [2], [0, 0]),
        helper.make_tensor("ends3", TensorProto.INT64, [2], [1, 1]),
        helper.make_tensor("axes3", TensorProto.INT64, [2], [0, 2]),
        helper.make_tensor("step", TensorProto.FLOAT, [], [1.0]),
    ]
    inputs = [
        _value("input", TensorProto.FLOAT, ["batch", "samples"]),
        _value("state", TensorProto.FLOAT, [2, "batch", 128]),
        _value("sr", TensorProto.INT64, []),
    ]
    outputs = [
        _value("output", TensorProto.FLOAT, ["batch", 1]),
        _value("stateN", TensorProto.FLOAT, [2, "batch", 128]),
    ]
    return _model(nodes, inputs, outputs, constants)


def scale_graph(factor: float, *, name: str = "x") -> bytes:
    """A graph whose output `y`, FP32 (batch, 2), is its one input times a factor."""
    nodes = [helper.make_node("Mul", [name, "factor"], ["y"])]
    constants = [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])]
    shape: list[int | str] = ["batch", 2]
    return _model(nodes, [_value(name, TensorProto.FLOAT, shape)], [_value("y", TensorProto.FLOAT, shape)], constants)


EXPORTED = {"taken": "serving_default_x:0", "given": "save_infer_model/scale_0.tmp_1"}
"""Names of tensors as tf2onnx and Paddle2ONNX write them."""

EXPORTED_SPECS: dict[str, Any] = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2], "source": EXPORTED["taken"]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2], "source": EXPORTED["given"]}],
}
"""The inputs and outputs of `exported_graph`."""


def exported_graph(factor: float, *, given: int = -1) -> bytes:
    """The same with such names and batch axes of the length -1, as Paddle2ONNX writes them; `given` is the output's."""
    nodes = [helper.make_node("Mul", [EXPORTED["taken"], "factor"], [EXPORTED["given"]])]
    constants = [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])]
    inputs = [_value(EXPORTED["taken"], TensorProto.FLOAT, [-1, 2])]
    return _model(nodes, inputs, [_value(EXPORTED["given"], TensorProto.FLOAT, [given, 2])], constants)


def spinner_graph(taken: str, given: str, *, turns: int = 1) -> bytes:
    """A graph that gives back its one input, INT64 (batch,), after `turns` turns of a loop for the largest number."""
    counted = helper.make_node("Add", ["x", "one"], ["y"])
    goes_on = helper.make_node("Identity", ["go"], ["on"])
    kinds = {"i": TensorProto.INT64, "go": TensorProto.BOOL, "on": TensorProto.BOOL}
    values = {name: _value(name, kinds.get(name, TensorProto.INT64), []) for name in ("i", "go", "x", "on", "y")}
    body = helper.make_graph(
        [counted, goes_on], "body", [values[name] for name in ("i", "go", "x")], [values["on"], values["y"]]
    )
    nodes = [
        helper.make_node("ReduceMax", [taken], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "each"], ["trips"]),
        helper.make_node("Loop", ["trips", "", "zero"], ["end"], body=body),
        helper.make_node("Mul", ["end", "zero"], ["nothing"]),
        helper.make_node("Add", [taken, "nothing"], [given]),
    ]
    numbers = {"zero": 0, "one": 1, "each": turns}
    constants = [helper.make_tensor(name, TensorProto.INT64, [], [n]) for name, n in numbers.items()]
    inputs, outputs = ([_value(name, TensorProto.INT64, ["batch"])] for name in (taken, given))
    return _model(nodes, inputs, outputs, constants)


def hungry_graph(taken: str, given: str, *, numbers: int) -> bytes:
    """A graph that gives back its one input, INT64 (batch,), and needs memory for `numbers` float32 a row meanwhile."""
    nodes = [
        helper.make_node("Shape", [taken], ["rows"]),
        helper.make_node("Mul", ["rows", "wanted"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["nothing"], to=TensorProto.INT64),
        helper.make_node("Add", [taken, "nothing"], [given]),
    ]
    constants = [helper.make_tensor("wanted", TensorProto.INT64, [1], [numbers])]
    inputs, outputs = ([_value(name, TensorProto.INT64, ["batch"])] for name in (taken, given))
    return _model(nodes, inputs, outputs, constants)


SCALE_SPECS: dict[str, Any] = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}
"""The inputs and outputs of `scale_graph`."""


def graph_model(name: str, graph: bytes, **fields: Any) -> dict[str, Any]:
    """A model.yaml for a graph beside it in `graph.onnx`."""
    variant = {"runtime": "onnx", "artefacts": {"graph": "graph"}, "memory": "1MiB"}
    return {
        "name": name,
        "version": 1,
        "summary": "A test's.",
        "licence": "Apache-2.0",
        "pipeline": "tensors",
        "reference": "onnx",
        "artefacts": {"graph": {"kind": "file", "path": "graph.onnx", "sha256": hashlib.sha256(graph).hexdigest()}},
        "variants": {"onnx": {**variant, "profiles": {"cpu": {"base": 0.001, "slope": 0.0001}}}},
        **fields,
    }


def onnx_variant(base: float) -> dict[str, Any]:
    """A variant for a graph beside its model.yaml, one batch of which takes `base` seconds by its profile."""
    profile = {"base": base, "slope": 0.0}
    return {"runtime": "onnx", "artefacts": {"graph": "graph"}, "memory": "1MiB", "profiles": {"cpu": profile}}


def write_model(models: Path, name: str, graph: bytes, **fields: Any) -> Path:
    """The model's folder, with its graph; `fields` are those of its model.yaml that differ."""
    folder = models / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.onnx").write_bytes(graph)
    (folder / "model.yaml").write_text(yaml.safe_dump(graph_model(name, graph, **fields)), encoding="utf-8")
    return folder


def _value(name: str, kind: int, shape: Sequence[int | str]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[Any]) -> bytes:
    graph = helper.make_graph(nodes, "test", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
