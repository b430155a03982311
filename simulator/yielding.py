"""Which running generations of a simulated class yield to urgent ones that wait: by the router's own function."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from router.decide.moves.preempt import Occupant, Waiter, Yielding, penalty, preempt
from simulator.device import SimulatedDevice
from simulator.fleet import Fleet, Stepping
from simulator.workload import SimulatedJob


@dataclass(frozen=True, slots=True)
class YieldTerms:
    """What yields of a class depend on: its place in the fleet, its price, and the services' terms."""

    place: int
    usd_per_second: float
    late_rates: Sequence[float]
    """US dollars an hour when all of a service is late."""
    preemptible: Sequence[bool]
    """Of each service."""
    most: int
    """Cuts of one job after which it does not yield; 0: none does."""

    @classmethod
    def of(cls, fleet: Fleet, place: int, usd_per_second: float, *, yields: bool) -> YieldTerms:
        """The terms of a class; `yields` says whether its generations yield."""
        preemptible = [service.preemptible for service in fleet.services]
        most = fleet.rebalance.max_moves_per_job if yields else 0
        return cls(place, usd_per_second, fleet.penalties, preemptible, most)

    def decide(
        self,
        waiting: Sequence[SimulatedJob],
        devices: Iterable[SimulatedDevice],
        timing: Stepping,
        asked: Collection[int],
        now: float,
    ) -> list[Yielding]:
        """The generations that yield now to these jobs of their model, unless `asked`; tokens are devices' indices."""
        running = (one for device in devices for one in self._occupants(device, waiting[0].model, timing, now))
        occupants = [one for one in running if int(one.job) not in asked]
        waiters = [self._waiter(job, timing, now) for job in waiting] if occupants else []
        return preempt(waiters, occupants, most=self.most)

    def _occupants(self, device: SimulatedDevice, model: int, timing: Stepping, now: float) -> Iterator[Occupant]:
        if device.run is None:
            return
        step = device.run.step
        for job, written in device.run.written(now):
            if job.model == model and self.preemptible[job.service]:
                left = step * job.tokens_left(written)
                yield Occupant(
                    job=str(job.index),
                    token=str(device.index),
                    left=left,
                    redo=timing.prefill(job.size + written),
                    due=job.due - now,
                    penalty=penalty(self.late_rates[job.service], timing.prefill(job.size) + step * written + left),
                    price=self.usd_per_second,
                    cuts=job.cuts,
                )

    def _waiter(self, job: SimulatedJob, timing: Stepping, now: float) -> Waiter:
        tokens = job.size + job.written
        run = timing.prefill(tokens) + job.tokens_left(job.written) * timing.step(1, tokens)
        return Waiter(str(job.index), job.due - now, run, penalty(self.late_rates[job.service], job.work[self.place]))
