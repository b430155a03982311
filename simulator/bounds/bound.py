"""What nobody can undercut: a lower bound on the cost of answering requests in time in this simulator.

A linear programme finds prices: what a second of work is worth in each window of time on each class (`pricing`). The
bound then trusts neither its groups nor its solver: by weak duality (Boyd and Vandenberghe, *Convex Optimization*,
2004, section 5.2), whatever the prices, a fleet costs at least what each request costs at them where and when it is
cheapest, less what the prices promise for devices that there are not.

Why no schedule costs less. A request that is answered in time runs on one class between its arrival and its deadline,
and takes at least the device seconds that `charges` says. For each class:

1. Powered devices, on average over a window, are as many as the device seconds of work in it, a second.
2. A device works only once it has started, and has been on for `start` seconds then (`Pool.switch_on`), or since the
   trace began. So those that work in a window are on in all windows that begin no longer than `start` before its end.
3. There are at least `minimum` devices and `count` at most. `initial` ones are on for `start` seconds from the
   beginning (`scaling.Need`), unless devices of the class fail or are reclaimed.

What happens after the last arrival is paid as work alone. Left out: idle time, whole devices, failures, and what
`charges` leaves out. That the scaling rule keeps devices for the densities of jobs (`scaling.wanted`), and for `start`
seconds after, was tried: on Azure's traces the bound stayed the same to the cent, for that time can be filled with work
that is paid anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simulator.bounds.minimum_time import least_work
from simulator.bounds.pricing import Prices, Supply, Windows, find_prices
from simulator.fleet import SERVICES
from simulator.outcome import Summary
from simulator.traces.workload import Figures, Workload

NAME = "lp-bound"

WINDOW = 20.0
"""Seconds of a window; longer for traces of more than two hours. With 5 s the bound was up to 5 % higher on Azure's."""

_MOST_WINDOWS = 360


@dataclass(frozen=True, slots=True)
class Bound:
    """What answers cost at least, in US dollars: `fixed`, and what each request adds.

    `least` has each service's requests, cheapest first, but those that no class could answer in time; `asked` is how
    many requests each service had.
    """

    fixed: float
    least: Mapping[str, Figures]
    asked: Mapping[str, int]

    @property
    def cost(self) -> float:
        """What answering in time every request that could be costs at least."""
        return self.of(dict.fromkeys(SERVICES, 1.0))

    def of(self, attained: Mapping[str, float | None]) -> float:
        """What answering these shares of the services' requests in time costs at least: the cheapest ones."""
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
            p50=None,
            p99=None,
            goodput=None,
            moves=0,
            utilisation={},
        )


def lower_bound(workload: Workload) -> Bound:
    """The least that any policy can pay; the module's docstring says what that rests on."""
    work = least_work(workload)
    windows = Windows.of(workload, max(WINDOW, float(workload.trace.arrival[-1]) / _MOST_WINDOWS))
    supplies = [Supply.of(device, windows) for device in workload.fleet.classes.values()]
    prices = find_prices(workload, work, supplies, windows)
    least = np.min([_cheapest(price, work[:, column], windows) for column, price in enumerate(prices)], axis=0)
    service, possible = workload.trace.service, np.isfinite(least)
    return Bound(
        sum(price.fixed for price in prices),
        {name: np.sort(least[possible & (service == number)]) for number, name in enumerate(SERVICES)},
        {name: int((service == number).sum()) for number, name in enumerate(SERVICES)},
    )


def _cheapest(prices: Prices, work: Figures, windows: Windows) -> Figures:
    """What each request costs on the class in its cheapest window; infinite where it cannot be in time."""
    later = np.arange(windows.count + 1) >= np.arange(windows.count + 1)[:, None]
    lowest = np.minimum.accumulate(np.where(later, prices.work, np.inf), axis=1)  # from a window (row) to a later one
    able = np.isfinite(work)
    return np.where(able, np.where(able, work, 0.0) * lowest[windows.first, windows.last], np.inf)
