"""The plan for the devices that were bought: which classes each kind of request prefers, and how each class scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from router.decide.plan import Plan as FleetPlan
from simulator.fleet import DeviceClass
from simulator.planner.plan import Plan, equipped, mix_of
from simulator.planner.prices import Offer
from simulator.traces.workload import Workload
from simulator.tuning.planning import plan_of
from simulator.tuning.search import Search
from simulator.tuning.tuner import Decision
from simulator.tuning.twin import Conditions, Twin, Window

PLAYS = 150
"""Plays of the search: nothing waits for it."""


def fleet_plan(
    workload: Workload,
    offers: Sequence[Offer],
    bought: Plan,
    *,
    seed: int,
    progress: Callable[[float], None] = lambda plays: None,
) -> FleetPlan | None:
    """The best plan that a search finds for the workload's latest arrivals; None if the fleet has no penalties.

    No class has more devices than were bought, and fewer are on if that saves more than it costs.
    """
    if not any(workload.fleet.penalties):
        return None
    on_mix = _scaling(equipped(workload, mix_of(bought, offers)), workload)
    fleet, end = on_mix.fleet, float(on_mix.trace.arrival[-1]) + 1
    counts = tuple(device.count for device in fleet.classes.values())
    window = Window.latest(on_mix, end, end)
    twin = Twin(fleet, window, Conditions.usual(fleet, counts))
    found = Search(twin, seed, progress).find(None, PLAYS)
    decision = Decision(
        assignment=found.assignment,
        adopted=True,
        devices=tuple(twin.devices(found.assignment)),
        before=math.inf,
        after=found.score,
        plays=twin.plays,
        moves={},
    )
    return plan_of(decision, fleet, window, number=1, made=0.0)


def _scaling(on_mix: Workload, workload: Workload) -> Workload:
    """The mix with devices that may be off, down to the fleet file's minimum."""

    def lowered(name: str, device: DeviceClass) -> DeviceClass:
        return msgspec.structs.replace(device, minimum=min(workload.fleet.classes[name].minimum, device.count))

    classes = {name: lowered(name, device) for name, device in on_mix.fleet.classes.items()}
    return replace(on_mix, fleet=replace(on_mix.fleet, classes=classes))
