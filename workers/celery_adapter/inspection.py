"""What Celery's remote control sees of a job that passes Celery's own request by: `inspect`, `revoke`, heartbeats."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery.app.task import Task
from celery.worker import state


class PlainRequest:
    """Stands for a plain job among Celery's requests. Made only for a job that is here long enough to be seen.

    Args:
        kwargs: what is shown of its arguments.
        revoke: ends the job as revoked, when an operator terminates it.
    """

    acknowledged = False
    eta = None
    time_start: float | None = None
    worker_pid: int | None = None

    def __init__(
        self, job: str, task: Task[Any, Any], hostname: str, kwargs: str, queue: str, revoke: Callable[[], None]
    ) -> None:
        self.id = job
        self.task = task
        self.name = self.type = task.name
        self.hostname = hostname
        self.kwargs = kwargs
        self.delivery_info = {"exchange": queue, "routing_key": queue}
        self._revoke = revoke
        state.task_reserved(self)

    def start(self, at: float) -> None:
        """The job runs since `at`, by this host's monotonic clock."""
        self.time_start, self.worker_pid = at, os.getpid()
        state.task_accepted(self)

    def end(self) -> None:
        """The job has ended."""
        self.acknowledged = True
        state.task_ready(self)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and its kin show."""
        return {
            "id": self.id,
            "name": self.name,
            "args": [],
            "kwargs": self.kwargs,
            "type": self.type,
            "hostname": self.hostname,
            "time_start": self.time_start,
            "acknowledged": self.acknowledged,
            "delivery_info": self.delivery_info,
            "worker_pid": self.worker_pid,
        }

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End the job as revoked. A callable is ended; rows of other batches run, and their answers are dropped."""
        self._revoke()

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Nothing: the pool gives back what it holds when it is terminated."""
