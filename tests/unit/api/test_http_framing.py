"""Where a request ends: our framing agrees with the HTTP parser."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.framing import Chunks, FramingError, framing_of

CHUNKED = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
SIZES = st.sampled_from(
    [b"0", b"1", b"5", b"aF", b"00", b"000000000000000003", b"-1", b"0x2", b"1_0", b"", b" 2", b"2 "]
)
LINES = st.sampled_from(
    [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b";a=b\r\n", b';a="\n"\r\n', b"x: y\r\n", b"abcde", b"a", b"GET "]
)
NAMES = ["content-length", "Content-Length", "transfer-encoding", "x", "content-length ", "upgrade", "connection"]
VALUES = [
    "0",
    "3",
    " 3",
    "3 ",
    "+3",
    "3, 3",
    "9" * 25,
    "chunked",
    "Chunked",
    "gzip",
    "gzip, chunked",
    "upgrade",
    "h2c",
    "",
]


class Parsed:
    """What httptools makes of bytes: how many messages are whole, and whether it refuses them."""

    def __init__(self, *pieces: bytes) -> None:
        self.whole = 0
        self.refused = self.headed = False
        parser = httptools.HttpRequestParser(self)
        try:
            for piece in pieces:
                parser.feed_data(piece)
        except httptools.HttpParserError:
            self.refused = True
        except httptools.HttpParserUpgrade:
            pass

    def on_headers_complete(self) -> None:
        self.headed = True

    def on_message_complete(self) -> None:
        self.whole += 1


def pieces_of(content: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The same bytes, cut at some places."""
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    return [content[a:b] for a, b in itertools.pairwise(places)]


def end_of(content: bytes, cuts: Sequence[int] = ()) -> int | None:
    """Where a chunked body ends by our count; None where it goes on."""
    chunks, at = Chunks(), 0
    for piece in pieces_of(content, cuts):
        at += chunks.end_in(piece)
        if chunks.ended:
            return at
    return None


@given(
    sizes=st.lists(st.integers(1, 40), max_size=5),
    extension=st.sampled_from([b"", b";a", b";name=value"]),
    trailers=st.lists(st.sampled_from([b"a: b", b"long: " + b"x" * 50]), max_size=2),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_a_chunked_body_ends_where_it_ends_however_it_is_cut(
    sizes: list[int], extension: bytes, trailers: list[bytes], cuts: Sequence[int]
) -> None:
    body = b"".join(b"%x%s\r\n%s\r\n" % (size, extension, b"\n" * size) for size in sizes)
    body += b"0\r\n" + b"".join(trailer + b"\r\n" for trailer in trailers) + b"\r\n"

    assert end_of(body + b"GET / HTTP/1.1\r\n\r\n", cuts) == len(body)
    assert Parsed(CHUNKED, body).whole == 1


@given(content=st.lists(SIZES | LINES, max_size=8).map(b"".join), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_no_chunked_body_ends_for_us_and_goes_on_for_the_parser(content: bytes, cuts: list[int]) -> None:
    try:
        end = end_of(content, cuts)
    except FramingError:
        return
    parsed = Parsed(CHUNKED, content if end is None else content[:end])
    assert parsed.refused or parsed.whole == (end is not None)


@given(headers=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4))
def test_no_body_has_another_length_for_us_than_for_the_parser(headers: list[tuple[str, str]]) -> None:
    head = "".join(["POST /content-length HTTP/1.1\r\n", *(f"{name}:{value}\r\n" for name, value in headers), "\r\n"])
    try:
        framing = framing_of(head.encode())
    except FramingError:
        return
    body = b"0\r\n\r\n" if framing.chunked else bytes(framing.length)
    parsed = Parsed(framing.head, body)
    assert parsed.refused or parsed.whole == 1
    if body:
        short = Parsed(framing.head, body[:-1])
        assert short.refused or (short.headed and not short.whole)


def test_a_wish_to_speak_another_protocol_is_taken_out_of_a_head() -> None:
    head = b"POST / HTTP/1.1\r\nconnection: upgrade\r\nUpgrade: h2c\r\ncontent-length: 5\r\n\r\n"

    framing = framing_of(head)

    assert b"h2c" not in framing.head
    assert Parsed(framing.head, b"hello").whole == 1


@pytest.mark.parametrize(
    "head",
    [b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b" GET / HTTP/1.1\r\n\r\n"],
)
def test_a_tunnel_and_what_begins_as_no_request_does_have_no_end(head: bytes) -> None:
    with pytest.raises(FramingError):
        framing_of(head)
