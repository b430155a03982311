"""Jobs that wait on a device for their variant, which is loaded while the device runs other batches."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tasks.heartbeat import variant_key
from tasks.models.model import Model
from taxiway.contract.keys import LEVELS, PATIENT
from taxiway.errors import ExecutionError, TaxiwayError
from workers.decide.residency import InUseError, Resident, spared_for
from workers.executor import Executor
from workers.learned import Loaded
from workers.stages.job import RunningJob, Urgency

LOAD_AT_MOST = 3600.0
"""Time limit in seconds of a load, after which it counts as hung: a download, and a recipe with up to 1,800 s."""

LEAVE = 5.0
"""Seconds that a stopping worker waits for a load, to avoid interrupting native code."""

_LAST: Urgency = (LEVELS, math.inf, math.inf)

InLanes = Callable[[Urgency], Collection[str]]
"""Returns the variants of jobs in lanes that are at least as urgent; they stay loaded until these have run."""


@dataclass(slots=True)
class _Load:
    """One load: its thread and outcome. If no job waits for it, `rest` are the variants to try when it fails.

    `displaced` are the variants unloaded for it, if all jobs that wait for it are patient.
    """

    key: str
    model: Model
    rest: Sequence[str] = ()
    displaced: Sequence[Resident] = ()
    thread: threading.Thread | None = None
    outcome: Loaded | ExecutionError | None = None


class Loads:
    """Jobs that wait for loads. One runs at a time, on its own thread. Only who has the device's turn, unless stated.

    `rows` counts waiting rows; any thread may read it.

    Args:
        wake: called on the load's thread when it has ended.
        fail: called with jobs whose variant cannot be loaded, and the error.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        wake: Callable[[], None],
        fail: Callable[[Sequence[RunningJob], TaxiwayError], None],
    ) -> None:
        self._executor = executor
        self._wake = wake
        self._fail = fail
        self._waiting: dict[str, list[RunningJob]] = {}
        self._since: dict[RunningJob, float] = {}
        self._wanted: list[tuple[Model, Sequence[str]]] = []
        self._load: _Load | None = None
        self._must_end_by = math.inf
        self._newest: Loaded | None = None
        self._stays_until = 0.0  # the newest stays for its jobs: until it has run, or as long as its load took
        self._spared_until = 0.0  # patient jobs displace nothing that urgent ones use
        self._again = math.inf  # when a load that was put off for one of these may begin
        self.rows = 0
        self.patient = 0.0

    @property
    def ended(self) -> bool:
        """Whether a load has ended since the last call of `finish`."""
        return self._load is not None and self._load.outcome is not None

    def hung(self, now: float) -> bool:
        """Whether the running load counts as hung. Thread-safe."""
        return now > self._must_end_by

    def wait(self, job: RunningJob) -> None:
        """Add a job that waits for its variant."""
        self._waiting.setdefault(job.key, []).append(job)
        self._since[job] = time.monotonic()
        self.rows += len(job.rows)
        self.patient += job.patient

    def want(self, model: Model) -> None:
        """Load the fastest loadable variant of a model that no job waits for, once no job waits for any load."""
        self._wanted.append((model, self._executor.fastest_first(model)))

    def replace(self, model: Model, variant: str) -> None:
        """Reload a lost variant, once no job waits for a load."""
        if (model, [variant]) not in self._wanted:
            self._wanted.append((model, [variant]))

    def drop_outdated(self) -> list[RunningJob]:
        """Remove and return the jobs whose model has changed in the catalogue."""
        self._wanted = [one for one in self._wanted if self._executor.is_current(one[0])]
        dropped = []
        for key, jobs in list(self._waiting.items()):
            old = [job for job in jobs if not self._executor.is_current(job.model)]
            dropped += old
            self._let_go(old)
            self._waiting[key] = [job for job in jobs if job not in old]
            if not self._waiting[key]:
                del self._waiting[key]
        return dropped

    def finish(self) -> list[RunningJob]:
        """The jobs whose variant has loaded since the last call; jobs of a failed load are failed."""
        if self._load is None or self._load.outcome is None:
            return []
        load, outcome = self._load, self._load.outcome
        self._load, self._must_end_by = None, math.inf
        if not self._executor.is_current(load.model):  # it was replaced meanwhile: jobs wait for the new version
            if isinstance(outcome, Loaded):
                outcome.runtime.unload()
            return []
        if isinstance(outcome, ExecutionError):
            self._fail(self._over(load.key), outcome)
            if load.rest:
                self._wanted.insert(0, (load.model, load.rest))
            return []
        self._executor.keep(outcome)
        now = time.monotonic()
        self._newest, self._stays_until = outcome, now + outcome.seconds
        self._spared_until = max(self._spared_until, now + spared_for(outcome.seconds, load.displaced))
        return self._over(load.key)

    def begin(self, in_lanes: InLanes) -> None:
        """Start a load for the most urgent job whose variant can get memory, unless a load runs."""
        if self._load is not None:
            return
        now, newest = time.monotonic(), self._newest
        new = {newest.key} if newest is not None and not newest.ran and now < self._stays_until else set()
        self._again = math.inf
        first = {key: min(job.urgency for job in jobs) for key, jobs in self._waiting.items()}
        for key in sorted(first, key=lambda key: (first[key], key)):
            job, patient = self._waiting[key][0], first[key][0] >= PATIENT
            keeping, sparing = new.union(in_lanes(first[key])), patient and now < self._spared_until
            try:
                leaving = self._executor.make_space(job.model, job.variant, keeping=keeping, sparing=sparing)
            except InUseError:
                until = [self._stays_until] * len(new) + [self._spared_until] * sparing
                self._again = min([self._again, *until])
            except ExecutionError as error:
                self._fail(self._over(key), error)
            else:
                self._start(_Load(key, job.model, displaced=leaving if patient else ()), job.variant)
                return
        self._begin_wanted(in_lanes(_LAST))

    @property
    def pause(self) -> float:
        """Seconds until a load that was put off may begin; infinite if none was."""
        return max(self._again - time.monotonic(), 0.0)

    def _begin_wanted(self, keeping: Collection[str]) -> None:
        """Start a wanted load that no job waits for; without memory it is loaded when a job needs it."""
        while self._wanted and self._load is None:
            model, names = self._wanted.pop(0)
            keys = [variant_key(model.id, name) for name in names]
            if not names or self._waiting.keys() & set(keys) or any(self._executor.ready(model, one) for one in names):
                continue
            try:
                self._executor.make_space(model, names[0], keeping=keeping)
            except InUseError:
                continue
            except ExecutionError:  # logged by the executor
                self._wanted.insert(0, (model, names[1:]))
            else:
                self._start(_Load(keys[0], model, names[1:]), names[0])

    def give_up(self) -> list[RunningJob]:
        """Remove and return all jobs that wait for a load."""
        self._wanted.clear()
        return [job for key in list(self._waiting) for job in self._over(key)]

    def leave(self) -> None:
        """Start no more loads, and wait briefly for the running one."""
        if self._load is not None and self._load.thread is not None:
            self._load.thread.join(LEAVE)

    def _start(self, load: _Load, variant: str) -> None:
        def run() -> None:
            try:
                load.outcome = self._executor.open(load.model, variant)
            except ExecutionError as error:
                load.outcome = error
            self._wake()

        self._load, self._must_end_by = load, time.monotonic() + LOAD_AT_MOST
        load.thread = threading.Thread(target=run, name="taxiway-load", daemon=True)
        load.thread.start()

    def _over(self, key: str) -> list[RunningJob]:
        """Remove and return the jobs that wait for the variant."""
        jobs = self._waiting.pop(key, [])
        self._let_go(jobs)
        if not self._waiting:
            self.patient = 0.0  # no rounding errors are left
        return jobs

    def _let_go(self, jobs: Sequence[RunningJob]) -> None:
        now = time.monotonic()
        for job in jobs:
            job.load_time += now - self._since.pop(job)
            self.rows -= len(job.rows)
            self.patient -= job.patient
