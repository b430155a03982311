"""Contents of files in an object store: S3, Google Cloud Storage or Azure, by their address."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import obstore
from obstore.store import from_url

_PART = 5 * 2**20  # bytes per part of an upload: the minimum at S3


class StoreContents:
    """Contents at an address, read in pieces of at least `piece` bytes; credentials come from the environment."""

    def __init__(self, address: str, piece: int) -> None:
        self._store = from_url(address)
        self._piece = piece

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> int:
        """As `FolderContents` does."""
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        await obstore.put_async(self._store, name, counted(), chunk_size=_PART, max_concurrency=2)
        return size

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """As `FolderContents` does."""
        found = await obstore.get_async(self._store, name)
        async for piece in found.stream(min_chunk_size=self._piece):
            yield bytes(piece)

    async def delete(self, *names: str) -> None:
        """As `FolderContents` does."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, name)

    async def delete_below(self, folder: str) -> None:
        """As `FolderContents` does."""
        async for found in obstore.list(self._store, folder):
            await self.delete(*(one["path"] for one in found))

    async def delete_unfinished(self) -> None:
        """Nothing: unfinished uploads are no objects, and end by a rule of the store."""
