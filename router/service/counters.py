"""What a router counts since it started.

Workers count outcomes and latencies since their start; `OutcomeCounters` sums their increments.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tasks.heartbeat import DeviceFacts, Done, Ran, Use, empty
from taxiway.contract.job import JobState

Counts = Mapping[tuple[str, ...], float]
"""Counts by the values of a metric's labels."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters since one router started."""

    # Counted by the router
    placed: Counts
    """By class and model."""
    moved: Counts
    """By source, target and kind."""
    yields: Counts = field(default_factory=dict)
    """Requests to yield, by class."""
    refused: Counts = field(default_factory=dict)
    """By error code."""
    ended: Counts = field(default_factory=dict)
    """By final state."""
    # Counted by the workers
    outcomes: Counts = field(default_factory=dict)
    """By class and final state."""
    latency: Mapping[tuple[str, ...], Sequence[float]] = field(default_factory=dict)
    """By class and stage: the figures of `tasks.heartbeat`."""
    dead_lettered: int = 0
    """Dead-lettered arrivals, counted by the router."""
    rejected: Counts = field(default_factory=dict)
    """Messages by class."""
    used: Mapping[tuple[str, str], Use] = field(default_factory=dict)
    """By class and model."""
    dollars: Counts = field(default_factory=dict)
    """By class, model and tenant."""
    webhooks: Counts = field(default_factory=dict)
    """Attempts by outcome, counted by the router."""


class OutcomeCounters:
    """Sums since this router's first update. They never decrease when workers come and go.

    `outcomes` counts jobs by class and final state. `latency` has the figures of `tasks.heartbeat` by class and stage.
    `rejected` counts messages by class. `models` has each model's sums over all classes, `used` those of endpoints by
    class and model, and `dollars` US dollars by class, model and tenant.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter()
        self.latency: dict[tuple[str, ...], list[float]] = {}
        self.rejected: Counter[tuple[str, ...]] = Counter()
        self.models: dict[str, Ran] = {}
        self.used: dict[tuple[str, str], Use] = {}
        self.dollars: dict[tuple[str, ...], float] = {}
        self._seen: dict[tuple[str, str], Done] = {}
        self._started = False

    def update(self, devices: Iterable[DeviceFacts]) -> None:
        """Add what live devices did since the last update. The first update sets the baseline."""
        for device in devices:
            for hardware_class, done in device.done.items():
                before = self._seen.get((device.worker, hardware_class), Done())
                self._seen[device.worker, hardware_class] = done
                if self._started:
                    self._add(hardware_class, done, before)
        self._started = True

    def _add(self, hardware_class: str, done: Done, before: Done) -> None:
        if _sum(done) < _sum(before):  # a new process under the same name
            before = Done()
        if done.rejected:
            self.rejected[hardware_class,] += done.rejected - before.rejected
        for outcome, jobs in done.outcomes.items():
            self.outcomes[hardware_class, outcome] += jobs - before.outcomes.get(outcome, 0)
        for model, ran in done.models.items():
            self.models[model] = self.models.get(model, Ran()).plus(ran, before.models.get(model, Ran()))
        self._add_use(hardware_class, done, before)
        for stage, figures in done.latency.items():
            sums = self.latency.setdefault((hardware_class, stage), empty())
            counted = before.latency.get(stage, empty())
            sums[:] = [one + now - was for one, now, was in zip(sums, figures, counted, strict=True)]

    def _add_use(self, hardware_class: str, done: Done, before: Done) -> None:
        for model, use in done.used.items():
            own = (hardware_class, model)
            self.used[own] = self.used.get(own, Use()).plus(use, before.used.get(model))
        for model, paid in done.dollars.items():
            for tenant, dollars in paid.items():
                key, was = (hardware_class, model, tenant), before.dollars.get(model, {}).get(tenant, 0.0)
                self.dollars[key] = self.dollars.get(key, 0.0) + dollars - was


LATELY = 300.0
"""Seconds for which `RecentOutcomes` counts a job that ended."""


class RecentOutcomes:
    """How many jobs `ended` in the last `LATELY` seconds, and how many of them `missed` their deadline."""

    def __init__(self) -> None:
        self.ended = self.missed = 0
        self._sums: deque[tuple[float, int, int]] = deque()

    def observe(self, outcomes: Iterable[Mapping[tuple[str, ...], int]], now: float) -> None:
        """Read counters whose labels end with a job's final state; `now` is of any monotonic clock."""
        counts = [(labels[-1], jobs) for counted in outcomes for labels, jobs in counted.items()]
        ended = sum(jobs for _, jobs in counts)
        missed = sum(jobs for state, jobs in counts if state == JobState.EXPIRED)
        self._sums.append((now, ended, missed))
        while self._sums[0][0] < now - LATELY:
            self._sums.popleft()
        _, ended_before, missed_before = self._sums[0]
        self.ended, self.missed = ended - ended_before, missed - missed_before


def _sum(done: Done) -> int:
    return sum(done.outcomes.values()) + done.rejected
