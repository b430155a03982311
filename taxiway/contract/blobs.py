"""Claim check: values larger than a limit are stored beside the message, which holds references to them.

A blob is a value's raw bytes (a tensor's elements in row-major order, little-endian) under `keys.blob_key` in the state
store. Its reference is a mapping `{"ref", "bytes", "datatype"}`, with `shape` where it is a tensor; without, datatype
BYTES, it is a bytes value. In a request it has the blob's SHA-256 as `digest`: the router's signature covers the body,
so it covers the blob too. In a result it has `href`, a URL at the HTTP door for clients without taxiway.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from taxiway.errors import InvalidRequestError, ResultExpiredError, TaxiwayError, cut

INLINE = 16 * 2**10
"""Values up to this many bytes stay in the message, unless `limits.inline` in queues.yaml sets another limit."""

KEPT = 86400
"""Seconds a blob is kept until a router takes its request; after that it is kept as long as the job's record."""

Buffer = bytes | bytearray | memoryview

_MARK = b'"ref":'


class Reference(msgspec.Struct, frozen=True):
    """The reference to a blob in a message; `bytes` is its size, `digest` its SHA-256 in hexadecimal."""

    ref: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    datatype: str
    digest: str = ""


class Blobs:
    """Moves a request's large values out of its message; `contents` maps each `ref` to the bytes, not copied."""

    def __init__(self, limit: int = INLINE) -> None:
        self.limit = limit
        self.contents: dict[str, Buffer] = {}

    def keep(self, content: Buffer) -> dict[str, Any]:
        """The fields of a reference to `content`."""
        return self._named(content) | {"digest": hashlib.sha256(content).hexdigest()}

    def _named(self, content: Buffer) -> dict[str, Any]:
        ref = uuid.uuid4().hex
        self.contents[ref] = content
        return {"ref": ref, "bytes": memoryview(content).nbytes}


class ResultBlobs(Blobs):
    """Moves a result's large values out of it."""

    def keep(self, content: Buffer) -> dict[str, Any]:
        """The fields of a reference to `content`."""
        fields = self._named(content)
        return fields | {"href": f"/v2/blobs/{fields['ref']}"}


def may_refer(message: Buffer) -> bool:
    """Whether encoded JSON may contain references: a cheap test of its bytes, since most messages have none."""
    return _MARK in bytes(message)


def is_reference(value: Any) -> bool:
    """Whether `value` is a reference to a blob."""
    return isinstance(value, dict) and {"ref", "bytes", "datatype"} <= value.keys()


def references(value: Any) -> Iterator[Reference]:
    """Every reference in `value`, at any depth.

    Raises:
        InvalidRequestError: one is malformed.
    """
    if is_reference(value):
        yield _parsed(value)
    elif isinstance(value, (dict, list, tuple)):
        for below in value.values() if isinstance(value, dict) else value:
            yield from references(below)


def referred(message: Buffer) -> list[Reference]:
    """Every reference in encoded JSON; none if it cannot be parsed."""
    try:
        return list(references(msgspec.json.decode(message))) if may_refer(message) else []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRequestError):
        return []


def resolved(value: Any, contents: Mapping[str, Buffer | None]) -> Any:
    """`value` with references replaced by their blobs: a tensor's goes into its `data`, not copied.

    Raises:
        InvalidRequestError: a blob's size or digest differs from its reference.
        ResultExpiredError: a blob has expired.
    """
    if is_reference(value):
        content = _checked(_parsed(value), contents)
        if "shape" not in value:
            return bytes(content)
        rest = {name: part for name, part in value.items() if name not in ("ref", "bytes", "digest", "href")}
        return rest | {"data": content}
    if isinstance(value, dict):
        return {key: resolved(below, contents) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolved(below, contents) for below in value]
    return value


def _parsed(value: dict[str, Any]) -> Reference:
    try:
        return msgspec.convert(value, Reference)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"ref: expected a reference to a blob: {cut(str(error))}", field="ref") from error


def _checked(reference: Reference, contents: Mapping[str, Buffer | None]) -> Buffer:
    content = contents.get(reference.ref)
    if content is None:
        raise gone(reference.ref)
    if len(content) != reference.bytes:
        raise _other(reference, f"{reference.bytes} bytes", f"{len(content)}")
    if reference.digest and hashlib.sha256(content).hexdigest() != reference.digest:
        raise _other(reference, f"SHA-256 {reference.digest}", "other bytes")
    return content


def gone(ref: str) -> TaxiwayError:
    """The error for a missing blob."""
    return ResultExpiredError(f"blob {ref} has expired", ref=ref)


def _other(reference: Reference, expected: str, got: str) -> InvalidRequestError:
    return InvalidRequestError(f"ref: expected blob {reference.ref} of {expected}, got {got}", field="ref")
