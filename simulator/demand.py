"""What a workload demands of a fleet's classes, and the cheapest devices that carry it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simulator.fleet import SERVICES, Fleet
from simulator.workload import Figures, Workload, barred, figures_of


def prices(fleet: Fleet) -> dict[str, float]:
    """US dollars an hour for a device of each class that costs something by the hour."""
    return {name: 3600 * device.usd_per_second for name, device in fleet.classes.items() if device.usd_per_second}


DEMAND_WINDOW = 60.0
"""Seconds of the windows in which demand is counted; longer for a service with a longer deadline."""

QUANTILE = 0.95
"""The quantile over those windows that a mix must serve."""


DEADLINE_EXPONENT = 0.25
"""Exponent by which a service's headroom shortens its deadline: a headroom of 16 halves it."""


class InfeasibleError(ValueError):
    """No mix of the fleet's instances meets the requirements; the message says what is missing and by how much."""


def check_deadlines(workload: Workload, slo: Mapping[str, float]) -> None:
    """Check that each service's share could be answered in time on an idle device of some class.

    Raises:
        InfeasibleError: for the first service that cannot, with what the fastest class needs.
    """
    alone = _alone(workload)
    fastest, deadline = alone.min(axis=1), workload.trace.deadline
    for name, share in slo.items():
        rows = np.flatnonzero(workload.trace.service == SERVICES.index(name))
        possible = float((fastest[rows] <= deadline[rows]).mean()) if len(rows) else 1.0
        if possible >= share:
            continue
        tightness = fastest[rows] / np.minimum(deadline[rows], 1e300)
        row = rows[np.argsort(tightness, kind="stable")[math.ceil(share * len(rows) - 1e-9) - 1]]
        need = "no class that may run it does"
        if math.isfinite(fastest[row]):
            best = list(workload.fleet.classes)[int(alone[row].argmin())]
            need = f"the fastest class, {best}, needs {fastest[row]:.3g} s"
        raise InfeasibleError(
            f"{name} asks {share:g} within {deadline[row]:.3g} s, {need}; {possible:.3g} could be in time at most"
        )


def demand(workload: Workload, headroom: Figures) -> Figures:
    """The demand of the workload's busiest windows: devices that each group of requests keeps busy on each class alone.

    A group is equal in model, service and the classes that may run it. Shapes: (services,) to (groups, classes);
    infinite if a group may not run.

    A request costs its device seconds in the fullest batch in which it would still be in time.
    A group's demand is the `QUANTILE` over its windows, and at least its mean.
    A headroom of h multiplies that by h, and requires answers in deadline / h ** `DEADLINE_EXPONENT`, or as fast as
    possible.
    Requests that no class could answer in time are left out.

    Raises:
        InfeasibleError: that applies to all requests.
    """
    times = headroom[workload.trace.service]
    work = _needed(workload, workload.trace.deadline / times**DEADLINE_EXPONENT)
    rows = np.flatnonzero(np.isfinite(work).any(axis=1))
    if not len(rows):
        raise InfeasibleError("no request could be answered in time on any class")
    work = work[rows] * times[rows, None]
    model, service = workload.trace.model[rows].astype(np.int64), workload.trace.service[rows].astype(np.int64)
    pattern = np.isfinite(work) @ (1 << np.arange(work.shape[1]))
    keys, group = np.unique(np.stack([service, model, pattern], axis=1), axis=0, return_inverse=True)
    windows = _windows(workload)
    load = [
        _busiest(workload.trace.arrival[rows[group == number]], work[group == number], *windows[int(key[0])])
        for number, key in enumerate(keys)
    ]
    return np.array(load)


def _needed(workload: Workload, due: Figures) -> Figures:
    """Device seconds of each request if answered by `due`; else, if it meets its deadline, on its fastest class."""
    work, alone = _work(workload, due), _alone(workload)
    fastest = alone.argmin(axis=1)
    late = ~np.isfinite(work).any(axis=1) & (alone.min(axis=1) <= workload.trace.deadline)
    work[late, fastest[late]] = alone[late, fastest[late]]
    return work


