"""A producer's request: a model, inputs, and service terms; and the limits of its values. The same at every door.

The limits are on count, depth, elements in a shape, and text that UTF-8 can encode. Values in unparsed JSON are counted
before any expensive work: decoders recurse once per level and build an object per value.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import msgspec

from taxiway.errors import QUOTED, InvalidRequestError, RequestTooLargeError, cut, wrong_field

if TYPE_CHECKING:
    from taxiway.contract.values import Buffer

Priority = Literal["high", "normal", "low"]

_NAMESPACE = uuid.UUID("6b0f6a4e-6f0e-5f7e-9a52-1f3f3f5f2d11")
MAX_NAME = 256
"""Most characters of a tenant, model reference or idempotency key."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Service terms: how much the answer matters, and where the data may go.

    `deadline` counts seconds from acceptance; `budget` is in US dollars; `locality` is a label that every device on the
    request's path must carry (`edge`); `min_accuracy` (0 to 1) is the minimum stated accuracy of the variant; `service`
    names a set of defaults in queues.yaml; with `stream` a generated answer is streamed: that of the only row, or by
    `rows` that of each; `webhook` names an endpoint of the tenant's that is notified of the end.
    """

    deadline: float | None = None
    service: str | None = None
    priority: Priority | None = None
    budget: float | None = None
    tenant: str = "default"
    locality: str | None = None
    min_accuracy: float | None = None
    idempotency_key: str | None = None
    stream: bool | Literal["rows"] | None = None
    webhook: str | None = None


class Request(Terms, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The keyword arguments of the task `taxiway.infer`: a model, its inputs and the terms.

    `inputs` is a plain value where the model has one input, a mapping by name, or a list of OIP tensors;
    `outputs` names the outputs to return (all, if empty); `parameters` go to the model (`max_tokens`, …).
    """

    model: str
    inputs: Any
    parameters: dict[str, Any] = {}
    outputs: tuple[str, ...] = ()


TERMS = frozenset(Terms.__struct_fields__)
_FIELDS = frozenset(Request.__struct_fields__)
_WHERE = re.compile(r"^(?:Expected )?(?P<what>.*?) - at (?:`key` in )?`\$\.(?P<field>[^`]*)`$", re.DOTALL)


def parse_request(fields: Mapping[str, Any]) -> Request:
    """The request from plain keyword arguments; None means that a field is not set.

    Raises:
        InvalidRequestError: a field is unknown, missing or out of range; names it.
        RequestTooLargeError: inputs or parameters have too many values.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if not given.keys() <= _FIELDS:
        raise _unknown(next(str(name)[:QUOTED] for name in given if name not in _FIELDS))
    for name in ("model", "inputs"):
        if name not in given:
            raise InvalidRequestError(f"{name}: expected a value, got nothing", field=name)
    _check(given)
    try:
        request = msgspec.convert(given, Request)
    except msgspec.ValidationError as error:
        raise _named(error) from error
    check_content(request)
    return request


def check_content(request: Request) -> None:
    """Reject inputs and parameters that some part of the fleet could not encode or decode.

    Raises:
        InvalidRequestError: a value is nested too deeply, or has text that UTF-8 cannot encode.
        RequestTooLargeError: there are too many values.
    """
    check_values(request.inputs, "inputs")
    if request.parameters:
        check_values(request.parameters, "parameters")


def check_terms(terms: Terms) -> None:
    """Reject invalid terms.

    Raises:
        InvalidRequestError: names the field, what was expected and what was given.
    """
    _check({name: getattr(terms, name) for name in terms.__struct_fields__})


def _check(given: Mapping[str, Any]) -> None:
    for field, value in given.items():
        if value is not None and field in _MEANS:
            means, expected = _MEANS[field]
            if not means(value):
                raise _invalid(field, expected, value)


RESENT = "taxiway.resent:"
"""Prefix of idempotency keys that the HTTP client generates for retries; reserved for it."""


def new_id() -> str:
    """A random UUID (version 4), in a third of the time of `uuid.uuid4`."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def job_id(terms: Terms) -> str:
    """A new job's id; the same tenant and idempotency key always give the same id.

    `check_terms` rejects line breaks in both, so that no two pairs give the same text.
    """
    if terms.idempotency_key is None:
        return new_id()
    return str(uuid.uuid5(_NAMESPACE, f"{terms.tenant}\n{terms.idempotency_key}"))


