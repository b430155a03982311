"""Stage 4: writes results in bulk, announces and acknowledges them.

If the store is also the broker, a plain job's result, announcement and acknowledgement are one script. Otherwise the
result is written first, so that a crash in between only repeats the job. Jobs that Celery's consumer received are then
finished by Celery. If other tasks follow the job (a link, a chain, a chord), Celery's order holds: they are sent before
its result is written.

A job's result has the answers of its rows, and where, how long and at what cost they ran.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from opentelemetry.trace import SpanKind

from broker.valkey.records import Ending as StoredEnding
from broker.valkey.records import Verdict
from broker.valkey.worker import ClassQueue, Store, insist
from tasks import telemetry
from tasks.heartbeat import STAGES, Done, Ran, Stage, Use, count, empty, is_emulated
from tasks.models.catalogue import TensorSpec
from tasks.models.profiles import generates, length_of
from taxiway.contract.job import JobState, Result, RunReport, failure_meta, failure_of, state_of, success_meta
from taxiway.contract.limits import check_depth
from taxiway.contract.values import ResultBlobs, to_wire
from taxiway.errors import BrokerUnavailableError, ExecutionError, JobCancelledError, TaxiwayError, error_of_code
from workers.decide.faults import describe
from workers.device import Device
from workers.port import Row
from workers.stages.admit import named_row
from workers.stages.held import Shared
from workers.stages.job import (
    Answered,
    CeleryTask,
    Delivery,
    Dropped,
    Ended,
    Ending,
    Job,
    Outcome,
    Returned,
    Used,
)
from workers.stages.queues import PieceQueue

logger = logging.getLogger(__name__)

_MOST = 64
"""Endings per write: their clients and routers proceed while the store writes the next ones."""

Answer = TypeVar("Answer")


class FinishStage:
    """Ends deliveries.

    Args:
        admit: receives deliveries whose claim was lost before their result was written; the next claim shows why.
        class_queue: acknowledges plain jobs' messages; None if Celery's consumer receives all messages.
    """

    def __init__(
        self, shared: Shared, counters: OutcomeCounters, class_queue: ClassQueue | None, device: Device
    ) -> None:
        self._inbox = shared.endings
        self._admit = shared.admissions
        self._store = shared.store
        self._held = shared.held
        self._counters = counters
        self._queue = class_queue
        self._device = device
        self._celery = shared.celery
        self._given_up = threading.Event()
        self._started: list[Delivery] = []
        self._writing = threading.Lock()

    def report_started(self, deliveries: list[Delivery]) -> None:
        """Soon report running jobs to the store, and send pending events. Thread-safe."""
        self._started = deliveries
        self._inbox.wake()

    def end_here(self, endings: Sequence[Ending]) -> None:
        """Write a plain job's answer on the caller's thread; anything else is put in the queue. Thread-safe.

        One attempt: what the store does not take is put in the queue too, and the finish thread insists.
        """
        job = endings[0].job if len(endings) == 1 and isinstance(endings[0], Answered) else None
        written = False
        if job is not None and job.delivery.task is None and self._writing.acquire(blocking=False):
            try:
                written = not job.delivery.ended and self._write_once(self._reported(job))
            finally:
                self._writing.release()
        if not written:
            self._inbox.put(endings)

    def stop(self) -> None:
        """End after the queued endings, or if the store does not answer."""
        self._given_up.set()
        self._inbox.close()

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            endings, last = self._inbox.take()
            for start in range(0, len(endings), _MOST):
                some = endings[start : start + _MOST]
                with self._writing:
                    self._finish(some)
                self._inbox.wrote(len(some))
            if self._started or not endings:
                self._report()
            self._celery.flush_full_group()
            if last:
                self._celery.flush_events()
                return

    def _report(self) -> None:
        started, self._started = [delivery for delivery in self._started if not delivery.ended], []
        try:
            self._store.start([(delivery.job, delivery.token, delivery.started) for delivery in started])
        except BrokerUnavailableError:
            return
        for delivery in started:
            delivery.start_stored = True
        self._celery.flush_events()

    def _finish(self, endings: Sequence[Ending]) -> None:
        ended = [one for ending in endings if (one := self._outcome(ending)) is not None]
        try:
            self._keep_blobs(ended)
            self._write([one for one in ended if not _followed(one.delivery)])
            for one in ended:
                if (task := one.delivery.task) is not None and task.followed:
                    self._end_in_celerys_order(one, task)
            for ending in endings:
                if isinstance(ending, Dropped):
                    self._drop(ending.delivery)
            self._bill([ending for ending in endings if isinstance(ending, Used)])
            self._return([ending for ending in endings if isinstance(ending, Returned) and not ending.delivery.ended])
        except BrokerUnavailableError as error:  # unacknowledged messages are redelivered
            logger.error("results could not be written", extra={"jobs": len(endings), "error": error.message})

    def _outcome(self, ending: Ending) -> Ended | None:
        """The outcome to write for a delivery; None if there is none to write."""
        delivery = ending.delivery
        if delivery.ended or isinstance(ending, Dropped | Returned | Used):
            return None
        if isinstance(ending, Answered):
            return self._reported(ending.job)
        if isinstance(ending, Ended):
            return ending
        if delivery.task is not None:
            self._held.remove(delivery)
            delivery.task.revoke()
            return None
        return Ended(delivery, Outcome(error=JobCancelledError("the job was revoked")))

    def _reported(self, job: Job) -> Ended:
        """The outcome of a job with all rows answered."""
        blobs = ResultBlobs(self._store.limits.inline)
        try:
            result = answer_of(job, self._device, blobs)
            meta = success_meta(job.delivery.job, result)
            check_depth({"outputs": result.outputs}, "outputs", meta)
            outcome = Outcome(
                result,
                meta=meta,
                blobs=blobs.contents,
                rows=len(job.rows),
                billed=job.billed,
                generated=generated_by(job),
            )
        except Exception as error:  # a model's outputs may have any type and nesting
            failed = ExecutionError(f"{job.variant}: an output cannot be encoded: {describe(error)}")
            return Ended(job.delivery, Outcome(error=failed))
        return Ended(job.delivery, outcome)

    def _keep_blobs(self, ended: Sequence[Ended]) -> None:
        """Store the blobs that the results reference, before the results."""
        kept = {ref: content for one in ended for ref, content in one.outcome.blobs.items()}
        if kept:
            self._insist(lambda: self._store.keep_blobs(kept))

    def _write(self, ended: Sequence[Ended]) -> None:
        """Write the results of jobs without follow-up tasks, in bulk."""
        if not ended:
            return
        endings = [self._ending(one) for one in ended]
        self._settle(ended, endings, self._insist(lambda: self._store.finish(endings)))

    def _write_once(self, ended: Ended) -> bool:
        """Write a result without blobs; whether the store answered that it is written."""
        ending = self._ending(ended)
        if ended.outcome.blobs:
            return False
        try:
            written = self._store.finish([ending])
        except BrokerUnavailableError:
            return False
        if written[0]:
            self._settle([ended], [ending], written)
        return written[0]

    def _settle(self, ended: Sequence[Ended], endings: Sequence[StoredEnding], written: Sequence[bool]) -> None:
        """Count and report the results that were written, and find out why others were not."""
        pairs = list(zip(ended, endings, written, strict=True))
        self._counters.count(one for one, _, done in pairs if done)
        if self._queue is not None and not self._queue.acknowledges_with_result:
            self._queue.acknowledge([one.delivery.tag for one, _, done in pairs if done and one.delivery.tag])
        for one, ending, done in pairs:
            if done:
                self._written(one, ending)
            elif one.delivery.claim is None or not one.delivery.token:
                self._drop(one.delivery)  # an ending that needs no claim is refused only if the job has ended
            else:
                self._write_again(one)

    def _written(self, ended: Ended, ending: StoredEnding) -> None:
        """Report a result that is stored."""
        delivery = ended.delivery
        removed = self._held.remove(delivery)
        if delivery.task is not None:
            delivery.task.finish(ended.outcome, delivery.token, ending)
        elif removed:
            self._celery.report_end(delivery, ended.outcome)

    def _write_again(self, ended: Ended) -> None:
        """Write the result under a new claim, if the store lost the first one in a failover."""
        delivery = ended.delivery
        _, (claim,) = self._insist(lambda: self._store.claim([(delivery.job, 0.0)]))
        if claim.verdict is not Verdict.RUN:
            self._lose(delivery)
            return
        delivery.claim = claim
        self._write([ended])

    def _lose(self, delivery: Delivery) -> None:
        """Claim a job again whose claim was lost: the new claim shows why, and whether the job runs again."""
        delivery.lost = True
        self._admit.put(delivery)

    def _end_in_celerys_order(self, ended: Ended, task: CeleryTask) -> None:
        """Send a job's follow-up tasks, then write its result, if its claim is still ours or none is needed."""
        delivery = ended.delivery
        claim = [(delivery.job, delivery.token)]
        if delivery.token and not self._insist(lambda: self._store.renew(claim))[0]:
            self._lose(delivery)
            return
        if delivery.began and not delivery.start_stored:
            self._insist(lambda: self._store.start([(delivery.job, delivery.token, delivery.started)]))
        self._held.remove(delivery)
        task.finish(ended.outcome, delivery.token, None)
        self._counters.count([ended])

    def _drop(self, delivery: Delivery) -> None:
        """Acknowledge a job that had already ended. Its worker may have died before a chord's count."""
        meta = self._insist(lambda: self._store.result(delivery.job))
        failure = failure_of(meta) if meta is not None else None
        error = error_of_code(failure.code, failure.message) if failure is not None else None
        if delivery.task is not None:
            self._held.remove(delivery)
            delivery.task.drop(error)
            return
        assert self._queue is not None
        self._queue.acknowledge([delivery.tag])
        if self._held.remove(delivery):
            self._celery.report_release(delivery, error)

    def _bill(self, used: Sequence[Used]) -> None:
        """Count what was used, and charge it to the jobs whose tenants have a budget."""
        self._counters.use(used)
        dollars: dict[str, float] = {}
        for one in used:
            if one.delivery.ticket.tariffs.get(one.delivery.hardware_class) is not None:
                dollars[one.delivery.job] = dollars.get(one.delivery.job, 0.0) + one.dollars + one.time_dollars
        bills = [(job, uuid.uuid4().hex, sum_of) for job, sum_of in dollars.items()]
        if bills:
            self._insist(lambda: self._store.bill(bills))

    def _return(self, returned: Sequence[Returned]) -> None:
        """Return jobs to their queues. Runs that count are counted before."""
        counted = [one.delivery for one in returned if one.counts]
        unstored = [one for one in counted if not one.start_stored]
        self._insist(lambda: self._store.start([(one.job, one.token, one.started) for one in unstored]))
        self._insist(lambda: self._store.release([(one.job, one.token) for one in counted], counts=True))
        for delivery in counted:
            delivery.retries += 1
        self._held.requeue([one.delivery for one in returned])

    def _ending(self, ended: Ended) -> StoredEnding:
        delivery, error = ended.delivery, ended.outcome.error
        if error is not None:
            state, meta = state_of(error), failure_meta(delivery.job, error)
        else:
            state, meta = JobState.SUCCEEDED, ended.outcome.meta
        return StoredEnding(
            delivery.job,
            state,
            meta,
            delivery.token,
            delivery.ticket.reply,
            ended.outcome.generated,
            started=repr(delivery.started) if delivery.began and not delivery.start_stored else "",
            device=self._device.label,
            tag=delivery.tag if self._queue is not None and self._queue.acknowledges_with_result else "",
        )

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        return insist(call, self._given_up, self._log_unavailable)

    def _log_unavailable(self, why: str) -> None:
        logger.warning("cannot write results", extra={"error": why})


