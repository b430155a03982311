"""Reloads a worker's catalogue and profiles when the models folder changes."""

from __future__ import annotations

import logging
import threading

from broker.valkey.worker_store import Store
from tasks.models.folder import LOOK
from tasks.reload import Reporter
from taxiway.errors import BrokerUnavailableError
from workers.context import WorkerContext
from workers.stages.device import DeviceStage

logger = logging.getLogger(__name__)


class FolderWatch:
    """Checks the folder once a second, on its own thread."""

    def __init__(self, context: WorkerContext, device: DeviceStage, store: Store) -> None:
        self._context = context
        self._store = store
        self._reporter = Reporter(context.folder, "worker", store.worker)
        self._stopped = threading.Event()
        context.folder.follow(lambda catalogue, book: device.renew(catalogue, book, warm=context.warm()))

    def run(self) -> None:
        """Check until stopped."""
        self._context.folder.log_problems()
        while not self._stopped.is_set():
            self._report()
            asked = self._reporter.asked
            self._context.folder.look(closely=asked)
            if asked:
                self._reporter.looked()
            else:
                self._stopped.wait(LOOK)

    def stop(self) -> None:
        """End `run`. Any thread may call it."""
        self._stopped.set()

    def _report(self) -> None:
        try:
            self._reporter.heard(self._store.watch(self._reporter.arguments()))
        except BrokerUnavailableError as error:  # the heartbeat logs the outage; the folder is read anyway
            logger.debug("cannot report the catalogue", extra={"error": error.message})