def _unknown(name: str) -> InvalidRequestError:
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    message = f"{name or repr(name)}: expected no such field, but one of {sorted(_FIELDS)}{hint}"
    return InvalidRequestError(message, field=name)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_name(value: object) -> TypeGuard[str]:
    """Whether `value` is a valid name: 1 to `MAX_NAME` printable characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value <= sys.float_info.max


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_stream(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value == "rows")


_PRIORITIES = [*get_args(Priority)]

_MEANS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("deadline", "budget"), (_is_positive, "a finite number > 0")),
    "min_accuracy": (_is_share, "a number from 0 to 1"),
    "stream": (_is_stream, "true or false"),
    "priority": (_PRIORITIES.__contains__, f"one of {_PRIORITIES}"),
    **dict.fromkeys(
        ("tenant", "locality", "service", "idempotency_key", "webhook", "model"),
        (is_name, f"text of 1 to {MAX_NAME} printable characters"),
    ),
}
"""For each field, its validity test and a description of valid values."""


def _invalid(field: str, expected: str, value: object) -> InvalidRequestError:
    if isinstance(value, float) and value.is_integer():  # JSON and Python print it differently
        value = int(value)
    return wrong_field(field, expected, value)


def _named(error: msgspec.ValidationError) -> InvalidRequestError:
    """The validation error as taxiway's error, with the field first."""
    match = _WHERE.match(str(error))
    field, what = (match["field"], match["what"]) if match else ("request", str(error))
    return InvalidRequestError(f"{cut(field)}: expected {cut(what)}", field=cut(field))


ELEMENTS = 500_000
"""Most values in a request's JSON, unless `limits.elements` in queues.yaml sets another limit.

Decoding takes about 100 ns per number and 300 ns per list (AMD EPYC, 2.6 GHz). One decoding call blocks all other
threads, so it may decode a fifth of the limit (`AT_ONCE`): some numbers take 800 ns, and no cheap test finds them.
"""

AT_ONCE = 5
"""Divisor of the limit for values decoded in one call: all except the numbers in numeric tensors."""

LARGE = 2**17
"""JSON of at least this many bytes is counted first, and decoded off the event loop; less takes at most 15 ms."""

RANK = 32
"""Most axes of a tensor: the limit of numpy 1."""

LENGTHS = 2**63
"""Exclusive upper bound of an axis length: lengths are signed 64-bit integers."""


def count_values(text: Buffer) -> int:
    """Estimate how many values JSON text holds, weighted by decoding time; never less than the true count.

    Commas and brackets are counted, including those in strings; a list or mapping counts as three. A number of over 24
    digits counts as half of its digits, one with an exponent of three or more digits as 200: it can take 20 us. The
    count takes 4 ms per MiB.
    """
    whole = text if isinstance(text, bytes) else bytes(text)
    found = 1 + whole.count(b",") + 2 * (whole.count(b"[") + whole.count(b"{"))
    alike = whole.translate(_ALIKE, b"+-")
    return found + len(_MANY_DIGITS) // 2 * alike.count(_MANY_DIGITS) + _HARD * _extreme(whole, alike)


def _extreme(whole: bytes, alike: bytes) -> int:
    """Count numbers with an exponent of three digits; if hexadecimal text may have matched, count exactly.

    `alike` is the text with all digits as zeros and without signs.
    """
    found = alike.count(b"e000")
    if found < _FEW:
        return found
    pieces = (whole[start : start + _PIECE + _OVERLAP] for start in range(0, len(whole), _PIECE))
    return sum(len(_EXTREME.findall(piece)) for piece in pieces)


_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_MANY_DIGITS = b"0" * 24
_HARD = 200  # weight of a number with an extreme exponent
_FEW = 500  # up to this many such numbers are accepted without an exact count
_EXTREME = re.compile(rb"[0-9][eE][+-]?0*(?:29[0-9]|[3-9][0-9][0-9]|[0-9]{4,})(?=[\s,\]}])")
_PIECE = 2**20  # bytes per step of the exact count
_OVERLAP = 16
_QUOTES = 200_000  # up to this many quotes, strings are removed before counting


def values_beyond(text: Buffer, most: int) -> int | None:
    """How many values JSON text holds if more than `most`, else None; skips strings unless there are very many."""
    found = count_values(text) if len(text) > LARGE else 0
    if found > most:
        whole = bytes(text).replace(rb"\\", b"").replace(rb"\"", b"")
        if whole.count(b'"') <= _QUOTES:
            found = count_values(b'""'.join(whole.split(b'"')[::2]))
    return found if found > most else None


def check_json(text: Buffer, most: int = ELEMENTS) -> None:
    """Reject JSON that would take too long to decode.

    Raises:
        RequestTooLargeError: it has more than `most` values; names the limit.
    """
    if (found := values_beyond(text, most)) is not None:
        raise RequestTooLargeError(
            f"body: expected at most {most} values in JSON (limits.elements, docs/producers.md says how they are "
            f"counted), got {found}: send large tensors raw, as binary tensor data or numpy arrays",
            field="body",
            limit="elements",
        )


def check_elements(elements: int, most: int, field: str) -> None:
    """Reject a BYTES tensor of more than `most` elements: each becomes an object.

    Raises:
        RequestTooLargeError: it has more; names the limit.
    """
    if elements > most:
        raise RequestTooLargeError(
            f"{field}: expected at most {most} elements in a BYTES tensor (limits.elements), got {elements}",
            field=field,
            limit="elements",
        )


