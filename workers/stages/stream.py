"""Stage 5, beside finish: streams generated answers as they grow."""

from __future__ import annotations

import logging

from broker.valkey.worker_store import WorkerStore
from taxiway.errors import BrokerUnavailableError
from workers.stages.queues import PieceQueue

logger = logging.getLogger(__name__)

_PAUSE = 0.5  # seconds before a retry while the store is unavailable


class StreamStage:
    """Stage 5, beside finish: appends pieces of generated answers to their streams without blocking the device.

    Pieces that arrive during a write are sent together.
    """

    def __init__(self, inbox: PieceQueue, store: WorkerStore) -> None:
        self._inbox = inbox
        self._store = store
        self._unavailable = False

    def run(self) -> None:
        """Run until the queue is closed and empty, or closed while the store is unavailable."""
        while pieces := self._inbox.take():
            try:
                self._store.append(pieces)
            except BrokerUnavailableError as error:
                if self._inbox.closed:
                    return
                if not self._unavailable:
                    logger.warning("cannot stream answers", extra={"jobs": len(pieces), "error": error.message})
                self._unavailable = True
                self._inbox.put_back(pieces, pause=_PAUSE)
            else:
                self._unavailable = False

    def stop(self) -> None:
        """End after the queued pieces. Thread-safe."""
        self._inbox.close()
