"""A lower bound on a run's score with whole devices and their starts, from a mixed-integer programme.

The programme knows all arrivals, sizes and outputs. It buys devices of each class in slots of time, and gives the work
of each request to classes and slots, or leaves it out and pays the penalty. HiGHS need not solve it: the bound is what
it has proved when its time is over, its dual bound, which is valid however early it stops.

Every run obeys the programme. In it, a device serves from the end of its start until it is switched off:

1. `serving` devices, a whole number, serve across a slot's beginning, and `started` ones begin to serve within it.
   Those across its end are among both. Those across both ends, at least the devices across the end less the started
   ones, are paid for the whole slot; others for as long as they serve.
2. Each started device has also cost `start` seconds, and was on for them: together with those that serve, no more than
   the class's `count`, or what an event leaves available. None serves before `start`, apart from `initial` ones.
3. `minimum` devices serve until the last arrival, unless devices of the class fail or are taken away.
4. A request that is answered in time takes at least `least_work` of one class's devices between its arrival and its
   deadline. It is not on a spot class unless its service is preemptible.
5. A request that is not costs its share of its service's penalty.

Relaxed, so that it stays a bound:

- Within a slot, work is fluid: no request waits for a batch, for another's turn, or for a free device while devices of
  its class have time left, and none occupies more devices or less time than suits. A request is as long in time as its
  slots of arrival and deadline are, and may be divided among classes.
- Each request runs in the best batch that its deadline and the memory allow, whatever else has arrived.
- Loading models, failures and reclaims cost nothing. `initial` devices may be switched off at once.
- Work begun before hardware slows down may end at the speed before (`Pace.carried`).
- Requests of a kind (`Kind`) have costs of one ratio between classes, and the largest is left out at
  the price of one.
- Slots grow after the last arrival.

Requests of a kind cost alike and are one divisible amount of work, whose cost is not overstated. They have the same
model, service and classes that answer them in time. Each has a size, and takes at least its size times the kind's rate
on each class. A kind of requests whose costs have unlike ratios between classes understates them, so the kinds that
lose most are split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lab.bounds.linear import SLACK, Pace, Programme, Solution, fines, is_lasting, least_work
from simulator.engine import RunSummary, penalty
from simulator.fleet import SERVICES, DeviceClass
from simulator.traces import Column
from simulator.workload import Figures, Workload

NAME = "whole-bound"

SLOT = 60.0
"""Seconds of a slot; longer for traces of more than half an hour. With less, fewer trials are solved in time."""

SECONDS = 30.0
"""The solver's time."""

_MOST_SLOTS = 30
_GROWTH = 2.0
_KINDS = 64
_GAP = 1e-3
_MARGIN = 1e-6
"""Share of the dual bound that the solver's tolerances may be worth."""


@dataclass(frozen=True, slots=True)
class WholeBound:
    """No run has a lower `score`, in US dollars.

    The best plan that the solver found for its relaxed fleet leaves out the shares `missed` of the services' requests;
    `cost` is what the score leaves for devices then. `gap` is that plan's score over the bound, less one. `seconds` is
    the time taken.
    """

    requests: int
    score: float
    cost: float
    missed: Mapping[str, float | None]
    gap: float
    seconds: float

    def summary(self) -> RunSummary:
        """The bound as a row of the table of policies."""
        return RunSummary(
            policy=NAME,
            requests=self.requests,
            attainment={name: None if share is None else 1 - share for name, share in self.missed.items()},
            cost_usd=self.cost,
            score=self.score,
        )


def whole_bound(workload: Workload, *, seconds: float = SECONDS) -> WholeBound:
    """The lowest score that is possible as far as the solver can tell in this time; see the module's docstring."""
    began = time.perf_counter()
    classes = list(workload.fleet.classes.values())
    paces = [Pace.of(workload, column) for column in range(len(classes))]
    work = least_work(workload, paces)
    slots = _Slots.of(workload, work, paces)
    price = np.array([device.usd_per_second for device in classes])
    unit = float(price[price > 0].min(initial=1.0))
    programme = _Plan(workload, slots, unit)
    for name, pace in zip(workload.fleet.classes, paces, strict=True):
        programme.add_class(name, pace)
    for kind in kinds(workload, work, price, most=_KINDS):
        programme.add_kind(kind)
    return programme.solved(np.asarray(np.isfinite(work).any(axis=1)), began, seconds)


