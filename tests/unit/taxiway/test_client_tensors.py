"""The client: its package, its pauses, and arrays as tensors."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import taxiway
from taxiway import errors
from taxiway.backoff import Backoff
from taxiway.client.valkey_results import MOST_PER_PASS, next_pass
from taxiway.contract.tensors import (
    HEADER,
    array,
    body,
    bytes_elements,
    bytes_part,
    decode_outputs,
    encode_inputs,
    nest,
    pieces,
    placed,
    plain,
    split,
)
from taxiway.contract.values import DATATYPES, from_wire, to_wire
from taxiway.errors import InvalidRequestError

TEXT = {"name": "text", "datatype": "BYTES", "shape": [-1]}
STEPS = {"name": "steps", "datatype": "INT64", "shape": [-1]}
POINT = {"name": "point", "datatype": "FP32", "shape": [-1, 2]}
DTYPES = st.sampled_from(sorted(DATATYPES.values()))
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def test_a_list_of_tensors_becomes_lists_or_arrays_and_other_values_stay() -> None:
    tensors = [from_wire(to_wire(np.ones(2, np.float32)))] * 2
    assert plain(tensors) == [[1.0, 1.0], [1.0, 1.0]]
    assert [made.dtype for made in array(tensors)] == [np.float32, np.float32]
    assert plain(["a", "b"]) == array(["a", "b"]) == ["a", "b"]


@given(arrays.arrays(DTYPES, SHAPES, elements={"allow_nan": False}))
def test_an_array_on_the_wire_is_the_same_array_again_and_the_lists_that_numpy_makes_of_it(given: np.ndarray) -> None:
    back = array(from_wire(to_wire(given)))
    assert back.dtype == given.dtype
    assert np.array_equal(back, given)
    assert plain(from_wire(to_wire(given))) == nest(given.reshape(-1).tolist(), given.shape) == given.tolist()


STATE = {"name": "state", "datatype": "FP32", "shape": [2, -1, 1], "batch_axis": 1}
RATE: dict[str, Any] = {"name": "rate", "datatype": "INT64", "shape": [], "batch_axis": None}


@pytest.mark.parametrize("state", [[[1.0], [2.0]], np.array([[1.0], [2.0]], np.float32)])
def test_a_row_gets_its_batch_axis_where_the_model_has_it_and_what_has_none_stays_as_it_is(state: np.ndarray) -> None:
    (tensor, rate), single = encode_inputs([STATE, RATE], {"state": state, "rate": 8000})
    assert (tensor["shape"], rate["shape"], rate["data"], single) == ([2, 1, 1], [], [8000], True)


@pytest.mark.parametrize("show", [plain, array])
def test_one_row_comes_back_without_its_batch_axis_and_several_as_they_are(show: Callable[[Any], Any]) -> None:
    def decoded(shape: list[Any]) -> object:
        data = [float(n) for n in range(4)][: int(np.prod(shape))]
        sent = {"name": "state", "datatype": "FP32", "shape": shape, "data": data, "parameters": {"batch_axis": 1}}
        return np.asarray(decode_outputs([sent], None, show)["state"]).tolist()

    assert decoded([2, 1, 1]) == [[0.0], [1.0]]
    assert decoded([2, 2, 1]) == [[[0.0], [1.0]], [[2.0], [3.0]]]


@given(arrays.arrays(DTYPES, arrays.array_shapes(min_dims=2, max_dims=3), elements={"allow_nan": False}))
def test_an_array_travels_behind_the_json_as_it_lies_in_memory(given: np.ndarray) -> None:
    spec = {"name": "x", "datatype": "FP32", "shape": [-1] * given.ndim}
    tensors, _ = encode_inputs([spec], given)
    framed = body({"parameters": {}}, tensors)
    text, rest = split(framed.body, str(framed.header_length))
    (back,) = placed(json.loads(bytes(text))["inputs"], rest)
    assert np.array_equal(array(back), given) and array(back).dtype == given.dtype, "which the router judges"
    assert plain(back) == given.tolist()


def test_bytes_beside_other_values_are_tagged() -> None:
    tensors, _ = encode_inputs([TEXT], [b"\xff", "a", {"b": b"\x00"}])
    framed = body({}, tensors)
    (tensor,) = json.loads(framed.body)["inputs"]
    assert from_wire(tensor["data"]) == [b"\xff", "a", {"b": b"\x00"}]


def test_what_has_nothing_raw_is_json_alone() -> None:
    tensors, _ = encode_inputs([TEXT], ["a"])
    framed = body({}, tensors)
    assert framed.header_length is None
    assert framed.headers == {"content-type": "application/json"}
    assert json.loads(framed.body) == {"inputs": tensors}


@pytest.mark.cases("specs, inputs, tensors, single")
def test_inputs_of_every_form_are_tensors(specs: list[Any], inputs: Any, tensors: list[Any], single: bool) -> None:
    assert encode_inputs(specs, inputs) == (tensors, single)


@pytest.mark.parametrize(
    ("specs", "inputs", "match"),
    [([TEXT, STEPS], {"text": ["a", "b"], "steps": 3}, "batch axis"), ([TEXT], {"a", "b"}, "set")],
)
def test_inputs_that_have_no_form_are_refused(specs: list[Any], inputs: Any, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        encode_inputs(specs, inputs)


def test_outputs_are_bare_where_the_request_was() -> None:
    label = {"name": "label", "shape": [1], "datatype": "BYTES", "data": ["good"]}
    point = {"name": "point", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
    assert decode_outputs([label, point], True, plain) == {"label": "good", "point": [1.0, 2.0]}
    assert decode_outputs([label, point], False, plain) == {"label": ["good"], "point": [[1.0, 2.0]]}
    assert decode_outputs([label, point], None, plain) == {"label": "good", "point": [1.0, 2.0]}


@given(st.lists(st.binary()))
def test_bytes_elements_are_the_same_after_their_way(elements: list[bytes]) -> None:
    assert bytes_elements(memoryview(bytes_part(elements)), len(elements), "x") == elements


@given(st.binary(), st.integers(0, 5))
def test_any_bytes_are_elements_or_refused(part: bytes, count: int) -> None:
    try:
        elements = bytes_elements(memoryview(part), count, "x")
    except InvalidRequestError:
        return
    assert bytes_part(elements) == part


@pytest.mark.parametrize("length", ["0", "4", "-1", "x", "", "1.0", "²"])
def test_a_header_that_bounds_no_json_is_refused(length: str) -> None:
    with pytest.raises(InvalidRequestError, match=HEADER):
        split(b"abc", length)


@pytest.mark.parametrize("sizes", [[4], [2], [-1], ["3"], [True], [1.0], [2, 2], []])
def test_sizes_that_do_not_add_up_are_refused(sizes: list[object]) -> None:
    with pytest.raises(InvalidRequestError, match="binary_data_size"):
        list(pieces(sizes, memoryview(b"abc")))


def test_every_name_that_is_promised_is_there_and_every_error_is_promised() -> None:
    assert [getattr(taxiway, name).__name__ for name in taxiway.__all__] == [*taxiway.__all__]
    tree = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert tree <= set(taxiway.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        taxiway.nothing  # noqa: B018


@pytest.mark.parametrize("url", ["amqp://localhost", "localhost:6379", "", "redis://localhost:port"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="url"):
        taxiway.Client(url)


@pytest.mark.parametrize("interface", ["redis://127.0.0.1:9", "http://127.0.0.1:9"])
def test_one_idempotency_key_for_a_map_is_refused(interface: str) -> None:
    with taxiway.Client(interface) as client, pytest.raises(InvalidRequestError, match="idempotency_key"):
        next(client.map("echo", [1, 2], idempotency_key="one"))


def test_what_only_a_router_knows_is_not_asked_of_a_broker() -> None:
    with taxiway.Client("redis://127.0.0.1:9") as client, pytest.raises(InvalidRequestError, match="http"):
        client.fleet()


def test_nothing_is_read_before_it_has_waited_for_a_look_or_if_it_was_announced_meanwhile() -> None:
    jobs, left = next_pass([], "ab")
    assert (jobs, left) == ([], ["a", "b"])
    jobs, left = next_pass(left, "abc")
    assert (jobs, left) == (["a", "b"], ["a", "b", "c"])
    assert next_pass(left, "bc") == (["b", "c"], ["b", "c"])


@given(st.integers(0, 3 * MOST_PER_PASS))
def test_each_of_many_has_its_turn_before_any_comes_again(count: int) -> None:
    waiting, looks = {str(number): None for number in range(count)}, list[list[str]]()
    _, left = next_pass([], waiting)
    for _ in range(-(-count // MOST_PER_PASS)):
        look, left = next_pass(left, waiting)
        looks.append(look)
    assert sorted(job for look in looks for job in look) == sorted(waiting)
    assert all(len(look) <= MOST_PER_PASS for look in looks)


SECONDS = st.floats(1e-3, 1e4)
DRAWS = st.floats(0, 1)


def test_a_pause_doubles_with_each_failure_and_is_bounded_however_many_there_are() -> None:
    backoff = Backoff(0.5, 30.0)
    assert [backoff.pause(failures) for failures in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert backoff.pause(1_000_000) == 30.0


@given(first=SECONDS, factor=st.floats(1, 1e4), spread=st.floats(0, 1), failures=st.integers(1, 10_000), draw=DRAWS)
def test_jitter_shortens_by_its_spread(first: float, factor: float, spread: float, failures: int, draw: float) -> None:
    full = Backoff(first, first * factor)
    pause = Backoff(first, first * factor, spread).pause(failures, draw)
    assert full.pause(failures) * (1 - spread) <= pause * 1.001
    assert pause <= full.pause(failures) <= full.pause(failures + 1) <= full.longest
