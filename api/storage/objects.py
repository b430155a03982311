"""Files, batches and responses: their records in the state store, and the contents of files.

An object belongs to a tenant; to any other it does not exist. A record is replaced as a whole, and only if it is still
the one that the new value was made from, so that any number of routers may write.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from broker.valkey import Call, packed
from tasks.queues.limits import Limits
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import (
    BATCHES_OPEN,
    OBJECTS_EXPIRING,
    RESPONSES_OPEN,
    object_key,
    objects_key,
    stored_key,
    tenant_batches_key,
)
from taxiway.errors import OverloadedError, RequestTooLargeError, TaxiwayError, UnknownObjectError, quoted

if TYPE_CHECKING:
    from api.storage.object_store import StoreContents


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
    placed, expiring, opened = ("" if value is None else str(value) for value in (place, expires, open_batches))
    facts = [before, after, named.name, named.expiring, placed, expiring, named.open, opened, *counts]
    return Call("objects/put", keys, facts)


CONTENT_BYTES = 2**18
"""Bytes of a file's content read and written at once."""

_EVERYONE = "default"  # the owner of objects created at an API without keys
_STORED, _CHANGED = b"stored", b"changed"  # what `put_call` answers
_RECORDS_READ = 32  # records that are read at once
_PAGE_BYTES = 4 * 2**20  # bytes of records after which a page ends
_RETRY_AFTER = 60.0  # seconds after which a tenant with too many open batches may retry
_ABANDONED_AFTER = 3600.0  # seconds without a write after which an unfinished content is abandoned
_UNRECORDED = 6 * 3600.0  # seconds that a content waits for its record: at a MiB a minute 360 MiB arrive in that time


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file. `expires_at` is a Unix time, None if it is kept until it is deleted."""

    id: str
    tenant: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None


class Owned(msgspec.Struct):
    """The part of an object that names its owner."""

    tenant: str


class ExpiresAfter(msgspec.Struct, frozen=True):
    """When a file expires: `seconds` after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=1, le=30 * 86400)]


decode_file = msgspec.json.Decoder(FileRecord).decode
_encode = msgspec.json.Encoder().encode
decode_owned = msgspec.json.Decoder(Owned).decode


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """What was deleted."""

    id: str
    object: Literal["file", "batch", "response", "webhook_endpoint.deleted"]
    deleted: bool = True


def page_of(data: Sequence[Any], more: bool, id_of: Callable[[Any], str] = attrgetter("id")) -> Page:
    """The objects as a page, after which there are `more`."""
    first, last = (id_of(data[0]), id_of(data[-1])) if data else (None, None)
    return Page(data=[*data], first_id=first, last_id=last, has_more=more)


def owner_of(tenant: str | None) -> str:
    """The owner of objects that a caller creates."""
    return _EVERYONE if tenant is None else tenant


def new_name(prefix: str) -> str:
    """A random name."""
    return prefix + secrets.token_hex(16)


