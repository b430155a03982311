"""Stage 5, beside finish: streams generated answers as they grow."""

from __future__ import annotations

import logging

from broker.outage import Outage
from broker.valkey.worker_store import WorkerStore
from taxiway.errors import BrokerUnavailableError
from workers.stages.queues import PieceQueue

logger = logging.getLogger(__name__)


class StreamStage:
    """Stage 5, beside finish: appends pieces of generated answers to their streams without blocking the device.

    Pieces that arrive during a write are sent together.
    """

    def __init__(self, inbox: PieceQueue, store: WorkerStore) -> None:
        self._inbox = inbox
        self._store = store

    def run(self) -> None:
        """Run until the queue is closed and empty, or closed while the store is unavailable."""
        outage = Outage(logger, "cannot stream answers")
        while pieces := self._inbox.take():
            try:
                self._store.append(pieces)
            except BrokerUnavailableError as error:
                if self._inbox.closed:
                    return
                self._inbox.put_back(pieces, pause=outage.pause(error))
            else:
                outage.over()

    def stop(self) -> None:
        """End after the queued pieces. Thread-safe."""
        self._inbox.close()
