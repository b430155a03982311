"""The jobs whose variant is not loaded, and the load that runs for some of them while the device runs other batches."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tasks.catalogue import Model
from tasks.facts import variant_key
from taxiway.errors import ExecutionError, TaxiwayError
from workers.executor import Executor, Loaded
from workers.residency import InUseError
from workers.work import Job

LOAD_AT_MOST = 3600.0
"""Seconds of a load that count as progress: a download, and a recipe, which has 1,800 s. Longer ones hang."""

LEAVE = 5.0
"""Seconds that a worker which stops lets a load have, so that no native code is cut off where it need not be."""

Urgency = tuple[float, float]
"""A job's deadline, and when it came: the least goes first."""

Lined = Callable[[Urgency], Collection[str]]
"""Gives the variants that jobs at least as urgent wait for in lanes: they keep their memory until these have run."""


@dataclass(slots=True)
class _Load:
    """One load: its thread, and at last what came of it."""

    key: str
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
        self._lost: dict[str, tuple[Model, str]] = {}
        self._load: _Load | None = None
        self._must_end_by = math.inf
        self._blocked: Urgency | None = None
        self.rows = 0

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

    def replace(self, model: Model, variant: str) -> None:
        """Load a variant again that was lost, once no job waits for a load."""
        self._lost[variant_key(model.id, variant)] = model, variant

    def goes_ahead(self, urgency: Urgency) -> bool:
        """Whether what is so urgent may run before those that wait for the memory which it holds."""
        return self._blocked is None or urgency <= self._blocked

    def finish(self) -> list[Job]:
        """The jobs whose variant is loaded since the last call; those of one that failed end."""
        if self._load is None or self._load.outcome is None:
            return []
        key, outcome = self._load.key, self._load.outcome
        self._load, self._must_end_by = None, math.inf
        if isinstance(outcome, ExecutionError):
            self._fail(self._over(key), outcome)
            return []
        self._executor.keep(outcome)
        return self._over(key)

    def begin(self, lined: Lined) -> None:
        """Load for the most urgent job that memory can be had for, unless a load runs."""
        if self._load is not None:
            return
        self._blocked = None
        first = {key: min(map(_urgency, jobs)) for key, jobs in self._waiting.items()}
        for key in sorted(first, key=lambda key: (first[key], key)):
            job = self._waiting[key][0]
            try:
                self._executor.make_room(job.model, job.variant, keeping=lined(first[key]))
            except InUseError:
                self._blocked = self._blocked or first[key]
            except ExecutionError as error:
                self._fail(self._over(key), error)
            else:
                self._start(key, job.model, job.variant)
                return
        self._begin_lost(lined((math.inf, math.inf)))

    def _begin_lost(self, keeping: Collection[str]) -> None:
        """Load one of the variants that were lost; one that finds no room is loaded when a job asks for it."""
        while self._lost and self._load is None:
            key, (model, variant) = self._lost.popitem()
            if key in self._waiting or self._executor.ready(model, variant) is not None:
                continue
            with suppress(InUseError, ExecutionError):  # the executor has said why
                self._executor.make_room(model, variant, keeping=keeping)
                self._start(key, model, variant)

    def give_up(self) -> list[Job]:
        """The jobs that wait for a load, and wait no more."""
        self._blocked = None
        self._lost.clear()
        return [job for key in list(self._waiting) for job in self._over(key)]

    def leave(self) -> None:
        """Begin no other load, and wait a little for the one that runs."""
        if self._load is not None and self._load.thread is not None:
            self._load.thread.join(LEAVE)

    def _start(self, key: str, model: Model, variant: str) -> None:
        load = _Load(key)

        def run() -> None:
            try:
                load.outcome = self._executor.open(model, variant)
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
        return jobs


def _urgency(job: Job) -> Urgency:
    return job.deadline, job.arrived