class Objects:
    """The records of files, batches and responses, within the limits of their tenants."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._connection = AsyncConnection(url, server="state store")
        self._limits = limits

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def expect_content(self, name: str, now: float) -> None:
        """Announce a file's content: it is deleted after a while, if no file of that name is added."""
        await self._expire(ObjectName("file", name, ""), now + _UNRECORDED)

    async def add_file(self, record: FileRecord, created: float, *, limited: bool = True) -> None:
        """Add a file whose content is written, unless it was added before; one of a batch's answers is not `limited`.

        Raises:
            RequestTooLargeError: its tenant has no room for it.
        """
        named, after = ObjectName("file", record.id, record.tenant), _encode(record)
        most, files = (int(self._limits.objects), int(self._limits.files)) if limited else (None, None)
        grown = [Grown("objects", len(after), most), Grown("files", record.bytes, files)]
        expires = record.expires_at or 0
        await self._put(named, put_call(named, b"", after, grown, place=created, expires=expires))

    async def room(self, tenant: str) -> int:
        """The bytes that a tenant's next file may have.

        Raises:
            RequestTooLargeError: its files have as many as they may.
        """
        held = int(await self._connection.call("HGET", stored_key(tenant), "files") or 0)
        room = int(self._limits.files) - held
        if room <= 0:
            raise self._refusal("files", held, tenant)
        return room

    async def add_batch(self, name: str, tenant: str, value: Any, created: float) -> None:
        """Add a batch, which is open.

        Raises:
            RequestTooLargeError: its tenant has no room for it.
            OverloadedError: its tenant has too many that have not ended.
        """
        after = _encode(value)
        grown = Grown("objects", len(after), int(self._limits.objects))
        named, most = ObjectName("batch", name, tenant), self._limits.batches
        await self._put(named, put_call(named, b"", after, [grown], place=created, open_batches=most))

    async def keep_response(self, name: str, tenant: str, value: Any, now: float, *, opened: bool) -> None:
        """Add a response, unless it exists, and delete the tenant's oldest beyond the limits."""
        if opened:
            await self._connection.call("ZADD", RESPONSES_OPEN, now, name)
        named, after = ObjectName("response", name, tenant), _encode(value)
        grown, expires = Grown("responses", len(after)), now + self._limits.keep_response
        count, size = await self._put(named, put_call(named, b"", after, [grown], place=now, expires=expires))
        while count > self._limits.responses or size > self._limits.objects:
            (oldest,) = await self._connection.call("ZRANGE", objects_key("response", tenant), 0, 0)
            if oldest.decode() == name:
                break
            count, size = await self.delete("response", oldest.decode(), tenant)

    async def get(self, kind: Kind, name: str, tenant: str | None) -> bytes:
        """An object that a caller of `tenant` may see; None may see all.

        Raises:
            UnknownObjectError: no such object.
        """
        raw = await self._connection.call("GET", object_key(kind, name))
        if raw is None or (tenant is not None and decode_owned(raw).tenant != tenant):
            raise UnknownObjectError(f"no {kind} {quoted(name)} is known", **{kind: name})
        return bytes(raw)

    async def page(
        self, kind: Kind, tenant: str, *, after: str, most: int, latest_first: bool
    ) -> tuple[list[bytes], bool]:
        """A tenant's objects by creation time, after the object named `after`, and whether there are more.

        Up to `most`; fewer, if they are large. They are read a few at a time.
        """
        key = objects_key(kind, tenant)
        rank, command = ("ZREVRANK", "ZREVRANGE") if latest_first else ("ZRANK", "ZRANGE")
        place = await self._connection.call(rank, key, after) if after else None
        first = 0 if place is None else place + 1
        names = await self._connection.call(command, key, first, first + most)
        found: list[bytes] = []
        read = size = 0
        while read < min(len(names), most) and size < _PAGE_BYTES:
            step = names[read : min(read + _RECORDS_READ, most)]
            raws = await self._connection.call("MGET", *(object_key(kind, name.decode()) for name in step))
            some = [bytes(raw) for raw in raws if raw is not None]
            found += some
            read, size = read + len(step), size + sum(map(len, some))
        return found, read < len(names)

    async def delete(self, kind: Kind, name: str, tenant: str, content: int = 0) -> tuple[int, int]:
        """Delete an object's record; `content` are the bytes of a file's content.

        Returns the number of its tenant's objects of that kind, and what is counted of them.
        """
        named = ObjectName(kind, name, tenant)
        counts = [COUNTED[kind], "files" if kind == "file" else "", content]
        call = Call("objects/drop", named.keys, [name, named.expiring, *counts])
        count, size = await self._connection.run(call)
        return count, size

    async def replace(self, kind: Kind, name: str, before: bytes, value: Any) -> bytes | None:
        """Replace an object that is still `before`; returns it as stored, or None if it has changed."""
        after = _encode(value)
        named = ObjectName(kind, name, value.tenant)
        grown = Grown(COUNTED[kind], len(after) - len(before))
        word, *_ = await self._connection.run(put_call(named, before, after, [grown]))
        return after if word == _STORED else None

    async def change(self, kind: Kind, name: str, tenant: str | None, change: Callable[[bytes], Any]) -> bytes:
        """Replace an object by the value of `change`, retrying if others change it meanwhile."""
        while True:
            before = await self.get(kind, name, tenant)
            after = await self.replace(kind, name, before, change(before))
            if after is not None:
                return after

    async def use_responses(self, names: Sequence[str], tenant: str, now: float, *, most: int) -> list[Any]:
        """Responses of a tenant as stored, None for each that does not exist; they are kept from now on.

        Raises:
            RequestTooLargeError: together they have more than `most` bytes.
        """
        keys = [object_key("response", name) for name in names]
        used = [part for name in names for part in (now, name)]
        expires = now + self._limits.keep_response
        kept = [part for name in names for part in (expires, ObjectName("response", name, tenant).expiring)]
        size = sum(await self._connection.calls(*(("STRLEN", key) for key in keys)))
        if size > most:
            message = f"previous_response_id: expected at most {most} bytes of conversation, got {size}"
            raise RequestTooLargeError(message, limit="payload", most=most, got=size)
        found, *_ = await self._connection.transaction(
            ("MGET", *keys),
            ("ZADD", objects_key("response", tenant), "XX", *used),
            ("ZADD", OBJECTS_EXPIRING, "XX", *kept),
        )
        return [raw if raw is not None and decode_owned(raw).tenant == tenant else None for raw in found]

    async def open_responses(self, since: float) -> list[str]:
        """The background responses created after `since` that have not ended."""
        _, names = await self._connection.transaction(
            ("ZREMRANGEBYSCORE", RESPONSES_OPEN, "-inf", since), ("ZRANGE", RESPONSES_OPEN, 0, -1)
        )
        return [name.decode() for name in names]

    async def close_response(self, name: str) -> None:
        """Record that a response has ended."""
        await self._connection.call("ZREM", RESPONSES_OPEN, name)

    async def open_batches(self) -> list[tuple[str, str]]:
        """The batches that have not ended, each with its tenant, oldest first."""
        found = await self._connection.call("ZRANGE", BATCHES_OPEN, 0, -1)
        return [(name, tenant) for name, _, tenant in (one.decode().partition(" ") for one in found)]

    async def close_batch(self, name: str, tenant: str, ended: float) -> None:
        """Record that a batch has ended: it is kept for `limits.keep_batch`."""
        named = ObjectName("batch", name, tenant)
        await self._connection.transaction(
            ("ZADD", OBJECTS_EXPIRING, ended + self._limits.keep_batch, named.expiring),
            ("ZREM", BATCHES_OPEN, named.open),
            ("SREM", tenant_batches_key(tenant), name),
        )

    async def expired(self, now: float, most: int) -> list[tuple[Kind, str]]:
        """Up to `most` objects that have expired, and contents that got no record."""
        found = await self._connection.call("ZRANGEBYSCORE", OBJECTS_EXPIRING, "-inf", now, "LIMIT", 0, most)
        return [(kind, name) for kind, _, name in (one.decode().partition(":") for one in found)]

    async def forget(self, kind: Kind, name: str, expires: float | None = None) -> None:
        """Expire a name no more, or at another time."""
        named = ObjectName(kind, name, "")
        if expires is not None:
            await self._expire(named, expires)
            return
        await self._connection.call("ZREM", OBJECTS_EXPIRING, named.expiring)

    async def _expire(self, named: ObjectName, at: float) -> None:
        await self._connection.call("ZADD", OBJECTS_EXPIRING, at, named.expiring)

    async def _put(self, named: ObjectName, call: Call) -> tuple[int, int]:
        """The number of the tenant's objects of that kind, and what is counted of them; 0 if it was there before."""
        word, *counts = await self._connection.run(call)
        if word == _STORED:
            return counts[0], counts[1]
        if word == _CHANGED:
            return 0, 0
        raise self._refusal(word.decode(), counts[0], named.tenant)

    def _refusal(self, limit: str, held: int, tenant: str) -> TaxiwayError:
        """The error of a tenant that has as much as `limit` allows."""
        most = int(getattr(self._limits, limit))
        if limit == "batches":
            message = f"tenant {tenant!r} has {held} batches that have not ended (limit {most}, limits.batches)"
            return OverloadedError(message, tenant=tenant, limit="limits.batches", retry_after=_RETRY_AFTER)
        what = "files" if limit == "files" else "batches and records of files"
        message = f"the {what} of tenant {tenant!r} have {held} bytes (limit {most}, limits.{limit}): delete some"
        return RequestTooLargeError(message, limit=f"limits.{limit}", most=most, got=held)