def _followed(delivery: Delivery) -> bool:
    """Whether other tasks follow the job."""
    return delivery.task is not None and delivery.task.followed


_PAUSE = 0.5  # seconds before a retry while the store is unavailable


class StreamStage:
    """Stage 5, beside finish: appends pieces of generated answers to their streams without blocking the device.

    Pieces that arrive during a write are sent together.
    """

    def __init__(self, inbox: PieceQueue, store: Store) -> None:
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


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that ran: its seconds and its rows."""

    seconds: float
    rows: int


def note(
    job: Job, rows: Sequence[int], answers: Sequence[Row | TaxiwayError | None], batch: Batch
) -> TaxiwayError | None:
    """Record the rows' answers and their share of the batch in the job; returns the first error."""
    job.run_time += batch.seconds
    job.device_time += batch.seconds * len(rows) / batch.rows
    job.batch = max(job.batch, batch.rows)
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, TaxiwayError):
            return named_row(answer, row, job)
        job.answers[row] = answer
    return None


def answer_of(job: Job, device: Device, blobs: ResultBlobs) -> Result:
    """The job's result in plain values: a single value for a request of one row, a list or tensor for several.

    `blobs` keeps values that are too large for it.

    Raises:
        TaxiwayError: an output cannot be encoded.
    """
    hardware_class = job.delivery.hardware_class
    return Result(
        model=job.model.id,
        outputs={spec.name: to_wire(_output(job, spec), spec.name, blobs) for spec in _wanted(job)},
        single=job.single,
        report=RunReport(
            hardware_class=hardware_class,
            variant=job.variant,
            device=device.label,
            emulated=is_emulated(device.kind, job.hardware),
            batch=job.batch,
            queue_wait=max(0.0, job.delivery.started - job.ticket.accepted),
            run_time=job.run_time,
            cost=job.ticket.prices[hardware_class] / 3600 * job.device_time + job.billed,
            reason=job.ticket.reason,
            tokens=job.tokens,
        ),
    )


