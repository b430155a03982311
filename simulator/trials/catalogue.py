"""The trials by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from simulator.fleet import Event, Fleet, load_fleet
from simulator.traces.trace import Trace
from simulator.traces.workload import Workload, prepare
from simulator.trials.arrivals import LENGTH, Random, Row, arrivals, drift, edge, mixed

FLEETS = Path(__file__).parents[1] / "fleets"


@dataclass(frozen=True, slots=True)
class Trial:
    """A fleet file, what arrives, and what happens to the fleet meanwhile."""

    name: str
    file: str
    make: Callable[[Random, Path | None], list[Row]]
    events: tuple[Event, ...] = ()

    def fleet(self) -> Fleet:
        """The fleet, with the trial's events."""
        return replace(load_fleet(FLEETS / self.file), events=self.events)

    def trace(self, seed: int, data: Path | None = None) -> Trace:
        """What arrives with a seed, with `data` the folder of the Azure traces, if there is one."""
        return arrivals(self.make, (seed, *self.name.encode()), data)

    def workload(self, trace: Trace) -> Workload:
        """A trace on the trial's fleet."""
        return prepare(trace, self.fleet(), seed=1)


THROTTLED = Event(at=LENGTH / 2, hardware_class="gpu.l4", slower=3.0)

TRIALS: Mapping[str, Trial] = {
    trial.name: trial
    for trial in (
        Trial("steady", "trial-mixed.yaml", mixed),
        Trial("drift", "trial-mixed.yaml", drift),
        Trial("throttled", "trial-mixed.yaml", mixed, (THROTTLED,)),
        Trial("edge", "trial-edge.yaml", edge),
    )
}
