"""The message a producer writes: Celery's task protocol 2, in kombu's envelope for Valkey and Redis.

A worker of plain Celery reads it. A producer may sign a message (HMAC-SHA-256), and its trace continues in the message
if its process uses OpenTelemetry, which is not a dependency.

A message counts as accepted by its durability. `written`: in the broker's memory, and in its log as its `appendfsync`
says. `replicated`: also in the memory of so many replicas that a majority of the servers has it, so a failover to one
of these replicas loses nothing.

Sources: Celery's "Message Protocol" (version 2); kombu's virtual transport; W3C Trace Context, level 1.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import msgspec

from taxiway.contract.keys import ARRIVALS, CANCEL, INFER
from taxiway.contract.limits import ELEMENTS, values_beyond
from taxiway.contract.request import Request, new_id, parse_request
from taxiway.contract.values import Blobs, from_wire, to_wire
from taxiway.errors import (
    BrokerFullError,
    BrokerUnavailableError,
    FleetUnavailable,
    InvalidRequestError,
    cut,
    invalid,
    wrong_field,
)

SHORTEST = 16
"""Minimum bytes of a key."""


def read_key(text: str) -> bytes:
    """The key from hexadecimal `text`.

    Raises:
        ValueError: not hexadecimal, or too short.
    """
    key = bytes.fromhex(text)
    if len(key) < SHORTEST:
        raise ValueError(f"expected at least {2 * SHORTEST} hexadecimal digits")
    return key


def key_id(key: bytes) -> str:
    """A key's name for logs and errors, which reveals nothing of the key."""
    return hashlib.sha256(b"taxiway key\n" + key).hexdigest()[:8]


def signature(text: bytes, body: bytes, key: bytes) -> str:
    """Sign both together. JSON has no line breaks outside strings, so that no two pairs give the same bytes."""
    code = _keyed(key).copy()
    code.update(text)
    code.update(b"\n")
    code.update(body)
    return code.hexdigest()


def signed_by(keys: Sequence[bytes], given: str, text: bytes, body: bytes) -> bool:
    """Whether the signature matches one of the `keys`; compared in constant time."""
    claimed = given.encode(errors="replace")
    return any(hmac.compare_digest(claimed, signature(text, body, key).encode()) for key in keys)


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> hmac.HMAC:
    """Created once: with cold caches, looking up the algorithm takes ten times as long as a signature."""
    return hmac.new(key, digestmod="sha256")


TRACEPARENT = "traceparent"
"""The header with a message's trace id and parent span id."""

TRACESTATE = "tracestate"
"""The header for vendor-specific trace data."""

Carried = Mapping[str, str]
"""Both headers; empty without tracing."""

_API = "opentelemetry.trace"
_NO_SPAN: AbstractContextManager[Carried] = nullcontext({})


def submitting(model: str, job: str = "") -> AbstractContextManager[Carried]:
    """The span of a submission, as a context manager; yields the headers that the request carries.

    A process that traces has imported OpenTelemetry; in any other this costs one dictionary lookup. If the caller's
    span is not sampled, this one is not either.
    """
    api = sys.modules.get(_API)
    return _submitting(api, model, job) if api is not None and _traces(api) else _NO_SPAN


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


HEADER = "taxiway"
"""The message header with taxiway's own fields."""

BRIDGED = "taxiway_bridged"
"""The property that marks a message that came from RabbitMQ: what follows from its job goes back there."""

DESTINATION = "taxiway_to"
"""The property of a message in `AMQP_OUTBOX` that names its queue at RabbitMQ."""

CLAIMABLE = "taxiway_job"
"""The property, first in a placed message, with the `job` and `deadline_at` of its ticket, for a script to claim it."""

_POSITIONAL = ("model", "inputs")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]").search
_UNTRACED: Carried = {}
NO_CANVAS: dict[str, None] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
"""The third part of a task's body if nothing follows from it."""


class Envelope(msgspec.Struct, kw_only=True):
    """A message as kombu stores it in a Valkey list; `body` is base64.

    The properties come first, where scripts read the `CLAIMABLE` one without decoding the message.
    """

    properties: dict[str, Any]
    headers: dict[str, Any]
    body: str
    content_type: str = msgspec.field(name="content-type", default="application/json")
    content_encoding: str = msgspec.field(name="content-encoding", default="utf-8")

    def payload(self) -> bytes:
        """The body's bytes.

        Raises:
            InvalidRequestError: the body does not match its encoding.
        """
        if self.properties.get("body_encoding") != "base64":
            return self.body.encode()
        try:
            return _bytes_of(self.body)
        except ValueError as error:
            raise invalid("body", f"base64: {error}") from error

    def with_payload(self, body: bytes) -> Envelope:
        """The same message with another body, and without the texts that Celery shows of the one before."""
        properties = {**self.properties, "body_encoding": "base64"}
        headers = {**self.headers, "argsrepr": "", "kwargsrepr": ""}
        coded = base64.b64encode(body).decode("ascii")
        return msgspec.structs.replace(self, properties=properties, headers=headers, body=coded)


