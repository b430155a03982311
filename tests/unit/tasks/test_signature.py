from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given

from tasks.document import Size
from tasks.models.model import Model, Parameter, Profile, Variant
from tasks.models.signature import bind, bind_parameters
from tasks.models.tensor_spec import TensorSpec
from taxiway.errors import InvalidRequestError, RequestError, RequestTooLargeError
from tests.builders import a_text_model
from tests.unit.strategies import json_values

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


def test_a_mapping_is_a_value_of_a_model_that_takes_any_json_and_else_names_inputs() -> None:
    assert bind(model(TEXT, pipeline="tensors"), {"gate": 7}, {}).rows == ({"text": {"gate": 7}},)
    with pytest.raises(InvalidRequestError, match=r"inputs: expected inputs of m:1 \(points\), got 'point'"):
        bind(model(POINTS, pipeline="tensors"), {"point": [1, 2]}, {})


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
