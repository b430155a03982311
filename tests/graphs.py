"""Small ONNX graphs, and models of them, for tests."""

import hashlib
from pathlib import Path
from typing import Any

import onnx.parser
import yaml

from tests.builders import recorded

VAD_SPECS: dict[str, Any] = yaml.safe_load(recorded("documents/vad.yaml"))
"""The inputs and outputs of silero-vad: a state with the batch on its second axis, and one sample rate for all rows."""


def vad_graph() -> bytes:
    """A graph with these: `output` is the mean of a row's input plus its state's first number plus the sample rate."""
    return text_graph("""
        (float[batch, samples] input, float[2, batch, 128] state, int64 sr)
        => (float[batch, 1] output, float[2, batch, 128] stateN)
        <int64[1] one = {1}, int64[1] zero = {0}, int64[2] begin = {0, 0}, int64[2] end = {1, 1},
         int64[2] axes = {0, 2}, float step = {1}>
        {
            mean = ReduceMean <keepdims = 1> (input, one)
            slice = Slice (state, begin, end, axes)
            first = Squeeze (slice, zero)
            rate = Cast <to = 1> (sr)
            output = Sum (mean, first, rate)
            stateN = Add (state, step)
        }
    """)


def scale_graph(factor: float, *, name: str = "x") -> bytes:
    """A graph whose output `y`, FP32 (batch, 2), is its one input times a factor."""
    return _scaling(f'float[batch, 2] "{name}"', "float[batch, 2] y", factor)


EXPORTED = {"taken": "serving_default_x:0", "given": "save_infer_model/scale_0.tmp_1"}
"""Names of tensors as tf2onnx and Paddle2ONNX write them."""

EXPORTED_SPECS: dict[str, Any] = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2], "source": EXPORTED["taken"]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2], "source": EXPORTED["given"]}],
}
"""The inputs and outputs of `exported_graph`."""


def exported_graph(factor: float, *, given: int = -1) -> bytes:
    """The same with such names and batch axes of the length -1, as Paddle2ONNX writes them; `given` is the output's."""
    return _scaling(f'float[-1, 2] "{EXPORTED["taken"]}"', f'float[{given}, 2] "{EXPORTED["given"]}"', factor)


def _scaling(taken: str, given: str, factor: float) -> bytes:
    x, y = (value.split()[-1] for value in (taken, given))
    return text_graph(f"({taken}) => ({given}) <float factor = {{{factor}}}> {{ {y} = Mul ({x}, factor) }}")


def spinner_graph(taken: str, given: str, *, turns: int = 1) -> bytes:
    """A graph that gives back its one input, INT64 (batch,), after `turns` turns of a loop for the largest number."""
    return text_graph(f"""
        (int64[batch] "{taken}") => (int64[batch] "{given}")
        <int64 zero = {{0}}, int64 one = {{1}}, int64 each = {{{turns}}}>
        {{
            most = ReduceMax <keepdims = 0> ("{taken}")
            trips = Mul (most, each)
            end = Loop (trips, , zero)
                <body = turn (int64 i, bool go, int64 x) => (bool on, int64 y)
                    {{ y = Add (x, one) on = Identity (go) }}>
            nothing = Mul (end, zero)
            "{given}" = Add ("{taken}", nothing)
        }}
    """)


def hungry_graph(taken: str, given: str, *, numbers: int) -> bytes:
    """A graph that gives back its one input, INT64 (batch,), and needs memory for `numbers` float32 a row meanwhile."""
    return text_graph(f"""
        (int64[batch] "{taken}") => (int64[batch] "{given}")
        <int64[1] wanted = {{{numbers}}}>
        {{
            rows = Shape ("{taken}")
            size = Mul (rows, wanted)
            zeros = ConstantOfShape (size)
            sum = ReduceSum <keepdims = 0> (zeros)
            nothing = Cast <to = 7> (sum)
            "{given}" = Add ("{taken}", nothing)
        }}
    """)


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


def text_graph(text: str) -> bytes:
    """A graph in ONNX's own text."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> test {text}')
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
