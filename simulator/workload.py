"""A trace prepared for a fleet: every request has a service, a deadline, a level, and figures for each class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.decide.classify import BACKGROUND, LATENCY_CRITICAL, level_of
from simulator.fleet import Fleet
from simulator.traces import COLUMNS, UNSET, Column, Trace
from tasks.history import PRIORITIES

TOGETHER = 8
"""Batch size at which work is counted (`b*` of the cost model), if that many fit."""

CHUNK = 16_384

Figures = NDArray[np.float64]

Row = tuple[float, ...]
"""One figure per class."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace in which every request has its terms. `level` is the queue's, 0 first; `deadline` may be infinite."""

    trace: Trace
    fleet: Fleet
    level: Column

    def __len__(self) -> int:
        return len(self.trace)

    def part(self, rows: slice | Column, **columns: Any) -> Workload:
        """Some of the requests, as `Trace.part`, with other `columns` where given."""
        return replace(self, trace=replace(self.trace.part(rows), **columns), level=self.level[rows])

    def merged(self, other: Workload) -> Workload:
        """These requests, and those of another workload of the same models and tenants, in order of arrival."""
        arrival = np.concatenate([self.trace.arrival, other.trace.arrival])
        order = np.argsort(arrival, kind="stable")
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(self.trace, name), getattr(other.trace, name)])[order] for name in COLUMNS
        }
        level = np.concatenate([self.level, other.level])[order]
        return replace(self, trace=replace(self.trace, **columns), level=level)


@dataclass(slots=True, eq=False)
class SimulatedJob:
    """A request in the simulation, with the figures that a policy may use."""

    index: int
    arrival: float
    model: int
    size: int
    output: int
    deadline: float
    service: int
    level: int
    tenant: str
    predicted: int
    """Tokens of its answer, as policies know them."""
    # By class, from the predicted output; infinite if it cannot run
    alone: Row
    """Seconds until the answer on an idle device."""
    work: Row
    """Device seconds that it costs in a batch."""
    crowding: Row
    """Seconds that each further request in its batch adds."""
    # What changes while it is played
    due: float = field(init=False)
    queued: float = field(init=False)
    """When it joined its queue."""
    density: float = 0.0
    """How many devices it occupies in its class until it is due."""
    written: float = 0.0
    """Tokens that earlier runs have left."""
    cuts: int = 0
    """How often it yielded."""

    def __post_init__(self) -> None:
        self.due, self.queued = self.arrival + self.deadline, self.arrival

    def tokens_left(self, written: float) -> float:
        """Tokens that are yet to come after so many, as predicted."""
        return max(self.predicted - written, 1.0)


def prepare(trace: Trace, fleet: Fleet) -> Workload:
    """Give every request its level; it has its service and its deadline."""
    priority = np.where(trace.priority == UNSET, PRIORITIES.index("normal"), trace.priority)
    return Workload(trace, fleet, _levels(trace.deadline, priority))


def _levels(deadline: Figures, priority: Column) -> Column:
    """The product's levels; a deadline matters only by which of its bounds it is under."""
    bounds = np.array([LATENCY_CRITICAL, BACKGROUND])
    band = np.searchsorted(bounds, deadline)
    examples = (LATENCY_CRITICAL, BACKGROUND, None)
    table = np.array([[level_of(example, name) for name in PRIORITIES] for example in examples], np.int8)
    levels: Column = table[band, priority]
    return levels


def alone_and_work(trace: Trace, fleet: Fleet, output: Column) -> tuple[Figures, Figures, Figures]:
    """`alone`, `work` and `crowding` of jobs with outputs of these lengths; shapes (n, classes)."""
    shape = (len(trace), len(fleet.classes))
    alone, work, crowding = (np.full(shape, math.inf) for _ in range(3))
    for number, name in enumerate(trace.models):
        rows = np.flatnonzero(trace.model == number)
        size, tokens = trace.size[rows].astype(np.float64), output[rows].astype(np.float64)
        for column, (device, timing) in enumerate(zip(fleet.classes.values(), fleet.timings[name], strict=True)):
            if timing is None:
                continue
            together = min(TOGETHER, device.max_batch)
            alone[rows, column] = timing.answer(size, tokens, 1)
            crowded = timing.answer(size, tokens, together)
            work[rows, column] = crowded / together
            crowding[rows, column] = (crowded - alone[rows, column]) / max(together - 1, 1)
    return alone, work, crowding


def figures_of(trace: Trace, fleet: Fleet, output: Column) -> tuple[Figures, Figures, Figures]:
    """`alone_and_work` of requests whose services are known: only preemptible work may run on spot devices."""
    figures = alone_and_work(trace, fleet, output)
    never = barred(trace, fleet)
    for figure in figures:
        figure[never] = math.inf
    return figures


def barred(trace: Trace, fleet: Fleet) -> Column:
    """Which requests may not run on which classes, under any policy; shape (n, classes)."""
    spot = np.array([device.spot for device in fleet.classes.values()])
    firm = ~np.array(fleet.preemptible)
    both: Column = firm[trace.service][:, None] & spot[None, :]
    return both


def jobs(workload: Workload) -> Iterator[SimulatedJob]:
    """The requests in order of arrival, made in chunks."""
    trace = workload.trace
    for start in range(0, len(trace), CHUNK):
        part = slice(start, start + CHUNK)
        piece = trace.part(part)
        figures = figures_of(piece, workload.fleet, piece.predicted)
        yield from map(
            SimulatedJob,
            range(start, start + len(piece)),
            piece.arrival.tolist(),
            piece.model.tolist(),
            piece.size.tolist(),
            piece.output.tolist(),
            piece.deadline.tolist(),
            piece.service.tolist(),
            workload.level[part].tolist(),
            [trace.tenants[number] for number in piece.tenant.tolist()],
            piece.predicted.tolist(),
            *(list(map(tuple, figure.tolist())) for figure in figures),
        )
