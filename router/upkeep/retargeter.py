"""Asks workers to serve other classes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict

from router.decide.moves.retarget import Retarget, RetargetConditions, retarget
from router.service.admission import Rules
from router.service.snapshot_reader import FleetReader
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from tasks.settings import Settings
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)


class Retargeter(Duty):
    """Asks workers to serve other classes. Their heartbeats show the effect."""

    def __init__(self, settings: Settings, rules: Rules, fleet: FleetReader, store: RouterStore) -> None:
        super().__init__(rules.topology.rebalance.tick)
        self._fleet = fleet
        self._store = store
        self._settings = settings
        self._rules = rules
        self._conditions = RetargetConditions()

    def begin(self) -> None:
        """Conditions observed before another router was the leader are superseded."""
        self._conditions = RetargetConditions()
        super().begin()

    async def tick(self) -> None:
        """Evaluate the fleet, and send workers the resulting commands."""
        fleet, now = self._fleet.working.fleet, self._store.clock.now()
        if fleet.stale:
            return
        self._conditions.observe(fleet, self._rules.topology, now)
        decided = retarget(fleet, self._rules.topology, self._conditions, now)
        if decided:
            self._conditions.note(decided, now)
            await asyncio.to_thread(self._command, decided)
        for one in decided:
            logger.info("retargeted", extra=asdict(one))

    def _command(self, decided: Sequence[Retarget]) -> None:
        from kombu.exceptions import KombuError  # now, not above: routers start sooner without Celery

        from tasks.celery_app import make_app

        app = make_app(self._settings, self._rules.topology)
        connection = app.connection_for_write()
        lost: tuple[type[BaseException], ...] = (KombuError, OSError, *connection.connection_errors)
        try:
            with connection:
                for one in decided:
                    app.control.broadcast(
                        one.action.value,
                        arguments={"queue": one.hardware_class},
                        destination=[one.worker],
                        connection=connection,
                    )
        except lost as error:
            raise BrokerUnavailableError(f"the state store did not accept a worker command: {error}") from error
