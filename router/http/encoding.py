"""Compressed request bodies: inflated before anything else reads them, within the limit of a body.

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
"""Accepted encodings of a body, as in `Accept-Encoding`."""

_READ = (b"gzip", b"x-gzip", b"deflate")
_PLAIN = (b"", b"identity")
_WINDOW = 47  # zlib's wbits for gzip or zlib headers (HTTP's deflate), detected automatically, with any window
_PIECE = 2**20  # bytes inflated at once


class Inflated:
    """ASGI middleware that inflates compressed bodies.

    `behind` gets requests as they came. `inflated` gets those whose bodies were inflated and take more memory than
    declared. `limit` bounds a body, in bytes, compressed and inflated.
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
    """The content of a gzip member or zlib stream, inflated piece by piece: at most `limit` bytes plus one piece.

    Raises:
        InvalidRequestError: neither format, truncated, or followed by more data.
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
            raise InvalidRequestError("body: expected gzip or deflate, got truncated data", field="body")
        pieces.append(piece)
    if machine.unused_data:
        raise InvalidRequestError("body: expected one gzip or deflate member, got data after it", field="body")
    return b"".join(pieces)


async def _whole(receive: Receive, limit: int) -> bytes:
    """A body as it was sent.

    Raises:
        RequestTooLargeError: it exceeds `limit` bytes.
        InvalidRequestError: the client disconnected.
    """
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise InvalidRequestError("body: the client disconnected", field="body")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"payload: expected at most {limit} bytes after decompression, got more", limit="payload"
    )


def _plain(scope: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scope of the same request with an unencoded body of `length` bytes."""
    body = (b"content-encoding", b"content-length", b"transfer-encoding")
    rest = [(name, value) for name, value in scope["headers"] if name not in body]
    return {**scope, "headers": [*rest, (b"content-length", b"%d" % length)]}


def _once(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, and then what `receive` returns."""
    given = False

    async def first() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first