class FolderContents:
    """Contents of files, by name, in a folder of this machine, or one that all routers mount.

    A content exists as a whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """Write a content as it arrives; returns its size in bytes."""
        path = self._folder / name
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        size = 0
        try:
            with await asyncio.to_thread(unfinished.open, "wb") as file:
                async for piece in pieces:
                    size += await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(_flush, file)
            await asyncio.to_thread(unfinished.replace, path)
        finally:
            await asyncio.to_thread(unfinished.unlink, missing_ok=True)
        return size

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """A content, in pieces. Raises `FileNotFoundError`."""
        with await asyncio.to_thread((self._folder / name).open, "rb") as file:
            while piece := await asyncio.to_thread(file.read, CONTENT_BYTES):
                yield piece

    async def delete(self, *names: str) -> None:
        """Delete contents; missing ones are ignored."""
        for name in names:
            await asyncio.to_thread((self._folder / name).unlink, missing_ok=True)

    async def delete_below(self, folder: str) -> None:
        """Delete all contents in a folder."""
        await asyncio.to_thread(shutil.rmtree, self._folder / folder, ignore_errors=True)

    async def delete_unfinished(self) -> None:
        """Delete what writes left that ended with their process: others change their files every minute."""
        await asyncio.to_thread(_delete_old, self._folder, time.time() - _ABANDONED_AFTER)


Contents: TypeAlias = "FolderContents | StoreContents"


def open_contents(place: str) -> Contents:
    """The contents in a folder, or at the address of an object store."""
    if "://" not in place:
        return FolderContents(Path(place))
    from api.storage.object_store import StoreContents  # obstore is installed only where it is used

    return StoreContents(place, CONTENT_BYTES)


async def one_piece(content: bytes) -> AsyncIterator[bytes]:
    """A small content as pieces."""
    yield content


def _delete_old(folder: Path, before: float) -> None:
    """Delete unfinished contents without a write since `before`."""
    for path in folder.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def file_path(name: str) -> str:
    """The name of a file's content."""
    return f"files/{name}"


async def bounded(pieces: AsyncIterator[bytes], most: int, limit: str) -> AsyncIterator[bytes]:
    """The pieces of a file, up to the size that a limit allows now.

    Raises:
        RequestTooLargeError: it has more than `most` bytes.
    """
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > most:
            raise RequestTooLargeError(f"file: expected at most {most} bytes (limits.{limit})", limit=limit, most=most)
        yield piece
