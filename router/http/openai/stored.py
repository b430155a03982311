"""Files and batches of one router: where they are, and what works on the batches."""

from __future__ import annotations

import asyncio

from router.http.inference import Inference
from router.http.openai.batch_runner import BatchRunner
from router.http.openai.objects import Objects, open_contents
from router.jobs import Jobs
from router.service.arrivals import Router
from tasks.settings import Settings


class StoredObjects:
    """What the endpoints need; `limit` is the most bytes of a file.

    `place` is a folder, or an object store's address.
    """

    def __init__(self, router: Router, settings: Settings, place: str) -> None:
        self.router = router
        self.objects = Objects(settings.state)
        self.contents = open_contents(place)
        self.runner = BatchRunner(router, Inference(router, Jobs(router)), self.objects, self.contents)
        self.limit = int(router.rules.topology.limits.file)
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Work on batches from now on."""
        self._running = asyncio.create_task(self.runner.run(), name="batches")

    async def stop(self) -> None:
        """Leave the batches to other routers, and disconnect."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self.objects.close()
