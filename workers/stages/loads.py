"""The jobs whose variant is not loaded, and the load that runs for some of them while the device runs other batches."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tasks.heartbeat import variant_key
from tasks.models.catalogue import Model
from taxiway.errors import ExecutionError, TaxiwayError
from workers.decide.residency import InUseError
from workers.executor import Executor, Loaded
from workers.stages.job import Job
from workers.stages.queues import patient_seconds

LOAD_AT_MOST = 3600.0
"""Seconds of a load that count as progress: a download, and a recipe, which has 1,800 s. Longer ones hang."""

LEAVE = 5.0
"""Seconds that a worker which stops lets a load have, so that no native code is cut off where it need not be."""

Urgency = tuple[float, float]
"""A job's deadline, and when it came: the least goes first."""

_LAST: Urgency = (math.inf, math.inf)

InLanes = Callable[[Urgency], Collection[str]]
"""Gives the variants of jobs in lanes that are at least as urgent: they keep their memory until these have run."""


@dataclass(slots=True)
class _Load:
    """One load: its thread, and at last what came of it. Where nothing waits, `rest` is what is tried if it fails."""

    key: str
    model: Model
    rest: Sequence[str] = ()
    thread: threading.Thread | None = None
    outcome: Loaded | ExecutionError | None = None


class Loads:
    """What waits for a load. One runs at a time, on a thread of its own. For the device thread, unless said.

    Args:
        wake: called on the load's thread when it has ended.
        fail: takes jobs whose variant cannot be had, and why.

    `rows` counts what waits; any thread may read it.
    """

    def __init__(
        self, executor: Executor, *, wake: Callable[[], None], fail: Callable[[Sequence[Job], TaxiwayError], None]
    ) -> None:
        self._executor = executor
        self._wake = wake
        self._fail = fail
        self._waiting: dict[str, list[Job]] = {}
        self._wanted: list[tuple[Model, Sequence[str]]] = []
        self._load: _Load | None = None
        self._must_end_by = math.inf
        self._blocked: Urgency | None = None
        self.rows = 0
        self.patient = 0.0

    @property
    def ended(self) -> bool:
        """Whether a load has ended, and `finish` was not called since."""
        return self._load is not None and self._load.outcome is not None

    def hung(self, now: float) -> bool:
        """Whether the load takes so long that it will not end. Any thread may ask."""
        return now > self._must_end_by

    def wait(self, job: Job) -> None:
        """Let a job wait for its variant."""
        self._waiting.setdefault(job.key, []).append(job)
        self.rows += len(job.rows)
        self.patient += patient_seconds([job], self._executor)

    def want(self, model: Model) -> None:
        """Load one variant of a model that no job waits for, once none waits for another: the fastest that loads."""
        self._wanted.append((model, self._executor.fastest_first(model)))

    def replace(self, model: Model, variant: str) -> None:
        """Load a variant again that was lost, once no job waits for a load."""
        if (model, [variant]) not in self._wanted:
            self._wanted.append((model, [variant]))

    def drop_outdated(self) -> list[Job]:
        """The jobs whose model the catalogue has no more as they were read; they wait no more."""
        self._wanted = [one for one in self._wanted if self._executor.is_current(one[0])]
        dropped = []
        for key, jobs in list(self._waiting.items()):
            old = [job for job in jobs if not self._executor.is_current(job.model)]
            dropped += old
            self.rows -= sum(len(job.rows) for job in old)
            self.patient -= patient_seconds(old, self._executor)
            self._waiting[key] = [job for job in jobs if job not in old]
            if not self._waiting[key]:
                del self._waiting[key]
        return dropped

    def goes_ahead(self, urgency: Urgency) -> bool:
        """Whether what is so urgent may run before those that wait for the memory which it holds."""
        return self._blocked is None or urgency <= self._blocked

    def finish(self) -> list[Job]:
        """The jobs whose variant is loaded since the last call; those of one that failed end."""
        if self._load is None or self._load.outcome is None:
            return []
        load, outcome = self._load, self._load.outcome
        self._load, self._must_end_by = None, math.inf
        if not self._executor.is_current(load.model):  # it was replaced meanwhile: who waits does so for the new one
            if isinstance(outcome, Loaded):
                outcome.runtime.unload()
            return []
        if isinstance(outcome, ExecutionError):
            self._fail(self._over(load.key), outcome)
            if load.rest:
                self._wanted.insert(0, (load.model, load.rest))
            return []
        self._executor.keep(outcome)
        return self._over(load.key)

    def begin(self, in_lanes: InLanes) -> None:
        """Load for the most urgent job that memory can be had for, unless a load runs."""
        if self._load is not None:
            return
        self._blocked = None
        first = {key: min(map(_urgency, jobs)) for key, jobs in self._waiting.items()}
        for key in sorted(first, key=lambda key: (first[key], key)):
            job = self._waiting[key][0]
            try:
                self._executor.make_room(job.model, job.variant, keeping=in_lanes(first[key]))
            except InUseError:
                self._blocked = self._blocked or first[key]
            except ExecutionError as error:
                self._fail(self._over(key), error)
            else:
                self._start(_Load(key, job.model), job.variant)
                return
        self._begin_wanted(in_lanes(_LAST))

    def _begin_wanted(self, keeping: Collection[str]) -> None:
        """Load what is wanted and no job waits for; one that finds no room is loaded when a job asks for it."""
        while self._wanted and self._load is None:
            model, names = self._wanted.pop(0)
            keys = [variant_key(model.id, name) for name in names]
            if not names or self._waiting.keys() & set(keys) or any(self._executor.ready(model, one) for one in names):
                continue
            try:
                self._executor.make_room(model, names[0], keeping=keeping)
            except InUseError:
                continue
            except ExecutionError:  # the executor has said why
                self._wanted.insert(0, (model, names[1:]))
            else:
                self._start(_Load(keys[0], model, names[1:]), names[0])

    def give_up(self) -> list[Job]:
        """The jobs that wait for a load, and wait no more."""
        self._blocked = None
        self._wanted.clear()
        return [job for key in list(self._waiting) for job in self._over(key)]

    def leave(self) -> None:
        """Begin no other load, and wait a little for the one that runs."""
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

    def _over(self, key: str) -> list[Job]:
        """The jobs that waited for the variant, and wait no more."""
        jobs = self._waiting.pop(key, [])
        self.rows -= sum(len(job.rows) for job in jobs)
        self.patient = self.patient - patient_seconds(jobs, self._executor) if self._waiting else 0.0
        return jobs


def _urgency(job: Job) -> Urgency:
    return job.deadline, job.arrived
