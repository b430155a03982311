"""Request bodies that come compressed: inflated before anything else reads them, within the limit of a body.

Sources: RFC 9110, 8.4 (Content-Encoding; deflate is zlib's form) and 15.5.16 (415); RFC 7694 (Accept-Encoding in an
answer); RFC 1952 (gzip).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from broker.beside import beside
from router.http.errors import body_of, headers_of
from router.http.gate import Application, Message, Receive, Send, answer
from taxiway.contract.amounts import LARGE
from taxiway.contract.quoting import quoted
from taxiway.errors import InvalidRequestError, RequestTooLargeError, TaxiwayError, UnsupportedEncodingError

ENCODINGS = "gzip, deflate"
"""What a body may be encoded with, as `Accept-Encoding` says it."""

_READ = (b"gzip", b"x-gzip", b"deflate")
_PLAIN = (b"", b"identity")
_WINDOW = 47  # zlib's number for a head and checksum of gzip or of zlib, which HTTP calls deflate, and any window
_PIECE = 2**20  # bytes that are inflated at once


class Inflated:
    """An ASGI application before another one, which finds each body as it was before it was compressed.

    `behind` gets requests as they came, and `inflated` those whose bodies were inflated: more memory than their callers
    declared. `limit` bounds a body, in bytes, as it comes and as it is inflated.
    """

    def __init__(self, behind: Application, inflated: Application, limit: int) -> None:
        self._behind = behind
        self._inflated = inflated
        self._limit = limit

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        coding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"").strip().lower()
        if coding in _PLAIN:
            await self._behind(scope, receive, send)
            return
        try:
            if coding not in _READ:
                message = (
                    f"content-encoding: expected one of {ENCODINGS}, or none, got {quoted(coding.decode('latin-1'))}"
                )
                raise UnsupportedEncodingError(message, accepted=ENCODINGS)
            content = await _whole(receive, self._limit)
            body = await beside(LARGE + 1, inflate, content, self._limit)
        except TaxiwayError as error:
            await answer(send, error.status, {**headers_of(error), "accept-encoding": ENCODINGS}, body_of(error))
        else:
            await self._inflated(_plain(scope, len(body)), _once(body, receive), send)


def inflate(content: bytes, limit: int) -> bytes:
    """What a gzip member or a stream of zlib holds; piece by piece, so that it takes `limit` bytes and a piece at most.

    Raises:
        InvalidRequestError: it is neither, or not all of one, or something follows it.
        RequestTooLargeError: it holds more than `limit` bytes.
    """
    machine = zlib.decompressobj(_WINDOW)
    pieces, size, rest = [], 0, content
    while not machine.eof:
        try:
            piece = machine.decompress(rest, _PIECE)
        except zlib.error as error:
            raise InvalidRequestError(f"body: expected gzip or deflate: {error}", field="body") from error
        size, rest = size + len(piece), machine.unconsumed_tail
        if size > limit:
            raise _too_large(limit)
        if not piece and not rest and not machine.eof:
            raise InvalidRequestError("body: expected gzip or deflate, got a part of it", field="body")
        pieces.append(piece)
    if machine.unused_data:
        raise InvalidRequestError("body: expected one member of gzip or deflate, got more behind it", field="body")
    return b"".join(pieces)


async def _whole(receive: Receive, limit: int) -> bytes:
    """A body as it comes.

    Raises:
        RequestTooLargeError: it is over `limit` bytes.
        InvalidRequestError: its sender is gone.
    """
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise InvalidRequestError("body: its sender is gone", field="body")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"payload: expected at most {limit} bytes, also inflated, got more", limit="payload")


def _plain(scope: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scope of the same request with a body of `length` bytes that is not encoded."""
    body = (b"content-encoding", b"content-length", b"transfer-encoding")
    rest = [(name, value) for name, value in scope["headers"] if name not in body]
    return {**scope, "headers": [*rest, (b"content-length", b"%d" % length)]}


def _once(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and then what comes behind it."""
    given = False

    async def first() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first
