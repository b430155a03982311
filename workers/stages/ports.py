"""The interface to the surrounding Celery worker; `workers.celery_adapter` implements it.

A job that Celery's consumer received also has a `job.CeleryTask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from taxiway.contract.wire import Envelope
from taxiway.errors import TaxiwayError
from workers.stages.job import Delivery, Outcome


class CeleryWorker(Protocol):
    """Celery's consumer, remote control and events. Thread-safe."""

    def queues(self) -> Sequence[str]:
        """The class queues that the worker consumes now."""

    def receive(self, envelope: Envelope, body: bytes, *, tag: str, queue: str) -> None:
        """Pass Celery's consumer a message of a class queue that it must handle itself: a canvas, an eta.

        Celery acknowledges it under `tag`.
        """

    @property
    def receiving(self) -> int:
        """How many messages passed to `receive` the consumer has not processed yet."""

    def tags(self) -> list[str]:
        """The tags of messages that it received and has not acknowledged."""

    def is_revoked(self, job: str) -> bool:
        """Whether remote control revoked the job."""

    def report_end(self, delivery: Delivery, outcome: Outcome) -> None:
        """Report to Celery's tools how a plain job ended here."""

    def report_release(self, delivery: Delivery, error: TaxiwayError | None = None) -> None:
        """Report that a plain job left the worker unfinished; `error` is from its stored result, if any."""

    def flush_events(self) -> None:
        """Send pending task events. Finish thread only."""

    def flush_full_group(self) -> None:
        """Send pending task events if they fill a group. Finish thread only."""

    def exit(self, status: int) -> None:
        """Start the worker's warm shutdown, with this exit status."""