def _windows(workload: Workload) -> list[tuple[float, int]]:
    """Length in seconds and number of each service's windows, which divide the trace evenly."""
    span = max(float(workload.trace.arrival[-1]), 1.0)
    found = []
    for number in range(len(SERVICES)):
        deadline = workload.trace.deadline[workload.trace.service == number]
        length = max(DEMAND_WINDOW, float(np.median(deadline))) if len(deadline) else DEMAND_WINDOW
        count = max(int(span // length), 1)
        found.append((span / count, count))
    return found


def _busiest(arrival: Figures, work: Figures, window: float, windows: int) -> Figures:
    """Devices kept busy on each class at the quantile of the windows; shapes (n,), (n, classes) to (classes,)."""
    slot = np.minimum((arrival // window).astype(np.int64), windows - 1)
    able = np.isfinite(work[0])
    load = np.full(work.shape[1], math.inf)
    for column in np.flatnonzero(able):
        busy = np.bincount(slot, weights=work[:, column], minlength=windows) / window
        load[column] = max(float(np.quantile(busy, QUANTILE)), float(busy.mean()))
    return load


def _alone(workload: Workload) -> Figures:
    """Seconds of each request on an idle device of each class; infinite where it may not run."""
    return figures_of(workload.trace, workload.fleet, workload.trace.output)[0]


def _work(workload: Workload, due: Figures) -> Figures:
    """Device seconds of each request in the fullest batch that is answered by `due`; infinite if there is none."""
    trace, fleet = workload.trace, workload.fleet
    work = np.full((len(trace), len(fleet.classes)), math.inf)
    for number, name in enumerate(trace.models):
        rows = np.flatnonzero(trace.model == number)
        size, output = trace.size[rows].astype(np.float64), trace.output[rows].astype(np.float64)
        for column, (device, timing) in enumerate(zip(fleet.classes.values(), fleet.timings[name], strict=True)):
            if timing is None:
                continue
            most = device.max_batch
            for batch in sorted({*(1 << power for power in range(most.bit_length())), most}):  # 1, 2, 4, … and the most
                seconds = timing.answer(size, output, batch)
                shared = np.where(seconds <= due[rows], seconds / batch, math.inf)
                work[rows, column] = np.minimum(work[rows, column], shared)
    work[barred(trace, fleet)] = math.inf
    return work


_INFEASIBLE = 2
"""`milp`'s status for a programme without a solution."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How many devices to buy of each class that has a price, in the order of `prices`, which are for one, by class."""

    prices: Mapping[str, float] = field(compare=False)
    counts: tuple[int, ...]

    @property
    def usd_per_hour(self) -> float:
        """Their total cost."""
        return sum(number * price for number, price in zip(self.counts, self.prices.values(), strict=True))

    def devices(self) -> dict[str, int]:
        """Devices of each class that has any."""
        return {name: number for name, number in zip(self.prices, self.counts, strict=True) if number}

    def changed(self, position: int, by: int) -> Mix:
        """The mix with `by` more devices of one class."""
        counts = (*self.counts[:position], self.counts[position] + by, *self.counts[position + 1 :])
        return Mix(self.prices, counts)


def cheapest(prices: Mapping[str, float], load: Figures, counts: Mapping[str, int]) -> Mix:
    """The mix that carries every group of requests at the least cost per hour.

    A group may be split among the classes on which its load is finite; there is at least one.
    A class carries at most the load of the devices bought for it.

    Args:
        prices: of a device of each class that can be bought.
        load: shape (groups, classes): devices that a group keeps busy on each class.
        counts: the most devices of each class, in the order of `load`'s columns.

    Raises:
        InfeasibleError: the counts do not allow it.
    """
    ceilings = np.array([number if name in prices else 0 for name, number in counts.items()])
    found = _solve([prices.get(name, 0.0) for name in counts], load, ceilings, further=0.0)
    if found is None:
        beyond = _solve([0.0] * len(counts), load, ceilings, further=math.inf)
        assert beyond is not None, "with unlimited devices there is always a mix"
        lacking = zip(counts.items(), beyond[len(counts) :], strict=True)
        said = ", ".join(f"{name} has at most {most}, {number} more" for (name, most), number in lacking if number)
        raise InfeasibleError(f"the fleet has too few devices: {said} would do")
    bought = dict(zip(counts, found, strict=False))
    return Mix(prices, tuple(bought[name] for name in prices))


def _solve(prices: Sequence[float], load: Figures, ceilings: Figures, *, further: float) -> list[int] | None:
    """Whole numbers of devices of each class, then of further ones, at most `further`; None if there is no solution.

    Variables: devices of each class, its further devices, which cost 1 each, shares of each group on each of its
    classes.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # now, not above: it is slow to import

    group, column = np.nonzero(np.isfinite(load))
    classes, shares = len(prices), len(group)
    share = 2 * classes + np.arange(shares)
    served = np.zeros((len(load), 2 * classes + shares))
    served[group, share] = 1
    carried = np.zeros((classes, 2 * classes + shares))
    carried[:, : 2 * classes] = np.tile(-np.eye(classes), 2)
    carried[column, share] = load[group, column]
    answer = milp(
        np.concatenate([prices, np.ones(classes), np.zeros(shares)]),
        integrality=np.arange(2 * classes + shares) < 2 * classes,
        bounds=Bounds(0, np.concatenate([ceilings, np.full(classes, further), np.ones(shares)])),
        constraints=[LinearConstraint(served, 1, 1), LinearConstraint(carried, -np.inf, 0)],
        options={"mip_rel_gap": 0},
    )
    if answer.status == _INFEASIBLE:
        return None
    assert answer.success, answer.message
    return [round(float(number)) for number in answer.x[: 2 * classes]]