@dataclass(frozen=True, slots=True)
class _Slots:
    """Slots between `edges`; the first `trace` of them are before the last arrival, and none is unbounded.

    `first` and `last` are each request's slots of arrival and of deadline; shapes (n,).
    """

    edges: Figures
    trace: int
    first: Column
    last: Column

    @classmethod
    def of(cls, workload: Workload, work: Figures, paces: Sequence[Pace]) -> _Slots:
        arrival = workload.trace.arrival
        due = arrival + workload.trace.deadline * SLACK
        end = float(arrival[-1])
        length = max(SLOT, end / _MOST_SLOTS)
        edges = np.linspace(0.0, end, math.ceil(end / length) + 1).tolist()
        known = due[np.isfinite(due)].max(initial=0.0)
        while edges[-1] < known or len(edges) < 2:
            edges.append(edges[-1] + length)
            length *= _GROWTH
        if np.isinf(due).any():
            slowest = min(min(pace.speeds) for pace in paces)
            edges.append(edges[-1] + float(np.where(np.isfinite(work), work, 0.0).sum()) / slowest + length)
        changes = {moment for pace in paces for moment in pace.changes if moment < edges[-1]}
        cuts = np.array(sorted({*edges, *changes}))
        first = np.clip(np.searchsorted(cuts, arrival, side="right") - 1, 0, len(cuts) - 2)
        last = np.clip(np.searchsorted(cuts, due, side="left") - 1, first, len(cuts) - 2)
        return cls(cuts, int((cuts[1:] <= end).sum()), first, last)

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    @property
    def lengths(self) -> Figures:
        lengths: Figures = np.diff(self.edges)
        return lengths


class _Plan:
    """The programme: classes first, then kinds of requests. Costs are in multiples of `unit` US dollars."""

    def __init__(self, workload: Workload, slots: _Slots, unit: float) -> None:
        self._workload = workload
        self._slots = slots
        self._unit = unit
        self._programme = Programme()
        self._busy: list[Column] = []
        self._left: list[tuple[int, Column, float]] = []
        self._asked = np.bincount(workload.trace.service, minlength=len(SERVICES))
        self._fines = fines(workload)

    def add_class(self, name: str, pace: Pace) -> None:
        """A class's devices: rows 1 to 3 of the module's docstring, and one per slot for the work that they have."""
        programme, slots, lengths = self._programme, self._slots, self._slots.lengths
        device, begin, end = self._workload.fleet.classes[name], slots.edges[:-1], slots.edges[1:]
        most = pace.most(begin, end)
        low = np.where(np.arange(slots.count) < slots.trace, device.minimum * is_lasting(self._workload.fleet, name), 0)
        room = np.clip(end - device.start, 0.0, lengths)
        price = device.usd_per_second / self._unit
        high = np.append(
            np.append(min(most[0], max(device.initial, device.minimum)), np.minimum(most[1:], most[:-1])), 0
        )
        serving = programme.columns(slots.count + 1, low=np.append(low, 0), high=high, whole=True)
        started = programme.columns(
            slots.count, cost=price * device.start, high=np.where(room > 0, most, 0), whole=True
        )
        paid = programme.columns(slots.count, cost=price, low=low * lengths, high=most * lengths)
        left = programme.rows(slots.count)
        for columns, values in ((serving[1:], 1.0), (serving[:-1], -1.0), (started, -1.0)):
            programme.put(left, columns, values)
        across = programme.rows(slots.count)
        for columns, figures in ((serving[1:], lengths), (started, -lengths), (paid, -1.0)):
            programme.put(across, columns, figures)
        within = programme.rows(slots.count)
        for columns, figures in ((paid, 1.0), (serving[:-1], -lengths), (started, -room)):
            programme.put(within, columns, figures)
        self._limit(device, serving, started, most)
        busy = programme.rows(slots.count)
        programme.put(busy, paid, -pace.fastest(begin - pace.carried, end))
        self._busy.append(busy)

    def _limit(self, device: DeviceClass, serving: Column, started: Column, most: Figures) -> None:
        """Devices that serve at a slot's beginning and those that start across all of it are no more than there are."""
        edges = self._slots.edges
        rows = self._programme.rows(self._slots.count, most=most)
        self._programme.put(rows, serving[:-1], 1.0)
        ends = np.searchsorted(edges[1:], edges[:-1] + device.start, side="right")
        pairs = [(row, slot) for row, end in enumerate(ends.tolist()) for slot in range(row, end)]
        if pairs:
            row, slot = np.array(pairs).T
            self._programme.put(rows[row], started[slot], 1.0)

    def add_kind(self, kind: Kind) -> None:
        """A kind of requests: what has arrived and is not yet due may wait; the rest is served, or left out."""
        programme, slots = self._programme, self._slots
        arrived = np.bincount(slots.first[kind.rows], kind.size, minlength=slots.count)
        due = np.bincount(slots.last[kind.rows], kind.size, minlength=slots.count)
        early = np.maximum((arrived - due).cumsum(), 0.0)
        early[-1] = 0.0
        waiting = programme.columns(slots.count, high=early)
        balance = programme.rows(slots.count, most=np.asarray(-arrived, np.float64))
        programme.put(balance, waiting, -1.0)
        programme.put(balance[1:], waiting[:-1], 1.0)
        used = np.flatnonzero(arrived + np.append(0.0, early[:-1]) > 0)
        largest = float(kind.size.max())
        cost = self._fines[kind.service] / self._unit / largest
        left = programme.columns(len(used), cost=cost)
        programme.put(balance[used], left, -1.0)
        self._left.append((kind.service, left, largest))
        for column, rate in zip(kind.columns.tolist(), kind.rate.tolist(), strict=True):
            served = programme.columns(len(used))
            programme.put(balance[used], served, -1.0)
            programme.put(self._busy[column][used], served, rate)

    def solved(self, able: Column, began: float, seconds: float) -> WholeBound:
        """The bound; `able` says which requests some class answers in time."""
        solution = self._programme.solve(gap=_GAP, seconds=seconds)
        lost = np.bincount(self._workload.trace.service[~able], minlength=len(SERVICES)).astype(np.float64)
        lowest = float(lost @ self._fines)
        score = lowest + max(solution.bound * self._unit * (1 - _MARGIN), 0.0)
        missed = self._missed(lost, solution)
        fined = penalty(self._workload, {name: None if share is None else 1 - share for name, share in missed.items()})
        return WholeBound(len(able), score, max(score - fined, 0.0), missed, solution.gap, time.perf_counter() - began)

    def _missed(self, lost: Figures, solution: Solution) -> dict[str, float | None]:
        """Shares of the services' requests that the solution leaves out, `lost` ones among them."""
        missed = lost.copy()
        for service, columns, largest in self._left:
            if solution.values is not None:
                missed[service] += float(solution.values[columns].sum()) / largest
        shares = zip(SERVICES, missed.tolist(), self._asked.tolist(), strict=True)
        return {name: min(count / asked, 1.0) if asked else None for name, count, asked in shares}


