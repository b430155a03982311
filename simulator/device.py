"""One device: what runs on it now, which models it holds, and since when it is on.

As a worker's device does (`workers/stages/device.py`), it runs one batch for each generating model. These take steps in
turn, and between two steps one batch of another model may run as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from simulator.fleet import Stepping, Timing, WholeBatches
from simulator.workload import SimulatedJob
from taxiway.contract.keys import LEVELS, PATIENT
from workers.decide.residency import Resident, Uses, evict, spared_for

_SAME_STEP = 1e-6
SAME_TIME = 1e-9
"""Seconds by which two instants differ at most that are the same."""


class Generation:
    """The running batch of one generating model: `rows` in it, and the tokens that are `cached` for them."""

    __slots__ = ("cached", "rows", "timing")

    def __init__(self, timing: Stepping) -> None:
        self.timing = timing
        self.rows = 0
        self.cached = 0.0


class DeviceRun:
    """All that runs on one device, from its first job to its last.

    Every row of every generating model gets one token a cycle, so a job's end is a number of cycles. While a prompt is
    read, a model is loaded or a whole batch runs, no row advances. `reserved` is the bytes that the rows' caches need
    at their longest.
    """

    __slots__ = (
        "_active",
        "_at",
        "_cycle",
        "_cycles",
        "_stalled",
        "_until",
        "began",
        "generations",
        "next_whole",
        "reserved",
        "whole",
    )

    def __init__(self, now: float) -> None:
        self.began = self.next_whole = now
        self.generations: dict[int, Generation] = {}
        self.whole: Sequence[SimulatedJob] = ()
        self.reserved = 0.0
        self._active: list[tuple[float, int, SimulatedJob]] = []
        self._at = self._stalled = self._until = now
        self._cycles = 0.0
        self._cycle = 1.0

    def __len__(self) -> int:
        return len(self._active) + len(self.whole)

    def models(self) -> set[int]:
        """The models that are in use."""
        used = set(self.generations)
        if self.whole:
            used.add(self.whole[0].model)
        return used

    def rows(self, model: int) -> int:
        """Rows in the running batch of a generating model."""
        generation = self.generations.get(model)
        return generation.rows if generation is not None else 0

    def admit(self, job: SimulatedJob, timing: Stepping, now: float, load: float) -> None:
        """Add a job to its model's batch: the model is loaded, `load` seconds, and the prompt is read at once."""
        self._advance(now)
        self._stalled = max(self._stalled, now) + load + timing.prefill(job.size + job.written)
        heappush(self._active, (self._cycles + job.output - job.written, job.index, job))
        generation = self.generations.setdefault(job.model, Generation(timing))
        generation.rows += 1
        generation.cached += job.size + job.written
        self.reserved += (job.size + job.output) * timing.cache

    def written(self, now: float) -> list[tuple[SimulatedJob, float]]:
        """The generating jobs, with the tokens that each has."""
        self._advance(now)
        return [(job, job.output - max(end - self._cycles, 0.0)) for end, _, job in self._active]

    def cut(self, job: SimulatedJob, now: float) -> float:
        """End a generation early; returns the tokens that it has."""
        written = dict(self.written(now))[job]
        self._active = [one for one in self._active if one[2] is not job]
        heapify(self._active)
        self._leave(job, written)
        return written

    @property
    def step(self) -> float:
        """Seconds of a step of all generations."""
        return self._seconds(0.0)

    def begin(self, jobs: Sequence[SimulatedJob], seconds: float, now: float) -> None:
        """Run a whole batch that takes this many seconds, loading included."""
        self._advance(now)
        self._stalled = self._until = max(self._stalled, now) + seconds
        self.whole = jobs

    def next_end(self) -> float:
        """When the next job ends, if none joins. Call it after every change."""
        if not self._active:
            return self._until
        left = max(self._active[0][0] - self._cycles, 0.0)
        self._cycle = self._seconds(left)
        end = max(self._stalled, self._at) + left * self._cycle
        return min(end, self._until) if self.whole else end

    def ended(self, now: float) -> list[SimulatedJob]:
        """Remove and return the jobs that end now."""
        self._advance(now)
        done: list[SimulatedJob] = []
        if self.whole and self._until <= now + SAME_TIME:
            done += self.whole
            self.whole = ()
            self.next_whole = now + (self._seconds(0.0) if self._active else 0.0)
        while self._active and self._stalled <= now + SAME_TIME and self._active[0][0] <= self._cycles + _SAME_STEP:
            job = heappop(self._active)[2]
            self._leave(job, job.output)
            done.append(job)
        return done

    def jobs(self) -> list[SimulatedJob]:
        """All jobs on the device, in order of arrival."""
        return sorted([*(job for _, _, job in self._active), *self.whole], key=lambda job: job.index)

    def _leave(self, job: SimulatedJob, tokens: float) -> None:
        generation = self.generations[job.model]
        generation.rows -= 1
        generation.cached -= job.size + tokens
        self.reserved -= (job.size + job.output) * generation.timing.cache
        if not generation.rows:
            del self.generations[job.model]

    def _seconds(self, left: float) -> float:
        """Seconds of one cycle, on average over the next `left` cycles."""
        return sum([g.timing.step(g.rows, g.cached + g.rows * left / 2) for g in self.generations.values()])

    def _advance(self, now: float) -> None:
        since = max(self._stalled, self._at)
        if now > since and self._active:
            cycles = (now - since) / self._cycle
            self._cycles += cycles
            for generation in self.generations.values():
                generation.cached += cycles * generation.rows
        self._at = now


