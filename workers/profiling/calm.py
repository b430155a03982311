"""How long a batch took, and how long it waited for the processor meanwhile because others had it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CALM = 0.05
"""Share of a run's seconds that threads may have waited for the processor, for the run to count as undisturbed."""


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one batch, and seconds that this process's threads waited for a processor in them."""

    seconds: float
    waited: float

    @property
    def disturbed(self) -> float:
        """Share of its seconds in which it waited."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0


def timed(batch: Callable[[], object]) -> Run:
    """Run the batch."""
    waited, began = _waited(), time.perf_counter()
    batch()
    seconds = time.perf_counter() - began
    return Run(seconds, max(0.0, _waited() - waited))


def calmest(runs: Sequence[Run], fewest: int) -> list[Run]:
    """The undisturbed runs where there are at least `fewest`, else the `fewest` that were disturbed least."""
    calm = [run for run in runs if run.disturbed <= CALM]
    return calm if len(calm) >= fewest else sorted(runs, key=lambda run: run.disturbed)[:fewest]


def _waited() -> float:
    """Seconds that the process's threads have waited on run queues (proc(5): schedstat); 0 where nothing tells."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel keeps no such figures
            continue
    return total / 1e9
