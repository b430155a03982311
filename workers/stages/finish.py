"""The finisher thread: writes results in bulk, acknowledges, and tells who follows.

A plain job's result, its announcement and its acknowledgement are one step of the store, where that is the broker too;
else the result comes first, so that whatever dies in between only repeats. A task that Celery handed over is then ended
by Celery's own tracer. Where other tasks follow from it (a link, a chain, a chord), Celery's order holds: they are sent
before its result is written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from celery import Celery, states
from celery.app.task import Context

from broker.valkey import endings
from broker.valkey.claims import Verdict
from broker.valkey.class_queue import ClassQueue
from broker.valkey.worker_store import Store, insist
from taxiway.contract.blobs import ResultBlobs
from taxiway.contract.bounds import check_depth
from taxiway.contract.job import JobState, failure_meta, failure_of, state_of, success_meta
from taxiway.errors import (
    BrokerUnavailableError,
    DeadlineExceededError,
    ExecutionError,
    JobCancelledError,
    TaxiwayError,
    error_of_code,
)
from workers.celery_adapter.backend import OUTCOME, STORED, TOKEN
from workers.celery_adapter.events import AT_MOST, TaskEvent
from workers.celery_adapter.held_jobs import Ledger
from workers.decide.faults import describe
from workers.device import Device
from workers.stages.backlog import Backlog
from workers.stages.job import Answered, Delivery, Dropped, Ended, Ending, Handed, Job, Outcome, Traced
from workers.stages.outcomes import Account
from workers.stages.report import answer_of, generated_by

logger = logging.getLogger(__name__)

SHOWN = 128
"""Characters of a result in its event, for Flower; the whole of it costs Celery more than all the rest of an echo."""

_MOST = 64
"""Endings that one write carries: their clients and routers go on while the store writes the next."""

_RESULT = b'"result":'

Answer = TypeVar("Answer")


class Finisher:
    """Ends deliveries.

    Args:
        class_queue: where plain jobs' messages are acknowledged; None where Celery's consumer takes all.
        on_hub: has a callback run on the thread that owns the broker's connection.
        again: takes a delivery whose result was not written, to be claimed anew: the claim then tells why.
        wrote: takes a written end of a task that Celery handed over, if it can be written again as it is.
    """

    def __init__(
        self,
        app: Celery,
        store: Store,
        ledger: Ledger,
        account: Account,
        class_queue: ClassQueue | None,
        *,
        device: Device,
        on_hub: Callable[[Callable[[], None]], None],
        again: Callable[[Delivery], None],
        wrote: Callable[[endings.Ending], None],
    ) -> None:
        self._app = app
        self._store = store
        self._ledger = ledger
        self._account = account
        self._queue = class_queue
        self._device = device
        self._on_hub = on_hub
        self._again = again
        self._wrote = wrote
        self.backlog = Backlog()
        self._given_up = threading.Event()
        self._untold: list[Delivery] = []

    def put(self, endings: Sequence[Ending]) -> None:
        """Hand endings over. Any thread may."""
        if endings:
            self.backlog.put(endings)

    def tell(self, began: list[Delivery]) -> None:
        """Tell the store that jobs run, and send the events that wait. Any thread may ask."""
        self._untold = began
        self.backlog.put(())

    def stop(self) -> None:
        """End after all that was handed over, or when the store does not answer."""
        self._given_up.set()
        self.backlog.close()

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            endings, last = self.backlog.take()
            for start in range(0, len(endings), _MOST):
                some = endings[start : start + _MOST]
                self._finish(some)
                self.backlog.wrote(len(some))
            if self._untold or not endings or self._ledger.events.waiting >= AT_MOST:
                self._tell()
            if last:
                self._ledger.events.flush()
                return

    def _tell(self) -> None:
        began, self._untold = [delivery for delivery in self._untold if not delivery.ended], []
        try:
            self._store.start([(delivery.job, delivery.token, delivery.started) for delivery in began])
        except BrokerUnavailableError:
            return
        for delivery in began:
            delivery.told = True
        self._ledger.events.flush()

    def _finish(self, endings: Sequence[Ending]) -> None:
        ended = [one for ending in endings if (one := self._outcome(ending)) is not None]
        try:
            self._keep_blobs(ended)
            self._write([one for one in ended if not _followed(one.delivery)])
            for one in ended:
                if _followed(one.delivery):
                    self._end_in_celerys_order(one)
            for ending in endings:
                if isinstance(ending, Dropped):
                    self._drop(ending.delivery)
        except BrokerUnavailableError as error:  # the messages stay unacknowledged and are delivered again
            logger.error("results could not be written", extra={"jobs": len(endings), "error": error.message})

    def _outcome(self, ending: Ending) -> Ended | None:
        """How a delivery ended; None where that is not for us to write."""
        delivery = ending.delivery
        if delivery.ended or isinstance(ending, Dropped):
            return None
        if isinstance(ending, Answered):
            return self._reported(ending.job)
        if isinstance(ending, Ended):
            return ending
        if delivery.handed is not None:
            self._ledger.forget(delivery)
            self._on_hub(delivery.handed.revoke)
            return None
        return Ended(delivery, Outcome(error=JobCancelledError("the job was revoked")))

    def _reported(self, job: Job) -> Ended:
        """The outcome of a job whose rows have their answers."""
        blobs = ResultBlobs(self._store.limits.inline)
        try:
            result = answer_of(job, self._device, blobs)
            meta = success_meta(job.delivery.job, result)
            check_depth({"outputs": result.outputs}, "outputs", meta)
            outcome = Outcome(result, meta=meta, rows=len(job.rows), generated=generated_by(job))
        except Exception as error:  # a model's outputs may be of any kind, and nested in any way
            failed = ExecutionError(f"{job.variant}: an output has no form on the wire: {describe(error)}")
            return Ended(job.delivery, Outcome(error=failed))
        return Ended(job.delivery, replace(outcome, blobs=blobs.kept))

    def _keep_blobs(self, ended: Sequence[Ended]) -> None:
        """Store what the results refer to, before them."""
        kept = {ref: content for one in ended for ref, content in one.outcome.blobs.items()}
        if kept:
            self._insist(lambda: self._store.keep_blobs(kept))

    def _write(self, ended: Sequence[Ended]) -> None:
        """Write the results of jobs from which nothing follows, all at once."""
        if not ended:
            return
        endings = [self._ending(one) for one in ended]
        written = self._insist(lambda: self._store.finish(endings))
        pairs = list(zip(ended, endings, written, strict=True))
        self._account.note(one for one, _, done in pairs if done)
        if self._queue is not None and not self._queue.acknowledges_with_result:
            self._queue.acknowledge([one.delivery.tag for one, _, done in pairs if done and one.delivery.tag])
        for one, ending, done in pairs:
            if done:
                self._written(one, ending)
            elif one.delivery.claim is None or not one.delivery.token:
                self._drop(one.delivery)  # what needs no claim is refused only where the job has ended
            else:
                self._write_anew(one)

    def _written(self, ended: Ended, ending: endings.Ending) -> None:
        """Tell of a result that is there."""
        if ended.delivery.handed is not None:
            ended.delivery.handed.fields[STORED] = True
            if not ended.outcome.blobs and ending.state is not JobState.DEAD:  # a dead job may be replayed meanwhile
                self._wrote(ending)
            self._trace(ended, ended.delivery.handed)
            return
        self._ledger.end(ended.delivery, _event(ended.delivery, ended.outcome, ending.meta))

    def _write_anew(self, ended: Ended) -> None:
        """Write the result under another claim, where the store lost the first one in a failover."""
        delivery = ended.delivery
        _, (claim,) = self._insist(lambda: self._store.claim([(delivery.job, 0.0)]))
        if claim.verdict is not Verdict.RUN:
            self._lose(delivery)
            return
        delivery.claim = claim
        self._write([ended])

    def _lose(self, delivery: Delivery) -> None:
        """Have a job claimed anew whose claim is not ours: without that it would only run again, and again in vain."""
        delivery.lost = True
        self._again(delivery)

    def _end_in_celerys_order(self, ended: Ended) -> None:
        """Send what follows from a job, then write its result: where its claim is still ours, or none is needed."""
        delivery = ended.delivery
        assert delivery.handed is not None
        claim = [(delivery.job, delivery.token)]
        if delivery.token and not self._insist(lambda: self._store.renew(claim))[0]:
            self._lose(delivery)
            return
        if delivery.began and not delivery.told:
            self._insist(lambda: self._store.start([(delivery.job, delivery.token, delivery.started)]))
        self._trace(ended, delivery.handed)
        self._account.note([ended])

    def _trace(self, ended: Ended, handed: Handed) -> None:
        """Run Celery's tracer around the outcome: signals, events, callbacks, and the result if that is not written."""
        job = ended.delivery.job
        handed.fields[OUTCOME] = ended.outcome
        handed.fields[TOKEN] = ended.delivery.token
        self._ledger.forget(ended.delivery)
        try:
            traced = handed.tracer(handed.task, job, handed.fields, handed.payload, None, None)
        except Exception:  # a callback that cannot be sent, a signal's receiver
            logger.exception("a task could not be ended", extra={"job": job})
            self._on_hub(lambda: handed.request.reject(requeue=True))
            return
        told = _with_run_time(traced, ended)
        self._on_hub(lambda: handed.succeed(told))

    def _drop(self, delivery: Delivery) -> None:
        """Acknowledge a job that had ended. Its worker may have died between the result and a chord's count."""
        meta = self._insist(lambda: self._store.result(delivery.job))
        failure = failure_of(meta) if meta is not None else None
        revoked = _revoked(delivery, error_of_code(failure.code, failure.message)) if failure is not None else None
        if delivery.handed is None:
            assert self._queue is not None
            self._queue.acknowledge([delivery.tag])
            self._ledger.end(delivery, revoked)
            return
        handed = delivery.handed
        self._ledger.forget(delivery)
        if handed.payload[2].get("chord"):
            self._count_chord_part(delivery.job, handed)
        self._on_hub(lambda: handed.drop(revoked))

    def _count_chord_part(self, job: str, handed: Handed) -> None:
        backend = self._app.backend
        stored = backend.get_task_meta(job)
        if stored["status"] in states.READY_STATES:
            context = Context(handed.fields | handed.payload[2])
            backend.on_chord_part_return(context, stored["status"], stored["result"])

    def _ending(self, ended: Ended) -> endings.Ending:
        delivery, error = ended.delivery, ended.outcome.error
        if error is not None:
            state, meta = state_of(error), failure_meta(delivery.job, error)
        else:
            state, meta = JobState.SUCCEEDED, ended.outcome.meta
        return endings.Ending(
            delivery.job,
            state,
            meta,
            delivery.token,
            delivery.ticket.reply,
            ended.outcome.generated,
            started=repr(delivery.started) if delivery.began and not delivery.told else "",
            device=self._device.label,
            tag=delivery.tag if self._queue is not None and self._queue.acknowledges_with_result else "",
        )

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        return insist(call, self._given_up, self._say_away)

    def _say_away(self, why: str) -> None:
        logger.warning("cannot write results", extra={"error": why})


