"""The fleet's outcomes and latencies: workers count since their start, and this sums their increments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tasks.heartbeat import DeviceFacts, Done, Ran, empty


class OutcomeCounters:
    """Sums since this router's first update. They never decrease when workers come and go.

    `outcomes` counts jobs by class and final state. `latency` has the figures of `tasks.heartbeat` by class and stage.
    `rejected` counts messages by class. `models` has each model's sums over all classes.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter()
        self.latency: dict[tuple[str, ...], list[float]] = {}
        self.rejected: Counter[tuple[str, ...]] = Counter()
        self.models: dict[str, Ran] = {}
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
        for stage, figures in done.latency.items():
            sums = self.latency.setdefault((hardware_class, stage), empty())
            counted = before.latency.get(stage, empty())
            sums[:] = [one + now - was for one, now, was in zip(sums, figures, counted, strict=True)]


def _sum(done: Done) -> int:
    return sum(done.outcomes.values()) + done.rejected
