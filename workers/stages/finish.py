"""Stage 4: makes results, writes them in bulk, announces and acknowledges them. Beside it, answers are streamed.

A plain job's result, announcement and acknowledgement are one script. Jobs that Celery's consumer received are then
finished by Celery. If other tasks follow the job (a link, a chain, a chord), Celery's order holds: they are sent before
its result is written.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from broker.valkey.class_queue import ClassQueue
from broker.valkey.jobs import Ending as StoredEnding
from broker.valkey.jobs import Verdict
from broker.valkey.worker_store import WorkerStore, insist
from tasks.heartbeat import is_emulated, variant_key
from tasks.models.model import generates
from tasks.models.profiles import length_of
from tasks.models.tensor_spec import TensorSpec
from taxiway.backoff import Outage
from taxiway.contract.job import JobState, Result, RunReport, failure_meta, failure_of, state_of, success_meta
from taxiway.contract.limits import LARGE, check_depth
from taxiway.contract.stream import total
from taxiway.contract.values import Blobs, to_wire
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    DeadlineExceededError,
    ExecutionError,
    JobCancelledError,
    TaxiwayError,
    error_of_code,
)
from workers.decide.faults import describe
from workers.device import Device
from workers.learned import DeviceVariants
from workers.stages.job import (
    REVOKED,
    CeleryTask,
    Delivery,
    Dropped,
    Ended,
    Ending,
    Returned,
    RunningJob,
    TextRun,
    Used,
    taken,
)
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import PieceQueue, Shared

_NO_TEXT = TextRun()


def answer_of(job: RunningJob, device: Device, blobs: Blobs) -> Result:
    """The job's result in plain values: a single value for a request of one row, a list or tensor for several.

    `blobs` keeps values that are too large for it.

    Raises:
        TaxiwayError: an output cannot be encoded.
    """
    hardware_class = job.delivery.hardware_class
    waited = max(0.0, job.delivery.started - job.ticket.accepted)
    generation = job.generation or _NO_TEXT
    before = generation.kept.parts
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
            queue_wait=waited,
            run_time=job.run_time + sum(part.seconds for part in before),
            cost=device.prices.get(hardware_class, job.ticket.prices[hardware_class]) / 3600 * job.device_time
            + job.billed
            + sum(part.cost for part in before),
            reason=job.ticket.reason,
            tokens=job.tokens if not before else total(generation.parts),
            parts=generation.parts if before or generation.kept.text else (),
            load_time=min(job.load_time, waited),  # by two clocks
            redone=job.times.redone,
            checkpoints="; ".join(job.times.notes),
        ),
    )


def _wanted(job: RunningJob) -> list[TensorSpec]:
    """The requested outputs, in request order."""
    specs = {spec.name: spec for spec in job.model.outputs}
    return [specs[name] for name in job.outputs]


def _output(job: RunningJob, spec: TensorSpec) -> Any:
    values = [answer[spec.name] for answer in job.answers if answer is not None]
    if job.single:
        return values[0]
    alike = all(isinstance(value, np.ndarray) and value.shape == values[0].shape for value in values)
    return np.stack(values, spec.batch_axis or 0) if alike else values


logger = logging.getLogger(__name__)

_ENDINGS_A_WRITE = 64
"""Endings per write: their clients and routers proceed while the store writes the next ones."""

_SAY_NOTHING = (DeadlineExceededError, JobCancelledError, DeadLetteredError)
"""Errors whose texts have nothing of a job's inputs."""

Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class FinishStage:
    """Ends deliveries."""

    shared: Shared
    counters: WorkerOutcomes
    class_queue: ClassQueue
    """Acknowledges the messages of jobs that had ended before."""
    variants: DeviceVariants
    """Learn how long jobs took."""
    _given_up: threading.Event = field(default_factory=threading.Event)
    _outage: Outage = field(default_factory=lambda: Outage(logger, "cannot write results"))
    _started: list[Delivery] = field(default_factory=list)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def report_started(self, deliveries: list[Delivery]) -> None:
        """Soon report running jobs to the store, and send pending events. Thread-safe."""
        self._started = deliveries
        self.shared.endings.wake()

    def end_here(self, endings: Sequence[Ending]) -> None:
        """Write a plain job's answer on the caller's thread; anything else is put in the queue. Thread-safe.

        One attempt: what the store does not take is put in the queue too, and the finish thread insists.
        """
        written, job = False, endings[0] if len(endings) == 1 else None
        if isinstance(job, RunningJob) and job.delivery.task is None and self._writing.acquire(blocking=False):
            try:
                written = not job.delivery.ended and self._write_once(self._reported(job))
            finally:
                self._writing.release()
        if not written:
            self.shared.endings.put(endings)

    def stop(self) -> None:
        """End after the queued endings, or if the store does not answer."""
        self._given_up.set()
        self.shared.endings.close()

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            endings, last = self.shared.endings.take()
            for start in range(0, len(endings), _ENDINGS_A_WRITE):
                some = endings[start : start + _ENDINGS_A_WRITE]
                with self._writing:
                    self._finish(some)
                self.shared.endings.wrote(len(some))
            if self._started or not endings:
                self._report()
            self.shared.celery.flush_full_group()
            if last:
                self.shared.celery.flush_events()
                return

    def _report(self) -> None:
        started, self._started = [delivery for delivery in self._started if not delivery.ended], []
        try:
            self.shared.store.start([(delivery.job, delivery.token, delivery.started) for delivery in started])
        except BrokerUnavailableError:
            return
        for delivery in started:
            delivery.start_stored = True
        self.shared.celery.flush_events()

    def _finish(self, endings: Sequence[Ending]) -> None:
        ended = [one for ending in endings if (one := self._outcome(ending)) is not None]
        try:
            if kept := {ref: content for one in ended for ref, content in one.blobs.items()}:
                self._insist(lambda: self.shared.store.keep_blobs(kept))  # before the results that reference them
            self._write([one for one in ended if one.delivery.task is None or not one.delivery.task.followed])
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
        if delivery.ended or isinstance(ending, (Dropped, Returned, Used)):
            return None
        if isinstance(ending, RunningJob):
            return self._reported(ending)
        if ending.error is not REVOKED or delivery.task is None:
            return self._sealed(ending)
        self.shared.held.remove(delivery)
        delivery.task.revoke()
        return None

    def _reported(self, job: RunningJob) -> Ended:
        """The outcome of a job with all rows answered."""
        sealed = job.delivery.sealed
        inline = self.shared.store.limits.inline
        blobs = Blobs(inline, LARGE, linked=True) if sealed is None else Blobs(sys.maxsize, linked=True)
        try:
            result = answer_of(job, self.variants.device, blobs)
            if sealed is not None and self.shared.seal_keys is not None:
                result = self.shared.seal_keys.seal_result(result, sealed)
            meta, answers = success_meta(job.delivery.job, result), [one for one in job.answers if one is not None]
            check_depth({"outputs": result.outputs}, "outputs", meta)
            return Ended(
                job.delivery,
                result,
                meta=meta,
                blobs=blobs.contents,
                rows=len(job.rows),
                billed=job.billed,
                generated=tuple(length_of(answer) for answer in answers) if generates(job.model) else (),
            )
        except Exception as error:  # a model's outputs may have any type and nesting
            failed = ExecutionError(f"{job.variant}: an output cannot be encoded: {describe(error)}")
            return self._sealed(Ended(job.delivery, error=failed))

    def _sealed(self, ended: Ended) -> Ended:
        """The outcome, with its error sealed if the inputs were; not one that says nothing of them."""
        sealed, error = ended.delivery.sealed, ended.error
        if sealed is None or self.shared.seal_keys is None or error is None or isinstance(error, _SAY_NOTHING):
            return ended
        return msgspec.structs.replace(ended, error=self.shared.seal_keys.seal_error(error, sealed))

    def _write(self, ended: Sequence[Ended]) -> None:
        """Write the results of jobs without follow-up tasks, in bulk."""
        if not ended:
            return
        endings = [self._ending(one) for one in ended]
        self._settle(ended, endings, self._insist(lambda: self.shared.store.finish(endings)))

    def _write_once(self, ended: Ended) -> bool:
        """Write a result without blobs; whether the store answered that it is written."""
        ending = self._ending(ended)
        if ended.blobs:
            return False
        try:
            written = self.shared.store.finish([ending])
        except BrokerUnavailableError:
            return False
        if written[0]:
            self._settle([ended], [ending], written)
        return written[0]

    def _settle(self, ended: Sequence[Ended], endings: Sequence[StoredEnding], written: Sequence[bool]) -> None:
        """Count and report the results that were written, and find out why others were not."""
        pairs = list(zip(ended, endings, written, strict=True))
        self.counters.count(one for one, _, done in pairs if done)
        self._judge([one.delivery for one, _, done in pairs if done and one.error is None])
        self._judge([one.delivery for one, _, done in pairs if done and _expired(one.error)], expired=True)
        for one, ending, done in pairs:
            if done:
                self._written(one, ending)
            elif one.delivery.claim is None or not one.delivery.token:
                self._drop(one.delivery)  # an ending that needs no claim is refused only if the job has ended
            else:
                self._write_again(one)

    def _judge(self, deliveries: Sequence[Delivery], *, expired: bool = False) -> None:
        """Count how their placements' promises held; the worst job of each kind teaches the device, as they go by bulk.

        A job that was moved, or that Celery held back, says nothing of this device.
        """
        now, worst = time.time(), dict[tuple[str, int], tuple[float, float]]()
        for delivery in deliveries:
            ticket, promise = delivery.ticket, delivery.ticket.promise
            if promise is None or delivery.task is not None:
                continue
            seconds = taken(delivery, now, expired=expired)
            self.counters.judge(promise, seconds, expired=expired)
            if promise.hardware_class == delivery.hardware_class:
                kind = variant_key(ticket.model, ticket.variants[promise.hardware_class]), ticket.level
                worst[kind] = max(worst.get(kind, (0.0, promise.expected)), (seconds, promise.expected))
        for (key, level), (seconds, expected) in worst.items():
            self.variants.judge(key, level, expected=expected, seconds=seconds)

    def _written(self, ended: Ended, ending: StoredEnding) -> None:
        """Report a result that is stored."""
        delivery = ended.delivery
        removed = self.shared.held.remove(delivery)
        if delivery.task is not None:
            delivery.task.finish(ended, delivery.token, ending)
        elif removed:
            self.shared.celery.report_end(ended)

    def _write_again(self, ended: Ended) -> None:
        """Write the result under a new claim, if the store lost the first one in a failover."""
        delivery = ended.delivery
        _, (claim,) = self._insist(lambda: self.shared.store.claim([(delivery.job, 0.0)]))
        if claim.verdict is not Verdict.RUN:
            self._lose(delivery)
            return
        delivery.claim = claim
        self._write([ended])

    def _lose(self, delivery: Delivery) -> None:
        """Claim a job again whose claim was lost: the new claim shows why, and whether the job runs again."""
        delivery.lost = True
        self.shared.admissions.put(delivery)

    def _end_in_celerys_order(self, ended: Ended, task: CeleryTask) -> None:
        """Send a job's follow-up tasks, then write its result, if its claim is still ours or none is needed."""
        delivery = ended.delivery
        claim = [(delivery.job, delivery.token)]
        if delivery.token and not self._insist(lambda: self.shared.store.renew(claim))[0]:
            self._lose(delivery)
            return
        if delivery.began and not delivery.start_stored:
            self._insist(lambda: self.shared.store.start([(delivery.job, delivery.token, delivery.started)]))
        self.shared.held.remove(delivery)
        task.finish(ended, delivery.token, None)
        self.counters.count([ended])

    def _drop(self, delivery: Delivery) -> None:
        """Acknowledge a job that had already ended. Its worker may have died before a chord's count."""
        meta = self._insist(lambda: self.shared.store.result(delivery.job))
        failure = failure_of(meta) if meta is not None else None
        error = error_of_code(failure.code, failure.message) if failure is not None else None
        self._judge([delivery] if _expired(error) else [], expired=True)
        if delivery.task is not None:
            self.shared.held.remove(delivery)
            delivery.task.drop(error)
            return
        self.class_queue.acknowledge([delivery.tag])
        if self.shared.held.remove(delivery):
            self.shared.celery.report_release(delivery, error)

    def _bill(self, used: Sequence[Used]) -> None:
        """Count what was used, and charge it to the jobs whose tenants have a budget."""
        self.counters.use(used)
        dollars: dict[str, float] = {}
        for one in used:
            if one.delivery.ticket.tariffs.get(one.delivery.hardware_class) is not None:
                dollars[one.delivery.job] = dollars.get(one.delivery.job, 0.0) + one.dollars + one.time_dollars
        bills = [(job, uuid.uuid4().hex, sum_of) for job, sum_of in dollars.items()]
        if bills:
            self._insist(lambda: self.shared.store.bill(bills))

    def _return(self, returned: Sequence[Returned]) -> None:
        """Return jobs to their queues. What is kept of them is stored before, and runs that count are counted."""
        kept = [(one.delivery.job, one.delivery.token, one.kept) for one in returned if one.kept is not None]
        self._insist(lambda: self.shared.store.keep(kept))
        counted = [one.delivery for one in returned if one.counts]
        unstored = [one for one in counted if not one.start_stored]
        self._insist(lambda: self.shared.store.start([(one.job, one.token, one.started) for one in unstored]))
        self._insist(lambda: self.shared.store.release([(one.job, one.token) for one in counted], counts=True))
        for delivery in counted:
            delivery.retries += 1
        self.shared.held.requeue([one.delivery for one in returned])

    def _ending(self, ended: Ended) -> StoredEnding:
        delivery, error = ended.delivery, ended.error
        if error is not None:
            state, meta = state_of(error), failure_meta(delivery.job, error)
        else:
            state, meta = JobState.SUCCEEDED, ended.meta
        return StoredEnding(
            delivery.job,
            state,
            meta,
            delivery.token,
            delivery.ticket.reply,
            ended.generated,
            started=repr(delivery.started) if delivery.began and not delivery.start_stored else "",
            device=self.variants.device.label,
            tag=delivery.tag,
        )

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        return insist(call, self._given_up, self._outage)


def _expired(error: TaxiwayError | None) -> bool:
    """Whether the job's deadline had passed."""
    return isinstance(error, DeadlineExceededError)


class StreamStage:
    """Stage 5: appends pieces of generated answers to their streams without blocking the device.

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