@dataclass(frozen=True, slots=True)
class Kind:
    """`rows` are numbers of requests, `columns` of classes. Shapes: `size` (rows,), `rate` (columns,).

    `lost` is the US dollars by which the kind may understate its requests' costs.
    """

    service: int
    rows: Column
    columns: Column
    size: Figures
    rate: Figures
    lost: float
    ratios: Figures

    @classmethod
    def of(cls, service: int, rows: Column, work: Figures, price: Figures) -> Kind:
        """The kind of these requests; `work` is seconds, shape (n, classes), infinite alike for all of them."""
        columns = np.flatnonzero(np.isfinite(work[rows[0]]))
        own = np.maximum(work[np.ix_(rows, columns)], _NONE)
        rate = own.mean(axis=0)
        size = (own / rate).min(axis=1)
        lost = float((own * price[columns]).min(axis=1).sum()) * (1 - size.mean())
        logs = np.log(own)
        return cls(service, rows, columns, size, rate, lost, logs - logs.mean(axis=1, keepdims=True))

    def split(self, work: Figures, price: Figures) -> list[Kind]:
        """Two kinds, divided at the median of the most varied ratio; only this one if all ratios are alike."""
        ratio = self.ratios[:, self.ratios.var(axis=0).argmax()]
        middle = np.median(ratio)
        less = ratio < middle if middle > ratio.min() else ratio <= middle
        if less.all():
            return [self]
        return [Kind.of(self.service, self.rows[part], work, price) for part in (less, ~less)]


_NONE = 1e-9
"""Seconds that count as none, so that ratios are defined."""


def kinds(workload: Workload, work: Figures, price: Figures, *, most: int) -> list[Kind]:
    """All requests that some class answers in time, in at most `most` kinds, or as many as the least needs."""
    trace = workload.trace
    able = np.isfinite(work)
    rows = np.flatnonzero(able.any(axis=1))
    keys = np.stack([trace.model[rows], trace.service[rows], able[rows] @ (1 << np.arange(work.shape[1]))], axis=1)
    found = [
        Kind.of(int(key[1]), rows[(keys == key).all(axis=1)], work, price) for key in np.unique(keys, axis=0).tolist()
    ]
    while found and len(found) < most:
        worst = max(range(len(found)), key=lambda number: found[number].lost)
        parts = found[worst].split(work, price)
        if len(parts) == 1:
            break
        found[worst : worst + 1] = parts
    return found
