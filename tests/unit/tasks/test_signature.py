"""Inputs of a model: how they are bound, refused and measured."""

import base64
import re
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.document import Size
from tasks.models.folder import load_catalogue
from tasks.models.model import Model, ModelError, Parameter, Profile, UnitError, Variant, parse_model, read_unit
from tasks.models.profiles import length_of, predicted, ran_size, read_lengths
from tasks.models.signature import bind, bind_parameters
from tasks.models.sizes import measured, quantised, rows_of, size_of_row
from tasks.models.tensor_spec import TensorSpec
from tasks.settings import TREE
from taxiway.errors import InvalidRequestError, RequestError, RequestTooLargeError, TaxiwayError
from tests.builders import a_text_model
from tests.unit.strategies import json_values
from workers.pipelines.tensors import TensorPipeline

TEXT = TensorSpec("text", "BYTES", (-1,))
IMAGE = TensorSpec("image", "UINT8", (-1, 2, 2))
POINTS = TensorSpec("points", "FP32", (-1, -1))
WEIGHT = TensorSpec("weight", "FP32", (-1,), optional=True)
STATE = TensorSpec("state", "FP32", (2, -1, 3), batch_axis=1)
RATE = TensorSpec("rate", "INT64", (), batch_axis=None)
MODEL = msgspec.structs.replace(
    a_text_model("m", v=Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(1, 0)})),
    outputs=(TensorSpec("label", "BYTES", (-1,)), TensorSpec("score", "FP32", (-1,))),
    max_rows=100,
)


def model(*inputs: TensorSpec, **fields: Any) -> Model:
    return msgspec.structs.replace(MODEL, inputs=inputs or (TEXT,), **fields)


def tensor(datatype: str, shape: Any, data: Any, **named: Any) -> dict[str, Any]:
    return {"datatype": datatype, "shape": shape, "data": data, **named}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.mark.cases(
    "spec, inputs, rows, single",
    [
        (POINTS, np.ones((2, 1)), [[1.0], [1.0]], False),
        (POINTS, np.ones(2, np.float16), [[1.0, 1.0]], True),
        (POINTS, np.ones(1, ">f4"), [[1.0]], True),
    ],
)
def test_inputs_in_any_form_are_rows(spec: TensorSpec, inputs: Any, rows: list[Any], single: bool) -> None:
    bound = bind(model(spec), inputs, {})
    assert [plain(row[spec.name]) for row in bound.rows] == rows
    assert spec is not POINTS or bound.rows[0]["points"].dtype == np.float32
    assert bound.single is single


def test_rows_are_taken_along_the_batch_axis_and_share_what_has_none() -> None:
    state = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    bound = bind(model(POINTS, STATE, RATE), {"points": [[1], [2]], "state": state, "rate": 8000}, {})
    assert [plain(row["state"]) for row in bound.rows] == [state[:, 0].tolist(), state[:, 1].tolist()]
    assert [plain(row["rate"]) for row in bound.rows] == [8000, 8000]
    assert not bound.single


