"""A lower bound on the cost of answering requests in time in this simulator.

A linear programme finds prices: what a second of work is worth in each time window on each class (`find_prices`). The
bound relies neither on its groups nor on its solver: by weak duality (Boyd and Vandenberghe, *Convex Optimization*,
2004, section 5.2), for any prices, a fleet costs at least what each request costs at them where and when it is
cheapest, less what the prices promise for devices beyond the count.

Why no schedule costs less: a request that is answered in time runs on one class between its arrival and its deadline,
and takes at least the device seconds that `least_work` gives. For each class:

1. The mean number of powered devices over a window is at least the window's device seconds of work per second.
2. A device works only once it has started, and has then been on for `start` seconds (`Pool.switch_on`), or since the
trace began. Devices that work in a window are therefore on in all windows that begin at most `start` before its end.
3. There are at most `count` devices, and at least `minimum` unless devices of the class fail or are taken away.

What happens after the last arrival is charged as work alone. Left out: idle time, whole devices, failures, and what
`least_work` leaves out. Including that the scaling rule keeps devices for the densities of jobs (`scaling.wanted`),
and for `start` seconds after, was tried: on Azure's traces the bound did not change by a cent, because that time can be
filled with work that is paid anyway.

The minimum device seconds of answering a request in time (`least_work`) hold however it is scheduled. They are seconds
of the profile; `Pace` has what events do to them. Spot devices serve preemptible services only.

A batch's time is `base` per step, independent of its rows, plus what each row adds: its prompt, and its own tokens read
once per step (`Stepping`), or its size (`WholeBatches`). The second part is the request's own. Of the first, rows have
shares that sum to one in each step, by one of two rules:

- *by row*: equal shares, so each row bears at least 1 / `max_batch` of it;
- *by load*: in proportion to the tokens or sizes that the rows hold. A batch holds no more than the memory and its most
rows allow. While a request with a deadline runs, it holds still less: reading what all rows hold takes time in each
step, and the request must end in time. Its share is least if the batch holds equally much for each token of its own
(Cauchy and Schwarz).

Both hold for every batch, so the rule that charges more in total is chosen for each class and model.

Left out, so that nothing is charged that a schedule could avoid: waiting, loading, delays from the prompts of others,
compute-bound steps, and a `WholeBatches` batch's floor.

The programme that finds prices treats a group's requests as fluid, each at their mean cost, so its own optimum is not a
bound. `lower_bound` derives one from the prices, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lab.changes import HardwareChange, changes_of
from simulator.engine import RunSummary
from simulator.fleet import SERVICES, USABLE, DeviceClass, Fleet, Stepping, Timing, WholeBatches
from simulator.traces import Column
from simulator.workload import Figures, Workload, barred

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

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

    def summary(self) -> RunSummary:
        """The bound as a row of the table of policies, with the shares that could be answered in time."""
        possible = {name: len(self.least[name]) / asked if asked else None for name, asked in self.asked.items()}
        return RunSummary(
            policy=NAME, requests=sum(self.asked.values()), attainment=possible, cost_usd=self.cost, score=self.score
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


def fines(workload: Workload) -> Figures:
    """US dollars for one missed request of each service; shape (services,)."""
    trace = workload.trace
    asked = np.bincount(trace.service, minlength=len(SERVICES))
    each: Figures = np.array(workload.fleet.penalties) * float(trace.arrival[-1]) / 3600 / np.maximum(asked, 1)
    return each


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


BINS = 2
"""Groups per model, service and set of classes; with four the bound was 0.4 % higher on Azure's chat trace."""

MISSED = 10.0
"""Cost of leaving a request out of the programme, as a multiple of its highest cost: a fleet may be too small."""

