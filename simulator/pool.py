"""A hardware class in the simulation: its queue, its devices, and what a policy can see of them."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

from router.decide.moves.preempt import LET_START, SWITCH
from router.decide.plan import ClassSize, ScalingRule, density
from simulator.class_queue import SimulatedQueue, YieldTerms
from simulator.device import SAME_TIME, SimulatedDevice
from simulator.fleet import USABLE, Fleet, Stepping, Timing, WholeBatches
from simulator.workload import SimulatedJob
from taxiway.contract.job import Tokens
from taxiway.contract.keys import LEVELS, PATIENT
from workers.decide.batcher import ALONE, BatchPolicy, Row, WaitingRows, form, observe_gap, ready, widen_gap
from workers.decide.endpoints import EndpointRates, rates_of
from workers.decide.occupation import BATCHES

UNLIMITED = EndpointRates()

Action = Callable[[SimulatedDevice | None, int, float], None]
"""An event's callback: the device concerned, the version of it that was expected, and the time."""


class World(Protocol):
    """What a pool needs from the engine."""

    def at(self, time: float, action: Action, device: SimulatedDevice | None, version: int) -> None:
        """Schedule `action` at `time`."""

    def end(self, job: SimulatedJob, pool: Pool, now: float, *, answered: bool) -> None:
        """The job has ended: answered, or dropped because its deadline passed while it waited."""