def generated_by(job: Job) -> tuple[int, ...]:
    """The length of each generated answer; empty for other models."""
    if not generates(job.model):
        return ()
    return tuple(length_of(answer) for answer in job.answers if answer is not None)


def _wanted(job: Job) -> list[TensorSpec]:
    """The requested outputs, in request order."""
    specs = {spec.name: spec for spec in job.model.outputs}
    return [specs[name] for name in job.outputs]


def _output(job: Job, spec: TensorSpec) -> Any:
    values = [answer[spec.name] for answer in job.answers if answer is not None]
    if job.single:
        return values[0]
    alike = all(isinstance(value, np.ndarray) and value.shape == values[0].shape for value in values)
    return np.stack(values, spec.batch_axis or 0) if alike else values


_SUCCEEDED = str(JobState.SUCCEEDED)


@dataclass(slots=True)
class _Class:
    """The counters of one class."""

    outcomes: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    latency: dict[Stage, list[float]] = field(default_factory=lambda: {stage: empty() for stage in STAGES})
    models: dict[str, Ran] = field(default_factory=dict)
    used: dict[str, Use] = field(default_factory=dict)
    dollars: dict[str, dict[str, float]] = field(default_factory=dict)


class OutcomeCounters:
    """Counters by hardware class.

    Args:
        device: the device's label.
        tenants: those that dollars are counted for by name; all others are counted together.
    """

    def __init__(self, device: str, tenants: Collection[str] = ()) -> None:
        self._device = device
        self._tenants = frozenset(tenants)
        self._classes: dict[str, _Class] = {}
        self._rejecting = threading.Lock()

    def count(self, ended: Iterable[Ended]) -> None:
        """Count jobs whose results were just written. Finish thread only."""
        now = time.time()
        for one in ended:
            self._count(one, now)
            if one.delivery.trail is not None:
                self._trace(one, one.delivery.trail, now)

    def reject(self, hardware_class: str) -> None:
        """Count a refused message of that class's queue, which no router signed. Thread-safe."""
        with self._rejecting:
            self._of(hardware_class).rejected += 1

    def use(self, used: Iterable[Used]) -> None:
        """Count what rows used of an endpoint. Finish thread only."""
        for one in used:
            known, model = self._of(one.delivery.hardware_class), one.delivery.ticket.model
            known.used[model] = known.used.get(model, Use()).plus(
                Use(1, one.aborted, one.tokens.input, one.tokens.cached, one.tokens.output)
            )
            self._pay(known, one.delivery, one.dollars)
            for stage, seconds in (("first", one.first), ("token", one.each)):
                if seconds is not None:
                    count(known.latency.setdefault(cast(Stage, stage), empty()), seconds)

    def _pay(self, known: _Class, delivery: Delivery, dollars: float) -> None:
        tenant = delivery.tenant if delivery.tenant in self._tenants else ""
        paid = known.dollars.setdefault(delivery.ticket.model, {})
        paid[tenant] = paid.get(tenant, 0.0) + dollars

    def totals(self) -> dict[str, Done]:
        """All counters, by class. Thread-safe."""
        return {
            name: Done(
                dict(one.outcomes),
                {stage: tuple(figures) for stage, figures in list(one.latency.items())},
                one.rejected,
                dict(one.models),
                dict(one.used),
                {model: dict(paid) for model, paid in list(one.dollars.items())},
            )
            for name, one in list(self._classes.items())
        }

    def _count(self, ended: Ended, now: float) -> None:
        delivery, error = ended.delivery, ended.outcome.error
        state = _SUCCEEDED if error is None else str(state_of(error))
        known = self._of(delivery.hardware_class)
        known.outcomes[state] = known.outcomes.get(state, 0) + 1
        if delivery.began:
            waited, latency = delivery.started - delivery.ticket.accepted, known.latency
            count(latency["queue"], waited)
            count(latency["run"], _ran(ended, now))
            count(latency["total"], waited + now - delivery.began)
            model = delivery.ticket.model
            known.models[model] = known.models.get(model, Ran()).plus(_share(ended, waited, now), Ran())
            if (result := ended.outcome.result) is not None:
                self._pay(known, delivery, result.report.cost - ended.outcome.billed)
                if ended.outcome.generated and result.report.tokens is None:  # those of endpoints are counted by row
                    generated = Use(output=sum(ended.outcome.generated))
                    known.used[model] = known.used.get(model, Use()).plus(generated)

    def _of(self, hardware_class: str) -> _Class:
        known = self._classes.get(hardware_class)
        return self._classes.setdefault(hardware_class, _Class()) if known is None else known

    def _trace(self, ended: Ended, trail: telemetry.Trail, now: float) -> None:
        delivery, error = ended.delivery, ended.outcome.error
        code = "" if error is None else error.code
        place = {"taxiway.job": delivery.job, "taxiway.class": delivery.hardware_class}
        telemetry.wait(trail, delivery.began or now, place)
        over = now
        if delivery.began:
            over = delivery.began + _ran(ended, now)
            span = telemetry.begin("run", trail, delivery.began, self._attributes(ended, place), SpanKind.CONSUMER)
            telemetry.end(span, over, code)
        telemetry.end(telemetry.begin("result", trail, over, place), now, code)

    def _attributes(self, ended: Ended, place: dict[str, str]) -> telemetry.Attributes:
        ticket, result = ended.delivery.ticket, ended.outcome.result
        ran = {"taxiway.batch": result.report.batch, "taxiway.cost_usd": result.report.cost} if result else {}
        variant = ticket.variants[ended.delivery.hardware_class]
        what = {"taxiway.model": ticket.model, "taxiway.variant": variant, "taxiway.device": self._device}
        return {**place, **what, **ran}


def _share(ended: Ended, waited: float, now: float) -> Ran:
    """One job's contribution to its model's counters."""
    total, result = waited + now - ended.delivery.began, ended.outcome.result
    if result is None:
        return Ran(failed=1, lost=total, last=now)
    rows = ended.outcome.rows
    batches = rows / max(result.report.batch, 1)
    return Ran(answered=1, rows=rows, batches=batches, queue=waited, run=_ran(ended, now), total=total, last=now)


def _ran(ended: Ended, now: float) -> float:
    """Seconds in batches; for a failed job, all seconds since it began."""
    result = ended.outcome.result
    return min(result.report.run_time, now - ended.delivery.began) if result else now - ended.delivery.began
