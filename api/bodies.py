"""Request bodies before anything reads them: their memory is limited, and compressed ones are refused.

A request's body counts from its head to its answer, for as long as its request may hold it: with its declared length,
or as it arrives if it declares none. A body over `limits.payload` by itself is not counted: its reader refuses it.

Sources: RFC 9110, 8.4 (Content-Encoding) and 15.5.16 (415); RFC 7694 (Accept-Encoding in an answer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.access import Bodies
from api.errors import over_limit
from api.gate import Application, Message, Receive, Send, caller_of, refuse
from taxiway.errors import FleetUnavailable, InvalidRequestError, RequestError, UnsupportedEncodingError, quoted


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
        except RequestError as error:
            await refuse(scope, send, error, {"connection": "close", "accept-encoding": "identity"})
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
        UnsupportedEncodingError: it is compressed.
    """
    length, chunked = None, False
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            chunked = True
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            got = quoted(value.decode("latin-1"))
            raise UnsupportedEncodingError(f"content-encoding: expected none, got {got}", accepted="identity")
    if chunked and length is not None:
        raise InvalidRequestError("body: expected a length or chunks, got both", field="body")
    return None if chunked else length or 0


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
