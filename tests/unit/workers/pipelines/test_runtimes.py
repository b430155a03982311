import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
from taxiway.errors import ExecutionError, InvalidRequestError, RequestTooLargeError
from tests.graphs import EXPORTED, EXPORTED_SPECS, exported_graph, write_model
from workers.pipelines.tensors import TensorPipeline, read_output
from workers.port import ModelLoadError, Placed, Row, Runtime, import_runtime, open_pipeline
from workers.recipes.graph_text import save_graph
from workers.runtimes.onnx import providers

MODELS = load_catalogue(Path(__file__).parents[4] / "models")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def opened(model: Model) -> tuple[TensorPipeline, Runtime]:
    """The pipeline and the runtime of a model's reference variant, not loaded."""
    variant = model.variants[model.reference]
    placed = Placed(model.reference, variant.precision, variant.entry, {}, "cpu", folder=model.folder)
    pipeline = open_pipeline(model, variant, placed)
    assert isinstance(pipeline, TensorPipeline)
    return pipeline, import_runtime(variant.runtime)(placed)


def answers(model: str, *batches: list[dict[str, Any]]) -> list[Row]:
    """The answers of all rows of the batches, which run one after the other."""
    pipeline, runtime = opened(MODELS.resolve(model))
    runtime.load()
    try:
        return [row for batch in batches for row in pipeline.run(runtime, [pipeline.prepare(row, {}) for row in batch])]
    finally:
        runtime.unload()


@pytest.mark.parametrize("given", [-1, 0])
def test_an_exported_graph_answers_as_onnxruntime_alone_does(given: int, tmp_path: Path) -> None:
    graph = exported_graph(2.0, given=given)
    folder = write_model(tmp_path, "exported", graph, **EXPORTED_SPECS)
    model = load_catalogue(tmp_path).resolve("exported")
    placed = Placed("onnx", "fp32", "", {"graph": folder / "graph.onnx"}, "cpu")
    pipeline, runtime = open_pipeline(model, model.variants["onnx"], placed), import_runtime("onnx")(placed)
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    runtime.load()
    found = pipeline.run(runtime, [pipeline.prepare({"x": row}, {}) for row in rows])
    (alone,) = ort.InferenceSession(graph).run(None, {EXPORTED["taken"]: rows})
    assert np.array_equal([row["y"] for row in found], alone)


@given(st.lists(JSON | st.binary() | arrays.arrays(np.int64, (2, 3)), min_size=1, max_size=5))
def test_echo_gives_back_any_json_value_bytes_and_arrays(values: list[Any]) -> None:
    for value, answer in zip(values, answers("echo", [{"payload": value} for value in values]), strict=True):
        assert answer["payload"] is value or answer == {"payload": value}


def test_a_paced_batch_takes_five_milliseconds_and_a_tenth_a_row() -> None:
    pipeline, runtime = opened(MODELS.resolve("paced"))
    items = [pipeline.prepare({"payload": index}, {}) for index in range(32)]
    began = time.perf_counter()
    assert pipeline.run(runtime, items) == [{"payload": index} for index in range(32)]
    assert time.perf_counter() - began >= 0.0082
    with pytest.raises(ExecutionError, match="at most 32 rows"):
        answers("paced", [{"payload": index} for index in range(33)])
    named, began = (
        import_runtime("echo")(Placed("s", "none", "paced=0.02+0.01,load=0.02", {}, "cpu")),
        time.perf_counter(),
    )
    named.load()
    assert list(named.run({"payload": np.arange(2)})["payload"]) == [0, 1]
    assert time.perf_counter() - began >= 0.06


LATTICE = {"size": 16, "temperature": 2.0}


def test_the_sweeps_of_ising_are_its_size_and_bounded() -> None:
    pipeline, _ = opened(MODELS.resolve("ising"))
    assert pipeline.prepare(LATTICE | {"sweeps": 5000, "seed": 1}, {}).size == 5000
    with pytest.raises(InvalidRequestError, match=r"inputs\.sweeps: expected at least 1, got 0"):
        pipeline.prepare(LATTICE | {"sweeps": 0, "seed": 1}, {})
    with pytest.raises(RequestTooLargeError, match=r"inputs\.sweeps: expected at most 10000000, got 10000001"):
        pipeline.prepare(LATTICE | {"sweeps": 10_000_001, "seed": 1}, {})


@pytest.fixture
def doubling(tmp_path: Path) -> Placed:
    """A variant whose graph doubles `value`."""
    text = "doubling (float[batch, width] value) => (float[batch, width] doubled) { doubled = Add (value, value) }"
    save_graph(text, {}, tmp_path / "graph.onnx")
    return Placed("doubling", "fp32", "", {"graph": tmp_path / "graph.onnx"}, "cpu")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "output 'y' is missing"),
        (np.zeros(2, np.int64), r"expected shape \[3, -1\], got \[2\]"),
        (np.zeros((2, 4), np.int64), r"expected shape \[3, -1\], got \[2, 4\]"),
        (np.full((3, 1), math.nan), "expected INT64, got float64 values"),
        (np.full((3, 1), "text"), "expected INT64, got <U4 values"),
        (np.full((3, 1), object()), "expected INT64, got object values"),
    ],
)
def test_an_undeclared_output_is_an_execution_error(array: np.ndarray | None, message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        read_output(TensorSpec("y", "INT64", (-1, -1)), array, 3)
    assert read_output(TensorSpec("y", "FP32", (-1,)), np.arange(3), 3).dtype == np.float32, "the declared one"


def test_an_onnx_variant_can_be_loaded_again_and_refuses_what_its_graph_cannot_take(doubling: Placed) -> None:
    runtime = import_runtime("onnx")(doubling)
    batch = {"value": np.ones((2, 3), np.float32)}
    for _ in range(2):
        runtime.load()
        assert runtime.memory() > 0
        np.testing.assert_array_equal(runtime.run(batch)["doubled"], np.full((2, 3), 2, np.float32))
        runtime.unload()
        assert runtime.memory() == 0
    with pytest.raises(ExecutionError, match="not loaded"):
        runtime.run(batch)
    runtime.load()
    with pytest.raises(ExecutionError, match=r"doubling: .*Unexpected input data type"):
        runtime.run({"value": np.ones((2, 3), np.int64)})
    doubling.files["graph"].write_bytes(b"not a graph")
    with pytest.raises(ModelLoadError, match="doubling: onnxruntime cannot open it"):
        import_runtime("onnx")(doubling).load()


def test_a_device_without_a_provider_is_refused_and_never_replaced_by_the_cpu() -> None:
    assert providers("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(ModelLoadError, match="no execution provider for 'tpu:0'"):
        providers("tpu:0")


@pytest.mark.cases("runtime, entry, message")
def test_an_entry_reaches_only_what_is_registered(runtime: str, entry: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        import_runtime(runtime)(Placed("v", "fp32", entry, {}, "cpu")).load()


@given(st.integers(1, 300))
def test_rows_are_padded_to_the_next_power_of_two(rows: int) -> None:
    from workers.runtimes.jax import pad_rows  # here, as it takes a second to import JAX

    padded = pad_rows(np.ones((rows, 2), np.int64))
    assert padded.dtype == np.int32
    assert padded.sum() == 2 * rows
    assert len(padded) & (len(padded) - 1) == 0
    assert rows <= len(padded) < 2 * rows or rows == len(padded) == 1
