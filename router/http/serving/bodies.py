"""Bounds what the bodies of all requests under way take, of a tenant and of the router, before they are read.

A body counts from its head to its answer, for as long as its request may hold it: with the length that it declares, and
one that declares none as it comes. What is over `limits.payload` by itself is not counted: whoever reads it refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.access.bodies import Bodies
from router.http.errors import body_of, headers_of
from router.http.gate import Application, Message, Receive, Send, answer, caller_of
from taxiway.errors import FleetUnavailable


class BodyLimits:
    """An ASGI application before another one, behind the gate, which knows the caller; `payload` is the limit."""

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
        """Count so many bytes more. Raises as `Bodies.take` does."""
        self._bodies.take(self._tenant, size)
        self._size += size

    def give_back(self) -> None:
        """Count them no more."""
        self._bodies.give_back(self._tenant, self._size)

    async def receive(self) -> Message:
        """What comes next of the body, counted. Raises as `Bodies.take` does."""
        message = await self._receive()
        self.take(len(message.get("body", b"")))
        return message


def _length_of(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The bytes of a body; None where it does not say."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0