FAR = 100
"""Windows; a deadline at least this far off is ignored by the programme."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Whole windows of `length` seconds, plus one unbounded window after them.

    `first` and `last` are each request's window of arrival and of deadline; shapes (n,).
    """

    length: float
    count: int
    first: Column
    last: Column

    @classmethod
    def of(cls, workload: Workload, length: float) -> Windows:
        """The windows of this length that end before the last arrival."""
        trace = workload.trace
        count = int(trace.arrival[-1] // length)
        due = np.minimum(trace.arrival + trace.deadline * SLACK, (count + 1) * length)
        first, last = (np.minimum(moment // length, count).astype(np.int64) for moment in (trace.arrival, due))
        return cls(length, count, first, last)


@dataclass(frozen=True, slots=True)
class Supply:
    """A class's devices: at least `low` in each window, at most `count`, at `price` US dollars per second each.

    `pairs` are a window and one for whose work its devices are on. Shapes: (windows,) and (2, pairs).
    """

    count: int
    price: float
    low: Figures
    pairs: Column

    @classmethod
    def of(cls, fleet: Fleet, name: str, windows: Windows) -> Supply:
        """The class's devices."""
        device = fleet.classes[name]
        reach = int(device.start // windows.length)
        low = np.full(windows.count, float(device.minimum * is_lasting(fleet, name)))
        now, other = np.indices((windows.count, windows.count))
        started = (other > now) & (other - now < reach)
        return cls(device.count, device.usd_per_second, low, np.argwhere((other == now) | started).T)


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars for a second of work on a class, by window, the one after the trace last.

    `fixed` is what the class costs whatever it serves: its `low` devices, less what the prices promise for more than
    `count`.
    """

    work: Figures
    fixed: float

    @classmethod
    def of(cls, supply: Supply, windows: Windows, worth: Figures) -> Prices:
        """The prices at which each pair's device is worth these US dollars to the second window of the pair."""
        work = np.bincount(supply.pairs[1], worth, minlength=windows.count) / windows.length
        left = supply.price * windows.length - np.bincount(supply.pairs[0], worth, minlength=windows.count)
        fixed = float(np.where(left >= 0, left * supply.low, left * supply.count).sum())
        return cls(np.append(work, supply.price), fixed)


def find_prices(workload: Workload, work: Figures, supplies: Sequence[Supply], windows: Windows) -> list[Prices]:
    """Good prices for each class; `work` is device seconds, shape (n, classes)."""
    programme = Programme()
    unit = min(supply.price for supply in supplies)
    sellers = [_Seller.of(programme, supply, windows, supply.price / unit) for supply in supplies]
    for rows in _groups(workload, work, windows):
        _buy(programme, rows, work, sellers, windows)
    multipliers = programme.multipliers() * unit * windows.length
    return [
        Prices.of(supply, windows, multipliers[seller.cover]) for supply, seller in zip(supplies, sellers, strict=True)
    ]


def _groups(workload: Workload, work: Figures, windows: Windows) -> list[Column]:
    """Requests that arrive in the windows and could be in time, by model, service, classes and spread of costs."""
    trace = workload.trace
    dollars = work * np.array([device.usd_per_second for device in workload.fleet.classes.values()])
    able = np.isfinite(dollars)
    rows = np.flatnonzero(able.any(axis=1) & (windows.first < windows.count))
    spread = np.where(able, dollars, 0.0)[rows].sum(axis=1) / dollars[rows].min(axis=1, initial=math.inf)
    kinds = able[rows] @ (1 << np.arange(dollars.shape[1]))
    keys = np.stack([trace.model[rows], trace.service[rows], kinds], axis=1)
    found = []
    for key in np.unique(keys, axis=0):
        alike = np.flatnonzero((keys == key).all(axis=1))
        by_spread = rows[alike[np.argsort(spread[alike], kind="stable")]]
        found += [part for part in np.array_split(by_spread, BINS) if len(part)]
    return found


@dataclass(frozen=True, slots=True)
class _Seller:
    """A class in the programme: rows for devices kept busy by each window's work, and for devices on for them.

    `price` is the cost of a device per window, in the programme's unit.
    """

    price: float
    busy: Column
    cover: Column

    @classmethod
    def of(cls, programme: Programme, supply: Supply, windows: Windows, price: float) -> _Seller:
        powered = programme.columns(windows.count, cost=price, low=supply.low, high=supply.count)
        needed = programme.columns(windows.count)
        seller = cls(price, programme.rows(windows.count), programme.rows(supply.pairs.shape[1]))
        programme.put(seller.busy, needed, -1.0)
        programme.put(seller.cover, needed[supply.pairs[1]], 1.0)
        programme.put(seller.cover, powered[supply.pairs[0]], -1.0)
        return seller


def _buy(programme: Programme, rows: Column, work: Figures, sellers: Sequence[_Seller], windows: Windows) -> None:
    """Add a group to the programme: all of it is bought in its window of arrival, as shares of the classes."""
    slots = windows.first[rows]
    lag = int((windows.last[rows] - slots).max())
    whole = programme.rows(windows.count, most=np.where(np.bincount(slots, minlength=windows.count) > 0, -1.0, 0.0))
    dearest = np.zeros(windows.count)
    for column in np.flatnonzero(np.isfinite(work[rows[0]])).tolist():
        shares = programme.columns(windows.count, high=1.0)
        programme.put(whole, shares, -1.0)
        devices = np.bincount(slots, work[rows, column], minlength=windows.count) / windows.length
        _serve(programme, shares, devices, sellers[column], lag)
        dearest = np.maximum(dearest, devices * sellers[column].price)
    programme.put(whole, programme.columns(windows.count, cost=MISSED * dearest), -1.0)  # what the fleet cannot serve


def _serve(programme: Programme, shares: Column, devices: Figures, seller: _Seller, lag: int) -> None:
    """What is bought joins a backlog, worked off within `lag` windows, or after the trace at the bare price."""
    count = len(shares)
    stock = programme.columns(count, cost=np.where(np.arange(count) == count - 1, seller.price, 0.0))
    served, due = programme.rows(count), programme.rows(count if lag < FAR else 0)
    for rows, sign in ((served, -1.0), (seller.busy, 1.0)):
        programme.put(rows, shares, sign * devices)
        programme.put(rows[1:], stock[:-1], sign)
        programme.put(rows, stock, -sign)
    programme.put(due, stock[: len(due)], 1.0)
    for later in range(min(lag, len(due))):
        programme.put(due[later:], shares[: count - later], -devices[: count - later])


@dataclass(frozen=True, slots=True)
class Solution:
    """What HiGHS proved and found in its time: no solution costs less than `bound`; `values` is the best one found.

    `gap` is the best one's cost over the bound, less one; infinite without any. Shape of `values`: (columns,).
    """

    bound: float
    values: Figures | None
    gap: float


class Programme:
    """Columns and rows are numbered in the order of their addition."""

    def __init__(self) -> None:
        self._columns: list[Figures] = []
        self._most: list[Figures] = []
        self._entries: list[tuple[Column, Column, Figures]] = []
        self._width = self._height = 0

    def columns(
        self,
        count: int,
        *,
        cost: Figures | float = 0.0,
        low: Figures | float = 0.0,
        high: Figures | float = math.inf,
        whole: bool = False,
    ) -> Column:
        """Add `count` columns, of whole numbers if `whole`; returns their numbers."""
        figures = (cost, low, high, float(whole))
        self._columns.append(np.stack([np.broadcast_to(figure, (count,)) for figure in figures], axis=1))
        self._width += count
        return np.arange(self._width - count, self._width)

    def rows(self, count: int, *, most: Figures | float = 0.0) -> Column:
        """Add `count` rows; returns their numbers."""
        self._most.append(np.broadcast_to(most, (count,)))
        self._height += count
        return np.arange(self._height - count, self._height)

    def put(self, rows: Column, columns: Column, values: Figures | float) -> None:
        """Add entries, one for each element of the three arguments."""
        self._entries.append((rows, columns, np.broadcast_to(values, rows.shape)))

    def multipliers(self) -> Figures:
        """What one more unit of each row's limit would save; shape (rows,), at least 0. Ignores `whole`."""
        from scipy.optimize import linprog  # now, not above: it is slow to import, and most commands do not solve

        if not self._width:
            return np.zeros(self._height)
        columns, most = np.concatenate(self._columns), np.concatenate(self._most)
        found = linprog(columns[:, 0], A_ub=self._matrix(), b_ub=most, bounds=columns[:, 1:3], method="highs-ipm")
        assert found.success, found.message
        multipliers: Figures = np.maximum(-found.ineqlin.marginals, 0.0)
        return multipliers

    def solve(self, *, gap: float, seconds: float) -> Solution:
        """The least cost within a relative `gap`, or the best bound found within the time limit."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # now, as above

        columns, most = np.concatenate(self._columns), np.concatenate(self._most)
        found = milp(
            columns[:, 0],
            constraints=LinearConstraint(self._matrix(), -np.inf, most),
            bounds=Bounds(columns[:, 1], columns[:, 2]),
            integrality=columns[:, 3],
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        bound = -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
        if found.x is None:
            return Solution(bound, None, math.inf)
        return Solution(bound, found.x, float(found.fun) / bound - 1 if bound > 0 else math.inf)

    def _matrix(self) -> csr_matrix:
        from scipy.sparse import coo_matrix

        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        return coo_matrix((value, (row, column)), shape=(self._height, self._width)).tocsr()


SLACK = 1 + 2e-6
"""Factor on deadlines within which an answer counts as in time: latencies are float32 (`Outcome.in_time`)."""

_NONE = 1e-12


@dataclass(frozen=True, slots=True)
class _Run:
    """Requests' runs: seconds of the prompt, steps, seconds of a step's base and of each unit that a step holds.

    `own` is the units that the request itself holds, summed over its steps; `root` is the square of the sum of their
    roots; `room` is the most units that a batch holds. Shapes: (n,), or one figure for all.
    """

    prompt: Figures
    steps: Figures
    base: float
    per_unit: float
    own: Figures
    root: Figures
    room: float

    @classmethod
    def of(cls, timing: Timing, device: DeviceClass, size: Figures, output: Figures) -> _Run:
        """Requests of one model on a class."""
        total = size + output
        most = float(total.max()) * device.max_batch
        if isinstance(timing, WholeBatches):
            return cls(np.zeros_like(total), np.ones_like(total), timing.base, timing.slope, total, total, most)
        assert isinstance(timing, Stepping)
        return cls(
            prompt=np.maximum(size * (timing.per_token + timing.per_pair * size), timing.reading) + timing.overhead,
            steps=output,
            base=timing.reading + timing.overhead,
            per_unit=timing.per_cached,
            own=output * (size + output / 2),
            root=((2 / 3) * (total**1.5 - size**1.5)) ** 2,
            room=min(most, (device.memory * USABLE - timing.memory) / timing.cache),
        )

    def work(self, most: int, deadline: Figures) -> Figures:
        """Minimum device seconds in batches of at most `most` rows; infinite if it cannot be in time."""
        alone = self.prompt + self.steps * self.base
        able = alone + self.per_unit * self.own <= deadline
        in_time = np.where(able, deadline - alone, 0.0) / max(self.per_unit, _NONE)
        held = np.maximum(np.minimum(in_time, self.steps * self.room), np.maximum(self.own, _NONE))
        by_row, by_load = self.steps / most, self.root / held
        share = by_row if by_row[able].sum() > by_load[able].sum() else by_load
        return np.where(able, self.prompt + self.per_unit * self.own + self.base * share, np.inf)


def least_work(workload: Workload, paces: Sequence[Pace]) -> Figures:
    """Minimum seconds of each request on each class at its profile's pace; infinite if it would be late.

    Shape: (n, classes).
    """
    trace, fleet = workload.trace, workload.fleet
    work = np.full((len(trace), len(fleet.classes)), np.inf)
    for number, name in enumerate(trace.models):
        rows = np.flatnonzero(trace.model == number)
        size, output = trace.size[rows].astype(np.float64), trace.output[rows].astype(np.float64)
        for column, (device, timing) in enumerate(zip(fleet.classes.values(), fleet.timings[name], strict=True)):
            if timing is not None and len(rows):
                run = _Run.of(timing, device, size, output)
                deadline = trace.deadline[rows] * SLACK
                fastest = paces[column].fastest(trace.arrival[rows], trace.arrival[rows] + deadline)
                work[rows, column] = run.work(device.max_batch, deadline * fastest)
    work[barred(trace, fleet)] = np.inf
    return work


@dataclass(frozen=True, slots=True)
class Pace:
    """A class's speed and number of devices from each of these moments on, the first at 0.

    What was begun before a change may still run at the speed before it, for at most `carried` seconds.
    """

    moments: tuple[float, ...]
    speeds: tuple[float, ...]
    counts: tuple[float, ...]
    carried: float

    @classmethod
    def of(cls, workload: Workload, column: int) -> Pace:
        """The class in this column of the workload's figures."""
        fleet = workload.fleet
        name, device = list(fleet.classes.items())[column]
        moments, speeds, counts = [0.0], [1.0], [float(device.count)]
        for event in _events(fleet, name):
            moments.append(event.at)
            speeds.append(speeds[-1] if event.slower is None else 1 / event.slower)
            counts.append(counts[-1] if event.available is None else min(event.available, device.count))
        carried = _carried(workload, column) / min(speeds) if len(set(speeds)) > 1 else 0.0
        return cls(tuple(moments), tuple(speeds), tuple(counts), carried)

    @property
    def changes(self) -> set[float]:
        """When the speed or the number of devices changes."""
        after = set(self.moments[1:])
        return after | {moment + self.carried for moment in after}

    def fastest(self, begin: Figures, end: Figures) -> Figures:
        """The highest speed in each of these periods."""
        return self._highest(self.speeds, begin, end)

    def most(self, begin: Figures, end: Figures) -> Figures:
        """The highest number of devices in each of these periods."""
        return self._highest(self.counts, begin, end)

    def _highest(self, values: Iterable[float], begin: Figures, end: Figures) -> Figures:
        found = np.zeros(len(begin))
        for value, since, until in zip(values, self.moments, (*self.moments[1:], np.inf), strict=True):
            found = np.where((begin < until) & (end >= since), np.maximum(found, value), found)
        return found


def is_lasting(fleet: Fleet, name: str) -> bool:
    """Whether a class's devices are on until they are switched off: they do not fail, and none is taken away."""
    device = fleet.classes[name]
    reclaimed = device.reclaims_per_hour > 0 and device.spot
    fails = device.failures_per_hour or reclaimed
    return not fails and all(event.slower is not None for event in _events(fleet, name))


def _events(fleet: Fleet, name: str) -> list[HardwareChange]:
    return [change for change in changes_of(fleet) if change.hardware_class == name]


def _carried(workload: Workload, column: int) -> float:
    """Seconds of the most that a device can have begun: a whole batch, and the prompts of full generating batches."""
    trace, fleet = workload.trace, workload.fleet
    rows = list(fleet.classes.values())[column].max_batch
    whole, prompts = 0.0, 0.0
    for number, name in enumerate(trace.models):
        timing, total = fleet.timings[name][column], (trace.size + trace.output)[trace.model == number]
        size = float(total.max(initial=0))
        if isinstance(timing, WholeBatches):
            whole = max(whole, timing.load + timing.batch(rows, rows * size))
        elif isinstance(timing, Stepping):
            prompts += timing.load + rows * timing.prefill(size)
    return whole + prompts
