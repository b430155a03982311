"""Frames between fleets as messages: each arrives once, in its job's order, and none waits for a large one to end."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taxiway.contract.peer_messages import MESSAGE, Inbox, Outbox
from taxiway.contract.peers import (
    PeerPart,
    PeerPiece,
    ToCaller,
    encode_frames,
    read_one_to_caller,
    read_to_caller,
)

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


@given(sizes=st.lists(st.integers(0, 3000), max_size=200))
def test_small_frames_share_messages(sizes: list[int]) -> None:
    out = Outbox()
    for size in sizes:
        put(out, piece("a", 0, "x" * size))
    assert len(list(out.messages())) <= 1 + out.small + sum(size + 20 for size in sizes) // (MESSAGE // 4)


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
