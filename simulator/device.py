"""One device: what runs on it now, which models it holds, and since when it is on."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from simulator.timing import Stepping, Timing, Whole
from simulator.traces.workload import Job
from workers.decide.residency import Resident, Uses, evict

_SAME_STEP = 1e-6


class SteppingRun:
    """A generating batch: jobs join between steps and leave with their last token.

    All rows advance together, so a job's end is a step number. While a prompt is read no row advances.
    """

    __slots__ = ("_active", "_at", "_cached", "_reserved", "_stalled", "_step", "_steps", "began", "room", "timing")

    def __init__(self, timing: Stepping, now: float, *, load: float, room: float) -> None:
        self.timing = timing
        self.began = now
        self.room = room
        self._active: list[tuple[float, int, Job]] = []
        self._at = now
        self._stalled = now + load
        self._steps = 0.0
        self._step = 1.0
        self._cached = 0.0
        self._reserved = 0.0

    def __len__(self) -> int:
        return len(self._active)

    def fits(self, job: Job) -> bool:
        """Whether all caches at their longest fit into `room` tokens: paging that never has to evict."""
        return not self._active or self._reserved + job.size + job.output <= self.room

    def admit(self, job: Job, now: float) -> None:
        """Add a job: its prompt is read at once."""
        self._advance(now)
        self._stalled = (self._stalled if self._stalled > now else now) + self.timing.prefill(job.size)
        heappush(self._active, (self._steps + job.output, job.index, job))
        self._cached += job.size
        self._reserved += job.size + job.output

    def next_end(self) -> float:
        """When the next job ends, if none joins. Call it after every change."""
        left = self._active[0][0] - self._steps
        rows = len(self._active)
        self._step = self.timing.step(rows, self._cached + rows * left / 2)
        return (self._stalled if self._stalled > self._at else self._at) + left * self._step

    def ended(self, now: float) -> list[Job]:
        """Remove and return the jobs that end now."""
        self._advance(now)
        done: list[Job] = []
        while self._active and (not done or self._active[0][0] <= self._steps + _SAME_STEP):
            job = heappop(self._active)[2]
            self._cached -= job.size + job.output
            self._reserved -= job.size + job.output
            done.append(job)
        return done

    def jobs(self) -> list[Job]:
        """All jobs in the batch."""
        return [job for _, _, job in sorted(self._active, key=lambda entry: entry[1])]

    def _advance(self, now: float) -> None:
        since = self._stalled if self._stalled > self._at else self._at
        if now > since:
            steps = (now - since) / self._step
            self._steps += steps
            self._cached += steps * len(self._active)
        self._at = now


class WholeRun:
    """A batch that starts and ends as one."""

    __slots__ = ("_jobs", "_until", "began", "timing")

    def __init__(self, timing: Whole, jobs: Sequence[Job], now: float, *, load: float) -> None:
        self.timing = timing
        self.began = now
        self._jobs = list(jobs)
        self._until = now + load + timing.batch(len(self._jobs), sum(job.size + job.output for job in jobs))

    def __len__(self) -> int:
        return len(self._jobs)

    def next_end(self) -> float:
        """When the batch ends."""
        return self._until

    def ended(self, now: float) -> list[Job]:
        """All jobs of the batch."""
        done, self._jobs = self._jobs, []
        return done

    def jobs(self) -> list[Job]:
        """All jobs in the batch."""
        return list(self._jobs)


Run = SteppingRun | WholeRun


class Device:
    """One device of a class.

    `version` counts changes of its expected end, `session` how often it was switched on or off. `memory` is the bytes
    that models and caches may use. `busy` and `powered` are total seconds.
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
        self.run: Run | None = None
        self.resident: dict[int, Resident] = {}
        self.uses: dict[int, Uses] = {}
        self.busy = 0.0
        self.powered = 0.0

    def switch_on(self, now: float) -> None:
        """Switch it on: it costs money from now on, and serves once it has started."""
        self.on_since = now
        self.draining = False
        self.session += 1

    def switch_off(self, now: float) -> list[Job]:
        """Switch it off: it costs nothing and holds nothing. Returns the jobs that it ran, which are lost there."""
        assert self.on_since is not None
        lost = self.run.jobs() if self.run is not None else []
        self.rest(now)
        self.powered += now - self.on_since
        self.on_since = None
        self.serving = self.draining = False
        self.resident.clear()
        self.uses.clear()
        self.version += 1
        self.session += 1
        return lost

    def rest(self, now: float) -> None:
        """End its run."""
        if self.run is not None:
            self.busy += now - self.run.began
            self.run = None

    def hold(self, model: int, timing: Timing, now: float) -> float:
        """Make the model resident and mark it as used; returns the seconds of loading it, 0 if it was resident."""
        held = self.resident.get(model)
        if held is None:
            for leaving in evict(list(self.resident.values()), timing.memory, int(self.memory), now):
                del self.resident[int(leaving)]
        self.uses[model] = self.uses.get(model, Uses()).once_more(now)
        self.resident[model] = Resident(str(model), timing.memory, self.uses[model], timing.load)
        return timing.load if held is None else 0.0

    def start_stepping(self, model: int, timing: Stepping, now: float) -> SteppingRun:
        """Begin an empty generating batch."""
        load = self.hold(model, timing, now)
        free = self.memory - sum(resident.memory for resident in self.resident.values())
        run = SteppingRun(timing, now, load=load, room=free / timing.cache)
        self.run = run
        return run

    def start_whole(self, model: int, timing: Whole, jobs: Sequence[Job], now: float) -> None:
        """Begin a batch that runs as a whole."""
        self.run = WholeRun(timing, jobs, now, load=self.hold(model, timing, now))