def elements_of(shape: object, field: str, most: int = LENGTHS - 1) -> int:
    """The number of elements of a tensor of `shape`.

    Raises:
        InvalidRequestError: `shape` is not a list of at most `RANK` integers below `LENGTHS`, or has more than `most`
            elements; names `field`.
    """
    if not _is_shape(shape):
        raise wrong_field(field, f"a shape of at most {RANK} whole numbers from 0 to 2**63 - 1", shape)
    elements = 0 if 0 in shape else 1
    for length in shape:
        elements *= length
        if elements > most:
            raise wrong_field(field, f"a shape of at most {most} elements", shape)
    return elements


def _is_shape(shape: object) -> TypeGuard[list[int] | tuple[int, ...]]:
    return isinstance(shape, (list, tuple)) and len(shape) <= RANK and all(map(is_length, shape))


def is_length(length: object) -> bool:
    """Whether `length` is a valid axis length."""
    return type(length) is int and 0 <= length < LENGTHS


DEEPEST = 64
"""Most nested levels of lists and mappings in a value."""

MOST_VALUES = 1_000_000
"""Most values in a request's lists and mappings: that many JSON numbers take 40 ms to decode.

The elements of raw tensors (arrays, bytes) do not count.
"""

MOST_CONTAINERS = 200_000
"""Most lists and mappings in a request: JSON with that many takes 0.1 s to decode."""

COUNTED_TO = 10_000
"""Levels counted at most, for the error text."""

_NUMBERS, _TEXT = frozenset({int, float, bool, type(None)}), frozenset({str})


def check_values(value: Any, field: str) -> None:
    """Reject a value that some part of the fleet could not encode or decode.

    Raises:
        InvalidRequestError: it is nested too deeply, or has text that UTF-8 cannot encode; names `field`.
        RequestTooLargeError: it has too many values.
    """
    beside, depth, values, containers = [value], 0, 1, 0
    while True:
        _check_texts(beside, field)
        level = _parts(beside)
        if not level:
            return
        depth += 1
        containers += len(level)
        values += sum(map(len, level))
        _check_counts(values, containers, field)
        if depth > DEEPEST:
            raise _too_deep(depth_of(value), field)
        beside = list(_below(level))


def check_depth(value: Any, field: str, encoded: bytes) -> None:
    """Reject a value of more than `DEEPEST` levels; `encoded` is its JSON, in which few brackets mean few levels.

    Raises:
        InvalidRequestError: names `field`.
    """
    if encoded.count(b"[") + encoded.count(b"{") <= DEEPEST:
        return
    depth = depth_of(value)
    if depth > DEEPEST:
        raise _too_deep(depth, field)


def depth_of(value: Any) -> int:
    """The nesting depth of a value, counted up to `COUNTED_TO`, since a value may contain itself."""
    level, depth = _parts([value]), 0
    while level and depth < COUNTED_TO:
        depth += 1
        level = _parts(_below(level)) if len(level) <= MOST_VALUES else []
    return depth


def _parts(values: Iterable[Any]) -> list[Any]:
    """The lists and mappings among values."""
    return [value for value in values if isinstance(value, (list, tuple, dict))]


def _below(level: Iterable[Any]) -> Iterable[Any]:
    """The elements of these lists and mappings, skipping lists of only numbers or only ASCII strings."""
    for container in level:
        if isinstance(container, dict):
            yield from container.keys()
            yield from container.values()
        elif not (_NUMBERS.issuperset(map(type, container)) or _all_ascii(container)):
            yield from container


def _all_ascii(container: Collection[Any]) -> bool:
    return _TEXT.issuperset(map(type, container)) and all(map(str.isascii, container))


def _check_texts(values: Iterable[Any], field: str) -> None:
    for text in values:
        if not isinstance(text, str) or text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = f"a lone surrogate ({text[error.start]!a}) at character {error.start}"
            message = f"{field}: expected text that UTF-8 can encode, got {got}"
            raise InvalidRequestError(message, field=field) from error


def _too_deep(depth: int, field: str) -> InvalidRequestError:
    got = str(depth) if depth < COUNTED_TO else f"at least {COUNTED_TO}"
    message = f"{field}: expected at most {DEEPEST} levels of lists and mappings, got {got}"
    return InvalidRequestError(message, field=field)


def _too_many(values: int, containers: int) -> bool:
    return values > MOST_VALUES or containers > MOST_CONTAINERS


def _check_counts(values: int, containers: int, field: str) -> None:
    if not _too_many(values, containers):
        return
    if values > MOST_VALUES:
        what, most, got = "values", MOST_VALUES, values
    else:
        what, most, got = "lists and mappings", MOST_CONTAINERS, containers
    message = f"{field}: expected at most {most} {what}, got {got}: send large inputs as arrays or bytes"
    raise RequestTooLargeError(message, field=field, limit=what, most=most, got=got)
