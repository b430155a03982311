"""The planner: buys the cheapest mix for the demand, replays the trace on it, and buys more if that falls short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from simulator.demand import InfeasibleError, Mix, cheapest, check_deadlines, demand, prices
from simulator.engine import RunSummary
from simulator.fleet import SERVICES, Fleet
from simulator.reports import percent, table
from simulator.workload import Figures, Workload

STEP = 1.2
"""Factor by which a service's headroom grows after a replay in which it fell short."""

MOST_HEADROOM = 1e4
"""Limit on headroom; only a negligible load reaches it before the fleet or the replays are exhausted."""

MOST_REPLAYS = 40
"""Most replays per plan; at most half of them search for a sufficient mix, and the rest for a cheaper one."""

MISSES_IN_A_ROW = 10
"""Consecutive replays of cheaper mixes that may fall short."""

Replay = Callable[[str, Workload], RunSummary]
"""Plays a workload on the fleet in it, with all devices on; the text names the replay."""


class Bought(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of one class in the mix; `utilisation` is theirs in the replay."""

    hardware_class: str
    spot: bool
    devices: int
    usd_per_hour: float
    utilisation: float


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One replay: the headroom that the mix was bought for, its cost, and its attainment."""

    headroom: dict[str, float]
    usd_per_hour: float
    attainment: dict[str, float | None]


class MixPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The mix for a load. `rounds` led to a sufficient mix; `replays`, including those, to one that costs `saved` less.

    `saved` is US dollars per hour.
    """

    requests: int
    mix: list[Bought]
    usd_per_hour: float
    attainment: dict[str, float | None]
    rounds: list[Round]
    replays: int
    saved: float


class _Search:
    """The mixes replayed so far, in order, each with its replay's figures."""

    def __init__(self, workload: Workload, slo: Mapping[str, float], replay: Replay) -> None:
        self.workload = workload
        self.slo = slo
        self.tried: dict[Mix, RunSummary] = {}
        self._replay = replay

    def attempt(self, mix: Mix) -> bool:
        """Replay the mix unless already done; returns whether every service attains its share."""
        if mix not in self.tried:
            self.tried[mix] = self._replay(f"mix {len(self.tried) + 1}", equipped(self.workload, mix.devices()))
        return not self.short(mix)

    def short(self, mix: Mix) -> dict[str, float]:
        """The services that attain less than required, and by how much."""
        found = self.tried[mix].attainment
        gaps = {name: share - reached for name, share in self.slo.items() if (reached := found[name]) is not None}
        return {name: gap for name, gap in gaps.items() if gap > 0}

    def shortfall(self, mix: Mix) -> str:
        """The same in words."""
        found = self.tried[mix].attainment
        return ", ".join(
            f"{name} asks {self.slo[name]:g} in time and attains {found[name]:.4f}" for name in self.short(mix)
        )


def plan(workload: Workload, slo: Mapping[str, float], replay: Replay) -> MixPlan:
    """The cheapest mix found whose replay attains every service's share.

    Each service's demand gets headroom until the replay attains its share. Then cheaper mixes are replayed, until
    `MISSES_IN_A_ROW` of them in a row fall short.

    Raises:
        InfeasibleError: no mix suffices; says what is lacking, and by how much.
    """
    check_deadlines(workload, slo)
    search = _Search(workload, slo, replay)
    rounds: list[Round] = []
    enough = _enough(search, rounds)
    best = _cheaper(search, enough)
    return MixPlan(
        requests=len(workload),
        mix=_bought(best, search.tried[best], workload.fleet),
        usd_per_hour=best.usd_per_hour,
        attainment=search.tried[best].attainment,
        rounds=rounds,
        replays=len(search.tried),
        saved=enough.usd_per_hour - best.usd_per_hour,
    )


def equipped(workload: Workload, devices: Mapping[str, int]) -> Workload:
    """The workload on a mix: its classes with their devices, always on and warm."""
    fleet = workload.fleet
    kept = [number for number, name in enumerate(fleet.classes) if devices.get(name)]
    classes = {
        name: msgspec.structs.replace(device, count=count, minimum=count, initial=count, warm=tuple(fleet.timings))
        for name, device in fleet.classes.items()
        if (count := devices.get(name))
    }
    timings = {model: tuple(row[number] for number in kept) for model, row in fleet.timings.items()}
    return replace(workload, fleet=replace(fleet, classes=classes, timings=timings))


def _enough(search: _Search, rounds: list[Round]) -> Mix:
    """The first mix whose replay attains the required shares; `rounds` records each replay."""
    headroom = np.ones(len(SERVICES))
    mix: Mix | None = None
    while len(rounds) < MOST_REPLAYS // 2 and headroom.max() < MOST_HEADROOM:
        mix = _bought_for(search, headroom, mix)
        new = mix not in search.tried
        attained = search.attempt(mix)
        if new:
            rounds.append(_round(headroom, mix, search.tried[mix]))
        if attained:
            return mix
        headroom[[SERVICES.index(name) for name in search.short(mix)]] *= STEP
    assert mix is not None
    what = f"{search.shortfall(mix)} in {len(rounds)} replays, at ${mix.usd_per_hour:.2f} an hour"
    raise InfeasibleError(what)


def _bought_for(search: _Search, headroom: Figures, last: Mix | None) -> Mix:
    """The programme's mix; if the fleet is exhausted, the error also reports what the previous mix attained."""
    fleet = search.workload.fleet
    counts = {name: device.count for name, device in fleet.classes.items()}
    try:
        return cheapest(prices(fleet), demand(search.workload, headroom), counts)
    except InfeasibleError as error:
        if last is None:
            raise
        raise InfeasibleError(f"{search.shortfall(last)}, and {error}") from error


def _cheaper(search: _Search, enough: Mix) -> Mix:
    """The cheapest mix found that attains the required shares, starting from one that does.

    The next mix to be replayed has one device less or more than one that sufficed or fell short by the least; among
    those, it is the cheapest. More devices may attain less, if placement expects too much of them. None costs less
    than the first mix, which by the programme is the cheapest that can carry the load.
    """
    best, misses_left = enough, MISSES_IN_A_ROW
    least = next(iter(search.tried)).usd_per_hour
    while misses_left and len(search.tried) < MOST_REPLAYS:
        found = [
            (sum(search.short(parent).values()), mix.usd_per_hour, mix.counts, mix)
            for parent in search.tried
            for mix in _beside(parent, search.workload.fleet)
            if least <= mix.usd_per_hour < best.usd_per_hour and mix not in search.tried
        ]
        if not found:
            break
        mix = min(found, key=lambda one: one[:3])[3]
        attained = search.attempt(mix)
        misses_left = MISSES_IN_A_ROW if attained else misses_left - 1
        best = mix if attained else best
    return best


def _beside(mix: Mix, fleet: Fleet) -> Iterator[Mix]:
    """The mixes with one device less, and those with one more."""
    for position, name in enumerate(mix.prices):
        if mix.counts[position] and sum(mix.counts) > 1:
            yield mix.changed(position, -1)
        more = mix.changed(position, 1)
        if more.counts[position] <= fleet.classes[name].count:
            yield more


def _round(headroom: Figures, mix: Mix, summary: RunSummary) -> Round:
    return Round(
        headroom={name: round(float(times), 4) for name, times in zip(SERVICES, headroom, strict=True)},
        usd_per_hour=mix.usd_per_hour,
        attainment=summary.attainment,
    )


def _bought(mix: Mix, summary: RunSummary, fleet: Fleet) -> list[Bought]:
    return [
        Bought(
            hardware_class=name,
            spot=fleet.classes[name].spot,
            devices=number,
            usd_per_hour=number * mix.prices[name],
            utilisation=summary.utilisation[name],
        )
        for name, number in mix.devices().items()
    ]


def tables(slo: Mapping[str, float], plan: MixPlan) -> list[Table | Text]:
    """The mix, its attainment beside the shares that were required, and how it was found."""
    tried = ", ".join(f"${one.usd_per_hour:.2f}" for one in plan.rounds)
    since = f"{plan.replays - len(plan.rounds)} cheaper ones since, which saved ${plan.saved:.2f}"
    found = Text(f"{plan.requests:,} requests; mixes replayed: {tried} an hour; {since}", style="dim")
    return [_mix(plan), Text(), _attained(slo, plan), found]


def _mix(plan: MixPlan) -> Table:
    shown = table("class", right=("devices", "$ an hour", "busy"))
    for row in plan.mix:
        name = f"{row.hardware_class} (spot)" if row.spot else row.hardware_class
        shown.add_row(*map(Text, [name, str(row.devices), f"{row.usd_per_hour:.2f}", percent(row.utilisation)]))
    devices = sum(row.devices for row in plan.mix)
    shown.add_row("in all", str(devices), f"{plan.usd_per_hour:.2f}", "", style="bold")
    return shown


def _attained(slo: Mapping[str, float], plan: MixPlan) -> Table:
    shown = table("service", right=("asked", "attained", "headroom"))
    headroom = plan.rounds[-1].headroom
    for name in SERVICES:
        shown.add_row(name, percent(slo.get(name)), percent(plan.attainment[name]), f"×{headroom[name]:.2f}")
    return shown
