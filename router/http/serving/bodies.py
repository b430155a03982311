"""Limits the memory of all request bodies in progress, per tenant and per router, before they are read.

A body counts from its head to its answer, for as long as its request may hold it: with its declared length, or as it
arrives if it declares none. A body over `limits.payload` by itself is not counted: its reader refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.access.bodies import Bodies
from router.http.errors import body_of, headers_of
from router.http.gate import Application, Message, Receive, Send, answer, caller_of
from taxiway.errors import FleetUnavailable


class BodyLimits:
    """ASGI middleware after the gate, which identifies the caller; `payload` is the limit of one body."""

    def __init__(self, behind: Application, bodies: Bodies, payload: int) -> None:
        self._behind = behind
        self._payload = payload
        self._bodies = bodies

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        length = _length_of(scope["headers"])
        if length == 0 or (length is not None and length > self._payload):
            await self._behind(scope, receive, send)
            return
        counted = _Counted(self._bodies, caller_of(scope).tenant or "", receive)
        try:
            if length is not None:
                counted.take(length)
        except FleetUnavailable as error:
            await answer(send, error.status, headers_of(error), body_of(error))
            return
        try:
            await self._behind(scope, receive if length is not None else counted.receive, send)
        finally:
            counted.give_back()


class _Counted:
    """One request's body."""

    def __init__(self, bodies: Bodies, tenant: str, receive: Receive) -> None:
        self._bodies = bodies
        self._tenant = tenant
        self._receive = receive
        self._size = 0

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises as `Bodies.take` does."""
        self._bodies.take(self._tenant, size)
        self._size += size

    def give_back(self) -> None:
        """Stop counting them."""
        self._bodies.give_back(self._tenant, self._size)

    async def receive(self) -> Message:
        """The next part of the body, counted. Raises as `Bodies.take` does."""
        message = await self._receive()
        self.take(len(message.get("body", b"")))
        return message


def _length_of(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The length of a body; None if undeclared."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0
