"""Gives jobs that do not end here back: their claims end, and their messages return to the front of their queues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from broker.valkey.class_queue import ClassQueue
from broker.valkey.worker_store import Store
from taxiway.errors import BrokerUnavailableError
from workers.celery_adapter.held_jobs import Ledger
from workers.stages.fetch import in_order
from workers.stages.job import Delivery


class Returns:
    """Threads may share it.

    Args:
        class_queue: where plain jobs' messages are; None where Celery's consumer takes all.
        on_hub: has a callback run on the thread that owns the broker's connection.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        class_queue: ClassQueue | None,
        on_hub: Callable[[Callable[[], None]], None],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._queue = class_queue
        self._on_hub = on_hub

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Return jobs, given in the order in which they came; while a server is away they stay here.

        One that failed here and was to run again has had its run: it is given up at last, and runs alone until then.
        """
        claimed = [delivery for delivery in deliveries if delivery.token]
        with contextlib.suppress(BrokerUnavailableError):  # then their leases end by themselves
            self._store.release([(delivery.job, delivery.token) for delivery in claimed if not delivery.retries])
            self._store.let_lapse([(delivery.job, delivery.token) for delivery in claimed if delivery.retries])
            if self._queue is not None:
                self._queue.put_back(in_order([delivery.tag for delivery in deliveries if delivery.tag]))
            for delivery in reversed(deliveries):
                self._let_go(delivery)

    def _let_go(self, delivery: Delivery) -> None:
        if delivery.handed is None:
            self._ledger.end(delivery, None)
            return
        self._ledger.forget(delivery)
        self._on_hub(partial(delivery.handed.request.reject, requeue=True))
