"""Files, batches and responses in the state store, with the bytes that each tenant's take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from broker.valkey import Call, packed
from taxiway.contract.keys import (
    BATCHES_OPEN,
    OBJECTS_EXPIRING,
    object_key,
    objects_key,
    stored_key,
    tenant_batches_key,
)

Kind = Literal["file", "batch", "response"]

Count = Literal["objects", "responses", "files"]
"""Bytes that are counted: of the records of files and batches, of responses, and of the contents of files."""

COUNTED: Mapping[Kind, Count] = {"file": "objects", "batch": "objects", "response": "responses"}
"""Where an object's own bytes count."""


class Grown(NamedTuple):
    """Bytes that are added to a count, and the most that it may have then; None: any number."""

    counted: Count
    by: int
    most: int | None = None


@dataclass(frozen=True, slots=True)
class ObjectName:
    """An object's kind, name and tenant."""

    kind: Kind
    name: str
    tenant: str

    @property
    def expiring(self) -> str:
        """Its name among those that expire."""
        return f"{self.kind}:{self.name}"

    @property
    def open(self) -> str:
        """A batch's name among those that have not ended."""
        return f"{self.name} {self.tenant}"

    @property
    def keys(self) -> list[str]:
        """The object, its tenant's objects of the kind, what its tenant's take, and those that expire."""
        return [
            object_key(self.kind, self.name),
            objects_key(self.kind, self.tenant),
            stored_key(self.tenant),
            OBJECTS_EXPIRING,
        ]


def put_call(
    named: ObjectName,
    before: bytes,
    after: bytes,
    grown: Sequence[Grown],
    *,
    place: float | None = None,
    expires: float | None = None,
    open_batches: int | None = None,
) -> Call:
    """Stores an object that is still `before`, empty if it is new.

    `place` is its place among its tenant's objects, and `expires` the time at which it expires, 0 if never; None leaves
    them. The first of what has `grown` is the object's own bytes. `open_batches` is for a new batch: the most that its
    tenant may have.
    """
    keys = named.keys if open_batches is None else [*named.keys, tenant_batches_key(named.tenant), BATCHES_OPEN]
    counts = [packed({"field": one.counted, "bytes": one.by, "most": one.most}) for one in grown]
    times = (_text(place), _text(expires))
    return Call(
        "objects/put",
        keys,
        [before, after, named.name, named.expiring, *times, named.open, _text(open_batches), *counts],
    )


def drop_call(named: ObjectName, content: int) -> Call:
    """Deletes an object; `content` are the bytes of a file's content."""
    counts = [COUNTED[named.kind], "files" if named.kind == "file" else "", content]
    return Call("objects/drop", named.keys, [named.name, named.expiring, *counts])


def _text(value: float | None) -> str:
    return "" if value is None else str(value)
