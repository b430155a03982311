from __future__ import annotations

import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.bodies import inflate
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError


@given(st.binary(max_size=300))
def test_what_was_compressed_comes_out_as_it_was(content: bytes) -> None:
    assert inflate(gzip.compress(content), len(content)) == content


@given(st.binary(max_size=80))
def test_any_bytes_are_inflated_or_refused(content: bytes) -> None:
    for sent in (content, b"\x1f\x8b\x08\x00" + content, gzip.compress(content)[:-1], gzip.compress(content) + b"x"):
        try:
            inflate(sent, 2**16)
        except TaxiwayError as error:
            assert isinstance(error, InvalidRequestError)


@pytest.mark.parametrize(
    "sent",
    [gzip.compress(b"abc")[:-1], gzip.compress(b"abc") + b"x", gzip.compress(b"a") * 2, b""],
    ids=["cut", "with a byte more", "twice", "empty"],
)
def test_a_part_of_a_member_and_more_than_one_are_refused(sent: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"expected .*gzip"):
        inflate(sent, 2**16)


def test_a_bomb_is_refused_in_little_memory() -> None:
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLargeError):
            inflate(bomb, 2**22)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
