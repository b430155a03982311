"""Pieces of a stream and of messages between fleets, however they are cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taxiway.contract.job import GenerationPart, Result, Tokens
from taxiway.contract.peers import (
    MESSAGE,
    Inbox,
    Outbox,
    PeerPart,
    PeerPiece,
    ToCaller,
    encode_frames,
    read_one_to_caller,
    read_to_caller,
)
from taxiway.contract.server_events import EventParser, EventTooLargeError, ServerEvent
from taxiway.contract.stream import (
    CutGeneration,
    Lost,
    Piece,
    Progress,
    Restarted,
    read_piece,
    read_progress_at,
    total,
    with_streamed,
)
from tests.builders import a_result


def result(text: object) -> Result:
    return a_result(text=text)


def pieces(*texts: str, attempt: int = 1) -> list[Piece]:
    """Pieces that follow on each other."""
    return [Piece(attempt, len("".join(texts[:n])), text) for n, text in enumerate(texts)]


def tell(progress: Progress, answer: list[Piece]) -> list[object]:
    return [event for n, piece in enumerate(answer) for event in progress.take(f"{n + 1}-0", piece)]


ONE, TWO = pieces("one ", "two ")
UNO, DOS = pieces("uno ", "dos", attempt=2)
BESIDE = Piece(1, 4, sent=0, beside=({"tool_calls": []},))
STREAMS: dict[str, tuple[list[Piece], list[object]]] = {
    "a new attempt, and the old one": ([ONE, UNO, TWO, DOS], ["one ", Restarted(2), "uno ", "dos"]),
    "an attempt that restarts": ([ONE, TWO, *pieces("one")], ["one ", "two ", Restarted(1), "one"]),
    "a new attempt that has less": ([Piece(1, 0, "one two"), Piece(2, 0, "one ")], ["one two", Restarted(2), "one "]),
    "a new attempt whose beginning was missed": ([ONE, DOS], ["one ", Restarted(2), Lost(4), "dos"]),
    "a piece that comes twice": ([ONE, TWO, TWO, Piece(1, 4, "two three")], ["one ", "two ", "three"]),
    "a piece that a slow reader missed": ([ONE, Piece(1, 8, "three")], ["one ", Lost(4), "three"]),
    "only the text of the first row": ([ONE, Piece(1, 0, "uno ", row=1), BESIDE, TWO], ["one ", "two "]),
}


@pytest.mark.parametrize(("answer", "events"), STREAMS.values(), ids=STREAMS)
def test_a_reader_gets_each_part_once_and_learns_of_what_was_lost(answer: list[Piece], events: list[object]) -> None:
    assert tell(Progress(), answer) == events


@given(st.text(min_size=1), st.text(), st.data())
def test_a_generation_that_was_cut_goes_on_without_a_seam(text: str, rest: str, data: st.DataObject) -> None:
    read = data.draw(st.integers(0, len(text)))
    old = [Piece(1, 0, text[:read])] if read else []
    progress = Progress()
    events = tell(progress, [*old, Piece(2, 0, text), Piece(1, read, "late"), Piece(2, len(text), rest)])
    assert "".join(map(str, events)) == text + rest
    assert progress.end(result(text + rest)) == []


@pytest.mark.parametrize(
    ("stated", "text", "rest"),
    [
        ([ONE, TWO], "uno dos tres", [Restarted(2), "uno dos tres"]),  # a result of another attempt
        ([], [1, 2], []),
        ([], ["all of it"], ["all of it"]),  # a result of one row that was sent as rows
    ],
)
def test_a_result_ends_the_text(stated: list[Piece], text: object, rest: list[object]) -> None:
    progress = Progress()
    tell(progress, stated)
    assert progress.end(result(text)) == rest


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=6), st.integers(0, 5))
def test_a_reader_that_reconnects_gets_the_rest(texts: list[str], read: int) -> None:
    first = Progress()
    events = tell(first, pieces(*texts)[:read])
    again = read_progress_at(str(first))
    events += [
        event for n, piece in enumerate(pieces(*texts)[read:]) for event in again.take(f"{read + n + 1}-0", piece)
    ]
    assert "".join(map(str, events)) == "".join(texts)
    assert again.end(result("".join(texts))) == []


DELTAS = st.lists(st.fixed_dictionaries({"reasoning_content": st.text(max_size=5)}), max_size=3).map(tuple)


@given(
    st.builds(
        Piece,
        *[st.integers(1, 99), st.integers(0, 99), st.text(max_size=9), st.integers(0, 9)],
        tokens=st.integers(0, 99),
    )
    | st.builds(Piece, st.integers(1, 99), st.integers(0, 99), st.just(""), st.integers(0, 9), st.just(7), DELTAS)
)
def test_a_piece_is_read_as_it_was_written(piece: Piece) -> None:
    written = {
        name: value if isinstance(value, bytes) else str(value).encode() for name, value in piece.fields().items()
    }
    assert read_piece(written) == (piece if piece.beside else replace(piece, sent=0))


@pytest.mark.parametrize("text", ["", "1-0", "1-0:1:x:0", "a-0:1:2:3", "1-0:1:2:3:4"])
def test_a_position_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|values to unpack|invalid literal"):
        read_progress_at(text)


WORDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8)


def streamed(words: list[str], attempt: int = 1) -> list[Piece]:
    """Each word a token and a piece."""
    return [Piece(attempt, len("".join(words[:n])), word, tokens=n + 1) for n, word in enumerate(words)]


@given(WORDS, st.data())
def test_what_readers_got_beyond_what_was_kept_belongs_to_it(words: list[str], data: st.DataObject) -> None:
    kept, trimmed = sorted((data.draw(st.integers(0, len(words))), data.draw(st.integers(0, len(words)))), reverse=True)
    before = CutGeneration(1, "".join(words[:kept]), kept)
    whole = CutGeneration(1, "".join(words), len(words))
    assert with_streamed(before, streamed(words)[trimmed:]) == whole


@given(WORDS, WORDS)
def test_a_later_claim_that_began_again_counts_and_an_earlier_one_does_not(old: list[str], new: list[str]) -> None:
    kept = CutGeneration(1, "".join(old), len(old))
    assert with_streamed(kept, streamed(new, attempt=2)) == CutGeneration(2, "".join(new), len(new))
    later = CutGeneration(3, "".join(old), len(old))
    assert with_streamed(later, streamed(new, attempt=2)) == later


def test_a_stream_with_a_gap_or_with_more_than_text_adds_nothing() -> None:
    kept = CutGeneration(1, "one ", 1)
    assert with_streamed(kept, [Piece(1, 8, "three", tokens=3)]) == kept
    assert with_streamed(kept, [Piece(1, 4, "two", tokens=2), Piece(1, 7, beside=({"tool_calls": []},))]) == kept
    assert with_streamed(kept, [Piece(1, 4, "two", row=1, tokens=2)]) == kept


def test_the_parts_add_up() -> None:
    part = GenerationPart(hardware_class="c", variant="v", device="d", tokens=Tokens(input=5, cached=2, output=3))
    assert total([part, part]) == Tokens(input=10, cached=4, output=6)


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
def test_events_are_as_sent_however_they_are_cut(stream: tuple[bytes, list[ServerEvent]], data: st.DataObject) -> None:
    raw, whole = stream
    cuts = sorted({0, len(raw), *data.draw(st.lists(st.integers(0, len(raw)), max_size=20))})
    parser = EventParser()
    assert [event for start, end in pairwise(cuts) for event in parser.feed(raw[start:end])] == whole
    singly = EventParser()
    assert [event for byte in range(len(raw)) for event in singly.feed(raw[byte : byte + 1])] == whole


def test_an_endless_event_is_refused() -> None:
    parser = EventParser(1000)
    for _ in range(100):
        assert len(parser.feed(b"data: 1234567890\n\n" * 10)) == 10
    with pytest.raises(EventTooLargeError):
        for _ in range(20):
            parser.feed(b"x" * 100)


LONG = "x" * 3 * MESSAGE


def inbox(most: int = 2**30) -> Inbox[ToCaller]:
    return Inbox(read_to_caller, read_one_to_caller, most)


def piece(key: str, at: int, text: str) -> PeerPiece:
    return PeerPiece(key, at, text, 0, [])


def put(out: Outbox, frame: PeerPiece) -> None:
    out.put(encode_frames(frame), frame.key)


@given(given_=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5 * MESSAGE)), max_size=12))
@example([("a", 256), ("a", MESSAGE // 2 - 285), ("a", 256), ("a", MESSAGE // 2 - 14)])  # a long one behind short ones
def test_each_frame_arrives_once_and_in_the_order_of_its_job(given_: list[tuple[str, int]]) -> None:
    frames = [piece(key, at, "x" * size) for at, (key, size) in enumerate(given_)]
    out, read = Outbox(), inbox()
    for frame in frames:
        put(out, frame)
    messages = list(out.messages())
    received = [frame for message in messages for frame in read.frames(message)]
    assert all(len(message) <= MESSAGE for message in messages)
    assert (out.small, out.large) == (0, 0)
    for key in "abc":
        assert [one for one in received if getattr(one, "key", "") == key] == [one for one in frames if one.key == key]


def test_a_stream_of_small_frames_leaves_half_of_the_line_to_a_large_one() -> None:
    out = Outbox()
    put(out, piece("large", 0, LONG))
    sent = 0
    for _ in out.messages():
        sent += 1
        if out.large:
            for _ in range(MESSAGE // 1000):
                put(out, piece("small", 0, "x" * 1000))
    assert sent < 3 * len(LONG) // MESSAGE + 10


@pytest.mark.parametrize("parts", [[b"\xc0"], [encode_frames(PeerPart(memoryview(b""), True))], [b"x" * 600] * 2])
def test_parts_that_are_no_frame_or_have_no_end_are_refused(parts: list[bytes]) -> None:
    read = inbox(1000)
    frames = [PeerPart(memoryview(part), len(parts) == 1) for part in parts]
    with pytest.raises(msgspec.MsgspecError):
        list(read.frames(encode_frames(frames)))
