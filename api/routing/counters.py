"""What workers count, as sums since a router started, and what ended lately."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from tasks.heartbeat import DeviceFacts, Done, Use, empty
from taxiway.contract.job import JobState

Counts = Mapping[tuple[str, ...], float]
"""Counts by the values of a metric's labels."""

_TOKENS: Mapping[str, Callable[[Use], int]] = {
    "input": lambda use: use.input - use.cached,
    "cached": lambda use: use.cached,
    "output": lambda use: use.output,
    "excess": lambda use: use.excess,
}
"""Tokens by kind: `input` is what was not cached."""


class OutcomeCounters:
    """Sums of what workers count, since this router's first update. They never decrease when workers come and go."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter()  # jobs by class and final state
        self.latency: dict[tuple[str, ...], list[float]] = {}  # figures of `tasks.heartbeat` by class and stage
        self.rejected: Counter[tuple[str, ...]] = Counter()  # messages by class
        self.used: dict[tuple[str, str], Use] = {}  # of endpoints, by class and model
        self.dollars: dict[tuple[str, ...], float] = {}  # US dollars by class, model and tenant
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

    def counted(self) -> Mapping[str, Counts]:
        """The sums by metric."""
        return {
            "results": self.outcomes,
            "rejected": self.rejected,
            "usd": self.dollars,
            "tokens": {(*own, kind): of(use) for own, use in self.used.items() for kind, of in _TOKENS.items()},
            "aborts": {own: use.aborted for own, use in self.used.items()},
        }

    def _add(self, hardware_class: str, done: Done, before: Done) -> None:
        if _sum(done) < _sum(before):  # a new process under the same name
            before = Done()
        if done.rejected:
            self.rejected[hardware_class,] += done.rejected - before.rejected
        for outcome, jobs in done.outcomes.items():
            self.outcomes[hardware_class, outcome] += jobs - before.outcomes.get(outcome, 0)
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
    """How many jobs `ended` in the last `LATELY` seconds, and how many of them `missed` their deadline.

    `refused` counts the requests that no hardware could answer in time, and `deviceless` those without a live device.
    """

    def __init__(self) -> None:
        self.ended = self.missed = self.refused = self.deviceless = 0
        self._sums: deque[tuple[float, ...]] = deque()

    def observe(self, outcomes: Iterable[Mapping[tuple[str, ...], int]], refused: Sequence[int], now: float) -> None:
        """Read counters whose labels end with a job's final state; `now` is of any monotonic clock."""
        counts = [(labels[-1], jobs) for counted in outcomes for labels, jobs in counted.items()]
        ended = sum(jobs for _, jobs in counts)
        missed = sum(jobs for state, jobs in counts if state == JobState.EXPIRED)
        self._sums.append((now, ended, missed, *refused))
        while self._sums[0][0] < now - LATELY:
            self._sums.popleft()
        lately = (int(count - was) for count, was in zip(self._sums[-1], self._sums[0], strict=True))
        _, self.ended, self.missed, self.refused, self.deviceless = lately


def _sum(done: Done) -> int:
    return sum(done.outcomes.values()) + done.rejected