def _bytes_of(text: str) -> bytes:
    """Decode base64; long text in pieces, because one call blocks all threads for its duration.

    Raises:
        ValueError: not base64.
    """
    if len(text) <= _BASE64_CHARACTERS:
        return base64.b64decode(text, validate=True)
    if "=" in text[:-2]:
        raise ValueError("padding before the end")
    pieces = (text[start : start + _BASE64_CHARACTERS] for start in range(0, len(text), _BASE64_CHARACTERS))
    return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)


_BASE64_CHARACTERS = 2**22  # base64 characters per piece, a multiple of 4: 8 ms
_SIGNATURE, _SIGNED_AT = "signature", "signed_at"  # in that header

_encode = msgspec.json.Encoder().encode
_encode_alike = msgspec.json.Encoder(order="deterministic").encode
_decode_envelope = msgspec.json.Decoder(Envelope).decode
_decode_json = msgspec.json.Decoder().decode


def infer_message(
    job: str,
    request: Request,
    *,
    reply: str,
    origin: str,
    blobs: Blobs | None = None,
    trace: Carried = _UNTRACED,
    key: bytes | None = None,
    submission: str = "",
) -> bytes:
    """The arrival message for `request` with the id `job`.

    `reply` is the client's name: the result is announced on its `keys.reply_channel` besides Celery's channel. `origin`
    names the sender. `blobs` keeps large values, to be stored before the message. `trace` are headers. `key` signs the
    message. `submission` is the `keys.submission_id` under which the client is notified whether the job of its
    idempotency key matches the request.
    """
    header = {"reply": reply, "submission": submission} if submission else {"reply": reply}
    envelope = task_envelope(INFER, job, request_body(request, blobs), header=header, origin=origin)
    envelope.headers.update(trace)
    return encode_envelope(envelope if key is None else _signed(envelope, key))


def cancel_message(job: str, *, origin: str, key: bytes | None = None) -> bytes:
    """The arrival message that cancels `job`; `key` signs it."""
    body = _encode([[job], {}, NO_CANVAS])
    envelope = task_envelope(CANCEL, new_id(), body, header={}, origin=origin)
    return encode_envelope(envelope if key is None else _signed(envelope, key))


def _signed(envelope: Envelope, key: bytes) -> Envelope:
    """The envelope, signed by its producer over all headers, the time and the body."""
    header = {**envelope.headers[HEADER], _SIGNED_AT: time.time()}
    text = _encode_alike({**envelope.headers, HEADER: header})
    envelope.headers[HEADER] = {**header, _SIGNATURE: signature(text, envelope.payload(), key)}
    return envelope


def check_signed(envelope: Envelope, keys: Sequence[bytes], *, now: float, longest: float) -> None:
    """Check that a producer signed the arrival with one of the `keys` within `longest` seconds of `now`.

    Raises:
        InvalidRequestError: unsigned, wrongly signed, or too old.
    """
    header = envelope.headers.get(HEADER)
    header = dict(header) if isinstance(header, dict) else {}
    given, at = header.pop(_SIGNATURE, None), header.get(_SIGNED_AT)
    text = _encode_alike({**envelope.headers, HEADER: header})
    known = ", ".join(map(key_id, keys))
    if not isinstance(given, str) or not signed_by(keys, given, text, envelope.payload()):
        raise invalid(HEADER, f"an arrival signed by a producer (key {known})")
    if not isinstance(at, int | float) or abs(now - at) > longest:
        raise wrong_field(HEADER, f"to be signed within {longest:g} s", at)


def request_body(request: Request, blobs: Blobs | None = None) -> bytes:
    """Celery's `[args, kwargs, embed]` for a request, as JSON; `blobs` keeps large values.

    Raises:
        InvalidRequestError: a value that cannot be encoded.
    """
    try:
        inputs = to_wire(request.inputs, "inputs", blobs)
        parameters = to_wire(request.parameters, "parameters", blobs) if request.parameters else {}
        plain = msgspec.structs.replace(request, inputs=inputs, parameters=parameters)
        return _encode([[], plain, NO_CANVAS])
    except (UnicodeEncodeError, RecursionError) as error:  # a request that did not pass `parse_request`
        raise invalid("inputs", f"Unicode text, not nested too deeply: {cut(str(error))}") from error


def task_envelope(task: str, job: str, body: bytes, *, header: Mapping[str, Any], origin: str) -> Envelope:
    """The message that carries `body` to the arrivals queue."""
    headers = {
        "lang": "py",
        "task": task,
        "id": job,
        "root_id": job,
        "parent_id": None,
        "group": None,
        "argsrepr": "",
        "kwargsrepr": "",
        "origin": origin,
        HEADER: dict(header),
    }
    properties = {
        "correlation_id": job,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": ARRIVALS},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": new_id(),
    }
    return Envelope(body=base64.b64encode(body).decode("ascii"), headers=headers, properties=properties)


