"""What keeps the fleet's keys tidy: clients are told what it can run, and what nobody will look at again is dropped."""

from __future__ import annotations

import logging
import time

import msgspec

from broker.port import Transport
from router.http.metadata import model_list
from router.service.admission import Rules
from router.service.decision import misdirected
from router.service.snapshot_reader import FleetReader
from router.service.store import Store
from router.upkeep.leader import Duty

logger = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between two looks."""

PUBLISH = 30.0
"""Seconds after which what the fleet can run is published again; within `TICK` when that has changed."""


class Housekeeping(Duty):
    """Publishes the models, ends requests sent to Celery's default queue, and forgets listed jobs that are gone."""

    def __init__(self, transport: Transport, store: Store, fleet: FleetReader, rules: Rules) -> None:
        super().__init__(TICK)
        self._transport = transport
        self._store = store
        self._fleet = fleet
        self._rules = rules
        self._published = b"", 0.0  # what the fleet can run, and when that was published

    async def tick(self) -> None:
        """Look once."""
        await self._publish_models()
        await self._end_astray()
        await self._store.forget_listed()

    async def _publish_models(self) -> None:
        """Publish what `GET /v2/models` lists to clients of the broker, where it has changed, or from time to time."""
        listed, now = msgspec.json.encode(model_list(self._rules.catalogue, self._fleet.snapshot)), time.monotonic()
        published, at = self._published
        if published != listed or now - at > PUBLISH:
            await self._store.publish_models(listed)
            self._published = listed, now

    async def _end_astray(self) -> None:
        """End requests that plain Celery sent to its default queue, which nobody serves: their senders hear why."""
        astray = await self._transport.astray()
        if astray:
            await self._store.finish([ending for arrival in astray if (ending := misdirected(arrival)) is not None])
            await self._transport.forget(astray)
            logger.warning("requests sent to Celery's default queue", extra={"messages": len(astray)})
