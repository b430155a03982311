"""What the HTTP API submits, forwarded one message at a time without a call for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from broker.port import ForwardOutcome, Outgoing
from broker.valkey.queues import ValkeyTransport
from router.service.snapshot_reader import FleetReader
from taxiway.connection import settle
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)


class Submissions:
    """Forwards single messages; those that arrive while a call is in progress share the next one."""

    def __init__(self, transport: ValkeyTransport, fleet: FleetReader) -> None:
        self._transport = transport
        self._fleet = fleet
        self._waiting: list[tuple[Outgoing, asyncio.Future[ForwardOutcome]]] = []
        self._sender: asyncio.Task[None] | None = None

    def forward(self, outgoing: Outgoing) -> asyncio.Future[ForwardOutcome]:
        """A future of what became of the message.

        It raises what the shared call raised: a `BrokerUnavailableError`, or an unexpected error.
        """
        done: asyncio.Future[ForwardOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((outgoing, done))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return done

    async def _send(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._send_batch(batch)
        finally:
            self._sender = None

    async def _send_batch(self, batch: Sequence[tuple[Outgoing, asyncio.Future[ForwardOutcome]]]) -> None:
        try:
            forwarded = await self._fleet.forward(self._transport.forward, [outgoing for outgoing, _ in batch])
            for (_, done), fresh in zip(batch, forwarded, strict=True):
                settle(done, fresh)
        except Exception as error:  # the next call is made regardless
            if not isinstance(error, BrokerUnavailableError):
                logger.exception("forwarding failed", extra={"messages": len(batch)})
            for _, done in batch:
                settle(done, error)
