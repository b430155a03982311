"""What a message may ask of Celery: its headers, and the tasks that follow from it.

A message is refused where Celery could not run what its headers ask for, or could not send the tasks that follow.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec

from broker.valkey.jobs import REFUSED_TOKEN, Ending
from tasks.canvas import Embed, Signature
from taxiway.contract.job import failure_meta, state_of
from taxiway.contract.keys import AMQP_OUTBOX, ARRIVALS, DEFAULT_QUEUE
from taxiway.contract.limits import check_values, values_beyond
from taxiway.contract.request import is_name, new_id
from taxiway.contract.wire import BRIDGED, DESTINATION, HEADER, NO_CANVAS, Envelope, task_envelope
from taxiway.errors import UNREADABLE, InvalidRequestError, RequestTooLargeError, TaxiwayError

MOST_BYTES = 64 * 2**10
"""Limit on the size of a message's headers as JSON, in bytes."""

_MOST_FOLLOWERS = 1000  # a refused message writes no more results than this

_INTERNAL = re.compile(r"taxiway|unacked|_kombu|celery-task-meta-")
"""The beginning of a key of taxiway's, kombu's or Celery's own, which no error link may name as its queue."""

_SHOWN_CHARACTERS = 200  # characters of a received value in an error


class After(msgspec.Struct, frozen=True):
    """What follows a task that failed: the ends of those after it in its chain and chord, and its error links' calls.

    `calls` are messages with the queues that they go to.
    """

    endings: tuple[Ending, ...] = ()
    calls: tuple[tuple[str, Envelope], ...] = ()


NOTHING_AFTER = After()

_decode_follow = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw, dict[str, Any] | None]).decode
_encode = msgspec.json.Encoder().encode


def check_headers(envelope: Envelope) -> None:
    """Refuse headers that Celery could not read in a worker.

    Raises:
        InvalidRequestError: names the header, what was expected and what was received.
        RequestTooLargeError: they take more than `MOST_BYTES`.
    """
    headers = envelope.headers
    try:
        msgspec.convert(headers, _Headers)
    except msgspec.ValidationError as error:
        (name,) = _FIELD.findall(str(error))
        raise _invalid(name, _EXPECTED[name], headers[name]) from error
    eta = headers.get("eta")
    if eta is not None:
        moment_of("eta", eta)
    if not _is_utf8(envelope.content_encoding):
        raise _invalid("content-encoding", "utf-8", envelope.content_encoding)
    try:
        size = len(_encode(headers))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"headers: expected values that JSON can hold: {error}", field="headers") from error
    if size > MOST_BYTES:
        message = f"headers: expected at most {MOST_BYTES} bytes, got {size}"
        raise RequestTooLargeError(message, limit="headers", most=MOST_BYTES, got=size)


def after_failure(envelope: Envelope, job: str, error: TaxiwayError, most: int) -> After:
    """What follows a request that failed, so that who has only the ids of later tasks learns of the error.

    Nothing if the body cannot be read or has more than `most` values, and `_MOST_FOLLOWERS` of each at most.
    """
    try:
        body = envelope.payload()
        follow = (_decode_follow(body)[2] or {}) if values_beyond(body, most) is None else {}
    except (InvalidRequestError, *UNREADABLE):
        return NOTHING_AFTER
    ids = islice(dict.fromkeys(_ids_in([follow.get("chain"), follow.get("chord")])), _MOST_FOLLOWERS)
    links = follow.get("errbacks")
    links = links[:_MOST_FOLLOWERS] if isinstance(links, list) else []
    calls = [call for link in links if (call := _call_of(link, job)) is not None]
    if envelope.properties.get(BRIDGED):
        for queue, message in calls:  # for the bridge to publish in that queue of RabbitMQ
            message.properties[DESTINATION] = {"queue": queue}
        calls = [(AMQP_OUTBOX, message) for _, message in calls]
    return After(
        tuple(Ending(one, state_of(error), failure_meta(one, error), REFUSED_TOKEN) for one in ids), tuple(calls)
    )


