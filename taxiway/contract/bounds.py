"""Limits of a request's values at every door: depth, count, and text that UTF-8 can encode.

Decoders recurse once per level and build an object per value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from taxiway.errors import InvalidRequestError, RequestTooLargeError

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