@pytest.mark.cases("specs, inputs, field, message")
def test_a_wrong_input_is_named_with_its_fault(specs: list[TensorSpec], inputs: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bind(model(*specs), inputs, {})
    assert caught.value.details["field"] == field
    assert caught.value.message.startswith(f"{field}: ")
    assert message in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("inputs", [["a"] * 101, tensor("BYTES", [101], ["a"] * 101)])
def test_more_rows_than_the_model_takes_are_too_large(inputs: Any) -> None:
    with pytest.raises(RequestTooLargeError, match="expected at most 100 rows for m:1, got 101") as caught:
        bind(model(), inputs, {})
    assert caught.value.details["limit"] == "max_rows"


@pytest.mark.parametrize("value", [{"a": 1}, [{"a": 1}, None], 5, None, "a"])
def test_a_model_of_tensors_alone_takes_any_json_value_as_bytes(value: Any) -> None:
    bound = bind(model(pipeline="tensors"), value, {})
    assert [row["text"] for row in bound.rows] == (value if isinstance(value, list) else [value])


@given(inputs=json_values)
def test_any_inputs_are_bound_or_refused(inputs: Any) -> None:
    for specs in ((TEXT,), (POINTS,), (TEXT, WEIGHT)):
        try:
            assert bind(model(*specs), inputs, {}).rows
        except RequestError as error:
            assert error.details["field"].startswith("inputs")


PARAMETERS = {
    "max_tokens": Parameter("integer", default=64, minimum=1, maximum=512),
    "temperature": Parameter("number", default=0.0, minimum=0),
    "free": Parameter("number"),
    "seed": Parameter("integer"),
    "prefix": Parameter("string", maximum=3),
    "stop": Parameter("strings", maximum=2),
}
GENERATE = model(parameters=PARAMETERS)


def test_parameters_that_are_not_given_have_their_defaults() -> None:
    bound = bind_parameters(GENERATE, {"max_tokens": 5, "temperature": None, "stop": ["."]})
    assert bound == {"max_tokens": 5, "temperature": 0.0, "free": None, "seed": None, "prefix": None, "stop": ["."]}


@pytest.mark.cases("name, value, expected", [("temperature", 10**400, "expected a finite number >= 0, got 1")])
def test_a_wrong_parameter_is_named_with_what_was_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bind_parameters(GENERATE, {name: value})
    assert caught.value.details["field"] == f"parameters.{name}"
    assert caught.value.message.startswith(f"parameters.{name}: {expected}")


def test_all_outputs_are_given_unless_some_are_wanted() -> None:
    assert bind(model(), "a", {}).outputs == ("label", "score")
    assert bind(model(), "a", {}, ("score",)).outputs == ("score",)
    with pytest.raises(InvalidRequestError, match=r"outputs: expected one of \['label', 'score'\], got 'logits'"):
        bind(model(), "a", {}, ("logits",))


MODELS = load_catalogue(TREE / "models")
ISING = MODELS.resolve("ising")
SENTIMENT = MODELS.resolve("sentiment")
IDS = TensorSpec("ids", "INT64", (-1, -1))
PICTURE = TensorSpec("picture", "BYTES", (-1,), optional=True)
PIXELS = TensorSpec("raw", "FP32", (-1, -1, -1, 3), optional=True)


def sized(unit: str, *inputs: TensorSpec, most: int = 1_000_000, pipeline: Any = "tensors") -> Model:
    """A model whose rows are sized by `unit`."""
    fields = {"inputs": inputs, "size_unit": unit, "buckets": (most,), "expected_size": 7, "pipeline": pipeline}
    return msgspec.structs.replace(ISING, **fields)


def named(name: str, shape: list[Any], data: Any = None, datatype: str = "INT64") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


SWEEPS = struct.pack("<2q", 1_000, 3_000)


@pytest.mark.cases("inputs", [[named("seed", [2], [1, 2]), named("sweeps", [2], memoryview(SWEEPS))]])
def test_the_mean_of_a_named_input_is_read_from_every_form_that_inputs_have(inputs: Any) -> None:
    assert measured(ISING, inputs) == 2_000


@pytest.mark.parametrize("sweeps", [None, "many", 1e6, float("nan"), True, {"a": 1}, [], [1, "x"], [[1]]])
def test_a_named_input_that_is_no_integer_counts_as_expected(sweeps: Any) -> None:
    assert measured(ISING, {"sweeps": sweeps, "seed": 1}) == ISING.expected_size


@pytest.mark.parametrize("pipeline", ["chat", "generation"])
def test_a_prompt_far_over_the_context_is_refused_and_one_that_may_fit_is_left_to_its_worker(pipeline: str) -> None:
    model = sized("tokens", TensorSpec("asked", "BYTES", (-1,)), most=128, pipeline=pipeline)
    assert measured(model, "a" * 1_900) > 128
    with pytest.raises(RequestTooLargeError, match="at most 128 tokens of prompt and answer together") as caught:
        measured(model, "a" * 3_000)
    assert caught.value.details == {"field": "inputs.asked", "limit": 128}


def test_of_several_rows_the_wrong_one_is_named() -> None:
    with pytest.raises(RequestTooLargeError, match=r"^inputs.sweeps\[1\]: expected at most 10000000, got 20000000$"):
        measured(ISING, {"sweeps": [5, 20_000_000], "seed": [1, 2]})


@pytest.mark.parametrize("shape", [[4], [], [1] * 100_000, [1, -1], [1, "x"], "ab", None, [1, 1]])
def test_a_shape_that_is_not_the_inputs_counts_as_expected(shape: Any) -> None:
    model = sized("raw", PIXELS)
    assert measured(model, {"raw": named("raw", shape)}) == 7


def test_a_shape_of_huge_numbers_is_refused_at_once() -> None:
    with pytest.raises(RequestTooLargeError, match="got a larger one"):
        measured(sized("raw", PIXELS), {"raw": named("raw", [1, 10**4200, 10**4200, 3])})


def test_a_text_counts_by_its_length_also_where_it_is_bytes_or_a_blob() -> None:
    text = "x" * 400
    blob = {"ref": "0" * 32, "bytes": 400, "datatype": "BYTES", "digest": "d"}
    tagged = {"__type__": "base64", "__value__": base64.b64encode(text.encode()).decode()}
    assert [measured(SENTIMENT, one) for one in (text, tagged, blob)] == [102] * 3
    assert quantised(SENTIMENT, measured(SENTIMENT, "x" * 10_000)) == SENTIMENT.buckets[-1], "where it is cut"


sized_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(["shape", "datatype", "data", "name", "ref", "bytes", "__value__", "sweeps",
                                           "ids", "raw", "picture"]), below, max_size=5)
    ),
    max_leaves=12,
)  # fmt: skip
units = st.sampled_from([ISING, SENTIMENT, sized("ids", IDS), sized("ids[1]", IDS), sized("bytes", IDS, PICTURE)])


