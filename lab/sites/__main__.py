"""What are three sites with different hours worth together, beside each alone and beside one central fleet?

`python -m lab.sites` plays a day, a minute for an hour, with each seed: when the sites are busy one after the other,
when all are busy at the same hours, and when the edge is cut off for a quarter of the day. `sites alone` have no lines.
With `offers` each site is a class of the others. The `central fleet` has all devices and sees all of them, and its
callers pay the line's delay both ways; what is private runs at its site, on that site's devices, as part of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from rich.console import Console
from rich.table import Table

from lab.sites.hours import DAY, day
from lab.sites.region import Region
from lab.sites.site import SITES, Line, alone, central, fleet_of, topology_of
from simulator.engine import penalty
from simulator.fleet import SERVICES
from simulator.reports import table
from simulator.workload import Workload, prepare
from tasks.topology import Topology

DELAY = 0.04
"""Seconds that a message takes from one site to another, as in `examples/sites`."""

CUT = (0.25 * DAY, 0.5 * DAY)

SCENARIOS: Mapping[str, tuple[float, tuple[tuple[float, float], ...]]] = {
    "different hours": (1 / 3, ()),
    "the same hours": (0.0, ()),
    "different hours, edge cut off": (1 / 3, (CUT,)),
}
"""By how much of a day each site is later than the one before, and when the edge's lines are cut."""

ARMS: Mapping[str, tuple[Callable[[Sequence[Topology]], Sequence[Topology]], float]] = {
    "sites alone": (lambda sites: [alone(one) for one in sites], 0.0),
    "offers": (lambda sites: sites, 0.0),
    "central fleet": (lambda sites: [central(sites)], DELAY),
}
"""The fleets that the sites make, and how far away they are from callers."""


@dataclass(frozen=True, slots=True)
class Played:
    """The figures of one run, by what they are called; `latency` and `elsewhere` are of each request."""

    figures: Mapping[str, float]
    latency: np.ndarray
    elsewhere: np.ndarray


def lines_with(cuts: tuple[tuple[float, float], ...]) -> dict[frozenset[str], Line]:
    """The lines between the sites; those of the edge are cut."""
    return {frozenset(pair): Line(DELAY, cuts if "edge" in pair else ()) for pair in combinations(SITES, 2)}


def play(scenario: str, arm: str, seed: int) -> Played:
    """Play one day."""
    shift, cuts = SCENARIOS[scenario]
    make, away = ARMS[arm]
    trace, sites = day(seed, shift=shift), [topology_of(site) for site in SITES]
    region = Region(make(sites), trace, lines_with(cuts), away=away)
    region.run()
    timely = region.outcome.in_time(prepare(trace, fleet_of(sites[0])))
    home = np.array([SITES.index(tenant.partition(".")[0]) for tenant in trace.tenants])[trace.tenant]
    figures = {name: 100 * float(timely[trace.service == rank].mean()) for rank, name in enumerate(SERVICES)}
    score = region.cost
    for number, site in enumerate(SITES):
        shares = {
            name: float(timely[(home == number) & (trace.service == n)].mean()) for n, name in enumerate(SERVICES)
        }
        figures |= {f"{site} {name}": 100 * share for name, share in shares.items()}
        score += penalty(Workload(trace, fleet_of(sites[number]), trace.service), shares)
    figures |= {"cost": region.cost, "score": score, "moved": 100 * float(region.elsewhere.mean())}
    away_from_home = region.elsewhere | (region.away > 0)
    return Played(figures, region.outcome.latency, away_from_home)


def extra(one: Played, home: Played) -> float:
    """The median of the seconds by which what was served elsewhere was answered later than by its site alone."""
    both = one.elsewhere & np.isfinite(one.latency) & np.isfinite(home.latency)
    return float(np.median((one.latency - home.latency)[both])) if both.any() else 0.0


def shown(values: Sequence[float], digits: int) -> str:
    """The mean of a figure over the seeds, and its range."""
    low, mean, high = min(values), sum(values) / len(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def tables(scenario: str, runs: Mapping[tuple[str, str, int], Played], seeds: Sequence[int]) -> tuple[Table, Table]:
    """A scenario's figures: of all sites, and in time by site and service."""
    whole = table(
        first=scenario, right=[*(f"{name}, %" for name in SERVICES), "cost, $", "score, $", "moved, %", "extra, s"]
    )
    parts = [f"{site} {name}" for site in SITES for name in SERVICES[:2]]
    by_site = table(first="in time, %", right=parts)
    for arm in ARMS:
        mine = [runs[scenario, arm, seed] for seed in seeds]
        late = [extra(one, runs[scenario, "sites alone", seed]) for one, seed in zip(mine, seeds, strict=True)]
        digits = {"cost": 2, "score": 2, "moved": 0}
        of = {name: [one.figures[name] for one in mine] for name in mine[0].figures}
        cells = [shown(of[name], digits.get(name, 1)) for name in (*SERVICES, "cost", "score", "moved")]
        whole.add_row(arm, *cells, shown(late, 2))
        by_site.add_row(arm, *(shown(of[name], 1) for name in parts))
    return whole, by_site


def main() -> None:
    """Play every scenario under every arm with every seed, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m lab.sites", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scenario", choices=list(SCENARIOS), nargs="+", default=list(SCENARIOS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    given = parser.parse_args()
    keys = list(product(given.scenario, ARMS, given.seeds))
    with ProcessPoolExecutor(given.jobs) as pool:
        runs = dict(zip(keys, pool.map(play, *zip(*keys, strict=True)), strict=True))
    console = Console(width=None if sys.stdout.isatty() else 180)
    for scenario in given.scenario:
        console.print(*tables(scenario, runs, given.seeds), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
