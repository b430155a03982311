"""OIP's binary tensor data: raw elements after the JSON, whose length a header gives.

Source: kserve/open-inference-protocol, extension_binary_data.md. Elements are row-major and little-endian; an element
of a BYTES tensor is a four-byte length and its content.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from taxiway.contract.blobs import Buffer
from taxiway.errors import InvalidRequestError, quoted

HEADER = "inference-header-content-length"
"""The header with the length of the body's JSON in bytes."""

OCTETS = "application/octet-stream"
"""The media type of a body with binary data."""

SINGLE = "single"
"""The parameter of an input tensor sent without its batch axis: the axis that was added for the protocol.

The result then has no batch axis at any door. In a response, the parameter tells whether that is the case.
"""

SIZE = "binary_data_size"
"""The parameter of a tensor whose elements follow the JSON: their size in bytes."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Framed:
    """A body: JSON and the binary data after it."""

    text: bytes
    parts: Sequence[Buffer] = ()

    @property
    def pieces(self) -> Sequence[Buffer]:
        """The body's buffers in order, not copied."""
        return (self.text, *self.parts)

    @property
    def body(self) -> bytes:
        """All of it in one."""
        return b"".join(self.pieces) if self.parts else self.text

    @property
    def header_length(self) -> int | None:
        """The length of the JSON; None if the body is only JSON."""
        return len(self.text) if self.parts else None

    @property
    def headers(self) -> dict[str, str]:
        """The body's HTTP headers."""
        if self.header_length is None:
            return {"content-type": "application/json"}
        return {"content-type": OCTETS, HEADER: str(self.header_length)}


def split(body: Buffer, header_length: str | None) -> tuple[Buffer, memoryview]:
    """Split a body into its JSON and the binary data.

    Raises:
        InvalidRequestError: the header is not a length within the body.
    """
    if header_length is None:
        return body, memoryview(b"")
    if not header_length.isascii() or not header_length.isdigit() or not 0 < int(header_length) <= len(body):
        raise _wrong(HEADER, f"1 to {len(body)} bytes of the body", quoted(header_length))
    length, view = int(header_length), memoryview(body)
    return view[:length], view[length:]


def pieces(sizes: Sequence[object], rest: memoryview) -> Iterator[memoryview | None]:
    """Split `rest` into parts of these sizes, in order; None for a size of None.

    Raises:
        InvalidRequestError: a size is invalid, or the sizes do not add up to the length of `rest`.
    """
    start = 0
    for size in sizes:
        if size is None:
            yield None
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - start:
            raise _wrong(SIZE, f"0 to {len(rest) - start} bytes that follow the JSON", quoted(size))
        yield rest[start : start + size]
        start += size
    if start < len(rest):
        raise _wrong(SIZE, f"{len(rest)} bytes in all", str(start))


def bytes_part(elements: Sequence[Buffer]) -> bytes:
    """Encode a BYTES tensor's elements, each after its length."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def bytes_elements(part: memoryview, count: int, field: str) -> list[bytes]:
    """Decode the elements of a BYTES tensor.

    Raises:
        InvalidRequestError: there are not exactly `count` elements that fill `part`; names `field`.
    """
    found: list[bytes] = []
    start = 0
    while start + _LENGTH.size <= len(part) and len(found) < count:
        begin = start + _LENGTH.size
        start = begin + _LENGTH.unpack_from(part, start)[0]
        found.append(bytes(part[begin:start]))
    if start != len(part) or len(found) != count:
        raise _wrong(field, f"{count} elements, each after its length", f"{len(part)} bytes that do not match")
    return found


def _wrong(field: str, expected: str, got: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: expected {expected}, got {got}", field=field)
