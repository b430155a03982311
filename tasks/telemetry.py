"""A process's log, and its spans in OpenTelemetry traces of jobs.

The log is one JSON object a line on stderr: a constant event with its values beside it, never a secret.

A message carries its trace in W3C headers, and each process adds its spans. Only jobs with a sampled `traceparent` are
traced; any other job costs one header lookup. Our member of `tracestate` is the time at which the last process passed
the job on; the process that ends the wait after it records that as a span. The headers are not signed, since no
decision depends on them.

Source: W3C Trace Context, level 1.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import Any, cast

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tasks.settings import SettingsError
from taxiway.contract.wire import TRACEPARENT, TRACESTATE

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_PER_REQUEST = ("httpx", "uvicorn", "celery.worker.strategy", "celery.app.trace")
"""Loggers of libraries that write an INFO line for every request, task or start."""

_SECRETS = re.compile(r"(?<=://)[^/@\s\"]*(?=@)|(?<=\btaxiway_)[\w-]{43}(?![\w-])|(?<=\b[Bb]earer )[^\s\",]+")
"""Names and passwords in addresses, and keys of the HTTP API."""


def redacted(text: str) -> str:
    """`text` without secrets: a library's error text may contain any."""
    return _SECRETS.sub("…", text)


class JsonLines(logging.Formatter):
    """Writes a record as `{"time", "level", "logger", "event", …}`, its `extra` values in the same object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; values that JSON cannot hold are written as text."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return redacted(_encoded(line))


def _encoded(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=str).decode()
    except (ValueError, TypeError, RecursionError):  # text with lone surrogates, for one: what others sent
        return msgspec.json.encode({name: ascii(value) for name, value in line.items()}).decode()


def withhold(record: logging.LogRecord) -> bool:
    """A filter for processes that open sealed inputs: errors of jobs and models may quote them, and are left out."""
    if hasattr(record, "job") or hasattr(record, "variant"):
        record.exc_info = None
        for name in {"error", "traceback"} & vars(record).keys():
            setattr(record, name, "withheld: TAXIWAY_SEAL_KEYS is set")
    return True


def log_to_stderr(level: str = "INFO", *filters: Callable[[logging.LogRecord], bool]) -> None:
    """Send the process's log to stderr as `JsonLines`; libraries' lines for each request are logged at DEBUG only.

    Raises:
        ValueError: no such level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for one in filters:
        handler.addFilter(one)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _PER_REQUEST:
        logging.getLogger(name).setLevel(level if level == "DEBUG" else "WARNING")


EXPORTER = "OTEL_TRACES_EXPORTER"
"""The standard variable that names exporters. Without it nothing is exported, whatever is installed."""

_PACKAGE = "opentelemetry-exporter-otlp-proto-http"

_TRACESTATE_MEMBER = "taxiway"  # our member of `tracestate`: microseconds since the epoch
_AFTER = 2  # microseconds, so that rounding never lets a wait begin before its parent ends
_OTHERS = 31  # other members of the list, which has 32 at most

_w3c = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("taxiway")

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class ParentSpan:
    """The last span of a traced message, and when it ended by its host's clock, 0 if unknown."""

    context: Context
    since: float


def start_tracing(service: str, environment: Mapping[str, str]) -> None:
    """Export this process's spans as the standard OTEL_* variables say, if they name an exporter.

    Raises:
        SettingsError: OpenTelemetry's SDK, or an exporter of that name, is not installed.
    """
    names = [name.strip() for name in environment.get(EXPORTER, "").split(",") if name.strip() not in ("", "none")]
    if not names or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # or tracing has started
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # the operator's to install
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(EXPORTER, "none while opentelemetry-sdk is not installed", ",".join(names)) from error
    named = environment.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: named}))
    for name in names:
        provider.add_span_processor(BatchSpanProcessor(_exporter(name, environment)()))
    trace.set_tracer_provider(provider)


def _exporter(name: str, environment: Mapping[str, str]) -> Callable[[], Any]:
    """Makes the exporter of this name. Python's packages name OpenTelemetry's own `otlp` by its protocol.

    Raises:
        SettingsError: it is not installed, or only in part.
    """
    installed = {one.name: one for one in entry_points(group="opentelemetry_traces_exporter")}
    grpc = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "") == "grpc"
    named = name if name != "otlp" or name in installed else f"otlp_proto_{'grpc' if grpc else 'http'}"
    found = installed.get(named)
    if found is None:
        known = ", ".join(sorted(installed))
        raise SettingsError(EXPORTER, f"an installed exporter ({known}; `pip install {_PACKAGE}` adds otlp)", name)
    try:
        return cast(Callable[[], Any], found.load())
    except ImportError as error:
        raise SettingsError(EXPORTER, "an exporter that can be imported", f"{name}: {error}") from error


def parent_of(headers: Mapping[str, Any]) -> ParentSpan | None:
    """The trace context of a message; None if it is not traced or its headers are invalid."""
    if TRACEPARENT not in headers:
        return None
    carried = {name: headers.get(name) for name in (TRACEPARENT, TRACESTATE)}
    context = _w3c.extract({name: text for name, text in carried.items() if isinstance(text, str)}, Context())
    came = trace.get_current_span(context).get_span_context()
    if not (came.is_valid and came.trace_flags.sampled):
        return None
    since = came.trace_state.get(_TRACESTATE_MEMBER, "")
    return ParentSpan(context, int(since) / 1e6 if since.isdecimal() and len(since) < 18 else 0.0)


def begin(name: str, parent: ParentSpan, at: float, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL) -> Span:
    """A child of `parent` from `at`, in seconds since the epoch, until `end`."""
    return _tracer.start_span(f"taxiway.{name}", parent.context, kind, attributes, start_time=_nanoseconds(at))


def end(span: Span, at: float, error: str = "") -> None:
    """End a span; a span with an `error` has failed."""
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(_nanoseconds(at))


def wait(parent: ParentSpan, until: float, attributes: Attributes) -> None:
    """Record the time since the parent span as a span; never below zero, whatever two hosts' clocks say."""
    end(begin("wait", parent, min(parent.since, until) or until, attributes), until)


def mark(headers: dict[str, Any], span: Span, at: float) -> None:
    """Make the span the parent of the message's next spans, from `at` on."""
    _w3c.inject(headers, trace.set_span_in_context(span, Context()))
    others = [
        f"{name}={value}" for name, value in span.get_span_context().trace_state.items() if name != _TRACESTATE_MEMBER
    ]
    headers[TRACESTATE] = ",".join([f"{_TRACESTATE_MEMBER}={int(at * 1e6) + _AFTER}", *others[:_OTHERS]])


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
