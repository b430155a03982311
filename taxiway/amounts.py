"""How much there is before anything is worked out: values in JSON that is not parsed yet, elements in a shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from taxiway.errors import RequestTooLargeError, wrong_field

if TYPE_CHECKING:
    from taxiway.blobs import Buffer

ELEMENTS = 500_000
"""Values in a request's JSON, unless `limits.elements` in queues.yaml says otherwise.

One call decodes it, and no other thread runs meanwhile: about 100 ns a number, 300 ns a list, so 60 ms at most (on an
AMD EPYC at 2.6 GHz).
"""

LARGE = 2**17
"""Bytes of JSON from which on values are counted, and read beside the event loop: fewer take 15 ms at most."""

RANK = 32
"""Most axes of a tensor: numpy's before its release 2."""

LENGTHS = 2**63
"""What no axis is as long as: lengths are signed integers of 64 bits."""


def count_values(text: Buffer) -> int:
    """About how many values are in JSON, by its commas and brackets; a list or mapping counts as three.

    Never fewer than there are. Those in texts are counted too: a look at the bytes alone takes 0.6 ms a MiB.
    """
    whole = text if isinstance(text, bytes) else bytes(text)
    return 1 + whole.count(b",") + 2 * (whole.count(b"[") + whole.count(b"{"))


def values_beyond(text: Buffer, most: int) -> int | None:
    """How many values are in JSON, where they are more than `most`."""
    found = count_values(text) if len(text) > LARGE else 0
    return found if found > most else None


def check_json(text: Buffer, most: int = ELEMENTS, field: str = "body") -> None:
    """Refuse JSON that would take too long to decode.

    Raises:
        RequestTooLargeError: there are more than `most` values in it; names the limit.
    """
    if (found := values_beyond(text, most)) is not None:
        raise RequestTooLargeError(
            f"{field}: expected at most {most} values in JSON (limits.elements; its commas are counted, and each list "
            f"or mapping as three), got {found}: send large tensors raw, as binary tensor data or numpy arrays",
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
