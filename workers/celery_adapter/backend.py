"""Celery's result backend, with final results written once, by the worker whose claim holds, and announced."""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery, states
from celery.backends.redis import RedisBackend, SentinelBackend

from broker.valkey import run
from broker.valkey.records import Ending, finish_call
from tasks.ticket import Ticket
from taxiway.contract.job import JobState, failure_meta, state_of
from taxiway.contract.wire import HEADER
from taxiway.errors import ExecutionError, JobCancelledError, TaxiwayError
from workers.celery_adapter.strategy import bytes_of, context_of
from workers.stages.job import Outcome

logger = logging.getLogger(__name__)

STORED = "taxiway_stored"
"""Set in a request's context once its result has been written."""

TOKEN = "taxiway_token"
"""The fencing token in a request's context."""

OUTCOME = "taxiway_outcome"
"""The outcome in a request's context."""


class WriteOnceBackend(RedisBackend):
    """Writes final results of ticketed jobs by `FINISH`; everything else as Celery does.

    A message without a checked ticket can make a Celery worker write a result (an unknown task, for instance): that
    would end another's job, so nothing is written for it.
    """

    app: Celery

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: str | None = None, request: Any = None, **kwargs: Any
    ) -> Any:
        ticket = getattr(request, HEADER, None)
        if not isinstance(ticket, Ticket):
            if self._on_behalf_of_a_job():  # Celery fails what is chained after a failed job
                self._store_as_celery(task_id, result, state, traceback, request, **kwargs)
            return result
        if state not in states.READY_STATES:
            self._store_as_celery(task_id, result, state, traceback, request, **kwargs)
        elif not getattr(request, STORED, False):
            self._finish(ticket, result, state, request)
        return result

    def _store_as_celery(self, *args: Any, **kwargs: Any) -> None:
        super()._store_result(*args, **kwargs)  # type: ignore[misc]  # celery-types lacks it

    def _on_behalf_of_a_job(self) -> bool:
        task = self.app.current_worker_task
        return task is not None and isinstance(getattr(task.request, HEADER, None), Ticket)

    def _finish(self, ticket: Ticket, result: Any, state: str, request: Any) -> None:
        ending = self._ending(ticket, result, state, request)
        limits = context_of(self.app).topology.limits
        call = finish_call([ending], keep_result=limits.keep_result, keep_record=limits.keep_record)
        written = self.ensure(lambda: run(self.client, call), ())
        if not written[0]:
            logger.warning(
                "a result was not written: the job has ended or its claim is lost", extra={"job": ticket.job}
            )

    def _ending(self, ticket: Ticket, result: Any, state: str, request: Any) -> Ending:
        token, outcome = getattr(request, TOKEN, ""), getattr(request, OUTCOME, None)
        if state == states.SUCCESS:
            meta = self._get_result_meta(result, state, None, request)  # type: ignore[attr-defined]  # as above
            encoded: Any = self.encode(meta | {"task_id": ticket.job})
            generated = outcome.generated if outcome is not None else ()
            return Ending(ticket.job, JobState.SUCCEEDED, bytes_of(encoded), token, ticket.reply, generated)
        error = _error(result, state, outcome)
        return Ending(ticket.job, state_of(error), failure_meta(ticket.job, error), token, ticket.reply)


class WriteOnceSentinelBackend(WriteOnceBackend, SentinelBackend):
    """The same at the primary that sentinels name."""


def _error(result: Any, state: str, outcome: Outcome | None) -> TaxiwayError:
    """The error that a result in Celery's form stands for; the outcome's own where there is one."""
    if state == states.REVOKED:
        return JobCancelledError("the job was revoked")
    if outcome is not None and outcome.error is not None:
        return outcome.error
    named = result if isinstance(result, dict) else {"exc_message": str(result)}
    return ExecutionError(f"{named.get('exc_type', 'error')}: {named.get('exc_message')}")
