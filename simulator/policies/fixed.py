"""Placement and scaling that were decided beforehand: a class for each cell, and a rule for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.decide.scaling_rule import ScalingRule
from simulator.fleet import Fleet
from simulator.policies.policy import ByLevel
from simulator.pool import Pool
from simulator.traces.workload import Job

Cell = tuple[int, int]
"""A model and a service, as numbers in the trace's models and in `SERVICES`."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The class of each cell, and the scaling rule of each class, both by the classes' place in the fleet file."""

    classes: Mapping[Cell, int]
    rules: tuple[ScalingRule, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal assignments."""
        return (tuple(sorted(self.classes.items())), self.rules)

    def used(self) -> set[int]:
        """The classes that some cell has."""
        return set(self.classes.values())


class Fixed(ByLevel):
    """Every job goes to its cell's class; no class has fewer than its number of `devices`."""

    def __init__(self, assignment: Assignment, devices: Sequence[int] | None = None) -> None:
        self._assignment = assignment
        self._devices = devices or (0,) * len(assignment.rules)
        self._began = False

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        if not self._began:
            self._began = True
            for pool, rule, devices in zip(pools, self._assignment.rules, self._devices, strict=True):
                pool.follow(rule, devices)
        return self._assignment.classes[job.model, job.service]


def able_classes(fleet: Fleet, models: Sequence[str]) -> dict[Cell, list[int]]:
    """The classes that each cell may run on, if there are any: only preemptible services use spot devices."""
    spot = [device.spot for device in fleet.classes.values()]
    able = {
        (model, service): [
            place
            for place, timing in enumerate(fleet.timings[name])
            if timing is not None and (terms.preemptible or not spot[place])
        ]
        for model, name in enumerate(models)
        for service, terms in enumerate(fleet.services)
    }
    return {cell: places for cell, places in able.items() if places}