@given(model=units, inputs=sized_values)
def test_nothing_that_a_producer_writes_makes_measuring_fail(model: Model, inputs: Any) -> None:
    assert rows_of(model, inputs) >= 1
    try:
        size = measured(model, inputs)
    except TaxiwayError as error:
        assert len(error.message) < 150
    else:
        assert size >= 1


@given(rows=st.integers(1, 3), width=st.integers(0, 20))
def test_a_router_and_a_worker_measure_the_same(rows: int, width: int) -> None:
    ids = np.zeros((rows, width), np.int64)
    for unit in ("ids", "ids[1]", "bytes"):
        model = sized(unit, IDS)
        asked = [named("ids", [rows, width], memoryview(ids.tobytes()))]
        items = [TensorPipeline(model).prepare(row, {}).size for row in bind(model, asked, {}).rows]
        assert max(items) == max(measured(model, asked), 1)


@given(size=st.integers(1, 10_000_000))
def test_a_quantised_size_is_at_most_an_eighth_larger_and_one_of_few(size: int) -> None:
    found = quantised(ISING, size)
    assert size <= found <= size * 1.125
    assert len({quantised(ISING, n) for n in range(size, size + 100)}) <= 2 or size < 1_000


@pytest.mark.cases("unit, path")
def test_a_size_unit_that_the_model_does_not_have_is_named(unit: str, path: str) -> None:
    text = (TREE / "models/ising/model.yaml").read_text().replace("size_unit: sweeps", f"size_unit: '{unit}'")
    with pytest.raises(ModelError) as caught:
        parse_model(text, "model.yaml")
    assert caught.value.path == path


def test_a_size_unit_without_buckets_is_refused_as_every_row_would_be() -> None:
    text = re.sub("buckets: .*", "", (TREE / "models/ising/model.yaml").read_text())
    with pytest.raises(ModelError, match="expected sizes up to that of the largest row, because size_unit is sweeps"):
        parse_model(text, "model.yaml")


def test_rows_and_axes_are_counted_wherever_the_batch_axis_is() -> None:
    state = TensorSpec("state", "FP32", (2, -1, -1), batch_axis=1)
    rate = TensorSpec("rate", "INT64", (), batch_axis=None)
    asked = [named("rate", [], 16_000), named("state", [2, 5, 128], None, "FP32")]
    assert rows_of(sized("state", rate, state), asked) == 5
    assert measured(sized("state", rate, state), asked) == 256
    assert measured(sized("state[2]", rate, state), asked) == 128
    assert measured(sized("state[0]", rate, state), asked) == 2
    assert measured(sized("rate", rate, state), {"rate": 16_000}) == 16_000
    assert size_of_row(sized("state[2]", rate, state), {"state": np.zeros((2, 128))}) == 128
    with pytest.raises(UnitError):
        read_unit("state[1]", (rate, state), "tensors")


WEIGHTS = st.dictionaries(st.integers(0, 81), st.floats(0.01, 1000))


@given(lengths=WEIGHTS, most=st.integers(-5, 10**12), more=st.integers(0, 100_000))
def test_a_prediction_is_possible_and_grows_with_the_bound(lengths: dict[int, float], most: int, more: int) -> None:
    assert 0 <= predicted(lengths, most) <= max(most, 0)
    assert predicted(lengths, most) <= predicted(lengths, most + more)


@pytest.mark.parametrize(("most", "expected"), [(64, 32), (512, 256), (1, 0), (0, 0)])
def test_half_of_the_most_is_expected_before_any_answer_was_seen(most: int, expected: int) -> None:
    assert predicted({}, most) == expected


@given(raw=st.binary() | st.dictionaries(st.text(), st.floats() | st.text()).map(msgspec.json.encode))
def test_what_the_store_holds_is_read_or_counts_as_nothing(raw: bytes) -> None:
    assert 0 <= predicted(read_lengths(raw), 100) <= 100


def test_a_row_that_ran_counts_what_it_generated_and_the_token_that_ended_it() -> None:
    generate, sentiment = MODELS.resolve("generate"), MODELS.resolve("sentiment")
    stopped = {"text": "Paris.", "tokens": 3, "finish-reason": "stop"}
    full = {"text": "It is", "tokens": 64, "finish-reason": "length"}
    assert (length_of(stopped), length_of(full)) == (4, 64)
    assert ran_size(generate, 104, {"max_tokens": 64}, stopped) == 44
    assert ran_size(generate, 104, {"max_tokens": 64}, full) == 104
    assert ran_size(sentiment, 12, {}, {"label": "positive"}) == 12
