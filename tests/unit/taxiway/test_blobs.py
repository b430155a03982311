from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from taxiway.contract.request import parse_request
from taxiway.contract.values import (
    DATATYPES,
    Blobs,
    ResultBlobs,
    from_wire,
    may_refer,
    references,
    resolved,
    to_array,
    to_wire,
)
from taxiway.contract.wire import read_request, request_body
from taxiway.errors import InvalidRequestError, ResultExpiredError

JSON = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.binary(max_size=64)
VALUES = st.recursive(
    JSON, lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=4), below, max_size=4)
)
DTYPES = st.sampled_from(sorted(DATATYPES.values()))


def read(value: object, kept: dict[str, bytes | bytearray | memoryview]) -> Any:
    """What a reader on the other side of the wire gets."""
    return resolved(from_wire(json.loads(msgspec.json.encode(value))), kept)


@given(VALUES, st.integers(-1, 64))
def test_whatever_travels_beside_its_message_is_read_as_if_it_had_not(value: object, limit: int) -> None:
    blobs = Blobs(limit)

    assert read(to_wire(value, "inputs", blobs), blobs.contents) == from_wire(to_wire(value))


@given(arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, min_side=0), elements={"allow_nan": False}))
def test_an_array_beside_its_message_is_the_same_array(array: np.ndarray) -> None:
    blobs = Blobs(limit=-1)
    tensor = read(to_wire(array, "inputs", blobs), blobs.contents)

    assert np.array_equal(to_array(tensor, "inputs"), array)


def test_an_array_that_lies_in_order_is_not_copied() -> None:
    array, blobs = np.zeros(1000, np.float32), Blobs(limit=10)
    to_wire(array, "inputs", blobs)
    (content,) = blobs.contents.values()
    array[0] = 1.0

    assert np.frombuffer(content, np.float32)[0] == 1.0


def test_a_value_up_to_the_limit_stays_in_its_message() -> None:
    blobs = Blobs(limit=8)

    to_wire([b"12345678", np.zeros(2, np.float32), {"a": b"x"}], "inputs", blobs)

    assert blobs.contents == {}


def test_a_requests_reference_has_the_digest_and_a_results_the_address_at_the_interface() -> None:
    asked, answered = Blobs(limit=2), ResultBlobs(limit=2)
    reference, result = to_wire(b"abc", "inputs", asked), to_wire(b"abc", "x", answered)

    assert reference == {
        "datatype": "BYTES",
        "ref": reference["ref"],
        "bytes": 3,
        "digest": hashlib.sha256(b"abc").hexdigest(),
    }
    assert result == {
        "datatype": "BYTES",
        "ref": result["ref"],
        "bytes": 3,
        "href": f"/v2/blobs/{result['ref']}",
    }


def test_a_request_is_read_back_with_its_references() -> None:
    blobs = Blobs(limit=2)
    body = request_body(parse_request({"model": "m", "inputs": {"a": [b"abc", "text"]}}), blobs)
    request = read_request(body, "application/json")

    assert may_refer(body)
    assert [found.ref for found in references(request.inputs)] == list(blobs.contents)
    assert resolved(request.inputs, blobs.contents) == {"a": [b"abc", "text"]}


def test_a_message_without_references_is_seen_to_have_none() -> None:
    assert not may_refer(request_body(parse_request({"model": "m", "inputs": ["text", 'a "ref": in text']})))


@pytest.mark.parametrize("content", [b"abd", b"ab", b"abcd", b""])
def test_other_bytes_than_were_signed_for_are_refused(content: bytes) -> None:
    blobs = Blobs(limit=2)
    reference = to_wire(b"abc", "inputs", blobs)

    with pytest.raises(InvalidRequestError, match=reference["ref"]):
        resolved(reference, {reference["ref"]: content})


def test_an_expired_blob_is_reported_as_expired() -> None:
    blobs = Blobs(limit=2)
    reference = to_wire(b"abc", "inputs", blobs)

    with pytest.raises(ResultExpiredError, match=reference["ref"]):
        resolved(reference, {reference["ref"]: None})


@pytest.mark.parametrize(
    "fields", [{"ref": "job:1"}, {"ref": 7}, {"bytes": -1}, {"bytes": "3"}, {"datatype": 1}, {"digest": None}]
)
def test_a_malformed_reference_is_refused(fields: dict[str, object]) -> None:
    reference = {"ref": "0" * 32, "bytes": 3, "datatype": "BYTES", "digest": ""} | fields

    with pytest.raises(InvalidRequestError, match="ref"):
        list(references([reference]))
