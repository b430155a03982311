"""Size checks before any expensive work: values in unparsed JSON, elements in a shape."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeGuard

from taxiway.errors import RequestTooLargeError, wrong_field

if TYPE_CHECKING:
    from taxiway.contract.blobs import Buffer

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


def check_json(text: Buffer, most: int = ELEMENTS, field: str = "body") -> None:
    """Reject JSON that would take too long to decode.

    Raises:
        RequestTooLargeError: it has more than `most` values; names the limit.
    """
    if (found := values_beyond(text, most)) is not None:
        raise RequestTooLargeError(
            f"{field}: expected at most {most} values in JSON (limits.elements, docs/producers.md says how they are "
            f"counted), got {found}: send large tensors raw, as binary tensor data or numpy arrays",
            field=field,
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
