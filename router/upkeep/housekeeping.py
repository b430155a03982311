"""What the leader keeps in order for others: what is published, misdirected requests, the indexes of jobs."""

from __future__ import annotations

import logging
import time

import msgspec

from broker.valkey.queues import ValkeyTransport
from router.service.admission import Rules
from router.service.decision import misdirected_ending
from router.service.model_list import model_list
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from tasks.queues.queues_file import PublishedQueues, QueuesFile
from taxiway.release import release

logger = logging.getLogger(__name__)

HOUSEKEEPING_TICK = 1.0
"""Seconds between two ticks."""

PUBLISH = 30.0
"""Seconds after which models and queues.yaml are published again; within `HOUSEKEEPING_TICK` if one has changed."""


class Housekeeping(Duty):
    """Publishes models and queues.yaml, ends requests sent to Celery's default queue, removes jobs from the indexes."""

    def __init__(
        self, transport: ValkeyTransport, store: RouterStore, fleet: FleetReader, rules: Rules, queues: QueuesFile
    ) -> None:
        super().__init__(HOUSEKEEPING_TICK)
        self._transport = transport
        self._store = store
        self._fleet = fleet
        self._rules = rules
        self._queues = queues
        self._published = (b"", b""), 0.0  # the model list and queues.yaml, and when they were published

    async def tick(self) -> None:
        """Do each once."""
        await self._publish()
        await self._end_misdirected()
        await self._store.jobs.forget_listed()
        await self._store.jobs.forget_ended()

    async def _publish(self) -> None:
        """Publish the content of `GET /v2/models`, and queues.yaml, when they have changed or need renewal."""
        rules, now = self._rules, time.monotonic()
        listed = msgspec.json.encode(model_list(rules.catalogue, self._fleet.snapshot))
        both = listed, msgspec.json.encode(PublishedQueues(release(), self._queues.text))
        published, at = self._published
        if published != both or now - at > PUBLISH:
            await self._store.fleet.publish(*both)
            self._published = both, now

    async def _end_misdirected(self) -> None:
        """End requests sent by plain Celery to its default queue, which has no consumer, with an error that says so."""
        arrivals = await self._transport.misdirected()
        if arrivals:
            endings = [misdirected_ending(arrival) for arrival in arrivals]
            await self._store.jobs.finish([ending for ending in endings if ending is not None])
            await self._transport.forget(arrivals)
            logger.warning("requests sent to Celery's default queue", extra={"messages": len(arrivals)})
