"""Lends idle devices to classes that starve: acts on `retarget` by Celery's remote control, as operators may."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict

from kombu.exceptions import KombuError

from router.decide.retarget import Retarget, Spells, retarget
from router.decide.snapshot import FleetSnapshot
from tasks.celery_app import make_app
from tasks.settings import Settings
from tasks.topology import Topology
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)


class Retargeter:
    """Tells workers which classes to serve, while this router leads. What they do shows in their heartbeats."""

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self._app = make_app(settings, topology)
        self._topology = topology
        self._spells = Spells()

    def forget(self) -> None:
        """Another router leads: what was seen until now does not count any more."""
        self._spells = Spells()

    async def tick(self, fleet: FleetSnapshot, now: float) -> None:
        """Look at the fleet at `now`, by the store's clock, and tell workers what follows.

        Raises:
            BrokerUnavailableError: the broker does not take a command.
        """
        if fleet.stale:
            return
        self._spells.look(fleet, self._topology, now)
        decided = retarget(fleet, self._topology, self._spells, now)
        if decided:
            self._spells.note(decided, now)
            await asyncio.to_thread(self._tell, decided)
        for one in decided:
            logger.info("retargeted", extra=asdict(one))

    def _tell(self, decided: Sequence[Retarget]) -> None:
        connection = self._app.connection_for_write()
        lost: tuple[type[BaseException], ...] = (KombuError, OSError, *connection.connection_errors)
        try:
            with connection:
                for one in decided:
                    self._app.control.broadcast(
                        one.action.value,
                        arguments={"queue": one.hardware_class},
                        destination=[one.worker],
                        connection=connection,
                    )
        except lost as error:
            raise BrokerUnavailableError(f"the broker took no command: {error}") from error
