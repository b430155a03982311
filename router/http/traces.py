"""Trace context at the HTTP door: `traceparent` is passed on with the job, and the answer carries the job's."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from router.http.gate import Application, Receive, Send
from taxiway.contract.tracing import TRACEPARENT, TRACESTATE

_TRACEPARENT = TRACEPARENT.encode()

_LONGEST = 512  # bytes of `tracestate` that every system passes on (W3C Trace Context, 3.3.1.5)

_carried: ContextVar[dict[str, str] | None] = ContextVar("carried", default=None)


class Traced:
    """ASGI middleware that keeps the trace context of the request in progress."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        remember(dict(scope["headers"]))
        await self._behind(scope, receive, partial(_send_with_trace, send) if answer_header() else send)


def remember(headers: Mapping[bytes, bytes]) -> None:
    """Keep the trace context in a request's headers while it is served."""
    if _TRACEPARENT in headers:
        context = {name: headers.get(name.encode(), b"") for name in (TRACEPARENT, TRACESTATE)}
        fit = {name: value.decode("latin-1") for name, value in context.items() if 0 < len(value) <= _LONGEST}
        if TRACEPARENT in fit:
            _carried.set(fit)


def answer_header() -> dict[str, str]:
    """The `traceparent` header for the answer to the present request; empty if it has no trace context."""
    context = _carried.get()
    return {} if context is None else {TRACEPARENT: context[TRACEPARENT]}


def carry(headers: dict[str, Any]) -> None:
    """Copy the present request's trace context into a message's headers."""
    context = _carried.get()
    if context is not None:
        headers.update(context)


def carried_on(headers: Mapping[str, Any]) -> None:
    """Make the answer return the trace context that a message continues with."""
    context = _carried.get()
    if context is not None:
        context[TRACEPARENT] = str(headers[TRACEPARENT])


async def _send_with_trace(send: Send, message: Mapping[str, Any]) -> None:
    if message["type"] == "http.response.start":
        traceparent = [(name.encode(), value.encode("latin-1")) for name, value in answer_header().items()]
        message = {**message, "headers": [*message["headers"], *traceparent]}
    await send(message)
