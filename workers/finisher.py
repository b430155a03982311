"""The finisher thread: writes results in bulk, then lets Celery's own tracer end each task, and acknowledges.

Results come first and acknowledgements last, so that whatever dies in between only repeats. Where other tasks follow
from a job (a link, a chain, a chord), Celery's order holds instead: they are sent before the result is written.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from celery import Celery, states
from celery.app.task import Context
from celery.worker.state import task_ready

from tasks import scripts
from taxiway.errors import BrokerUnavailableError
from taxiway.job import JobState, failure_meta, state_of, success_meta
from workers.backend import OUTCOME, STORED, TOKEN
from workers.store import Store, insist
from workers.work import Delivery, Dropped, Ended, Ending, Revoked, Traced

logger = logging.getLogger(__name__)

_MOST = 256
"""Endings that one write carries, so that the store is not blocked for long by one script."""


class Finisher:
    """Ends deliveries.

    Args:
        on_hub: has a callback run on the thread that owns the broker's connection.
        again: takes a delivery whose result was not written, to be claimed anew: the claim then tells why.
    """

    def __init__(
        self,
        app: Celery,
        store: Store,
        *,
        on_hub: Callable[[Callable[[], None]], None],
        again: Callable[[Delivery], None],
    ) -> None:
        self._app = app
        self._store = store
        self._on_hub = on_hub
        self._again = again
        self._inbox: queue.SimpleQueue[Sequence[Ending] | None] = queue.SimpleQueue()
        self._given_up = threading.Event()

    def put(self, endings: Sequence[Ending]) -> None:
        """Hand endings over. Any thread may."""
        if endings:
            self._inbox.put(endings)

    def stop(self) -> None:
        """End after all that was handed over, or when the store does not answer."""
        self._given_up.set()
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            endings, last = self._take()
            for start in range(0, len(endings), _MOST):
                self._finish(endings[start : start + _MOST])
            if last:
                return

    def _take(self) -> tuple[list[Ending], bool]:
        """All that is there, at least one; and whether the end was among it."""
        taken: list[Ending] = []
        got = self._inbox.get()
        while got is not None:
            taken += got
            try:
                got = self._inbox.get_nowait()
            except queue.Empty:
                return taken, False
        return taken, True

    def _finish(self, endings: Sequence[Ending]) -> None:
        ended = [ending for ending in endings if isinstance(ending, Ended)]
        try:
            self._write([e for e in ended if not e.delivery.canvas])
            for one in endings:
                self._finish_alone(one)
        except BrokerUnavailableError as error:  # the messages stay unacknowledged and are delivered again
            logger.error("results could not be written", extra={"jobs": len(endings), "error": error.message})

    def _write(self, plain: Sequence[Ended]) -> None:
        """Write the results of jobs from which nothing follows, all at once."""
        if not plain:
            return
        endings = [_ending(ended) for ended in plain]
        written = insist(lambda: self._store.finish(endings), self._given_up, self._say_away)
        for ended, done in zip(plain, written, strict=True):
            ended.delivery.fields[STORED] = done

    def _finish_alone(self, ending: Ending) -> None:
        delivery = ending.delivery
        if isinstance(ending, Dropped):
            self._drop(delivery)
        elif isinstance(ending, Revoked):
            self._on_hub(lambda: _revoke(delivery))
        elif self._holds(ending):
            self._trace(ending)
        elif ending.token:
            self._again(delivery)
        else:  # what needs no claim is refused only where the job has ended
            self._drop(delivery)

    def _holds(self, ended: Ended) -> bool:
        """Whether the result was written, or may be: the claim is ours, or none is needed."""
        if not ended.delivery.canvas:
            return bool(ended.delivery.fields[STORED]) or self._write_anew(ended)
        claim = [(ended.delivery.job, ended.token)]
        return not ended.token or insist(lambda: self._store.renew(claim), self._given_up, self._say_away) == 1

    def _write_anew(self, ended: Ended) -> bool:
        """Write the result under another claim: the first ended while the store was away, and nobody else has one."""
        if not ended.token:
            return False
        job = ended.delivery.job
        _, (claim,) = insist(lambda: self._store.claim([(job, 0.0)]), self._given_up, self._say_away)
        if claim.verdict is not scripts.Verdict.RUN:
            return False
        ending = _ending(replace(ended, token=claim.token))
        ended.delivery.fields[STORED] = insist(lambda: self._store.finish([ending]), self._given_up, self._say_away)[0]
        return bool(ended.delivery.fields[STORED])

    def _trace(self, ended: Ended) -> None:
        """Run Celery's tracer around the outcome: signals, events, callbacks, and the result if that is not written."""
        delivery = ended.delivery
        delivery.fields[OUTCOME] = ended.outcome
        delivery.fields[TOKEN] = ended.token
        try:
            traced = delivery.tracer(delivery.task, delivery.job, delivery.fields, delivery.payload, None, None)
        except Exception:  # a callback that cannot be sent, a signal's receiver
            logger.exception("a task could not be ended", extra={"job": delivery.job})
            self._on_hub(lambda: delivery.request.reject(requeue=True))
            return
        told = _with_run_time(traced, ended)
        self._on_hub(lambda: delivery.succeed(told))

    def _drop(self, delivery: Delivery) -> None:
        """Acknowledge a job that had ended. Its worker may have died between the result and a chord's count."""
        meta = insist(lambda: self._store.result(delivery.job), self._given_up, self._say_away)
        if delivery.payload[2].get("chord"):
            backend = self._app.backend
            stored = backend.get_task_meta(delivery.job)
            if stored["status"] in states.READY_STATES:
                context = Context(delivery.fields | delivery.payload[2])
                backend.on_chord_part_return(context, stored["status"], stored["result"])
        cancelled = meta is not None and meta.status == states.REVOKED
        self._on_hub(lambda: _acknowledge(delivery, cancelled=cancelled))

    def _say_away(self, why: str) -> None:
        logger.warning("cannot write results", extra={"error": why})


def _with_run_time(traced: Traced, ended: Ended) -> Traced:
    """What the tracer says, with the device's seconds for its own: they are what Flower shows as the task's runtime."""
    failed, value, seconds = traced
    result = ended.outcome.result
    return failed, value, seconds if result is None else result.report.run_time


def _ending(ended: Ended) -> scripts.Ending:
    job, error = ended.delivery.job, ended.outcome.error
    reply = ended.delivery.ticket.reply
    if error is not None:
        return scripts.Ending(job, state_of(error), failure_meta(job, error), ended.token, reply)
    assert ended.outcome.result is not None
    meta = success_meta(job, ended.outcome.result)
    return scripts.Ending(job, JobState.SUCCEEDED, meta, ended.token, reply, ended.outcome.generated)


def _acknowledge(delivery: Delivery, *, cancelled: bool) -> None:
    if cancelled:
        delivery.request.send_event("task-revoked", terminated=False, signum=None, expired=False)
    task_ready(delivery.request)
    delivery.request.acknowledge()


def _revoke(delivery: Delivery) -> None:
    """Have Celery end a task that its remote control revoked."""
    delivery.request.revoked()
