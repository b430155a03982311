"""A caller's trace at the HTTP door: what comes in `traceparent` goes with its job, and the answer tells the job's."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from router.http.gate import Application, Receive, Send
from taxiway.tracing import TRACEPARENT, TRACESTATE

_NAMES = {name.encode(): name for name in (TRACEPARENT, TRACESTATE)}

_LONGEST = 512  # bytes of `tracestate` that every system passes on (W3C Trace Context, 3.3.1.5)

_carried: ContextVar[dict[str, str] | None] = ContextVar("carried", default=None)


class Traced:
    """An ASGI application before another one, which remembers the trace of the request that is served."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = scope.get("headers", ())
        came = {_NAMES[name]: value.decode("latin-1") for name, value in headers if name in _NAMES and _fits(value)}
        if TRACEPARENT in came:
            _carried.set(came)
            send = partial(_told, send, came)
        await self._behind(scope, receive, send)


def carry(headers: dict[str, Any]) -> None:
    """Put the trace of the request that is served into a message's headers."""
    came = _carried.get()
    if came is not None:
        headers.update(came)


def carried_on(headers: Mapping[str, Any]) -> None:
    """Let the answer tell the trace that a message goes on with."""
    came = _carried.get()
    if came is not None:
        came[TRACEPARENT] = str(headers[TRACEPARENT])


def _fits(value: bytes) -> bool:
    return len(value) <= _LONGEST


async def _told(send: Send, came: Mapping[str, str], message: Mapping[str, Any]) -> None:
    if message["type"] == "http.response.start":
        traceparent = (TRACEPARENT.encode(), came[TRACEPARENT].encode("latin-1"))
        message = {**message, "headers": [*message["headers"], traceparent]}
    await send(message)
