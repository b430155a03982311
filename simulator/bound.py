"""What nobody can undercut: a linear programme's lower bound on the cost of answering all requests in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from simulator.fleet import SERVICES
from simulator.outcome import Summary
from simulator.traces import Column
from simulator.workload import Figures, Workload, alone_and_most_shared

NAME = "lp-bound"

WINDOW = 60.0
"""Seconds of a capacity window; longer for traces of more than two hours."""

_MOST_WINDOWS = 120
_BINS = 4
_PENALTY = 1e3

MICRO = 1e6
"""The programme counts micro-dollars: HiGHS's tolerances are absolute, and a device second costs a few hundred."""


@dataclass(frozen=True, slots=True)
class Bound:
    """US dollars at least; `served` is the share of each service's requests that the bound answers in time."""

    cost: float
    served: dict[str, float | None]

    def summary(self, requests: int) -> Summary:
        """As a row beside the policies."""
        return Summary(
            policy=NAME,
            requests=requests,
            attainment=self.served,
            cost_usd=self.cost,
            p50=None,
            p99=None,
            goodput=None,
            moves=0,
            utilisation={},
        )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Requests of one window, service and likeness taken together, as device seconds of their best class.

    Shapes: all (groups,), but `ratio` (groups, classes): device seconds on a class for each second of `mass`, at least.
    """

    window: Column
    until: Column
    mass: Column
    ratio: Figures


def lower_bound(workload: Workload) -> Bound:
    """The least cost of any schedule that answers every request in time that could be.

    Every request costs at least its device seconds in the fullest batch that the class allows, on some class that could
    answer it in time alone, at some time from its arrival to its deadline; classes have no more device seconds than
    their count gives; what they cannot fit costs nothing here. Starts, idle time,
    loads and whole devices are left out, so that no schedule costs less. Within a group, requests may be split, and
    count as if each had the lowest ratio of the group.
    """
    alone, least = alone_and_most_shared(workload)
    feasible = alone <= workload.trace.deadline[:, None]
    prices = np.array([device.usd_per_second for device in workload.fleet.classes.values()])
    seconds = np.where(feasible, least, math.inf)
    possible: Column = np.any(feasible, axis=1)
    span = float(workload.trace.arrival[-1])
    window = max(WINDOW, span / _MOST_WINDOWS)
    groups = _grouped(workload, seconds, prices, possible, window)
    service = workload.trace.service
    served = {
        name: float(possible[service == number].mean()) if (service == number).any() else None
        for number, name in enumerate(SERVICES)
    }
    counts = np.array([device.count for device in workload.fleet.classes.values()])
    return Bound(_solve(groups, prices, counts * window), served)


def _grouped(workload: Workload, seconds: Figures, prices: Figures, possible: Column, window: float) -> _Groups:
    trace = workload.trace
    rows = np.flatnonzero(possible)
    seconds = seconds[rows]
    best = (seconds * prices).argmin(axis=1)
    mass = seconds[np.arange(len(rows)), best]
    ratio = seconds / mass[:, None]
    arrived = (trace.arrival[rows] // window).astype(np.int64)
    finite = np.where(np.isfinite(ratio), ratio, 0.0).sum(axis=1)
    likeness = np.searchsorted(np.quantile(finite, np.arange(1, _BINS) / _BINS), finite)
    runs = np.isfinite(seconds) @ (1 << np.arange(seconds.shape[1]))
    keys = np.stack([arrived, trace.service[rows], best, runs, likeness], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    count = int(group.max()) + 1
    lowest = np.full((count, seconds.shape[1]), math.inf)
    np.minimum.at(lowest, group, ratio)
    begin, until = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.maximum.at(begin, group, arrived)
    after = int(trace.arrival[-1] // window) + 1
    due = np.minimum((trace.arrival[rows] + trace.deadline[rows]) // window, after)
    np.maximum.at(until, group, due.astype(np.int64))
    return _Groups(begin, until, np.bincount(group, weights=mass, minlength=count), lowest)


def _solve(groups: _Groups, prices: Figures, capacity: Figures) -> float:
    """Micro-dollars at least, as dollars. A variable is a group's mass on a class in a window; what is left is dear."""
    classes = len(prices)
    group, column, slot = _variables(groups)
    use = groups.ratio[group, column]
    cost = use * prices[column] * MICRO
    left = len(groups.mass)
    dear = np.full(left, cost.max() * _PENALTY)
    variables = len(cost) + left
    equal_rows = np.concatenate([group, np.arange(left)])
    equal = coo_matrix((np.ones(variables), (equal_rows, np.arange(variables))), shape=(left, variables))
    windows = int(groups.until.max()) + 1
    room = np.tile(capacity, windows)
    room[(int(groups.window.max()) + 1) * classes :] = use.max() * groups.mass.sum()  # time enough after the trace
    limit_rows = slot * classes + column
    limits = coo_matrix((use, (limit_rows, np.arange(len(cost)))), shape=(windows * classes, variables))
    found = linprog(
        np.concatenate([cost, dear]),
        A_eq=equal.tocsr(),
        b_eq=groups.mass,
        A_ub=limits.tocsr(),
        b_ub=room,
        method="highs",
    )
    assert found.success, found.message
    return float(found.x[: len(cost)] @ cost) / MICRO


def _variables(groups: _Groups) -> tuple[Column, Column, Column]:
    """Group, class and window of every variable; shapes (variables,)."""
    lengths = groups.until - groups.window + 1
    group = np.repeat(np.arange(len(lengths)), lengths)
    slot = np.arange(len(group)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + groups.window[group]
    able = np.isfinite(groups.ratio[group])
    row, column = np.nonzero(able)
    return group[row], column, slot[row]
