"""A caller's trace at the HTTP door: what comes in `traceparent` goes with its job, and the answer tells the job's."""

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
    """An ASGI application before another one, which remembers the trace of the request that is served."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        remember(dict(scope["headers"]))
        await self._behind(scope, receive, partial(_tell, send) if told() else send)


def remember(headers: Mapping[bytes, bytes]) -> None:
    """Know the trace that a request's headers tell, for as long as it is served."""
    if _TRACEPARENT in headers:
        came = {name: headers.get(name.encode(), b"") for name in (TRACEPARENT, TRACESTATE)}
        fit = {name: value.decode("latin-1") for name, value in came.items() if 0 < len(value) <= _LONGEST}
        if TRACEPARENT in fit:
            _carried.set(fit)


def told() -> dict[str, str]:
    """The header that tells the trace in the answer to the request that is served; none where it has none."""
    came = _carried.get()
    return {} if came is None else {TRACEPARENT: came[TRACEPARENT]}


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


async def _tell(send: Send, message: Mapping[str, Any]) -> None:
    if message["type"] == "http.response.start":
        traceparent = [(name.encode(), value.encode("latin-1")) for name, value in told().items()]
        message = {**message, "headers": [*message["headers"], *traceparent]}
    await send(message)
