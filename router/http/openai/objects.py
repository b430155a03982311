"""Files and batches: what is known of them in the state store, and contents of files in a folder or an object store.

An object belongs to a tenant; for any other it does not exist. Everything is replaced as a whole, and only if it is
still what the new value was made from, so any number of routers may write.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from broker.valkey.leader import replace_call
from taxiway.contract.keys import BATCHES_OPEN, object_key, objects_key
from taxiway.errors import RequestTooLargeError, UnknownObjectError, quoted
from taxiway.valkey import fleet_errors
from taxiway.valkey.aio import Connection

Kind = Literal["file", "batch"]
Value = TypeVar("Value")

PIECE = 2**18
"""Bytes of a file's content read and written at once."""

_SERVER = "state store"
_EVERYONE = "default"  # owns what is made at a door without keys


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
    """The part of an object that says whose it is."""

    tenant: str


_encode = msgspec.json.Encoder().encode
_owned = msgspec.json.Decoder(Owned).decode


def owner_of(tenant: str | None) -> str:
    """Who owns what a caller makes."""
    return _EVERYONE if tenant is None else tenant


def new_name(prefix: str) -> str:
    """A random name."""
    return prefix + secrets.token_hex(16)


class Objects:
    """What is known of files and batches."""

    def __init__(self, url: str) -> None:
        self._connection = Connection(url)

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def add(self, kind: Kind, name: str, tenant: str, value: Any, created: float) -> None:
        """Add an object; one that is there is replaced."""
        index = ("ZADD", objects_key(kind, tenant), created, name)
        opened = [("SADD", BATCHES_OPEN, name)] if kind == "batch" else []
        with fleet_errors(_SERVER):
            await self._connection.transaction(("SET", object_key(kind, name), _encode(value)), index, *opened)

    async def get(self, kind: Kind, name: str, tenant: str | None) -> bytes:
        """An object that a caller of `tenant` may see; None may see all.

        Raises:
            UnknownObjectError: there is none.
        """
        with fleet_errors(_SERVER):
            raw = await self._connection.call("GET", object_key(kind, name))
        if raw is None or (tenant is not None and _owned(raw).tenant != tenant):
            raise UnknownObjectError(f"no {kind} {quoted(name)} is known", **{kind: name})
        return bytes(raw)

    async def page(self, kind: Kind, tenant: str, *, after: str, most: int, latest_first: bool) -> list[bytes]:
        """Up to `most` of a tenant's objects by the time they were made, after the one of that name."""
        key = objects_key(kind, tenant)
        rank, command = ("ZREVRANK", "ZREVRANGE") if latest_first else ("ZRANK", "ZRANGE")
        with fleet_errors(_SERVER):
            place = await self._connection.call(rank, key, after) if after else None
            first = 0 if place is None else place + 1
            names = await self._connection.call(command, key, first, first + most - 1)
            found = await self._connection.call("MGET", *(object_key(kind, n.decode()) for n in names)) if names else []
        return [bytes(raw) for raw in found if raw is not None]

    async def delete(self, kind: Kind, name: str, tenant: str) -> None:
        """Forget an object."""
        with fleet_errors(_SERVER):
            await self._connection.transaction(
                ("DEL", object_key(kind, name)), ("ZREM", objects_key(kind, tenant), name)
            )

    async def replace(self, kind: Kind, name: str, before: bytes, value: Any) -> bytes | None:
        """Replace an object that is still `before`; returns it as stored, or None if it has changed."""
        after = _encode(value)
        with fleet_errors(_SERVER):
            done = await self._connection.run(replace_call(object_key(kind, name), before, after))
        return after if done else None

    async def change(self, kind: Kind, name: str, tenant: str | None, change: Callable[[bytes], Any]) -> bytes:
        """Replace an object by what `change` makes of it, however often others change it meanwhile."""
        while True:
            before = await self.get(kind, name, tenant)
            after = await self.replace(kind, name, before, change(before))
            if after is not None:
                return after

    async def open_batches(self) -> list[str]:
        """The batches that have not ended."""
        with fleet_errors(_SERVER):
            return sorted(name.decode() for name in await self._connection.call("SMEMBERS", BATCHES_OPEN))

    async def close_batch(self, name: str) -> None:
        """Note that a batch has ended."""
        with fleet_errors(_SERVER):
            await self._connection.call("SREM", BATCHES_OPEN, name)


class Contents:
    """Contents of files, at a folder or the address of an object store (`s3://`, `gs://`, `az://`)."""

    def __init__(self, place: str) -> None:
        self._store: ObjectStore = from_url(place) if "://" in place else LocalStore(Path(place).resolve(), mkdir=True)

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """Write a content, which is there as a whole or not at all; returns its bytes."""
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        await obstore.put_async(self._store, name, counted(), chunk_size=5 * 2**20, max_concurrency=2)
        return size

    async def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small content."""
        await obstore.put_async(self._store, name, content)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """A content, in pieces.

        Raises:
            FileNotFoundError: there is none.
        """
        found = await obstore.get_async(self._store, name)
        async for piece in found.stream(min_chunk_size=PIECE):
            yield bytes(piece)

    async def delete(self, *names: str) -> None:
        """Delete contents; those that are not there are ignored."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, name)

    async def delete_below(self, prefix: str) -> None:
        """Delete all contents whose names begin with a folder."""
        async for found in obstore.list(self._store, prefix):
            await self.delete(*(one["path"] for one in found))


def file_path(name: str) -> str:
    """Where a file's content is."""
    return f"files/{name}"


async def bounded(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The pieces of a file.

    Raises:
        RequestTooLargeError: they have more than `most` bytes.
    """
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > most:
            raise RequestTooLargeError(f"file: expected at most {most} bytes", limit="file", most=most)
        yield piece