def misplaced(queue: str) -> InvalidRequestError:
    """The error for a request sent to a queue that no router consumes."""
    return invalid("queue", f"{ARRIVALS!r}", f"{queue!r}: send the task {INFER!r} with queue={ARRIVALS!r}")


def encode_envelope(envelope: Envelope) -> bytes:
    """The envelope as stored in Valkey."""
    return _encode(envelope)


def decode_envelope(raw: bytes) -> Envelope:
    """The envelope from a Valkey list element.

    Raises:
        InvalidRequestError: not an envelope, or too many values besides its body.
    """
    if (found := values_beyond(raw, ELEMENTS)) is not None:
        raise wrong_field("message", f"at most {ELEMENTS} values in its headers", found)
    try:
        return _decode_envelope(raw)
    except (ValueError, RecursionError) as error:
        raise invalid("message", f"a Celery message: {cut(str(error))}") from error


def read_body(payload: bytes, content_type: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a task message; bytes untagged, tensors left as mappings.

    Raises:
        InvalidRequestError: not JSON, or not a task message's body.
    """
    if content_type != "application/json":
        raise wrong_field("content-type", "application/json", content_type)
    try:
        args, kwargs, _embed = _decode_json(payload)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise TypeError(f"got {type(args).__name__} and {type(kwargs).__name__}")
        return [from_wire(a) for a in args], {name: from_wire(value, name) for name, value in kwargs.items()}
    except (ValueError, TypeError, RecursionError) as error:
        hint = r" (a surrogate in an escape, \ud800 to \udfff, needs its pair)" if _SURROGATE(payload) else ""
        raise invalid("body", f"[args, kwargs, embed] as JSON: {cut(str(error))}{hint}") from error


def read_request(payload: bytes, content_type: str) -> Request:
    """The request in a task message's body; `model` and `inputs` may be positional.

    Raises:
        InvalidRequestError: names the field that is wrong.
    """
    args, kwargs = read_body(payload, content_type)
    if len(args) > len(_POSITIONAL):
        raise invalid("args", f"at most {list(_POSITIONAL)}", f"{len(args)} values")
    return parse_request({**dict(zip(_POSITIONAL, args, strict=False)), **kwargs})


Durability = Literal["written", "replicated"]

_FULL = "command not allowed when used memory"  # from the server's error text; redis-py strips the code before it
_UNWRITTEN = "MISCONF"  # error code: the server cannot write its log or its snapshot

_NO_ACCESS = ("NOPERM", "WRONGPASS", "NOAUTH")  # error codes: the account lacks a right, or its password is wrong


def confirmations(durability: Durability, replicas: int) -> int:
    """How many replicas must have a write before it is accepted: with the primary, a majority of the servers."""
    return (replicas + 1) // 2 if durability == "replicated" else 0


def confirming(replicas: int, within: float) -> tuple[tuple[str | int, ...], ...]:
    """The commands that confirm earlier writes on the same connection by so many replicas within `within` seconds.

    They wait for the replicas' memory (WAIT), not their disks (WAITAOF): replicas report the latter once a second.
    """
    return (("WAIT", replicas, int(within * 1000)),) if replicas else ()


def check_confirmed(answers: Sequence[Any], replicas: int) -> None:
    """Raise if the answers to `confirming` lack confirmations.

    Raises:
        BrokerUnavailableError: too few replicas confirmed the request. It may still run.
    """
    for confirmed in answers:
        if isinstance(confirmed, Exception):
            raise refusal("state store", confirmed)
        if confirmed < replicas:
            message = f"the state store accepted the request, but {confirmed} of {replicas} replicas confirmed it"
            raise BrokerUnavailableError(f"{message}; it may still run", retry_after=1.0)


def refuses_account(error: BaseException) -> bool:
    """Whether the server answered that the account lacks a right, or that its password is wrong."""
    return any(code in str(error) for code in _NO_ACCESS)


def refusal(server: str, error: BaseException) -> FleetUnavailable:
    """Our error for a client library's exception or a server's error reply."""
    if _FULL in str(error):
        message = f"the {server}'s memory is full: it accepts no writes until jobs or results expire"
        return BrokerFullError(message, retry_after=5.0, resource="memory")
    if _UNWRITTEN in str(error):
        message = f"the {server} cannot write to its disk and accepts no writes: free disk space there ({error})"
        return BrokerFullError(message, retry_after=5.0, resource="disk")
    why = "refuses this account" if refuses_account(error) else "does not answer"
    return BrokerUnavailableError(f"the {server} {why}: {error}", retry_after=1.0)
