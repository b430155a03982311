"""The router with its tuner: a plan from the fleet's twin, per-request placement where there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from simulator.policies.blind import LIVE
from simulator.policies.policy import Held, Shift
from simulator.policies.taxiway import Taxiway
from simulator.pool import Pool
from simulator.reader import model_of
from simulator.traces.workload import Job, Workload, followed_by
from simulator.tuning.planning import plan_of
from simulator.tuning.tuner import FIRST, FIRST_PLAYS, PLAYS, WINDOW, Decision, Tuner
from simulator.tuning.twin import MOST, Conditions, Window

RECENT = 30.0
"""Seconds of live answers that an alarm looks at."""

HISTORY, HISTORY_PLAYS = 20_000, 150
"""Arrivals and plays of the tuning on a history, before the trace begins: nothing waits for it."""


class Tuned(Taxiway):
    """`Taxiway` under a plan that is tuned while the trace runs.

    `history` are arrivals from before the trace. Without one, placement is per request until the first plan.
    """

    def __init__(self, workload: Workload, *, seed: int = 0, history: Workload | None = None) -> None:
        super().__init__(workload, seed=seed)
        self._recorded, self._earlier = workload, 0.0
        if history is not None:
            self._recorded, self._earlier = followed_by(history, workload)
        self._tuner = Tuner(workload.fleet, seed)
        self._handed_over = 0.0
        self._live: deque[tuple[float, bool]] = deque()
        self._trim = False
        self.decisions: list[tuple[float, Decision]] = []

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        self._tune(pools, now)
        return super().choose(job, pools, now)

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`: under a plan, waiting work stays where it is."""
        if not self._planned(now):
            yield from super().look(pools, now)
            return
        yield from self._release(pools, now)
        if self._trim and self._tuner.assignment is not None:
            self._trim = False
            for pool in pools:
                if pool.index not in self._tuner.assignment.used():
                    pool.release()

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        if job.service == LIVE:
            self._live.append((job.arrival + seconds, seconds <= job.deadline))
        super().ended(job, pool, seconds)

    def _planned(self, now: float) -> bool:
        return self._tuner.assignment is not None and now > self._handed_over

    def _tune(self, pools: Sequence[Pool], now: float) -> None:
        """Make or renew the plan if that is due."""
        first = self._tuner.assignment is None
        if now < FIRST and not (first and self._earlier):
            return
        while self._live and self._live[0][0] < now - RECENT:
            self._live.popleft()
        pace = tuple(pool.pace for pool in pools)
        if not self._tuner.due(now, pace, [timely for _, timely in self._live]):
            return
        span, most, plays = WINDOW, MOST, PLAYS
        if first:
            span, most, plays = (
                (self._earlier, HISTORY, HISTORY_PLAYS) if self._earlier else (WINDOW, MOST, FIRST_PLAYS)
            )
        window = Window.latest(self._recorded, now + self._earlier, span, most)
        if not window.jobs:
            return
        conditions = Conditions(
            powered=tuple(pool.powered for pool in pools), available=tuple(pool.available for pool in pools), pace=pace
        )
        decision = self._tuner.tune(window, conditions, now, plays=plays)
        self._adopt(decision, pools, now)
        self._reader.follow(
            plan_of(decision, window.workload.fleet, window, number=len(self.decisions), made=now, name_of=_name)
        )

    def _adopt(self, decision: Decision, pools: Sequence[Pool], now: float) -> None:
        """Follow the decision; an assignment that is kept may need other numbers of devices by now."""
        self.decisions.append((now, decision))
        if decision.adopted:
            self._trim = True
            self._handed_over = max((move.latest for move in decision.moves.values()), default=now)
        for pool, rule, devices in zip(pools, decision.assignment.rules, decision.devices, strict=True):
            pool.follow(rule, devices)
            for _ in range(min(devices, pool.available) - pool.powered):
                pool.switch_on(now, after=pool.start)


def _name(model: str) -> tuple[str, None]:
    return model_of(model).id, None