def _call_of(link: Any, job: str) -> tuple[str, Envelope] | None:
    """The queue and the message of a call of an error link, which Celery gives the failed task's id as first argument.

    None if it is no plain task, or names a queue that is not a producer's to write to.
    """
    try:
        task = msgspec.convert(link, Signature)
    except msgspec.ValidationError:
        return None
    queue, own = task.options.get("queue", DEFAULT_QUEUE), task.options.get("task_id")
    if task.subtask_type or not is_name(queue) or (queue != ARRIVALS and _INTERNAL.match(queue)):
        return None
    args = task.args if task.immutable else [job, *task.args]
    body = _encode([args, task.kwargs, NO_CANVAS])
    call = task_envelope(task.task, own if is_name(own) else new_id(), body, header={}, origin="")
    del call.headers[HEADER]
    call.headers |= {"root_id": job, "parent_id": job}
    call.properties["delivery_info"]["routing_key"] = queue
    return queue, call


def _ids_in(signature: Any) -> Iterator[str]:
    """The ids of the tasks in a signature or list of them: those of a group, of a chord's header, and of its body."""
    if isinstance(signature, list):
        for one in signature:
            yield from _ids_in(one)
    if not isinstance(signature, dict):
        return
    options, kwargs = signature.get("options"), signature.get("kwargs")
    if isinstance(options, dict):
        if is_name(options.get("task_id")):
            yield options["task_id"]
        yield from _ids_in(options.get("chord"))
    if isinstance(kwargs, dict) and signature.get("subtask_type") in ("group", "chord"):
        yield from _ids_in([kwargs.get(part) for part in ("tasks", "header", "body")])


def check_embed(embed: Embed) -> None:
    """Refuse follow-up tasks whose arguments could not be encoded or decoded.

    Raises:
        InvalidRequestError: a value is nested too deeply.
        RequestTooLargeError: there are too many values.
    """
    if not embed.is_empty:
        check_values(msgspec.to_builtins(embed), "embed")


def moment_of(header: str, text: Any) -> datetime:
    """The time in a header; UTC if it has no time zone.

    Raises:
        InvalidRequestError: not an ISO 8601 date, or out of range.
    """
    with suppress(ValueError, TypeError, OverflowError):
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        if 0 <= moment.timestamp() < _FARTHEST:
            return moment
    raise _invalid(header, _DATE, text)


_FARTHEST = datetime(9000, 1, 1, tzinfo=UTC).timestamp()
_DATE = "an ISO 8601 date, from 1970 to the year 9000"

_Text = str | None
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None
_Seconds = Annotated[float, msgspec.Meta(ge=0)] | None


class _Headers(msgspec.Struct):
    """What Celery reads of a message's headers, besides `eta`."""

    lang: _Text = None
    root_id: _Text = None
    parent_id: _Text = None
    group: _Text = None
    shadow: _Text = None
    origin: _Text = None
    argsrepr: _Text = None
    kwargsrepr: _Text = None
    retries: _Count = None
    group_index: _Count = None
    replaced_task_nesting: _Count = None
    timelimit: tuple[_Seconds, _Seconds] | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None
    compression: Literal[""] | None = None


_FIELD = re.compile(r"`\$\.(\w+)")
_EXPECTED: Mapping[str, str] = {
    **dict.fromkeys(_Headers.__struct_fields__, "text"),
    **dict.fromkeys(("retries", "group_index", "replaced_task_nesting"), "a whole number >= 0"),
    "timelimit": "two numbers >= 0, or null for either",
    "stamped_headers": "a list of texts",
    "stamps": "a mapping",
    "compression": "a body that is not compressed",
}
"""By header: what is expected of its value."""


def _is_utf8(encoding: str) -> bool:
    try:
        return encoding == "binary" or codecs.lookup(encoding).name in ("utf-8", "ascii")
    except (LookupError, ValueError):
        return False


def _invalid(field: str, expected: str, value: object) -> InvalidRequestError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"
    return InvalidRequestError(f"{field}: expected {expected}, got {shown}", field=field)
