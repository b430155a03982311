from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tasks.document import Size
from tasks.models.model import Model, Parameter, Profile, TensorSpec, Variant
from tasks.models.signature import bind, bind_parameters
from taxiway.errors import InvalidRequestError, RequestError, RequestTooLargeError
from tests.unit.strategies import json_values

TEXT = TensorSpec("text", "BYTES", (-1,))
IMAGE = TensorSpec("image", "UINT8", (-1, 2, 2))
POINTS = TensorSpec("points", "FP32", (-1, -1))
WEIGHT = TensorSpec("weight", "FP32", (-1,), optional=True)
STATE = TensorSpec("state", "FP32", (2, -1, 3), batch_axis=1)
RATE = TensorSpec("rate", "INT64", (), batch_axis=None)


def model(*inputs: TensorSpec, **fields: Any) -> Model:
    given: dict[str, Any] = {
        "name": "m",
        "version": 1,
        "summary": "",
        "licence": "",
        "pipeline": "text",
        "inputs": inputs or (TEXT,),
        "outputs": (TensorSpec("label", "BYTES", (-1,)), TensorSpec("score", "FP32", (-1,))),
        "variants": {"v": Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(1, 0)})},
        "reference": "v",
        "max_rows": 100,
    }
    return Model(**(given | fields))


def tensor(datatype: str, shape: Any, data: Any, **named: Any) -> dict[str, Any]:
    return {"datatype": datatype, "shape": shape, "data": data, **named}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.mark.parametrize(
    ("spec", "inputs", "rows", "single"),
    [
        (TEXT, "a", ["a"], True),
        (TEXT, b"a", [b"a"], True),
        (TEXT, ["a", b"b"], ["a", b"b"], False),
        (TEXT, ["a"], ["a"], False),
        (TEXT, {"text": "a"}, ["a"], True),
        (TEXT, {"text": ["a", "b"]}, ["a", "b"], False),
        (TEXT, [tensor("BYTES", [2], ["a", "b"], name="text")], ["a", "b"], False),
        (TEXT, tensor("BYTES", [1], ["a"], name="text"), ["a"], False),
        (TEXT, tensor("BYTES", [1], ["a"]), ["a"], False),
        (POINTS, [1, 2], [[1.0, 2.0]], True),
        (POINTS, [[1, 2], [3, 4]], [[1.0, 2.0], [3.0, 4.0]], False),
        (POINTS, np.ones((2, 1)), [[1.0], [1.0]], False),
        (POINTS, np.ones(2, np.float16), [[1.0, 1.0]], True),
        (POINTS, np.ones(1, ">f4"), [[1.0]], True),
        (POINTS, tensor("FP32", [1, 2], b"\0" * 8), [[0.0, 0.0]], False),
        (IMAGE, [[1, 2], [3, 255]], [[[1, 2], [3, 255]]], True),
        (WEIGHT, 0.5, [0.5], True),
        (WEIGHT, [1, 2], [1.0, 2.0], False),
    ],
)
def test_inputs_in_any_form_are_rows(spec: TensorSpec, inputs: Any, rows: list[Any], single: bool) -> None:
    bound = bind(model(spec), inputs, {})
    assert [plain(row[spec.name]) for row in bound.rows] == rows
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


def test_a_request_without_batch_axes_is_one_row_whatever_it_shares() -> None:
    bound = bind(model(STATE, RATE), {"state": np.zeros((2, 3)), "rate": tensor("INT64", [], [8000])}, {})
    assert bound.single
    assert [plain(row["rate"]) for row in bound.rows] == [8000]


def test_numbers_have_the_datatype_of_the_input() -> None:
    assert bind(model(POINTS), [[1, 2]], {}).rows[0]["points"].dtype == np.float32


def test_several_inputs_are_bound_by_name_and_optional_ones_may_be_left_out() -> None:
    both = bind(model(TEXT, WEIGHT), {"text": ["a", "b"], "weight": [1, 2]}, {})
    assert [dict(row) for row in both.rows] == [{"text": "a", "weight": 1.0}, {"text": "b", "weight": 2.0}]
    assert [dict(row) for row in bind(model(TEXT, WEIGHT), "a", {}).rows] == [{"text": "a"}]


