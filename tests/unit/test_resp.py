import hiredis
from hypothesis import given
from hypothesis import strategies as st

from taxiway.valkey.resp import LARGE, Value, packed

LONG = bytes(range(256)) * (LARGE // 256) + b"x"


@given(st.lists(st.text() | st.binary() | st.integers() | st.just(LONG), min_size=1))
def test_a_command_is_packed_to_the_same_bytes_whether_its_values_are_large_or_not(command):
    assert b"".join(packed(command)) == hiredis.pack_command(tuple(command))


def test_a_large_value_is_sent_from_where_it_lies():
    view = memoryview(bytearray(LONG))
    assert any(isinstance(piece, memoryview) and piece.obj is view.obj for piece in packed(["SET", "k", view]))


@given(st.binary(), st.data())
def test_a_value_is_whole_when_nothing_is_missing_of_it_and_its_end(content, data):
    line = content + b"\r\n"
    begin = data.draw(st.integers(0, len(line)))
    value = Value(len(content), line[:begin])
    while value.missing:
        count = data.draw(st.integers(1, len(value.missing)))
        at = len(line) - len(value.missing)
        value.missing[:count] = line[at : at + count]
        value.came(count)
    assert value.content == content
