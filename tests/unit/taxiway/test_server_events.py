"""Server-sent events, however a stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.server_events import EventParser, EventTooLargeError, ServerEvent

lines = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12)
ends = st.sampled_from(["\n", "\r", "\r\n"])
names = st.text("abc", min_size=1, max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[ServerEvent]]:
    """A stream, with comments, names and unknown fields, and the events in it."""
    text, events = draw(st.sampled_from(["", "\ufeff"])), list[ServerEvent]()
    end = draw(ends)
    for _ in range(draw(st.integers(0, 4))):
        data, name = draw(st.lists(lines, min_size=1, max_size=3)), draw(st.none() | names)
        text += f": {draw(lines)}{end}id: 7{end}unknown: {draw(lines)}{end}"
        text += f"event:{name}{end}" if name else ""
        text += "".join(f"data: {line}{end}" for line in data) + end
        events.append(ServerEvent(name or "", "7", "\n".join(data)))
    return (text + draw(st.sampled_from(["", "data: cut", "data"]))).encode(), events


@given(stream=streams(), data=st.data())
def test_events_are_those_that_were_sent_however_the_stream_is_cut(
    stream: tuple[bytes, list[ServerEvent]], data: st.DataObject
) -> None:
    raw, whole = stream
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=20))})
    parser = EventParser()
    assert [event for start, end in pairwise(cuts) for event in parser.feed(raw[start:end])] == whole
    singly = EventParser()
    assert [event for byte in range(len(raw)) for event in singly.feed(raw[byte : byte + 1])] == whole


def test_an_event_has_its_lines_and_an_unfinished_one_is_none() -> None:
    text = b": hello\nevent: delta\ndata: one\ndata:two\n\ndata\n\nevent: empty\n\ndata: unfinished\n"
    assert EventParser().feed(text) == [ServerEvent("delta", "", "one\ntwo"), ServerEvent("", "", "")]


def test_an_endless_event_is_refused() -> None:
    parser = EventParser(1000)
    for _ in range(100):
        assert len(parser.feed(b"data: 1234567890\n\n" * 10)) == 10
    with pytest.raises(EventTooLargeError):
        for _ in range(20):
            parser.feed(b"x" * 100)