@pytest.mark.parametrize(
    ("specs", "inputs", "field", "message"),
    [
        ([TEXT], {"txt": "a"}, "inputs", "expected inputs of m:1 (text), got 'txt'"),
        ([TEXT], {"text": "a", "more": 1}, "inputs", "expected inputs of m:1 (text), got 'more'"),
        ([TEXT], [tensor("BYTES", [1], ["a"], name="txt")], "inputs", "expected inputs of m:1 (text), got 'txt'"),
        ([TEXT], tensor("BYTES", [1], ["a"], name=["text"]), "inputs", "expected inputs of m:1 (text), got ['text']"),
        ([TEXT], [tensor("BYTES", [1], ["a"], name="text")] * 2, "inputs.text", "expected one tensor of that name"),
        ([TEXT], {}, "inputs.text", "expected a value, got nothing"),
        ([WEIGHT], {}, "inputs.weight", "expected a value, got nothing"),
        ([TEXT, POINTS], {"text": "a"}, "inputs.points", "expected a value, got nothing"),
        ([TEXT], [], "inputs", "expected at least one row, got none"),
        ([TEXT], None, "inputs.text", "expected text or bytes, got None"),
        ([TEXT], 5, "inputs.text", "expected text or bytes, got 5"),
        ([TEXT], ["a", 5], "inputs.text.1", "expected text or bytes, got 5"),
        ([TEXT], tensor("FP32", [1], [1]), "inputs.text", "expected datatype BYTES, got 'FP32'"),
        (
            [TEXT],
            tensor("BYTES", [2], ["a"]),
            "inputs.text",
            "expected shape [n] and a list of n values in data",
        ),
        ([TEXT], tensor("BYTES", None, ["a"]), "inputs.text", "expected shape [n] and a list of n values in data"),
        ([TEXT], tensor("BYTES", [1], b"a"), "inputs.text", "expected shape [n] and a list of n values in data"),
        ([POINTS], tensor("FP64", [1, 1], [1]), "inputs.points", "expected datatype FP32, got 'FP64'"),
        ([POINTS], tensor("FP32", [1, 1], ["x"]), "inputs.points", "expected FP32 numbers"),
        ([POINTS], "a", "inputs.points", "expected FP32 numbers, got non-numeric values"),
        ([POINTS], ["a"], "inputs.points", "expected FP32 numbers, got non-numeric values"),
        ([POINTS], [[1], [2, 3]], "inputs.points", "expected FP32 numbers, in lists of equal lengths"),
        ([POINTS], [[[1]]], "inputs.points", "expected shape [-1, -1] (the first axis is the batch), got [1, 1, 1]"),
        ([POINTS], 1.0, "inputs.points", "expected shape [-1, -1] (the first axis is the batch), got []"),
        ([IMAGE], [[[1, 2, 3]]], "inputs.image", "expected shape [-1, 2, 2] (the first axis is the batch)"),
        ([STATE], [[[1, 2]]], "inputs.state", "expected shape [2, -1, 3] (axis 1 is the batch), got [1, 1, 2]"),
        ([TEXT, RATE], {"text": "a", "rate": [1]}, "inputs.rate", "expected shape [] (without a batch axis), got [1]"),
        ([WEIGHT, RATE], {"rate": 1}, "inputs", "expected an input with a batch axis, got none"),
        ([IMAGE], [[256, 0], [0, 0]], "inputs.image", "expected UINT8 numbers, got values from 0 to 256"),
        ([IMAGE], [[0.5, 0], [0, 0]], "inputs.image", "expected UINT8 numbers, got float64 values"),
        ([IMAGE], [[True, True], [True, True]], "inputs.image", "expected UINT8 numbers, got bool values"),
        ([TEXT, POINTS], {"text": ["a"], "points": [[1], [2]]}, "inputs", "expected the same number of rows in each"),
        ([TEXT, POINTS], {"text": "a", "points": [[1]]}, "inputs", "expected the batch axis on all inputs or on none"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_expected(
    specs: list[TensorSpec], inputs: Any, field: str, message: str
) -> None:
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


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", 0, "expected an integer >= 1 and <= 512, got 0"),
        ("max_tokens", 513, "expected an integer >= 1 and <= 512, got 513"),
        ("max_tokens", 5.0, "expected an integer >= 1 and <= 512, got 5.0"),
        ("max_tokens", True, "expected an integer >= 1 and <= 512, got True"),
        ("max_tokens", "5", "expected an integer >= 1 and <= 512, got '5'"),
        ("temperature", 10**400, "expected a finite number >= 0, got 1"),
        ("seed", 2**31 + 1, "expected an integer >= -2147483648 and <= 2147483648, got 2147483649"),
        ("temperature", float("nan"), "expected a finite number >= 0, got nan"),
        ("temperature", float("inf"), "expected a finite number >= 0, got inf"),
        ("free", float("-inf"), "expected a finite number, got -inf"),
        ("free", float("nan"), "expected a finite number, got nan"),
        ("free", False, "expected a finite number, got False"),
        ("prefix", "long", "expected text <= 3 characters, got 'long'"),
        ("stop", "a", "expected a list of texts <= 2 entries, got 'a'"),
        ("stop", [1], "expected a list of texts <= 2 entries, got [1]"),
        ("stop", ["a", "b", "c"], "expected a list of texts <= 2 entries"),
        ("max_token", 5, "expected a parameter of m:1 (free, max_tokens, prefix, seed, stop, temperature), got 5"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_was_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bind_parameters(GENERATE, {name: value})
    assert caught.value.details["field"] == f"parameters.{name}"
    assert caught.value.message.startswith(f"parameters.{name}: {expected}")


def test_all_outputs_are_given_unless_some_are_wanted() -> None:
    assert bind(model(), "a", {}).outputs == ("label", "score")
    assert bind(model(), "a", {}, ("score",)).outputs == ("score",)


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"outputs: expected one of \['label', 'score'\], got 'logits'"):
        bind(model(), "a", {}, ("logits",))
