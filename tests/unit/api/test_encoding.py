import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.bodies import inflate
from taxiway.errors import InvalidRequestError, RequestTooLargeError


@given(st.binary(max_size=300))
def test_what_was_compressed_comes_out_as_it_was_and_any_other_bytes_are_refused(content: bytes) -> None:
    assert inflate(gzip.compress(content), len(content), 100) == content
    whole = gzip.compress(content)
    for sent in (content, b"", b"\x1f\x8b\x08\x00" + content, whole[:-1], whole + b"x", whole * 2):
        with pytest.raises(InvalidRequestError, match=r"expected .*gzip"):
            inflate(sent, 2**16, 100)


def test_a_bomb_is_refused_in_little_memory() -> None:
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLargeError, match="at most 64 times its compressed size"):
            inflate(bomb, 2**26, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_body_within_the_limit_of_bytes_may_still_inflate_too_much() -> None:
    assert inflate(gzip.compress(bytes(2**20)), 2**22, 1) == bytes(2**20)
    with pytest.raises(RequestTooLargeError, match="at most 4194304 bytes"):
        inflate(gzip.compress(bytes(2**23)), 2**22, 2000)
