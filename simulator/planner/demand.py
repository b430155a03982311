"""What a workload demands of a fleet's classes, in device seconds per second, and whether its deadlines can be met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from simulator.fleet import SERVICES, Fleet
from simulator.timing import Timing
from simulator.traces.trace import Column
from simulator.traces.workload import Figures, Workload

WINDOW = 60.0
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
    alone = _permitted(workload, _alone(workload))
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
    work, alone = _permitted(workload, _work(workload, due)), _permitted(workload, _alone(workload))
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
        length = max(WINDOW, float(np.median(deadline))) if len(deadline) else WINDOW
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


def _permitted(workload: Workload, figures: Figures) -> Figures:
    """The figures, infinite on spot classes for services that must not be interrupted."""
    fleet = workload.fleet
    spot = np.array([device.spot for device in fleet.classes.values()])
    firm = np.array([not service.preemptible for service in fleet.services])[workload.trace.service]
    return np.where(firm[:, None] & spot, math.inf, figures)


def _alone(workload: Workload) -> Figures:
    """Seconds of each request on an idle device of each class."""
    alone = np.full((len(workload), len(workload.fleet.classes)), math.inf)
    for rows, column, timing in _runs(workload):
        alone[rows, column] = timing.answer(*_sizes(workload, rows), 1)
    return alone


def _work(workload: Workload, due: Figures) -> Figures:
    """Device seconds of each request in the fullest batch that is answered by `due`; infinite if there is none."""
    work = np.full((len(workload), len(workload.fleet.classes)), math.inf)
    devices = list(workload.fleet.classes.values())
    for rows, column, timing in _runs(workload):
        size, output = _sizes(workload, rows)
        for batch in _batches(devices[column].max_batch):
            seconds = timing.answer(size, output, batch)
            shared = np.where(seconds <= due[rows], seconds / batch, math.inf)
            work[rows, column] = np.minimum(work[rows, column], shared)
    return work


def _batches(most: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _sizes(workload: Workload, rows: Column) -> tuple[Figures, Figures]:
    return workload.trace.size[rows].astype(np.float64), workload.trace.output[rows].astype(np.float64)


def _runs(workload: Workload) -> Iterator[tuple[Column, int, Timing]]:
    """The requests of each model, with the classes that run it."""
    fleet: Fleet = workload.fleet
    for number, name in enumerate(workload.trace.models):
        rows = np.flatnonzero(workload.trace.model == number)
        for column, timing in enumerate(fleet.timings[name]):
            if timing is not None:
                yield rows, column, timing
