"""Propagates a caller's trace with its request, if its process uses OpenTelemetry, which is not a dependency.

Source: W3C Trace Context, level 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

TRACEPARENT = "traceparent"
"""The header with a message's trace id and parent span id."""

TRACESTATE = "tracestate"
"""The header for vendor-specific trace data."""

Carried = Mapping[str, str]
"""Both headers; empty without tracing."""

_API = "opentelemetry.trace"
_UNTRACED: AbstractContextManager[Carried] = nullcontext({})


def submitting(model: str, job: str = "") -> AbstractContextManager[Carried]:
    """The span of a submission, as a context manager; yields the headers that the request carries.

    A process that traces has imported OpenTelemetry; in any other this costs one dictionary lookup. If the caller's
    span is not sampled, this one is not either.
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