class SimulatedDevice:
    """One device of a class.

    `version` counts changes of its expected end, `session` how often it was switched on or off. `memory` is the bytes
    that models and caches may use. `busy` and `powered` are total seconds. Until `spared_until`, patient jobs displace
    none of the models that `urgent` jobs use.
    """

    __slots__ = (
        "busy",
        "draining",
        "index",
        "memory",
        "on_since",
        "powered",
        "resident",
        "run",
        "serving",
        "session",
        "spared_until",
        "urgent",
        "uses",
        "version",
    )

    def __init__(self, index: int, memory: float) -> None:
        self.index = index
        self.memory = memory
        self.on_since: float | None = None
        self.serving = False
        self.draining = False
        self.version = self.session = 0
        self.run: DeviceRun | None = None
        self.resident: dict[int, Timing] = {}
        self.uses: dict[int, Uses] = {}
        self.urgent: set[int] = set()
        self.spared_until = 0.0
        self.busy = 0.0
        self.powered = 0.0

    def __len__(self) -> int:
        return len(self.run) if self.run is not None else 0

    @property
    def available(self) -> bool:
        """Whether it takes new work."""
        return self.serving and not self.draining

    def switch_on(self, now: float) -> None:
        """Switch it on: it costs money from now on, and serves once it has started."""
        self.on_since = now
        self.draining = False
        self.session += 1

    def switch_off(self, now: float) -> list[SimulatedJob]:
        """Switch it off: it costs nothing and holds nothing. Returns the jobs that it ran, which are lost there."""
        assert self.on_since is not None
        lost = self.run.jobs() if self.run is not None else []
        self.rest(now)
        self.powered += now - self.on_since
        self.on_since = None
        self.serving = self.draining = False
        self.resident.clear()
        self.uses.clear()
        self.urgent.clear()
        self.spared_until = 0.0
        self.version += 1
        self.session += 1
        return lost

    def rest(self, now: float) -> None:
        """End its run."""
        if self.run is not None:
            self.busy += now - self.run.began
            self.run = None

    def can_admit(self, job: SimulatedJob, timing: Stepping, slots: int, now: float) -> bool:
        """Whether a job can join its model's batch: a slot is free, and all caches at their longest fit."""
        run = self.run
        if (run is not None and run.rows(job.model) >= slots) or not self.can_hold(job, timing, now):
            return False
        if run is None:
            return True
        used = timing.memory + sum([self.resident[model].memory for model in run.models() if model != job.model])
        return not run or run.reserved + (job.size + job.output) * timing.cache <= self.memory - used

    def can_begin(self, job: SimulatedJob, timing: WholeBatches, now: float) -> bool:
        """Whether a whole batch of a job's model can begin."""
        run = self.run
        begins = run is None or (not run.whole and run.next_whole <= now + SAME_TIME)
        return begins and self.can_hold(job, timing, now)

    def can_hold(self, job: SimulatedJob, timing: Timing, now: float) -> bool:
        """Whether the job's model is resident, or fits beside those that have to stay and their caches."""
        sparing = self._spares(job.level, now)
        if job.model in self.resident or (self.run is None and not sparing):
            return True
        stay, used = (set(), 0.0) if self.run is None else (self.run.models(), self.run.reserved)
        if sparing:
            stay |= self.urgent
        return used + sum([self.resident[other].memory for other in stay]) + timing.memory <= self.memory

    def hold(self, model: int, timing: Timing, now: float, level: int = LEVELS) -> float:
        """Make the model resident, for a job of a level or for none; returns the seconds of loading it."""
        load = 0.0
        if model not in self.resident:
            load, leaving = timing.load, self._evicted(timing.memory, now, sparing=self._spares(level, now))
            for other in leaving:
                del self.resident[int(other.variant)]
                self.urgent.discard(int(other.variant))
            if level >= PATIENT:
                self.spared_until = max(self.spared_until, now + load + spared_for(load, leaving))
        if level < PATIENT:
            self.urgent.add(model)
        self.uses[model] = self.uses.get(model, Uses()).once_more(now)
        self.resident[model] = timing
        return load

    def _spares(self, level: int, now: float) -> bool:
        """Whether jobs of a level displace none of the models that urgent jobs use."""
        return level >= PATIENT and now < self.spared_until

    def admit(self, job: SimulatedJob, timing: Stepping, now: float) -> None:
        """Add a job to its model's running batch."""
        load = self.hold(job.model, timing, now, job.level)
        self._running(now).admit(job, timing, now, load)

    def begin(self, jobs: Sequence[SimulatedJob], timing: WholeBatches, now: float, level: int) -> float:
        """Begin a batch that runs as a whole, for a job of a level; returns its seconds without loading."""
        load = self.hold(jobs[0].model, timing, now, level)
        seconds = timing.batch(len(jobs), sum(job.size + job.output for job in jobs))
        self._running(now).begin(jobs, load + seconds, now)
        return seconds

    def _running(self, now: float) -> DeviceRun:
        if self.run is None:
            self.run = DeviceRun(now)
        return self.run

    def _evicted(self, need: int, now: float, *, sparing: bool) -> list[Resident]:
        in_use = self.run.models() if self.run is not None else set()
        used = sum(self.resident[model].memory for model in in_use)
        idle = [
            Resident(str(model), timing.memory, self.uses[model], timing.load, urgent=model in self.urgent)
            for model, timing in self.resident.items()
            if model not in in_use
        ]
        return evict(idle, need, int(self.memory - used), now, sparing=sparing)
