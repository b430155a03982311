import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.tensors import HEADER, Framed, bytes_elements, bytes_part, pieces, split
from taxiway.errors import InvalidRequestError
from tests.narrowing import present


@given(st.binary(min_size=1), st.lists(st.binary()))
def test_what_is_framed_is_split_into_the_same_parts(text: bytes, parts: list[bytes]) -> None:
    whole = Framed(text, parts)
    head, rest = split(whole.body, whole.headers.get(HEADER))
    assert bytes(head) == text
    assert [bytes(present(piece)) for piece in pieces([len(part) for part in parts], rest)] == parts


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


def test_a_tensor_whose_data_is_in_the_json_takes_no_piece() -> None:
    assert list(pieces([None, 0, None], memoryview(b""))) == [None, b"", None]
