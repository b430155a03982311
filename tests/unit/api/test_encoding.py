import asyncio
import gzip
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.bodies import COMPRESSED_FROM, Gzipped, inflate, takes_gzip
from taxiway.errors import InvalidRequestError, RequestTooLargeError


@given(st.binary(max_size=300))
def test_what_was_compressed_comes_out_as_it_was_and_any_other_bytes_are_refused(content: bytes) -> None:
    assert inflate(gzip.compress(content), len(content), 100) == content
    for sent in (content, b"\x1f\x8b\x08\x00" + content, gzip.compress(content)[:-1], gzip.compress(content) + b"x"):
        with pytest.raises(InvalidRequestError):
            inflate(sent, 2**16, 100)


@pytest.mark.parametrize(
    "sent",
    [gzip.compress(b"abc")[:-1], gzip.compress(b"abc") + b"x", gzip.compress(b"a") * 2, b""],
    ids=["cut", "with a byte more", "twice", "empty"],
)
def test_a_part_of_a_member_and_more_than_one_are_refused(sent: bytes) -> None:
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


@pytest.mark.cases("value, takes")
def test_who_accepts_gzip(value: str, takes: bool) -> None:
    assert takes_gzip([(b"host", b"here"), (b"accept-encoding", value.encode())]) is takes
    assert not takes_gzip([(b"host", b"here")])


def answered(
    pieces: list[bytes], *, accepts: bytes = b"gzip", length: bool = True, kind: str = "application/json"
) -> Any:
    """The head and the body that a client gets of an answer in these pieces."""
    sent: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        size = sum(map(len, pieces))
        headers = [(b"content-type", kind.encode()), *([(b"content-length", b"%d" % size)] if length else [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": index + 1 < len(pieces)})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing reads the request")

    scope = {"type": "http", "method": "POST", "headers": [(b"accept-encoding", accepts)]}
    asyncio.run(Gzipped(behind)(scope, receive, send))
    return dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


@given(st.lists(st.binary(max_size=2 * COMPRESSED_FROM), min_size=1, max_size=4))
def test_an_answer_arrives_as_it_was_and_is_compressed_from_the_least_size(pieces: list[bytes]) -> None:
    plain = b"".join(pieces)
    head, body = answered(pieces)
    if len(plain) < COMPRESSED_FROM:
        assert (head, body) == ({b"content-type": b"application/json", b"content-length": b"%d" % len(plain)}, plain)
        return
    assert (head[b"content-encoding"], head[b"vary"], gzip.decompress(body)) == (b"gzip", b"accept-encoding", plain)
    assert head.get(b"content-length") == (b"%d" % len(body) if len(pieces) == 1 else None)


@pytest.mark.parametrize(
    "changed", [{"accepts": b"br"}, {"length": False}, {"kind": "text/event-stream"}, {"kind": "image/png"}], ids=str
)
def test_streams_and_answers_to_others_are_left_as_they_are(changed: dict[str, Any]) -> None:
    head, body = answered([bytes(COMPRESSED_FROM), bytes(COMPRESSED_FROM)], **changed)
    assert (body, b"content-encoding" in head) == (bytes(2 * COMPRESSED_FROM), False)
