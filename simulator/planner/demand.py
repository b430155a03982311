"""What a workload asks of a fleet's classes, in device seconds a second, and whether its deadlines can be met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from simulator.fleet import SERVICES, Fleet
from simulator.timing import Timing
from simulator.traces.trace import Column
from simulator.traces.workload import Figures, Workload

WINDOW = 60.0
"""Seconds of the windows that demand is counted in; longer where a service has longer to answer."""

QUANTILE = 0.95
"""The quantile over those windows that a mix must serve."""


HURRY = 0.25
"""How a service's headroom shortens its deadline: a headroom of 16 halves it."""


class InfeasibleError(ValueError):
    """No mix of the fleet's instances can do what was asked; the text says what and by how much."""


def check_deadlines(workload: Workload, slo: Mapping[str, float]) -> None:
    """See that each service's share could be answered in time on an idle device of some class.

    Raises:
        InfeasibleError: for the first service of which it cannot, with what the fastest class needs.
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
    """What the workload's busiest windows ask: the devices that each group of requests keeps busy on each class alone.

    A group is alike in model, service and the classes that may run it. Shapes: (services,) to (groups, classes);
    infinite where a group may not run.

    A request costs its device seconds in the fullest batch in which it would still be in time.
    A group asks what the `QUANTILE` of its windows does, and at least its mean.
    A headroom of h asks h times that, and answers in deadline / h ** `HURRY`, or as fast as can be.
    Requests that no class could answer in time ask nothing.

    Raises:
        InfeasibleError: that is all of them.
    """
    times = headroom[workload.trace.service]
    work = _needed(workload, workload.trace.deadline / times**HURRY)
    rows = np.flatnonzero(np.isfinite(work).any(axis=1))
    if not len(rows):
        raise InfeasibleError("none of the requests could be answered in time, on any class")
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
    """Device seconds of each request where it is answered by `due`, else where it is by its deadline and soonest."""
    work, alone = _permitted(workload, _work(workload, due)), _permitted(workload, _alone(workload))
    fastest = alone.argmin(axis=1)
    late = ~np.isfinite(work).any(axis=1) & (alone.min(axis=1) <= workload.trace.deadline)
    work[late, fastest[late]] = alone[late, fastest[late]]
    return work


def _windows(workload: Workload) -> list[tuple[float, int]]:
    """Seconds of each service's windows, all of one length, and how many the trace has."""
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
    """Device seconds of each request in the fullest batch that is answered by `due`; infinite where none is."""
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
