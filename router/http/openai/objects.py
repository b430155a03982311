"""Files, batches and responses: their records in the state store, and the contents of files.

An object belongs to a tenant; to any other it does not exist. A record is replaced as a whole, and only if it is still
the one that the new value was made from, so that any number of routers may write.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol

import msgspec

from broker.valkey.leader import replace_call
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import BATCHES_OPEN, FILES_EXPIRING, RESPONSES_OPEN, object_key, objects_key
from taxiway.errors import RequestTooLargeError, UnknownObjectError, quoted
from taxiway.valkey import fleet_errors

Kind = Literal["file", "batch", "response"]

PIECE = 2**18
"""Bytes of a file's content read and written at once."""

_SERVER = "state store"
_EVERYONE = "default"  # the owner of objects created at a door without keys


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
_owned = msgspec.json.Decoder(Owned).decode


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(found: Sequence[Any], limit: int, id_of: Callable[[Any], str] = attrgetter("id")) -> Page:
    """The first `limit` of the objects as a page."""
    data = [*found[:limit]]
    first, last = (id_of(data[0]), id_of(data[-1])) if data else (None, None)
    return Page(data=data, first_id=first, last_id=last, has_more=len(found) > limit)


def owner_of(tenant: str | None) -> str:
    """The owner of objects that a caller creates."""
    return _EVERYONE if tenant is None else tenant


def new_name(prefix: str) -> str:
    """A random name."""
    return prefix + secrets.token_hex(16)


class Objects:
    """The records of files, batches and responses."""

    def __init__(self, url: str) -> None:
        self._connection = AsyncConnection(url)

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def add(self, kind: Kind, name: str, tenant: str, value: Any, created: float) -> None:
        """Add an object, or replace it."""
        index = ("ZADD", objects_key(kind, tenant), created, name)
        opened = [("SADD", BATCHES_OPEN, name)] if kind == "batch" else []
        with fleet_errors(_SERVER):
            await self._connection.transaction(("SET", object_key(kind, name), _encode(value)), index, *opened)

    async def add_file(self, record: FileRecord, created: float) -> None:
        """Add a file, which may expire."""
        if record.expires_at is not None:
            with fleet_errors(_SERVER):
                await self._connection.call("ZADD", FILES_EXPIRING, record.expires_at, record.id)
        await self.add("file", record.id, record.tenant, record, created)

    async def expired_files(self, now: float, most: int) -> list[str]:
        """Up to `most` files that have expired."""
        with fleet_errors(_SERVER):
            found = await self._connection.call("ZRANGEBYSCORE", FILES_EXPIRING, "-inf", now, "LIMIT", 0, most)
        return [name.decode() for name in found]

    async def get(self, kind: Kind, name: str, tenant: str | None) -> bytes:
        """An object that a caller of `tenant` may see; None may see all.

        Raises:
            UnknownObjectError: no such object.
        """
        with fleet_errors(_SERVER):
            raw = await self._connection.call("GET", object_key(kind, name))
        if raw is None or (tenant is not None and _owned(raw).tenant != tenant):
            raise UnknownObjectError(f"no {kind} {quoted(name)} is known", **{kind: name})
        return bytes(raw)

    async def page(self, kind: Kind, tenant: str, *, after: str, most: int, latest_first: bool) -> list[bytes]:
        """Up to `most` of a tenant's objects by creation time, after the object named `after`."""
        key = objects_key(kind, tenant)
        rank, command = ("ZREVRANK", "ZREVRANGE") if latest_first else ("ZRANK", "ZRANGE")
        with fleet_errors(_SERVER):
            place = await self._connection.call(rank, key, after) if after else None
            first = 0 if place is None else place + 1
            names = await self._connection.call(command, key, first, first + most - 1)
            found = await self._connection.call("MGET", *(object_key(kind, n.decode()) for n in names)) if names else []
        return [bytes(raw) for raw in found if raw is not None]

    async def delete(self, kind: Kind, name: str, tenant: str) -> None:
        """Delete an object's record."""
        others = [("ZREM", FILES_EXPIRING, name)] if kind == "file" else []
        with fleet_errors(_SERVER):
            await self._connection.transaction(
                ("DEL", object_key(kind, name)), ("ZREM", objects_key(kind, tenant), name), *others
            )

    async def replace(self, kind: Kind, name: str, before: bytes, value: Any) -> bytes | None:
        """Replace an object that is still `before`; returns it as stored, or None if it has changed."""
        after = _encode(value)
        with fleet_errors(_SERVER):
            done = await self._connection.run(replace_call(object_key(kind, name), before, after))
        return after if done else None

    async def change(self, kind: Kind, name: str, tenant: str | None, change: Callable[[bytes], Any]) -> bytes:
        """Replace an object by the value of `change`, retrying if others change it meanwhile."""
        while True:
            before = await self.get(kind, name, tenant)
            after = await self.replace(kind, name, before, change(before))
            if after is not None:
                return after

    async def keep_response(
        self, name: str, tenant: str, value: Any, now: float, *, most: int, kept: int, opened: bool
    ) -> None:
        """Add a response for `kept` seconds, unless it exists, and delete the tenant's oldest beyond `most`."""
        index = objects_key("response", tenant)
        opening = [("ZADD", RESPONSES_OPEN, now, name)] if opened else []
        with fleet_errors(_SERVER):
            *_, count = await self._connection.transaction(
                ("SET", object_key("response", name), _encode(value), "NX", "EX", kept),
                *opening,
                ("ZADD", index, now, name),
                ("ZREMRANGEBYSCORE", index, "-inf", now - kept),
                ("ZCARD", index),
            )
            if count > most:
                oldest = [one.decode() for one in await self._connection.call("ZRANGE", index, 0, count - most - 1)]
                keys = [object_key("response", one) for one in oldest]
                await self._connection.transaction(("DEL", *keys), ("ZREM", index, *oldest))

    async def use_responses(self, names: Sequence[str], tenant: str, now: float, *, most: int, kept: int) -> list[Any]:
        """Responses of a tenant as stored, None for each that does not exist; they are kept for `kept` more seconds.

        Raises:
            RequestTooLargeError: together they have more than `most` bytes.
        """
        keys = [object_key("response", name) for name in names]
        renewed = [("EXPIRE", key, kept) for key in keys]
        used = [part for name in names for part in (now, name)]
        with fleet_errors(_SERVER):
            size = sum(await self._connection.calls(*(("STRLEN", key) for key in keys)))
            if size > most:
                message = f"previous_response_id: expected at most {most} bytes of conversation, got {size}"
                raise RequestTooLargeError(message, limit="payload", most=most, got=size)
            found, *_ = await self._connection.transaction(
                ("MGET", *keys), *renewed, ("ZADD", objects_key("response", tenant), "XX", *used)
            )
        return [raw if raw is not None and _owned(raw).tenant == tenant else None for raw in found]

    async def open_responses(self, since: float) -> list[str]:
        """The background responses created after `since` that have not ended."""
        with fleet_errors(_SERVER):
            _, names = await self._connection.transaction(
                ("ZREMRANGEBYSCORE", RESPONSES_OPEN, "-inf", since), ("ZRANGE", RESPONSES_OPEN, 0, -1)
            )
        return [name.decode() for name in names]

    async def close_response(self, name: str) -> None:
        """Record that a response has ended."""
        with fleet_errors(_SERVER):
            await self._connection.call("ZREM", RESPONSES_OPEN, name)

    async def open_batches(self) -> list[str]:
        """The batches that have not ended."""
        with fleet_errors(_SERVER):
            return sorted(name.decode() for name in await self._connection.call("SMEMBERS", BATCHES_OPEN))

    async def close_batch(self, name: str) -> None:
        """Record that a batch has ended."""
        with fleet_errors(_SERVER):
            await self._connection.call("SREM", BATCHES_OPEN, name)