class Pool:
    """One class. Policies read it; the engine changes it.

    `serving` devices take work and `powered` ones cost money. `waiting` and `running` count jobs, and `expected` those
    that wait elsewhere and will probably come here. `queued` is device seconds waiting, one figure per level, and
    `inside` those of running jobs. `available` is how many devices may be on.
    `pace` is the time that work takes over its profile's, and `learned` the same by model, as far as it is known: the
    class scales on that. `metered` is US dollars for `metered_requests` to an endpoint, and `rates` what it may be
    sent, over all devices. `batches` are the latest whole batches: when they began, their model and their seconds.
    """

    def __init__(
        self,
        index: int,
        name: str,
        fleet: Fleet,
        models: Sequence[str],
        world: World,
        *,
        yields: bool,
        seed: int,
        queue: type[SimulatedQueue] = SimulatedQueue,
    ) -> None:
        device = fleet.classes[name]
        self.index = index
        self.name = name
        self.device_class = device
        self.slots = device.max_batch
        self.usd_per_second = device.usd_per_second
        self.tariff = device.price.tariff
        self.metered = self._allowed_at = 0.0
        self.metered_requests = 0
        limits = rates_of(device.rate.requests_per_minute, device.rate.tokens_per_minute, 0.0, device.count)
        self.rates = UNLIMITED if limits == UNLIMITED else limits
        self.serving = self.powered = self.waiting = self.expected = self.running = self.started = 0
        self.available = device.count
        self.pace = 1.0
        self.learned = [1.0] * len(models)
        self.batches: deque[tuple[float, int, float]] = deque(maxlen=BATCHES)
        self.queued = [0.0] * LEVELS
        self.inside = 0.0
        self.devices = [SimulatedDevice(number, device.memory * USABLE) for number in range(device.count)]
        self._timings: tuple[Timing | None, ...] = tuple(fleet.timings[model][index] for model in models)
        self._warm = [number for number, model in enumerate(models) if model in device.warm]
        self._random = random.Random(f"{seed} {name}")
        self._world = world
        longest = math.inf if device.max_run is None else device.max_run
        self._batching = BatchPolicy(device.max_batch, device.max_wait, longest)
        self.queue = queue()
        self._size = ClassSize(device.start, device.minimum)
        self._density = self._peak = 0.0
        self._draining = 0
        self._gaps, self._newest = [ALONE] * len(models), [0.0] * len(models)
        self._paused: set[int] = set()  # models whose next batch waits for more rows since the last came
        self._yielding = YieldTerms.of(fleet, index, self.usd_per_second, yields=yields)
        self._asked: set[int] = set()  # running jobs that were asked to yield

    @property
    def count(self) -> int:
        """Most devices."""
        return self.device_class.count

    @property
    def start(self) -> float:
        """Seconds from switching a device on until it serves."""
        return self.device_class.start

    @property
    def free(self) -> int:
        """Jobs that could start now in addition to those waiting, as far as memory allows."""
        return self.serving * self.slots - self.running - self.waiting

    def back(self, most: int) -> Iterator[SimulatedJob]:
        """Up to `most` waiting jobs of each level, last served first. Requires a queue by level."""
        return self.queue.back(most)

    def runs(self, job: SimulatedJob) -> bool:
        """Whether the class can run the job at all."""
        return job.alone[self.index] < math.inf

    def cost(self, job: SimulatedJob) -> float:
        """US dollars of the device seconds that the job is expected to use, and of its tokens."""
        return job.work[self.index] * self.usd_per_second + self.bill(job)

    def bill(self, job: SimulatedJob) -> float:
        """US dollars for the job's tokens, and for it as a request."""
        return 0.0 if self.tariff is None else self.tariff.bill(Tokens(input=job.size, output=job.output), 1)

    def spent(self, now: float) -> float:
        """US dollars so far."""
        running = sum(now - device.on_since for device in self.devices if device.on_since is not None)
        return self.dollars(lambda device: device.powered) + running * self.usd_per_second + self.metered

    @property
    def jobs(self) -> int:
        """Jobs that wait, run, or are expected."""
        return self.waiting + self.running + self.expected

    def busy_seconds(self) -> float:
        """Device seconds of all jobs here."""
        return sum(self.queued) + self.inside

    def dollars(self, seconds: Callable[[SimulatedDevice], float]) -> float:
        """US dollars for these seconds of each device."""
        return self.usd_per_second * sum(map(seconds, self.devices))

    def wait(self, job: SimulatedJob) -> float:
        """Seconds until the job is expected to start."""
        if not self.serving:
            return self.start + sum(self.queued[: job.level + 1]) / max(self.powered, 1)
        ahead = sum(self.queued[: job.level + 1])
        full = self.running >= self.serving * self.slots
        if not full and not ahead:
            return 0.0
        return (ahead + (self.inside / max(self.running, 1) if full else 0.0)) / self.serving

    def run(self, job: SimulatedJob) -> float:
        """Seconds that the job is expected to run in the batch that it would join."""
        rows = (self.running + self.waiting) / self.serving if self.serving else 0.0
        return job.alone[self.index] + min(rows, self.slots - 1) * job.crowding[self.index]

    def finish(self, job: SimulatedJob) -> float:
        """Seconds until the job's answer is expected."""
        return self.wait(job) + self.run(job)

    def enqueue(self, job: SimulatedJob, now: float) -> None:
        """Add a job to the queue; devices with capacity take it at once."""
        if self.running or self.queue.count(job.model):
            self._gaps[job.model] = observe_gap(self._gaps[job.model], now - self._newest[job.model])
            self._paused.discard(job.model)
        self._newest[job.model] = job.queued = now
        self._push(job)
        self._load(job, now)
        while (first := self.queue.first(job.model)) is not None and self._take(first, now):
            pass  # other models have waited for a device since before
        if self._yielding.most and job.level < PATIENT and self.queue.count(job.model):
            self._world.at(now + LET_START, self._look, None, job.model)

    def remove(self, job: SimulatedJob) -> None:
        """Remove a waiting job that moves to another class."""
        self._unqueue(job)
        self._density -= job.density

    def expect(self, job: SimulatedJob, now: float) -> None:
        """A job that is not bound to a class yet will probably come here: devices are kept for it."""
        self.expected += 1
        self._load(job, now)

    def forget(self, job: SimulatedJob) -> None:
        """An expected job has arrived, or will not."""
        self.expected -= 1
        self._density -= job.density

    def feed(self, now: float) -> None:
        """Give waiting jobs to devices with capacity, in the queue's order; a model that must wait blocks no other."""
        if not self.waiting:
            return
        blocked: set[int] = set()
        while job := next((job for job in self.queue.heads() if job.model not in blocked), None):
            if not self._take(job, now):
                blocked.add(job.model)

    def _take(self, job: SimulatedJob, now: float) -> bool:
        """Drop a waiting job whose deadline has passed, or give it to a device; False if none has capacity for it."""
        if job.due > now:
            return self._give(job, now)
        self._unqueue(job)
        self._drop(job, now)
        return True

    def _give(self, job: SimulatedJob, now: float) -> bool:
        if self.rates is not UNLIMITED and (wait := self.rates.wait(job.size + job.output, now)) > 0:
            if self._allowed_at <= now:
                self._allowed_at = now + wait
                self._world.at(self._allowed_at, self._fed, None, 0)
            return False
        timing = self._timings[job.model]
        if isinstance(timing, Stepping):
            return self._admit(job, timing, now)
        return isinstance(timing, WholeBatches) and self._begin(job, timing, now)

    def follow(self, rule: ScalingRule, devices: int = 0, pause: float = 0.0, now: float = 0.0) -> None:
        """Scale by this rule from `now` on, and have `devices` at least until there was no job for `pause` seconds."""
        self._size.follow(rule, devices, pause, now)

    def release(self, devices: int, now: float) -> None:
        """Switch off what is not needed now beyond a number of devices, without its keep-alive time."""
        self._size.release(devices, now)

    def tick(self, now: float) -> None:
        """Switch on devices that are needed, and switch off those not needed for their keep-alive time."""
        if self.jobs:
            self._size.use(now)
        if self._yielding.most and self.waiting:
            for job in self.queue.heads():
                self._look(None, job.model, now)
        self._grow(now)
        peak, self._peak = self._peak, self._density
        staying = self._size.kept(self.powered - self._draining, peak, self.jobs, now, self.available)
        surplus = self.powered - self._draining - staying
        if surplus > 0:
            for device in sorted(self.devices, key=_idleness)[:surplus]:
                self._drain(device, now)

    def _drain(self, device: SimulatedDevice, now: float) -> None:
        """Give the device no more work, and switch it off once it has none."""
        device.draining = True
        self._draining += 1
        self.serving -= device.serving
        self._let_go(device, now)

    def switch_on(self, now: float, *, after: float, loaded: Iterable[int] = ()) -> None:
        """Switch the next device on, with some models loaded; it serves `after` that many seconds."""
        device = next(device for device in self.devices if device.on_since is None)
        device.switch_on(now)
        self.powered += 1
        self.started += after > 0
        self._world.at(now + after, self._started, device, device.session)
        lost = self.device_class.failures_per_hour + self.device_class.reclaims_per_hour * self.device_class.spot
        if lost:
            self._world.at(now + self._random.expovariate(lost / 3600), self._fail, device, device.session)
        self._hold(device, loaded, now)
        self._size.need(self.powered, now)

    def _fail(self, device: SimulatedDevice | None, session: int, now: float) -> None:
        """The device fails at once."""
        if device is None or device.session != session:
            return
        self._lose(device, now)
        self._grow(now)
        self.feed(now)

    def _lose(self, device: SimulatedDevice, now: float) -> None:
        """The device is gone; the jobs that it ran are queued again."""
        self.serving -= device.available
        self._draining -= device.draining
        self.powered -= 1
        for job, written in device.run.written(now) if device.run is not None else ():
            if self._yielding.preemptible[job.service]:
                job.written = written
        for job in device.switch_off(now):
            self._leave(job)
            self._push(job)

    def _started(self, device: SimulatedDevice | None, session: int, now: float) -> None:
        if device is not None and device.session == session:
            device.serving = True
            self.serving += not device.draining
            self._hold(device, self._warm, now)
            self.feed(now)

    def _hold(self, device: SimulatedDevice, models: Iterable[int], now: float) -> None:
        for timing, model in ((self._timings[model], model) for model in models):
            if timing is not None:
                device.hold(model, timing, now)

    def _admit(self, job: SimulatedJob, timing: Stepping, now: float) -> bool:
        """Add a generating job to the device with the fewest jobs among those with capacity.

        It does not take the memory that an urgent one of another model waits for.
        """
        before = takewhile(lambda other: other is not job, self.queue.heads())
        if any(
            one.level < min(job.level, PATIENT) and isinstance(self._timings[one.model], Stepping) for one in before
        ):
            return False
        device = self._emptiest(job.model, lambda device: device.can_admit(job, timing, self.slots, now))
        if device is None:
            return False
        self._unqueue(job)
        self._enter(job, now)
        spared_until = device.spared_until
        device.admit(job, timing, now)
        self._begun(device, spared_until)
        if job.due < math.inf:
            self._world.at(job.due, self._expire, device, job.index)
        return True

    def _expire(self, device: SimulatedDevice | None, index: int, now: float) -> None:
        """A running generation's deadline has passed: its worker ends it."""
        if (job := self._stopped(device, index, now)) is not None:
            self._drop(job, now)
            self.feed(now)

    def _yield(self, device: SimulatedDevice | None, index: int, now: float) -> None:
        """A running generation that was asked to yields its slot, and goes on from the queue."""
        self._asked.discard(index)
        if (job := self._stopped(device, index, now)) is not None:
            job.cuts += 1
            self._push(job)
            self.feed(now)
            self._look(None, job.model, now)

    def _stopped(self, device: SimulatedDevice | None, index: int, now: float) -> SimulatedJob | None:
        """A running generation that has been stopped; None if it does not run there any more."""
        if device is None or device.run is None:
            return None
        job = next((job for job, _ in device.run.written(now) if job.index == index), None)
        if job is not None:
            job.written = device.run.cut(job, now)
            self._leave(job)
            self._settle(device, now)
        return job

    def _look(self, device: SimulatedDevice | None, model: int, now: float) -> None:
        """Ask running generations of a model to yield to urgent ones that wait."""
        timing = self._timings[model]
        urgent = [job for job in self.queue.front(model, self.slots) if job.level < PATIENT]
        if not urgent or not isinstance(timing, Stepping):
            return
        able = [device for device in self.devices if device.run is not None and device.run.rows(model)]
        for one in self._yielding.decide(urgent, able, timing, self._asked, now):
            index = int(one.occupant.job)
            self._asked.add(index)
            self._world.at(now + SWITCH, self._yield, self.devices[int(one.occupant.token)], index)

    def _emptiest(self, model: int, able: Callable[[SimulatedDevice], bool]) -> SimulatedDevice | None:
        """The able device with the fewest jobs, and of several one that holds the model. Only better ones are asked."""
        best, least = None, (math.inf, True)
        for device in self.devices:
            if device.serving and not device.draining:
                fill = (0 if device.run is None else len(device.run), model not in device.resident)
                if fill < least and able(device):
                    best, least = device, fill
        return best

    def _begin(self, first: SimulatedJob, timing: WholeBatches, now: float) -> bool:
        device = self._emptiest(first.model, lambda device: device.can_begin(first, timing, now))
        if device is None:
            return False
        rows = min(self.queue.count(first.model), self.slots)
        run = timing.batch(rows, rows * (first.size + first.output))
        waiting = WaitingRows(rows, first.queued, self._newest[first.model], first.due - run, run)
        wait = ready(waiting, now, self._batching, self._gaps[first.model])
        if wait > SAME_TIME:
            if first.model not in self._paused:
                self._paused.add(first.model)
                self._world.at(now + wait, self._wake, None, first.model)
            return False
        chosen = self._before(first, device, now)
        model = chosen.model
        if model in self._paused:
            self._paused.discard(model)
            self._gaps[model] = widen_gap(self._gaps[model])
        whole = self._timings[model]
        assert isinstance(whole, WholeBatches)
        spared_until = device.spared_until
        seconds = device.begin(self._form(model, whole, now), whole, now, chosen.level)
        self.batches.append((now, model, seconds))
        self._begun(device, spared_until)
        return True

    def _begun(self, device: SimulatedDevice, spared_until: float) -> None:
        """Expect the end of what has begun, and the time from which patient jobs may displace models again."""
        self._expect(device)
        if device.spared_until > spared_until:
            self._world.at(device.spared_until, self._fed, None, 0)

    def _before(self, first: SimulatedJob, device: SimulatedDevice, now: float) -> SimulatedJob:
        """The job whose batch begins instead of this one's: a more urgent one does not wait for rows behind others."""
        ahead = [job for job in self.queue.heads() if job.level < first.level and job.model in self._paused]
        for job in ahead:
            timing = self._timings[job.model]
            if job.due > now and isinstance(timing, WholeBatches) and device.can_begin(job, timing, now):
                return job
        return first

    def _form(self, model: int, timing: WholeBatches, now: float) -> list[SimulatedJob]:
        """The next batch, formed as a worker does from what it prefetches: twice its largest batch, or one job."""
        most = 2 * self.slots if self.slots > 1 else 1
        alike = [job for job in self.queue.front(model, most) if job.due > now]
        alike.sort(key=lambda job: (job.level, job.due))
        rows = [Row(job.level, job.due, job.size + job.output) for job in alike]
        chosen = [alike[place] for place in form(rows, self._batching, timing.batch, now)]
        for job in chosen:
            self._unqueue(job)
            self._enter(job, now)
        return chosen

    def _fed(self, device: SimulatedDevice | None, version: int, now: float) -> None:
        """What waited may begin: a rate limit allows it, a device has taken a step, or spares no models any more."""
        self.feed(now)

    def _wake(self, device: SimulatedDevice | None, model: int, now: float) -> None:
        if model in self._paused:
            self.feed(now)

    def _expect(self, device: SimulatedDevice) -> None:
        assert device.run is not None
        device.version += 1
        self._world.at(device.run.next_end(), self._ended, device, device.version)

    def _ended(self, device: SimulatedDevice | None, version: int, now: float) -> None:
        if device is None or device.version != version or device.run is None:
            return
        for job in device.run.ended(now):
            self._leave(job)
            self._density -= job.density
            self._world.end(job, self, now, answered=True)
        self._settle(device, now)
        self.feed(now)

    def _settle(self, device: SimulatedDevice, now: float) -> None:
        """Some of a device's jobs have left it."""
        assert device.run is not None
        if len(device.run):
            self._expect(device)
            if not device.run.whole and device.run.next_whole > now:
                self._world.at(device.run.next_whole, self._fed, None, 0)
        else:
            device.rest(now)
            self._let_go(device, now)

    def _let_go(self, device: SimulatedDevice, now: float) -> None:
        """Switch a draining device off once it is empty."""
        if device.draining and device.run is None:
            device.switch_off(now)
            self.powered -= 1
            self._draining -= 1

    def _grow(self, now: float) -> None:
        on = self.powered - self._draining
        lacking = self._size.grown(on, self._density, self.jobs, now, self.available) - on
        if lacking <= 0:
            return
        for device in self.devices:
            if lacking and device.draining:
                device.draining = False
                self._draining -= 1
                self.serving += device.serving
                lacking -= 1
        for _ in range(min(lacking, self.available - self.powered)):
            self.switch_on(now, after=self.start)

    def _load(self, job: SimulatedJob, now: float) -> None:
        pace = self.learned[job.model]
        job.density = density(pace * job.work[self.index], job.deadline, pace * job.alone[self.index])
        self._density += job.density
        self._peak = max(self._peak, self._density)
        self._size.use(now)
        self._grow(now)

    def _push(self, job: SimulatedJob) -> None:
        self.queued[job.level] += job.work[self.index]
        self.queue.push(job)
        self.waiting += 1

    def _unqueue(self, job: SimulatedJob) -> None:
        self.queue.take(job)
        self.waiting -= 1
        self.queued[job.level] -= job.work[self.index]
        if not self.waiting:
            self.queued = [0.0] * LEVELS  # clears rounding errors

    def _drop(self, job: SimulatedJob, now: float) -> None:
        self._density -= job.density
        self._world.end(job, self, now, answered=False)

    def _enter(self, job: SimulatedJob, now: float) -> None:
        self.running += 1
        self.metered += self.bill(job)
        self.metered_requests += self.tariff is not None
        if self.rates is not UNLIMITED:
            self.rates = self.rates.taken(job.size + job.output, now)
        self.inside += job.work[self.index]

    def _leave(self, job: SimulatedJob) -> None:
        self.running -= 1
        self.inside = self.inside - job.work[self.index] if self.running else 0.0


def _idleness(device: SimulatedDevice) -> tuple[bool, bool, int, int]:
    """Sort key for devices: powered ones that start yet first, then those with the fewest jobs."""
    gone = device.on_since is None or device.draining
    return (gone, device.serving, len(device), -device.index)
