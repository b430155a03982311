"""The lanes of a device: which batch runs next, and how much waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from workers.decide.batcher import BatchPolicy
from workers.decide.occupation import Stint
from workers.executor import Executor, most_rows
from workers.learned import Loaded
from workers.stages.job import RunningJob
from workers.stages.lane import Key, Lane, Urgency, key_of, urgency

_IDLE_WAIT = 60.0  # seconds; any arrival ends the wait


class Lanes:
    """Rows that wait for the device, by lane. Only who has its turn changes them; any thread may iterate.

    Args:
        clock: gives the store's time less this host's.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._clock = clock
        self._lanes: dict[Key, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        """Those that have rows."""
        return (lane for lane in list(self._lanes.values()) if lane)

    def __bool__(self) -> bool:
        return any(self._lanes.values())

    def add(self, job: RunningJob, loaded: Loaded) -> None:
        """Add the waiting rows of a prepared job."""
        for bucket in job.waiting:
            self._lane(loaded, bucket, job).add(job)

    def remove(self, job: RunningJob) -> None:
        """Take the job's rows out."""
        for bucket in job.waiting:
            if (lane := self._lanes.get(key_of(job, bucket))) is not None:
                lane.remove(job)

    def served(self, lane: Lane, now: float) -> None:
        """The batch that was taken from a lane has been answered."""
        lane.answered(now)
        if lane.alone and not lane:
            del self._lanes[lane.key]

    def next(self, now: float) -> tuple[Lane | None, float]:
        """The lane whose batch runs now, or the seconds to wait for one.

        A batch waits for more rows only while the device would be idle, or run others of its level.
        """
        waits = [(lane.due(now, self._clock()), lane) for lane in self]
        due = [lane for wait, lane in waits if wait <= 0]
        if due:
            first, most_urgent = min(due, key=Lane.turn), min((lane for _, lane in waits), key=Lane.turn)
            return most_urgent if most_urgent.rank < first.rank else first, 0.0
        return None, max(min((wait for wait, _ in waits), default=_IDLE_WAIT), 0.0001)

    def more_urgent(self, job: RunningJob, now: float) -> Lane | None:
        """The lane with the most urgent due batch that runs in this process and precedes the job."""
        due = [lane for lane in self if not lane.alone and not lane.own_process and self._precedes(lane, job, now)]
        return min(due, key=Lane.turn, default=None)

    def variants(self, least: Urgency | None = None) -> set[str]:
        """The variants with jobs, or with some at least as urgent."""
        return {lane.variant for lane in self if least is None or lane.urgency() <= least}

    def stints(self) -> Iterator[Stint[RunningJob]]:
        """The waiting batches in running order, with a safe bound of their seconds."""
        surely = {loaded.key: self._executor.track(loaded).surely for loaded in self._executor.all_loaded()}
        for lane in sorted(self, key=Lane.turn):
            for jobs, seconds in lane.batches():
                yield jobs, seconds * surely.get(lane.variant, math.inf)

    def renew(self) -> None:
        """Predict by the profiles of what is loaded now."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane}
        known = {loaded.key: loaded.known for loaded in self._executor.all_loaded()}
        for lane in self:
            lane.profile = known[lane.variant].profile if lane.variant in known else lane.profile

    def _lane(self, loaded: Loaded, bucket: int, job: RunningJob) -> Lane:
        key = key_of(job, bucket)
        if key not in self._lanes:
            most = most_rows(job.hardware, loaded.variant)
            policy = BatchPolicy(most, job.hardware.max_wait, job.hardware.runs_at_most)
            pace = partial(self._executor.pace, loaded.key)
            retargeted = job.hardware is not self._executor.hardware
            profile, own_process = loaded.known.profile, loaded.interruptible is not None
            self._lanes[key] = Lane(key, policy, profile, pace, retargeted=retargeted, own_process=own_process)
        return self._lanes[key]

    def _precedes(self, lane: Lane, job: RunningJob, now: float) -> bool:
        return lane.urgency()[:2] < urgency(job)[:2] and lane.due(now, self._clock()) <= 0
