"""A lower bound on the cost of answering requests in time in this simulator.

A linear programme finds prices: what a second of work is worth in each time window on each class (`pricing`). The bound
relies neither on its groups nor on its solver: by weak duality (Boyd and Vandenberghe, *Convex Optimization*, 2004,
section 5.2), for any prices, a fleet costs at least what each request costs at them where and when it is cheapest, less
what the prices promise for devices beyond the count.

Why no schedule costs less: a request that is answered in time runs on one class between its arrival and its deadline,
and takes at least the device seconds that `minimum_time` gives. For each class:

1. The mean number of powered devices over a window is at least the window's device seconds of work per second.
2. A device works only once it has started, and has then been on for `start` seconds (`Pool.switch_on`), or since the
trace began. Devices that work in a window are therefore on in all windows that begin at most `start` before its end.
3. There are at most `count` devices, and at least `minimum` unless devices of the class fail or are taken away.

What happens after the last arrival is charged as work alone. Left out: idle time, whole devices, failures, and what
`minimum_time` leaves out. Including that the scaling rule keeps devices for the densities of jobs (`scaling.wanted`),
and for `start` seconds after, was tried: on Azure's traces the bound did not change by a cent, because that time can be
filled with work that is paid anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simulator.bounds.minimum_time import SLACK, least_work
from simulator.bounds.pace import Pace
from simulator.bounds.pricing import Prices, Supply, Windows, find_prices
from simulator.fleet import SERVICES
from simulator.outcome import Summary, fines
from simulator.traces.workload import Figures, Workload

NAME = "lp-bound"

WINDOW = 20.0
"""Seconds of a window; longer for traces of more than two hours. With 5 s the bound was up to 5 % higher on Azure's."""

_MOST_WINDOWS = 360


@dataclass(frozen=True, slots=True)
class Bound:
    """Minimum cost of answers in US dollars: `fixed`, plus what each request adds.

    `least` has each service's requests, cheapest first, without those that no class could answer in time. `asked` is
    the number of requests of each service, `fines` US dollars for each that is missed.
    """

    fixed: float
    least: Mapping[str, Figures]
    asked: Mapping[str, int]
    fines: Mapping[str, float]

    @property
    def score(self) -> float:
        """Minimum of a run's score: a request that costs more than its fine is left out."""
        answered = sum(float(np.minimum(least, self.fines[name]).sum()) for name, least in self.least.items())
        never = sum((asked - len(self.least[name])) * self.fines[name] for name, asked in self.asked.items())
        return max(self.fixed + answered, 0.0) + never

    @property
    def cost(self) -> float:
        """Minimum cost of answering in time every request that could be."""
        return self.of(dict.fromkeys(SERVICES, 1.0))

    def of(self, attained: Mapping[str, float | None]) -> float:
        """Minimum cost of answering these shares of the services' requests in time: the cheapest ones."""
        answered = {name: round((attained[name] or 0.0) * self.asked[name]) for name in self.least}
        return max(self.fixed + sum(float(self.least[name][:count].sum()) for name, count in answered.items()), 0.0)

    def summary(self) -> Summary:
        """As a row beside the policies, with the shares that could be answered in time."""
        possible = {name: len(self.least[name]) / asked if asked else None for name, asked in self.asked.items()}
        return Summary(
            policy=NAME,
            requests=sum(self.asked.values()),
            attainment=possible,
            cost_usd=self.cost,
            score=self.score,
        )


def lower_bound(workload: Workload) -> Bound:
    """The least that any policy can pay; the module's docstring explains why."""
    work = _device_seconds(workload)
    windows = Windows.of(workload, max(WINDOW, float(workload.trace.arrival[-1]) / _MOST_WINDOWS))
    supplies = [Supply.of(workload.fleet, name, windows) for name in workload.fleet.classes]
    prices = find_prices(workload, work, supplies, windows)
    least = np.min([_cheapest(price, work[:, column], windows) for column, price in enumerate(prices)], axis=0)
    service, possible = workload.trace.service, np.isfinite(least)
    return Bound(
        sum(price.fixed for price in prices),
        {name: np.sort(least[possible & (service == number)]) for number, name in enumerate(SERVICES)},
        {name: int((service == number).sum()) for number, name in enumerate(SERVICES)},
        dict(zip(SERVICES, fines(workload).tolist(), strict=True)),
    )


def _device_seconds(workload: Workload) -> Figures:
    """Minimum device seconds of each request on each class, at the highest speed that the class has during its life."""
    trace = workload.trace
    paces = [Pace.of(workload, column) for column in range(len(workload.fleet.classes))]
    due = trace.arrival + trace.deadline * SLACK
    fastest = np.stack([pace.fastest(trace.arrival, due) for pace in paces], axis=1)
    seconds: Figures = least_work(workload, paces) / fastest
    return seconds


def _cheapest(prices: Prices, work: Figures, windows: Windows) -> Figures:
    """What each request costs on the class in its cheapest window; infinite if it cannot be in time."""
    later = np.arange(windows.count + 1) >= np.arange(windows.count + 1)[:, None]
    lowest = np.minimum.accumulate(np.where(later, prices.work, np.inf), axis=1)  # from a window (row) to a later one
    able = np.isfinite(work)
    return np.where(able, np.where(able, work, 0.0) * lowest[windows.first, windows.last], np.inf)
