"""Limits of the values in a request, the same at every interface: every part of the fleet decodes them in bounded time.

The limits are on count, depth, elements in a shape, and text that UTF-8 can encode. Values in unparsed JSON are counted
before any expensive work: decoders recurse once per level and build an object per value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard

from taxiway.errors import InvalidRequestError, RequestTooLargeError, flaw, invalid, wrong_field

Buffer = bytes | bytearray | memoryview
"""The bytes of a message or value."""

ELEMENTS = 500_000
"""Most values in a request's JSON, unless `limits.elements` in queues.yaml sets another limit.

Decoding takes about 100 ns per number and 300 ns per list (AMD EPYC, 2.6 GHz). One decoding call blocks all other
threads, so it may decode a fifth of the limit (`WHOLE_VALUES_DIVISOR`): some numbers take 800 ns, and no cheap test
finds them.
"""

WHOLE_VALUES_DIVISOR = 5
"""Divisor of the limit for values decoded in one call: all except the numbers in numeric tensors."""

LARGE = 2**17
"""JSON of at least this many bytes is counted first, and decoded off the event loop; less takes at most 15 ms."""

COUNT = 2**31
"""Most of what a request counts (tokens, choices, rows of classes), so that no estimate of it overflows."""

RANK = 32
"""Most axes of a tensor: the limit of numpy 1."""

LENGTHS = 2**63
"""Exclusive upper bound of an axis length: lengths are signed 64-bit integers."""


def count_values(text: Buffer) -> int:
    """Estimate how many values JSON text holds, weighted by decoding time; never less than the true count.

    Commas and brackets are counted, those in strings only where there are very many strings; a list or mapping counts
    as three. A number of over 24 digits counts as half of its digits, one with an exponent of three or more digits as
    200: it can take 20 us. The count takes 4 ms per MiB, and a tenth of that where most of it is one long text.
    """
    whole = _without_strings(text if isinstance(text, bytes) else bytes(text))
    found = 1 + whole.count(b",") + 2 * (whole.count(b"[") + whole.count(b"{"))
    alike = whole.translate(_ALIKE, b"+-")
    return found + len(_MANY_DIGITS) // 2 * alike.count(_MANY_DIGITS) + _HARD * _extreme(whole, alike)


def _without_strings(text: bytes) -> bytes:
    """JSON text whose strings are empty; with very many strings as it is."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in text else text
    return b'""'.join(plain.split(b'"')[::2]) if plain.count(b'"') <= _QUOTES else text


def _extreme(whole: bytes, alike: bytes) -> int:
    """Count numbers with an exponent of three digits; if hexadecimal text may have matched, count exactly.

    `alike` is the text with all digits as zeros and without signs.
    """
    found = alike.count(b"e000")
    if found < _FEW:
        return found
    pieces = (whole[start : start + _COUNTED_BYTES + _OVERLAP] for start in range(0, len(whole), _COUNTED_BYTES))
    return sum(len(_EXTREME.findall(piece)) for piece in pieces)


_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_MANY_DIGITS = b"0" * 24
_HARD = 200  # weight of a number with an extreme exponent
_FEW = 500  # up to this many such numbers are accepted without an exact count
_EXTREME = re.compile(rb"[0-9][eE][+-]?0*(?:29[0-9]|[3-9][0-9][0-9]|[0-9]{4,})(?=[\s,\]}])")
_COUNTED_BYTES = 2**20  # bytes per step of the exact count
_OVERLAP = 16
_QUOTES = 200_000  # up to this many quotes, strings are removed before counting


def values_beyond(text: Buffer, most: int) -> int | None:
    """How many values JSON text holds if more than `most`, else None."""
    found = _count_large(text)
    return found if found > most else None


def check_json(text: Buffer, most: int = ELEMENTS) -> None:
    """Reject JSON that would take too long to decode.

    Raises:
        RequestTooLargeError: it has more than `most` values; names the limit.
    """
    check_count(_count_large(text), most)


def _count_large(text: Buffer) -> int:
    """The count of large JSON text; 0 for text that is too short to hold too many values."""
    return count_values(text) if len(text) > LARGE else 0


def check_count(found: int, most: int) -> None:
    """Reject JSON that holds more than `most` values, by its count. Raises as `check_json`."""
    if found > most:
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
    if not isinstance(shape, (list, tuple)) or len(shape) > RANK:
        return False
    return all(type(length) is int and 0 <= length < LENGTHS for length in shape)


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


def surely_fits(encoded: bytes) -> bool:
    """Whether JSON is short and plain enough that `check_values` accepts whatever it holds; False if that is open."""
    short = len(encoded) <= MOST_VALUES and encoded.count(b"[") + encoded.count(b"{") <= DEEPEST
    return short and encoded.isascii() and rb"\u" not in encoded


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
            raise invalid(field, "text that UTF-8 can encode", flaw(error)) from error


def _too_deep(depth: int, field: str) -> InvalidRequestError:
    got = str(depth) if depth < COUNTED_TO else f"at least {COUNTED_TO}"
    return invalid(field, f"at most {DEEPEST} levels of lists and mappings", got)


def _check_counts(values: int, containers: int, field: str) -> None:
    for what, most, got in (("values", MOST_VALUES, values), ("lists and mappings", MOST_CONTAINERS, containers)):
        if got > most:
            message = f"{field}: expected at most {most} {what}, got {got}: send large inputs as arrays or bytes"
            raise RequestTooLargeError(message, field=field, limit=what, most=most, got=got)
