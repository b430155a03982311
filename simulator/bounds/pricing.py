"""Prices of device time, by window and class, from a linear programme over groups of similar requests.

The programme treats a group's requests as fluid, each at their mean cost, so its own optimum is not a bound.
`simulator.bounds.bound` derives one from the prices, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.bounds.minimum_time import SLACK
from simulator.bounds.pace import is_lasting
from simulator.bounds.programme import Programme
from simulator.fleet import Fleet
from simulator.traces.trace import Column
from simulator.traces.workload import Figures, Workload

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
