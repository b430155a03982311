"""The stored objects of OpenAI's API at one router: files, batches with their runner, and responses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from math import inf

from api.access import Bodies
from api.inference.infer import Inference
from api.objects.batch_runner import BatchRunner
from api.openai.responses.stored import Responses
from api.routing.router import HttpRouter
from api.storage.objects import FileRecord, Kind, Objects, decode_file, decode_owned, file_path, open_contents
from taxiway.errors import FleetUnavailable, UnknownObjectError
from taxiway.running import end

logger = logging.getLogger(__name__)

_EXPIRED_A_CALL = 256  # expired objects looked for by one call
_EXPIRE = 5.0  # seconds between two looks for what expired
_SWEEP = 600.0  # seconds between two looks for contents that a killed router left unfinished


class StoredObjects:
    """What the endpoints need; `limit` is the most bytes of a file. `bodies` are counted with the lines of batches.

    `place` is a folder, or an object store's address.
    """

    def __init__(self, router: HttpRouter, place: str) -> None:
        self.router = router
        self.objects = Objects(router.settings.broker, router.rules.topology.limits)
        self.contents = open_contents(place)
        self.inference = Inference(router)
        self.bodies = Bodies(router.rules.topology)
        self.runner = BatchRunner(self.inference, self.objects, self.contents, self.bodies)
        self.responses = Responses(self.inference, self.objects)
        self.limit = int(router.rules.topology.limits.file)
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Work on batches and responses from now on."""
        self._running = [
            asyncio.create_task(self.runner.run(), name="batches"),
            asyncio.create_task(self.responses.run(), name="responses"),
            asyncio.create_task(self._expire(), name="expiring objects"),
        ]

    async def stop(self) -> None:
        """Leave the work to other routers, and disconnect."""
        await end(self._running)
        self.objects.close()

    async def _expire(self) -> None:
        """Delete what expired, and contents without a file."""
        swept = -inf
        while True:
            with contextlib.suppress(FleetUnavailable, OSError):
                if time.monotonic() - swept > _SWEEP:
                    swept = time.monotonic()
                    await self.contents.delete_unfinished()
                await self._delete_expired()
            await asyncio.sleep(_EXPIRE)

    async def _delete_expired(self) -> None:
        while found := await self.objects.expired(self.router.store.clock.now(), _EXPIRED_A_CALL):
            for kind, name in found:
                await self._delete(kind, name)

    async def _delete(self, kind: Kind, name: str) -> None:
        """Delete an expired object, unless another router did."""
        try:
            raw = await self.objects.get(kind, name, None)
        except UnknownObjectError:
            if kind == "file":  # its upload broke off
                await self.contents.delete(file_path(name))
            await self.objects.forget(kind, name)
            return
        if kind == "file":
            await self._delete_file(decode_file(raw))
        else:
            await self.objects.delete(kind, name, decode_owned(raw).tenant)

    async def _delete_file(self, record: FileRecord) -> None:
        """Delete a file that has expired; one whose content was written twice may be among those, and has not."""
        expires = record.expires_at
        if expires is None or expires > self.router.store.clock.now():
            await self.objects.forget("file", record.id, expires)
            return
        await self.contents.delete(file_path(record.id))
        await self.objects.delete("file", record.id, record.tenant, record.bytes)