def _followed(delivery: Delivery) -> bool:
    """Whether other tasks follow from the job."""
    return delivery.handed is not None and delivery.handed.canvas


def _event(delivery: Delivery, outcome: Outcome, meta: bytes) -> TaskEvent:
    """How Celery says that a plain job ended."""
    job, now = delivery.job, time.time()
    if outcome.result is not None:
        at = meta.find(_RESULT) + len(_RESULT)
        shown = meta[at : at + SHOWN].decode(errors="replace")
        return TaskEvent("task-succeeded", job, now, result=shown, runtime=outcome.result.report.run_time)
    assert outcome.error is not None
    failed = TaskEvent("task-failed", job, now, exception=repr(outcome.error), traceback="")
    return _revoked(delivery, outcome.error) or failed


def _revoked(delivery: Delivery, error: TaxiwayError) -> TaskEvent | None:
    """How Celery says that a job was cancelled or expired, with the error as its exception; None for other errors.

    Flower shows the exception, but not the flag `expired`.
    """
    if not isinstance(error, (JobCancelledError, DeadlineExceededError)):
        return None
    return TaskEvent(
        "task-revoked",
        delivery.job,
        time.time(),
        terminated=bool(delivery.began),
        signum=None,
        expired=isinstance(error, DeadlineExceededError),
        exception=repr(error),
    )


def _with_run_time(traced: Traced, ended: Ended) -> Traced:
    """What the tracer says, with the device's seconds for its own: they are what Flower shows as the task's runtime."""
    failed, value, seconds = traced
    result = ended.outcome.result
    return failed, value, seconds if result is None else result.report.run_time
