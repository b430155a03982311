"""A job's result, and the counters and spans of its outcome.

The result has the answers of the job's rows, and where, how long and at what cost they ran.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from opentelemetry.trace import SpanKind

from tasks import telemetry
from tasks.heartbeat import STAGES, Done, Ran, Stage, Use, count, empty, is_emulated
from tasks.models.catalogue import TensorSpec
from tasks.models.profiles import generates, length_of
from taxiway.contract.job import JobState, Result, RunReport, state_of
from taxiway.contract.values import ResultBlobs, to_wire
from taxiway.errors import TaxiwayError
from workers.device import Device
from workers.pipelines import Row
from workers.stages.decode import named_row
from workers.stages.job import Delivery, Ended, Job, Used


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
