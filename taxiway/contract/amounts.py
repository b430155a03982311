"""How much there is before anything is worked out: values in JSON that is not parsed yet, elements in a shape."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeGuard

from taxiway.errors import RequestTooLargeError, wrong_field

if TYPE_CHECKING:
    from taxiway.contract.blobs import Buffer

ELEMENTS = 500_000
"""Values in a request's JSON, unless `limits.elements` in queues.yaml says otherwise.

About 100 ns a number and 300 ns a list (on an AMD EPYC at 2.6 GHz). What is decoded in one call, during which no other
thread runs, may be a fifth of that (`AT_ONCE`): there are numbers that take 800 ns, and no cheap look finds them.
"""

AT_ONCE = 5
"""By what the limit is divided for values that one call decodes: all but the numbers in tensors of numbers."""

LARGE = 2**17
"""Bytes of JSON from which on values are counted, and read beside the event loop: fewer take 15 ms at most."""

RANK = 32
"""Most axes of a tensor: numpy's before its release 2."""

LENGTHS = 2**63
"""What no axis is as long as: lengths are signed integers of 64 bits."""


def count_values(text: Buffer) -> int:
    """About how many values are in JSON, by how long they take to decode; at least as many as there are.

    They are counted by commas and brackets, a list or mapping as three; a number of over 24 digits counts as half of
    these, one with an exponent of three digits or more as 200: such a one can take 20 us. Those in texts are counted,
    too. The look takes 4 ms a MiB.
    """
    whole = text if isinstance(text, bytes) else bytes(text)
    found = 1 + whole.count(b",") + 2 * (whole.count(b"[") + whole.count(b"{"))
    alike = whole.translate(_ALIKE, b"+-")
    return found + len(_MANY_DIGITS) // 2 * alike.count(_MANY_DIGITS) + _HARD * _extreme(whole, alike)


def _extreme(whole: bytes, alike: bytes) -> int:
    """Numbers with an exponent of three digits; where hexadecimal text may have been taken for them, looked at closely.

    `alike` has all digits as zeros, and no signs.
    """
    found = alike.count(b"e000")
    if found < _FEW:
        return found
    pieces = (whole[start : start + _PIECE + _OVERLAP] for start in range(0, len(whole), _PIECE))
    return sum(len(_EXTREME.findall(piece)) for piece in pieces)


_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_MANY_DIGITS = b"0" * 24
_HARD = 200  # what a number with an extreme exponent counts as
_FEW = 500  # numbers with such exponents that are let be without a closer look
_EXTREME = re.compile(rb"[0-9][eE][+-]?0*(?:29[0-9]|[3-9][0-9][0-9]|[0-9]{4,})(?=[\s,\]}])")
_PIECE = 2**20  # bytes that are looked at closely at once
_OVERLAP = 16
_QUOTES = 200_000  # marks of texts that are few enough to take the texts out


def values_beyond(text: Buffer, most: int) -> int | None:
    """How many values are in JSON, where they are more than `most`; in texts none are, unless these are very many."""
    found = count_values(text) if len(text) > LARGE else 0
    if found > most:
        whole = bytes(text).replace(rb"\\", b"").replace(rb"\"", b"")
        if whole.count(b'"') <= _QUOTES:
            found = count_values(b'""'.join(whole.split(b'"')[::2]))
    return found if found > most else None


def check_json(text: Buffer, most: int = ELEMENTS, field: str = "body") -> None:
    """Refuse JSON that would take too long to decode.

    Raises:
        RequestTooLargeError: there are more than `most` values in it; names the limit.
    """
    if (found := values_beyond(text, most)) is not None:
        raise RequestTooLargeError(
            f"{field}: expected at most {most} values in JSON (limits.elements, docs/producers.md says how they are "
            f"counted), got {found}: send large tensors raw, as binary tensor data or numpy arrays",
            field=field,
            limit="elements",
        )


def check_elements(elements: int, most: int, field: str) -> None:
    """Refuse a BYTES tensor of more than `most` elements: each is an object of its own.

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
    """How many elements a tensor of `shape` has.

    Raises:
        InvalidRequestError: it is no list of at most `RANK` whole numbers below `LENGTHS`, or has more than `most`
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
    """Whether it can be the length of an axis."""
    return type(length) is int and 0 <= length < LENGTHS
