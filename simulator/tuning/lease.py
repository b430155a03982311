"""The lease by which one tuner at a time tunes the fleet's plan. A thread renews it, as a search takes longer."""

from __future__ import annotations

import logging
import threading

from broker.valkey.leases import lease_answer, lease_call
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import TUNER, TUNERS
from taxiway.errors import BrokerUnavailableError

TUNER_LEASE = 10.0
"""Seconds after which another tuner may tune if the one before was killed: more than a busy machine stops a process."""

RENEW_EVERY = 0.25
"""Lease durations between two renewals, and between two attempts of a tuner that has to wait."""

logger = logging.getLogger(__name__)


class Lease:
    """One tuner's lease in the state store, which it has from `take` until `give_up`, unless it was silent too long."""

    def __init__(self, url: str, name: str, duration: float = TUNER_LEASE) -> None:
        self.duration = duration
        self._connections = ConnectionPool(url, server="state store")
        self.name = name
        self._given_up = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> bool:
        """Take or keep the lease, and have it renewed; False while another tuner has it.

        Raises:
            BrokerUnavailableError: the state store does not answer.
        """
        taken = self._ask(self.duration)
        if taken and not self._renewing.ident:
            self._renewing.start()
        return taken

    def give_up(self) -> None:
        """Let another tuner work at once, and disconnect.

        Raises:
            BrokerUnavailableError: the state store does not answer; the lease expires.
        """
        self._given_up.set()
        if self._renewing.ident:
            self._renewing.join()
        try:
            self._ask(0.0)
        finally:
            self._connections.close()

    def _ask(self, duration: float) -> bool:
        return bool(lease_answer(self._connections.run(lease_call((TUNER, TUNERS), self.name, duration))).own)

    def _renew(self) -> None:
        while not self._given_up.wait(RENEW_EVERY * self.duration):
            try:
                self._ask(self.duration)
            except BrokerUnavailableError as error:
                logger.debug("lease not renewed", extra={"error": error.message})
