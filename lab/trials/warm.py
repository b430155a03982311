"""The router with a tuner that knows arrivals from before the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lab.rows import joined
from simulator.policies.taxiway import TunedPolicy
from simulator.tuning.tuner import PLAYED_WINDOW
from simulator.tuning.twin import Window
from simulator.workload import Workload

HISTORY, HISTORY_PLAYS = 20_000, 600
"""Arrivals of the tuning on a history, and its plays at most: `steady` ends after about 200, and nothing waits."""


class WarmPolicy(TunedPolicy):
    """`TunedPolicy` that has a plan at once, by its history."""

    def __init__(self, workload: Workload, history: Workload, *, seed: int) -> None:
        super().__init__(workload, seed=seed)
        self._recorded, self._earlier = followed_by(history, workload)
        self._before, self._next_look = len(history), 0.0

    def _window(self, recorded: Workload, until: float) -> tuple[Window, int | None]:
        if self._tuner.assignment is not None:
            return super()._window(recorded, until)
        self._played = until - PLAYED_WINDOW
        return Window.latest(recorded, until, self._earlier, HISTORY), HISTORY_PLAYS


def followed_by(earlier: Workload, later: Workload) -> tuple[Workload, float]:
    """Both workloads, one after the other, on the later one's fleet and with its numbers of models.

    Returns them and the seconds by which the later one was shifted.
    """
    span = float(earlier.trace.arrival[-1])
    after = replace(later.trace, arrival=later.trace.arrival + span)
    return Workload(joined([after, earlier.trace]), later.fleet, np.concatenate([earlier.level, later.level])), span
