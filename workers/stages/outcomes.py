"""Counts what became of jobs, and how long they took, for heartbeats."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import cast

from opentelemetry.trace import SpanKind

from tasks import telemetry
from tasks.heartbeat import STAGES, Done, Stage, Use, count, empty
from tasks.ticket import Promise
from taxiway.contract.job import JobState, state_of
from workers.stages.job import Delivery, Ended, Used

_SUCCEEDED = str(JobState.SUCCEEDED)


@dataclass(slots=True)
class _Class:
    """The counters of one class."""

    outcomes: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    latency: dict[Stage, list[float]] = field(default_factory=lambda: {stage: empty() for stage in STAGES})
    used: dict[str, Use] = field(default_factory=dict)
    dollars: dict[str, dict[str, float]] = field(default_factory=dict)


class WorkerOutcomes:
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
            if one.delivery.parent is not None:
                self._trace(one, one.delivery.parent, now)

    def judge(self, promise: Promise, seconds: float, *, expired: bool) -> None:
        """Count a job that took so many seconds from its placement, an expired one at least.

        Of one that expired within "at most", it is unknown whether that would have held. Finish thread only.
        """
        if not expired or seconds > promise.at_most:
            count(self._of(promise.hardware_class).latency.setdefault("bound", empty()), seconds / promise.at_most)

    def reject(self, hardware_class: str) -> None:
        """Count a refused message of that class's queue, which no router signed. Thread-safe."""
        with self._rejecting:
            self._of(hardware_class).rejected += 1

    def use(self, used: Iterable[Used]) -> None:
        """Count what rows used of an endpoint. Finish thread only."""
        for one in used:
            known, model = self._of(one.delivery.hardware_class), one.delivery.ticket.model
            known.used[model] = known.used.get(model, Use()).plus(
                Use(1, one.aborted, one.tokens.input, one.tokens.cached, one.tokens.output, one.excess)
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
                dict(one.used),
                {model: dict(paid) for model, paid in list(one.dollars.items())},
            )
            for name, one in list(self._classes.items())
        }

    def _count(self, ended: Ended, now: float) -> None:
        delivery, error = ended.delivery, ended.error
        state = _SUCCEEDED if error is None else str(state_of(error))
        known = self._of(delivery.hardware_class)
        known.outcomes[state] = known.outcomes.get(state, 0) + 1
        if delivery.began:
            waited, latency = delivery.started - delivery.ticket.accepted, known.latency
            count(latency["queue"], waited)
            count(latency["run"], _ran(ended, now))
            count(latency["total"], waited + now - delivery.began)
            if (result := ended.result) is not None:
                self._pay(known, delivery, result.report.cost - ended.billed)
                if ended.generated and result.report.tokens is None:  # those of endpoints are counted by row
                    generated = Use(output=sum(ended.generated))
                    model = delivery.ticket.model
                    known.used[model] = known.used.get(model, Use()).plus(generated)

    def _of(self, hardware_class: str) -> _Class:
        known = self._classes.get(hardware_class)
        return self._classes.setdefault(hardware_class, _Class()) if known is None else known

    def _trace(self, ended: Ended, parent: telemetry.ParentSpan, now: float) -> None:
        delivery, error = ended.delivery, ended.error
        code = "" if error is None else error.code
        place = {"taxiway.job": delivery.job, "taxiway.class": delivery.hardware_class}
        telemetry.wait(parent, delivery.began or now, place)
        over = now
        if delivery.began:
            over = delivery.began + _ran(ended, now)
            span = telemetry.begin("run", parent, delivery.began, self._attributes(ended, place), SpanKind.CONSUMER)
            telemetry.end(span, over, code)
        telemetry.end(telemetry.begin("result", parent, over, place), now, code)

    def _attributes(self, ended: Ended, place: dict[str, str]) -> telemetry.Attributes:
        ticket, result = ended.delivery.ticket, ended.result
        ran = {"taxiway.batch": result.report.batch, "taxiway.cost_usd": result.report.cost} if result else {}
        variant = ticket.variants[ended.delivery.hardware_class]
        what = {"taxiway.model": ticket.model, "taxiway.variant": variant, "taxiway.device": self._device}
        return {**place, **what, **ran}


def _ran(ended: Ended, now: float) -> float:
    """Seconds in batches; for a failed job, all seconds since it began."""
    result = ended.result
    return min(result.report.run_time, now - ended.delivery.began) if result else now - ended.delivery.began
