"""A caller's trace goes with its request, where its process uses OpenTelemetry: nothing of that is needed here.

Source: W3C Trace Context, level 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

TRACEPARENT = "traceparent"
"""The header that names a message's trace and the span before it."""

TRACESTATE = "tracestate"
"""The header in which each tracing system keeps what it needs."""

Carried = Mapping[str, str]
"""Both headers; empty where nobody traces."""

_API = "opentelemetry.trace"
_UNTRACED: AbstractContextManager[Carried] = nullcontext({})


def submitting(model: str, job: str = "") -> AbstractContextManager[Carried]:
    """The span of handing a request in, entered and left around that; gives what the request is to carry.

    A process that traces has imported OpenTelemetry: in any other this is one look. Where the caller's own span is not
    sampled, this one is not, either.
    """
    api = sys.modules.get(_API)
    return _submitting(api, model, job) if api is not None and _traces(api) else _UNTRACED


def _traces(api: Any) -> bool:
    around = api.get_current_span()
    if around is api.INVALID_SPAN:
        return not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider)
    return bool(around.get_span_context().trace_flags.sampled)


@contextmanager
def _submitting(api: Any, model: str, job: str) -> Iterator[Carried]:
    attributes = {"taxiway.model": model, **({"taxiway.job": job} if job else {})}
    tracer = api.get_tracer("taxiway")
    with tracer.start_as_current_span("taxiway.submit", kind=api.SpanKind.PRODUCER, attributes=attributes) as span:
        came = span.get_span_context()
        yield _carried(came) if came.is_valid and came.trace_flags.sampled else {}


def _carried(came: Any) -> Carried:
    parent = f"00-{came.trace_id:032x}-{came.span_id:016x}-{came.trace_flags:02x}"
    state = came.trace_state.to_header()
    return {TRACEPARENT: parent, TRACESTATE: state} if state else {TRACEPARENT: parent}
