"""Hears at once of jobs that were ended while this worker holds them: cancelled, or past their deadline.

What waits for the device is not run then, what generates stops at its next token, and a Python callable is ended. A
batch that cannot be ended goes on: the device's heartbeat says for how long. What is missed here, while the store is
away, is learned when the claims are renewed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from broker.valkey.worker_store import Store
from taxiway.errors import BrokerUnavailableError
from workers.stages.job import Delivery

_LISTEN = 1.0  # seconds for which one call listens
_PAUSE = 0.5  # seconds before a store that is away is asked again


class Withdrawals:
    """Marks deliveries whose jobs were ended; `held` gives all that are here, and `marked` is called after each."""

    def __init__(
        self, store: Store, held: Callable[[], Sequence[Delivery]], marked: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._held = held
        self._marked = marked
        self._stopping = threading.Event()

    def run(self) -> None:
        """Listen until stopped."""
        while not self._stopping.is_set():
            try:
                for job in self._store.withdrawn(_LISTEN):
                    self._mark(job)
            except BrokerUnavailableError:  # the pulse says so
                self._stopping.wait(_PAUSE)

    def stop(self) -> None:
        """End `run`, at once where the store answers. Any thread may call it."""
        self._stopping.set()
        with suppress(BrokerUnavailableError):  # it ends by itself
            self._store.wake_listener()

    def _mark(self, job: str) -> None:
        for delivery in self._held():
            if delivery.job == job:
                delivery.lost = True
                self._marked()
