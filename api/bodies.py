"""Request bodies before anything reads them.

Their memory is limited, and compressed ones are inflated. Answers are compressed by the ingress, if at all.

A request's body counts from its head to its answer, for as long as its request may hold it: with its declared length,
or as it arrives if it declares none. A body over `limits.payload` by itself is not counted: its reader refuses it.

Sources: RFC 9110, 8.4 (Content-Encoding; deflate is zlib's form) and 15.5.16 (415); RFC 7694 (Accept-Encoding in an
answer); RFC 1952 (gzip).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from api.access import Bodies
from api.errors import over_limit
from api.gate import Application, Message, Receive, Send, caller_of, refuse
from taxiway.contract.limits import LARGE
from taxiway.errors import (
    FleetUnavailable,
    InvalidRequestError,
    RequestTooLargeError,
    TaxiwayError,
    UnsupportedEncodingError,
    quoted,
)
from taxiway.running import beside

ENCODINGS = "gzip, deflate"
"""Accepted encodings of a body, as in `Accept-Encoding`."""

_ENCODINGS = (b"gzip", b"x-gzip", b"deflate")
_PLAIN = (b"", b"identity")
_WINDOW = 47  # zlib's wbits for gzip or zlib headers (HTTP's deflate), detected automatically, with any window
_INFLATED_BYTES = 2**20  # bytes inflated at once, and not counted as inflation


class BodyLimits:
    """ASGI middleware after the gate, which identifies the caller; `payload` is the limit of one body."""

    def __init__(self, behind: Application, bodies: Bodies, payload: int) -> None:
        self._behind = behind
        self._payload = payload
        self._bodies = bodies

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            length = _length_of(scope["headers"])
        except InvalidRequestError as error:
            await refuse(scope, send, error, {"connection": "close"})
            return
        if length == 0 or (length is not None and length > self._payload):
            await self._behind(scope, receive, send)
            return
        tenant, size = caller_of(scope).tenant or "", 0

        def take(more: int) -> None:
            nonlocal size
            self._bodies.take(tenant, more)
            size += more

        async def counted() -> Message:
            message = await receive()
            take(len(message.get("body", b"")))
            return message

        try:
            if length is not None:
                take(length)
        except FleetUnavailable as error:
            await refuse(scope, send, error)
            return
        try:
            await self._behind(scope, receive if length is not None else counted, send)
        finally:
            self._bodies.give_back(tenant, size)


def _length_of(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The length of a body; None if undeclared.

    Raises:
        InvalidRequestError: both a length and chunks, which another server may read otherwise (RFC 9112, 11.2).
    """
    length, chunked = None, False
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            chunked = True
    if chunked and length is not None:
        raise InvalidRequestError("body: expected a length or chunks, got both", field="body")
    return None if chunked else length or 0


class Inflated:
    """ASGI middleware that inflates compressed bodies.

    `behind` gets requests as they came. `inflated` gets those whose bodies were inflated and take more memory than
    declared. `limit` bounds a body, in bytes, compressed and inflated, and `inflation` how many times its compressed
    size it may have.
    """

    def __init__(self, behind: Application, inflated: Application, limit: int, inflation: int) -> None:
        self._behind = behind
        self._inflated = inflated
        self._limit, self._inflation = limit, inflation

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        coding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"").strip().lower()
        if coding in _PLAIN:
            await self._behind(scope, receive, send)
            return
        try:
            if coding not in _ENCODINGS:
                message = (
                    f"content-encoding: expected one of {ENCODINGS}, or none, got {quoted(coding.decode('latin-1'))}"
                )
                raise UnsupportedEncodingError(message, accepted=ENCODINGS)
            content = await read_body(scope, receive, self._limit)
            if content is None:
                return
            body = await beside(LARGE + 1, inflate, content, self._limit, self._inflation)
        except TaxiwayError as error:
            await refuse(scope, send, error, {"accept-encoding": ENCODINGS})
        else:
            await self._inflated(_plain(scope, len(body)), _once(body, receive), send)


def inflate(content: bytes, limit: int, inflation: int) -> bytes:
    """The content of a gzip member or zlib stream, inflated piece by piece: at most what is allowed plus one piece.

    Raises:
        InvalidRequestError: neither format, truncated, or followed by more data.
        RequestTooLargeError: it holds more than `limit` bytes, or more than a piece and `inflation` times its own size.
    """
    machine = zlib.decompressobj(_WINDOW)
    allowed = max(inflation * len(content), _INFLATED_BYTES)
    pieces, size, rest = [], 0, content
    while not machine.eof:
        try:
            piece = machine.decompress(rest, _INFLATED_BYTES)
        except zlib.error as error:
            raise InvalidRequestError(f"body: expected gzip or deflate: {error}", field="body") from error
        size, rest = size + len(piece), machine.unconsumed_tail
        if size > limit:
            message = f"payload: expected at most {limit} bytes after decompression, got more"
            raise RequestTooLargeError(message, limit="payload")
        if size > allowed:
            message = f"body: expected at most {inflation} times its compressed size of {len(content)} bytes, got more"
            raise RequestTooLargeError(message, limit="inflation", most=inflation)
        if not piece and not rest and not machine.eof:
            raise InvalidRequestError("body: expected gzip or deflate, got truncated data", field="body")
        pieces.append(piece)
    if machine.unused_data:
        raise InvalidRequestError("body: expected one gzip or deflate member, got data after it", field="body")
    return b"".join(pieces)


async def read_body(scope: Mapping[str, Any], receive: Receive, limit: int) -> bytes | None:
    """A request's body as it was sent; None if the client disconnected.

    Raises:
        RequestTooLargeError: it has more than `limit` bytes.
    """
    length = _length_of(scope["headers"])
    if length is not None and length > limit:
        raise over_limit(limit, length)
    pieces, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message["body"])
        size, more = size + len(pieces[-1]), message["more_body"]
        if size > limit:
            raise over_limit(limit, "more")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


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