class Contents(Protocol):
    """Contents of files, by name. A content exists as a whole or not at all."""

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """Write a content as it arrives; returns its size in bytes."""

    def read(self, name: str) -> AsyncIterator[bytes]:
        """A content, in pieces. Raises `FileNotFoundError`."""

    async def delete(self, *names: str) -> None:
        """Delete contents; missing ones are ignored."""

    async def delete_below(self, folder: str) -> None:
        """Delete all contents in a folder."""


class FolderContents:
    """Contents in a folder of this machine, or one that all routers mount."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """See `Contents`."""
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
        """See `Contents`."""
        with await asyncio.to_thread((self._folder / name).open, "rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE):
                yield piece

    async def delete(self, *names: str) -> None:
        """See `Contents`."""
        for name in names:
            await asyncio.to_thread((self._folder / name).unlink, missing_ok=True)

    async def delete_below(self, folder: str) -> None:
        """See `Contents`."""
        await asyncio.to_thread(shutil.rmtree, self._folder / folder, ignore_errors=True)


def open_contents(place: str) -> Contents:
    """The contents in a folder, or at the address of an object store."""
    if "://" not in place:
        return FolderContents(Path(place))
    from router.http.openai.object_store import StoreContents  # obstore is installed only where it is used

    return StoreContents(place, PIECE)


async def one_piece(content: bytes) -> AsyncIterator[bytes]:
    """A small content as pieces."""
    yield content


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def file_path(name: str) -> str:
    """The name of a file's content."""
    return f"files/{name}"


async def bounded(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The pieces of a file, up to a size.

    Raises:
        RequestTooLargeError: it has more than `most` bytes.
    """
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > most:
            raise RequestTooLargeError(f"file: expected at most {most} bytes", limit="file", most=most)
        yield piece
